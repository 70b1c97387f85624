from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres.kernels import reference
from fastres.kernels.aot import compile_launch, fits
from fastres.kernels.aot.cases import CompileCase, chain_cases
from fastres.kernels.bottleneck_chain import bottleneck_chain, chain_launch, chain_shape
from fastres.kernels.conv2d import conv2d
from fastres.kernels.cost import Target
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.tiles import ChainTile
from fastres.kernels.tiles.chain import ChainShape, chain_candidates

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FOUR_WARPS = ChainTile((2, 8, 8), 4, 3, 2)
EIGHT_WARPS = ChainTile((8, 4, 4), 8, 3, 2)
SMALL = ChainTile((1, 4, 4), 4, 3, 1)


@dataclass(frozen=True)
class Case:
    name: str
    shape: ChainShape
    dtype: torch.dtype = HALF
    bias: bool = True
    activation: ActivationKind | None = "relu"
    tile: ChainTile | None = None
    odd_shortcut: bool = False  # its last row and column are not read


CASES = (
    Case("layer1.0", ChainShape(3, 8, 8, 64, 256, 64, projected=64), tile=FOUR_WARPS),
    Case("layer1.0-bf16", ChainShape(2, 8, 8, 64, 256, 64, projected=64), BF16),
    Case("layer1.1", ChainShape(3, 12, 9, 64, 256, 64), tile=FOUR_WARPS),
    Case("layer1.1-bf16", ChainShape(2, 8, 8, 64, 256, 64), BF16),
    Case("layer1.2-v1.5", ChainShape(2, 8, 8, 64, 256, 128)),
    Case("layer1.2-v1", ChainShape(2, 8, 8, 64, 256)),
    Case("layer2.0-v1.5", ChainShape(3, 8, 8, 128, 512, 128, 256, 2, 2)),
    Case("layer2.0-v1", ChainShape(2, 4, 4, 128, 512, 128, 256, 1, 2)),
    Case("layer2.1", ChainShape(9, 4, 4, 128, 512, 128), tile=EIGHT_WARPS),
    Case("layer2.1-bf16", ChainShape(1, 4, 4, 128, 512, 128), BF16),
    Case("layer2.3-v1.5", ChainShape(2, 4, 4, 128, 512, 256)),
    Case("wide-layer1.0", ChainShape(1, 4, 4, 128, 256, 128, projected=64)),
    Case("one-pixel", ChainShape(1, 1, 1, 64, 64, 64), tile=SMALL),
    Case("odd-sizes", ChainShape(5, 5, 7, 64, 192, 64), tile=SMALL),
    Case("odd-output-stride-2", ChainShape(3, 10, 6, 64, 128, 0, 64, 2, 2), tile=SMALL),
    Case("odd-x", ChainShape(2, 4, 3, 64, 128, 64, 64, 1, 2), odd_shortcut=True),
    Case("stride-2-residual", ChainShape(2, 8, 8, 64, 128, 64, stride=2)),
    Case("no-bias-no-activation", ChainShape(1, 4, 4, 64, 64, 64), bias=False, activation=None),
    Case("silu", ChainShape(1, 4, 4, 64, 64, 64), activation="silu"),
    Case("batch-0", ChainShape(0, 8, 8, 64, 256, 64)),
)


@pytest.fixture(autouse=True)
def needs_boxes(request: pytest.FixtureRequest) -> None:
    """Skips on a GPU without the copy engine's boxes."""
    if "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda":
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs sm_90 or newer")


