from dataclasses import dataclass

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.aot import compile_launch, fits
from fastres.kernels.aot.cases import elementwise_cases
from fastres.kernels.elementwise import add_act, elementwise, elementwise_cost
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.tiles import PoolTile

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, ...] = (2, 5, 7, 40)
    dtype: torch.dtype = HALF
    scale: int = 0  # dimensions: 0 for none, 1 for [C], 2 for [N, C]
    shift: int = 0
    residual: bool = False
    activation: ActivationKind | None = None
    operand_dtype: torch.dtype = FP32
    tile: PoolTile | None = None


CASES = (
    Case("add-relu", (2, 7, 7, 64), residual=True, activation="relu"),
    Case("add", residual=True),
    Case("add-bf16", dtype=BF16, residual=True, activation="relu"),
    Case("add-fp32", dtype=FP32, residual=True),
    Case("add-matrix", (33, 20), residual=True),
    Case("batch-norm", scale=1, shift=1, activation="relu"),
    Case("batch-norm-bf16", dtype=BF16, scale=1, shift=1, activation="relu"),
    Case("scale-half", scale=1, operand_dtype=HALF),
    Case("shift", shift=1),
    Case("squeeze-excite", (3, 4, 5, 24), scale=2, operand_dtype=HALF),
    Case("squeeze-excite-block", (3, 4, 5, 24), scale=2, residual=True, activation="relu"),
    Case("everything", (3, 4, 5, 21), scale=2, shift=2, residual=True, activation="silu"),
    Case("mixed", scale=1, shift=2, tile=PoolTile(8, 16, 1)),
    *(Case(kind, activation=kind) for kind in ("relu", "silu", "sigmoid", "gelu", "hardswish")),
    Case("one-element", (1, 1, 1, 1), activation="relu"),
    Case("batch-0", (0, 4, 4, 16), scale=2, residual=True),
)


def operands(case: Case, device: torch.device, embed) -> dict[str, torch.Tensor | None]:
    random = torch.Generator().manual_seed(0)

    def draw(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return embed(torch.randn(sizes, generator=random).to(dtype).to(device))

    sizes = {0: None, 1: case.x[-1:], 2: (case.x[0], case.x[-1])}
    per_channel = {"scale": sizes[case.scale], "shift": sizes[case.shift]}
    return {
        "x": draw(case.x, case.dtype),
        **{name: size and draw(size, case.operand_dtype) for name, size in per_channel.items()},
        "residual": draw(case.x, case.dtype) if case.residual else None,
    }


def meaning(case: Case, given: dict[str, torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
    def seen(name: str) -> torch.Tensor | None:
        v = given[name]
        if v is None:
            return None
        v = v.cpu().to(dtype)
        return v[:, None, None, :] if name != "residual" and v.ndim == 2 else v

    y = given["x"].cpu().to(dtype)
    y = y if seen("scale") is None else y * seen("scale")
    y = y if seen("shift") is None else y + seen("shift")
    y = y if seen("residual") is None else y + seen("residual")
    return y if case.activation is None else reference.activation(y, case.activation)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_pytorch(case, device, guarded, poisoned, assert_parity):
    given = operands(case, device, guarded)
    oracle = meaning(case, given, torch.float64)
    out = poisoned(oracle.shape, case.dtype, device)
    assert elementwise(**given, activation=case.activation, out=out, tile=case.tile) is out
    assert_parity(out, oracle, meaning(case, given, FP32).to(case.dtype))


def test_in_place(device):
    x, r = torch.randn(2, 4, 4, 16, device=device), torch.randn(2, 4, 4, 16, device=device)
    expected = (x + r).relu()
    assert add_act(x, r, "relu", out=x) is x and torch.equal(x, expected)


def test_reads_strided_operands(device, guarded):
    wide = guarded(torch.randn(2, 8, 8, 24).to(device))
    x, r = wide[:, ::2, 1::2, 8:], wide[:, 4:, ::2, :16]
    assert torch.equal(add_act(x, r), x + r)
    assert torch.equal(
        elementwise(wide[0, 0, ::2, 3:9], activation="relu"), wide[0, 0, ::2, 3:9].relu()
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered in add")  # numpy of inf - inf
def test_keeps_nan_and_infinities(device):
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.0]], device=device)
    r = torch.tensor([[1.0, float("-inf"), 1.0, float("inf")]], device=device)
    torch.testing.assert_close(add_act(x, r, "relu"), (x + r).relu(), equal_nan=True)


X = torch.zeros(2, 4, 4, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x has shape \[4, 4, 16\], expected \[N, H, W, C\] or \[N, C\]"),
        ({"x": X.double()}, "x has dtype torch.float64"),
        ({"x": X.permute(0, 3, 1, 2)}, "x has stride 16 in its last dimension"),
        ({"x": X[:, :0]}, r"x has shape \[2, 0, 4, 16\], only the batch may be zero"),
        ({"residual": X[:1]}, r"residual has shape \[1, 4, 4, 16\], expected \[2, 4, 4, 16\]"),
        ({"residual": X.half()}, "residual has dtype torch.float16"),
        ({"residual": torch.zeros(2, 4, 4, 32)[..., ::2]}, "residual has stride 2"),
        ({"scale": torch.zeros(8)}, r"scale has shape \[8\], expected \[16\]"),
        ({"scale": torch.zeros(1, 16)}, r"scale has shape \[1, 16\], expected \[2, 16\]"),
        ({"shift": torch.zeros(16).half()}, "shift has dtype torch.float16"),
        ({"shift": torch.zeros(16, 2).T}, "shift has strides"),
        ({"out": X[:1]}, r"out has shape \[1, 4, 4, 16\]"),
        ({"out": X.to("meta")}, "out is on meta"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        elementwise(**{"x": X} | arguments)


def test_cost():
    cost = elementwise_cost(100, 2, 2, residual=True)
    assert (cost.flops, cost.bytes) == (200, 600)


CODE = [(sm, case) for sm in (80, 90) for case in elementwise_cases()]


@pytest.mark.compile
@pytest.mark.parametrize(("sm", "case"), CODE, ids=[f"sm_{sm}-{case.name}" for sm, case in CODE])
def test_machine_code(sm, case):
    facts = compile_launch(case.launch, sm)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0)
    assert fits(facts, sm)
    assert facts.count("LDG", "128") > 0 and facts.count("STG", "128") > 0
    assert facts.count("LDG", "U16") == 0 and facts.count("STG", "U16") == 0