def operands(case: Case, device: torch.device, embed: Callable[..., torch.Tensor]) -> Any:
    """a, w2, w3, shortcut, w1 and the biases by name, with sums of a size near one."""
    random = torch.Generator().manual_seed(0)
    shape = case.shape

    def draw(*sizes: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        values = torch.randn(sizes, generator=random) * scale
        return embed(values.to(dtype).to(device))

    def bias(size: int) -> torch.Tensor | None:
        return draw(size, dtype=FP32) if case.bias and size else None

    step, depth = shape.shortcut_stride, shape.mid + shape.projected
    sides = [step * side - int(case.odd_shortcut) for side in (shape.p, shape.q)]
    tensors = {
        "a": draw(shape.n, shape.h, shape.w, shape.mid),
        "w2": draw(shape.mid, 3, 3, shape.mid, scale=(9 * shape.mid) ** -0.5),
        "w3": draw(shape.ko, 1, 1, depth, scale=depth**-0.5),
        "shortcut": draw(shape.n, *sides, shape.projected or shape.ko),
    }
    if shape.next_mid:
        tensors["w1"] = draw(shape.next_mid, 1, 1, shape.ko, scale=shape.ko**-0.5)
    biases = {"b2": bias(shape.mid), "b3": bias(shape.ko), "b1": bias(shape.next_mid)}
    return tensors | biases


def options(case: Case) -> dict[str, Any]:
    return {
        "stride": case.shape.stride,
        "shortcut_stride": case.shape.shortcut_stride,
        "activation": case.activation,
        "tile": case.tile,
    }


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    activation: ActivationKind | None,
    stride: int = 1,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference of one convolution, NHWC in and out, computed in `dtype`."""
    x, weight = (t.cpu().to(dtype).permute(0, 3, 1, 2) for t in (x, weight))
    y = reference.conv2d(
        x,
        weight,
        None if bias is None else bias.cpu().to(dtype),
        stride=(stride, stride),
        padding=(weight.shape[2] // 2, weight.shape[3] // 2),
        residual=None if residual is None else residual.to(dtype).permute(0, 3, 1, 2),
        activation=activation,
    )
    return y.permute(0, 2, 3, 1)


def meaning(case: Case, tensors: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """out, computed in `dtype` by separate convolutions."""
    shape, act = case.shape, case.activation
    b = conv(tensors["a"], tensors["w2"], tensors["b2"], dtype, act, shape.stride)
    conv3, projection = tensors["w3"].split([shape.mid, shape.projected], dim=3)
    residual = tensors["shortcut"].cpu()
    if shape.projected:
        residual = conv(residual, projection, None, dtype, None, shape.shortcut_stride)
    return conv(b, conv3, tensors["b3"], dtype, act, residual=residual)


def outputs(case: Case, poisoned: Callable[..., torch.Tensor], device: torch.device) -> Any:
    pixels = (case.shape.n, case.shape.p, case.shape.q)
    out = poisoned((*pixels, case.shape.ko), case.dtype, device)
    if not case.shape.next_mid:
        return out, None
    return out, poisoned((*pixels, case.shape.next_mid), case.dtype, device)


def check(case: Case, tensors: Any, device: torch.device, poisoned: Any, assert_parity: Any) -> Any:
    """Runs the chain and compares out, and a_next with what w1 makes of the out that was written.

    So each is one step away from its oracle, and the interpreter's bf16, which cuts off, adds up
    no further than in one kernel.
    """
    out, a_next = outputs(case, poisoned, device)
    results = bottleneck_chain(**tensors, **options(case), out=out, a_next=a_next)
    assert results[0] is out and results[1] is a_next
    dtypes = (torch.float64, case.dtype)
    assert_parity(out, *(meaning(case, tensors, dtype) for dtype in dtypes))
    if a_next is not None:
        last = [conv(out, tensors["w1"], tensors["b1"], dtype, case.activation) for dtype in dtypes]
        assert_parity(a_next, *last)
    return out, a_next


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, device, guarded, poisoned, assert_parity):
    tensors = operands(case, device, guarded)
    check(case, tensors, device, poisoned, assert_parity)


@pytest.mark.interpret
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_geometry_and_tile(data, guarded, poisoned, assert_parity):
    stride, small, side = data.draw(st.integers(1, 2)), st.integers(1, 5), st.integers(1, 9)
    projected = data.draw(st.sampled_from([0, 64, 128]))
    shape = ChainShape(
        data.draw(small),
        stride * data.draw(side),
        stride * data.draw(side),
        mid=64,
        ko=64 * data.draw(st.integers(1, 3)),
        next_mid=data.draw(st.sampled_from([0, 64, 128])),
        projected=projected,
        stride=stride,
        shortcut_stride=data.draw(st.integers(1, 2)) if projected else 1,
    )
    tile = data.draw(st.sampled_from(chain_candidates(shape, 2, Target.typical(90))))
    case, device = Case("any", shape, tile=tile), torch.device("cpu")
    check(case, operands(case, device, guarded), device, poisoned, assert_parity)


@pytest.mark.parametrize("name", ["layer1.1", "layer2.1"])
def test_equals_three_kernels(name, device, guarded):
    """Roundings are the same; sums in another order move a few values by one step."""
    case = next(case for case in CASES if case.name == name)
    tensors = operands(case, device, guarded)
    out, a_next = bottleneck_chain(**tensors, **options(case))
    b = conv2d(tensors["a"], tensors["w2"], tensors["b2"], padding=(1, 1), activation="relu")
    residual = tensors["shortcut"]
    y = conv2d(b, tensors["w3"], tensors["b3"], residual=residual, activation="relu")
    for got, want in (
        (out, y),
        (a_next, conv2d(y, tensors["w1"], tensors["b1"], activation="relu")),
    ):
        assert (got != want).float().mean() < 0.02
        distance = (got.float() - want.float()).abs()
        assert torch.all(distance <= 2**-9 * want.float().abs().clamp(min=1.0))


def test_nan_and_infinity_spread_as_in_pytorch(device, guarded, poisoned, assert_parity):
    case = Case("nan", ChainShape(2, 6, 6, 64, 64, 64), tile=FOUR_WARPS)
    tensors = operands(case, device, guarded)
    tensors["a"][0, 2, 3, 5] = float("nan")
    tensors["shortcut"][1, 0, 0, 7] = float("inf")
    out, a_next = check(case, tensors, device, poisoned, assert_parity)
    assert out.isnan().sum() == 9 * 64 and a_next.isnan().sum() == 9 * 64
    assert out[1, 0, 0, 7].isinf() and a_next[1, 0, 0].isinf().any()


def test_allocates_its_outputs(device):
    shape = ChainShape(1, 4, 4, 64, 64, 64)
    tensors = operands(Case("own-outputs", shape), device, lambda x: x)
    out, a_next = bottleneck_chain(**tensors)
    assert out.shape == (1, 4, 4, 64) == a_next.shape and out.is_contiguous()
    assert (
        out.dtype == a_next.dtype == HALF and out.device.type == a_next.device.type == device.type
    )


def zeros(*sizes: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.zeros(sizes, dtype=dtype)


GOOD = {
    "a": zeros(1, 6, 8, 64),
    "w2": zeros(64, 3, 3, 64),
    "w3": zeros(128, 1, 1, 64),
    "shortcut": zeros(1, 6, 8, 128),
    "w1": zeros(64, 1, 1, 128),
}
PROJECTED = {"w3": zeros(128, 1, 1, 128), "shortcut": zeros(1, 6, 8, 64)}
WIDE = {"a": zeros(1, 6, 8, 256), "w2": zeros(256, 3, 3, 256), "w3": zeros(128, 1, 1, 256)}
UNALIGNED = zeros(1 + 6 * 8 * 64)[1:].view(1, 6, 8, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": GOOD["a"][0]}, r"a has shape \[6, 8, 64\], expected \[N, H, W, C\]"),
        ({"a": GOOD["a"].float()}, "a has dtype torch.float32, expected one of"),
        ({"a": GOOD["a"].permute(0, 3, 1, 2)}, "a has stride 64 in its last dimension"),
        ({"a": zeros(1, 6, 16, 64)[:, :, ::2]}, "a has strides .* expected it contiguous"),
        ({"a": UNALIGNED}, "a starts at 0x.*, expected a 16-byte step"),
        ({"w2": zeros(64, 1, 1, 64)}, r"w2 has shape .*, expected \[64, 3, 3, 64\]"),
        ({"w2": zeros(64, 576)}, r"w2 has shape \[64, 576\], expected \[K, R, S, C\]"),
        ({"w3": zeros(128, 1, 1, 32)}, "w3 has shape .*, expected at least a's 64 channels"),
        ({"w3": zeros(128, 1, 1, 96)}, "projected is 32, expected a power of two of at least 64"),
        ({"w3": zeros(96, 1, 1, 64)}, "out has 96 channels, expected a multiple of 64"),
        ({"w3": zeros(128, 3, 3, 64)}, r"w3 has shape .*, expected \[128, 1, 1, 64\]"),
        ({"shortcut": zeros(1, 6, 8, 64)}, r"shortcut has .*, expected \[1, 6, 8, 128\]"),
        (PROJECTED | {"shortcut_stride": 2}, r"shortcut has .*, expected \[1, 12, 16, 64\]"),
        ({"w1": zeros(96, 1, 1, 128)}, "next_mid is 96, expected a power of two"),
        ({"w1": zeros(64, 1, 1, 64)}, r"w1 has shape .*, expected \[64, 1, 1, 128\]"),
        ({"w1": GOOD["w1"].to("meta")}, "w1 is on meta, expected cpu"),
        ({"b2": zeros(64, dtype=torch.float64)}, "b2 has dtype torch.float64, expected"),
        ({"b3": zeros(64)}, r"b3 has shape \[64\], expected \[128\]"),
        ({"w1": None, "b1": zeros(64)}, "b1 is given without w1"),
        ({"w1": None, "a_next": zeros(1, 6, 8, 64)}, "w1 and a_next go together"),
        ({"out": zeros(1, 6, 8, 64)}, r"out has shape .*, expected \[1, 6, 8, 128\]"),
        ({"stride": 3}, "stride is 3 and shortcut_stride 1, expected each to be 1 or 2"),
        ({"shortcut_stride": 2}, "shortcut_stride is 2 with a residual"),
        ({"a": zeros(1, 5, 8, 64), "stride": 2}, "pairs of rows and columns; 5x8 is odd"),
        (WIDE, r"cannot be chained: the 3x3 has 256 channels; only \(64, 128\) are chained"),
        ({"tile": ChainTile((16, 8, 8), 4, 3, 2)}, "tile 16x8x8 w4 s3/2 does not fit"),
        ({"a": zeros(1, 0, 8, 64)}, "a size is zero"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        bottleneck_chain(**(GOOD | arguments))


def test_a_launch_needs_a_batch_and_a_target_that_moves_boxes():
    tensors = {
        name: tensor[:0] if name in ("a", "shortcut") else tensor for name, tensor in GOOD.items()
    }
    biases, out = (None, None, None), zeros(0, 6, 8, 128)
    operands = (*tensors.values(), *biases, out, zeros(0, 6, 8, 64))
    shape = chain_shape(tensors["a"], tensors["w2"], tensors["w3"], tensors["w1"])
    with pytest.raises(ValueError, match="the batch is 0, expected at least 1"):
        chain_launch(*operands, shape=shape, target=Target.typical(90))
    with pytest.raises(ValueError, match="sm_80 has no copy engine for boxes"):
        chain_launch(*operands, shape=shape, target=Target.typical(80))


# ---------------------------------------------------------------- machine code, without a GPU


@pytest.mark.compile
@pytest.mark.parametrize("case", list(chain_cases(90)), ids=lambda case: case.name)
def test_machine_code(case):
    facts = compile_launch(case.launch, 90)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0)
    assert fits(facts, 90)
    assert facts.shared_bytes <= bound(case)
    assert facts.count("HGMMA") > 0 and facts.count("HMMA") == 0
    assert facts.count("UTMALDG") > 0 and facts.count("UTMASTG") > 0


def bound(case: CompileCase) -> int:
    """What the tile says of the shared memory."""
    numbers, a = case.launch.constants, case.launch.arguments["a_desc"].base
    box = (numbers["BOX_N"], numbers["BOX_P"], numbers["BOX_Q"])
    stages = (numbers["CONV_STAGES"], numbers["CHUNK_STAGES"])
    tile = ChainTile(box, case.launch.num_warps, *stages, numbers["CHUNK"])
    sizes = (numbers["MID"], numbers["KO"], numbers["NEXT_MID"], numbers["PROJECTED"])
    return tile.shared_bytes(ChainShape(1, 8, 8, *sizes), a.element_size())


@pytest.mark.compile
@pytest.mark.parametrize("sm", [100, 120])
@pytest.mark.parametrize("name", ["layer1.1", "layer2.1"])
def test_newer_targets(sm, name):
    case = next(case for case in chain_cases(sm) if case.name == f"{name}.chain-b256-fp16")
    facts = compile_launch(case.launch, sm)
    # Triton 3.6 keeps addresses of the epilogue in local memory on sm_120, later versions do not
    older = triton.__version__.startswith("3.6.")
    assert max(facts.spill_stores, facts.spill_loads) <= (96 if sm == 120 and older else 0)
    assert fits(facts, sm)
    assert facts.count("UTMALDG") > 0
