"""Parts of a split depth added by the program that stores the last: the bits of a second kernel."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastres.kernels.aot import compile_kernel, facts_of, fits
from fastres.kernels.conv2d import conv2d_tma, conv2d_tma_launches
from fastres.kernels.conv2d.last_block_jit import is_last, sum_in_order
from fastres.kernels.conv2d.parts import new_parts, sum_dtype
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.launch import Launch
from fastres.kernels.reference import round_tf32
from fastres.kernels.tiles import BoxTile
from fastres.kernels.tiles.boxes import Projection, counter_bytes, workspace_bytes

HALF, FP32, INT8, FP8 = torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
SMALL = BoxTile(1, 4, 4, 64, 32, 4, 2)
RAGGED = BoxTile(2, 4, 4, 64, 32, 4, 3)  # over 3 images: the second box holds one that is not
ROW = BoxTile(1, 1, 64, 64, 32, 4, 3)


@dataclass(frozen=True)
class Case:
    name: str
    shape: ConvShape
    tile: BoxTile
    dtype: torch.dtype = HALF
    projected: int = 0
    residual: bool = False
    activation: str | None = "relu"
    bias: bool = True

    @property
    def projection(self) -> Projection | None:
        return Projection(self.projected) if self.projected else None


def same(n: int, h: int, w: int, c: int, k: int) -> ConvShape:
    """A 3x3 that keeps the size."""
    return ConvShape(n, h, w, c, k, 3, 3, (1, 1), (1, 1))


def point(n: int, h: int, w: int, c: int, k: int) -> ConvShape:
    return ConvShape(n, h, w, c, k, 1, 1)


CASES = (
    Case("ragged", same(3, 5, 7, 64, 72), replace(RAGGED, split_k=3), residual=True),
    Case("halving", ConvShape(3, 6, 6, 64, 72, 3, 3, (2, 2), (1, 1)), replace(RAGGED, split_k=2)),
    Case("row", point(2, 5, 5, 128, 72), replace(ROW, split_k=4), activation="gelu"),
    Case("projection", point(2, 5, 5, 64, 72), replace(ROW, split_k=2), projected=128),
    Case("every-step", same(1, 5, 5, 32, 16), replace(SMALL, split_k=9), bias=False),
    Case("bf16", same(1, 5, 5, 32, 16), replace(SMALL, split_k=3), torch.bfloat16, residual=True),
    Case("tf32", same(1, 5, 5, 32, 72), replace(SMALL, split_k=3), FP32, residual=True),
    Case("int8", same(2, 5, 7, 64, 80), replace(RAGGED, split_k=6), INT8, residual=True),
    Case("int8-bare", same(1, 5, 5, 32, 16), replace(SMALL, split_k=9), INT8, activation=None),
    Case("fp8", same(1, 5, 5, 32, 16), replace(SMALL, split_k=3), FP8, residual=True),
)
BATCH_0 = Case("batch-0", same(0, 5, 5, 64, 72), replace(RAGGED, split_k=3, last_adds=True))


class Posed:
    """A case with operands, parts that begin as NaN, and counters between other numbers."""

    def __init__(self, case: Case, device: torch.device, guarded: Any, poisoned: Any) -> None:
        self.case, self.device, self._poisoned = case, device, poisoned
        shape = case.shape
        generator = torch.Generator().manual_seed(0)

        def draw(*sizes: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
            values = torch.randn(sizes, generator=generator)
            values = 40 * values if dtype == INT8 else round_tf32(values)
            return guarded(values.to(dtype).to(device))

        depth = shape.r * shape.s * shape.c + case.projected
        pixels = (shape.n, shape.p, shape.q)
        self.x, self.weight = draw(shape.n, shape.h, shape.w, shape.c), draw(shape.k, depth)
        self.x2 = draw(*pixels, case.projected) if case.projected else None
        self.bias = draw(shape.k, dtype=FP32) if case.bias else None
        self.residual = draw(*pixels, shape.k) if case.residual else None
        self.more: dict[str, Any] = {}
        if case.dtype.itemsize == 1:
            scale = draw(shape.k, dtype=FP32).abs() * (1e-4 if case.dtype == INT8 else 0.1)
            self.more = {"scale": guarded(scale), "out_scale": 9.5}

    def memory(self, tile: BoxTile) -> dict[str, torch.Tensor]:
        sizes = self.case.shape, tile, self.case.projection
        parts, sums = (size(*sizes) // 4 for size in (workspace_bytes, counter_bytes))
        around = torch.full((sums + 256,), 113, dtype=torch.int32, device=self.device)
        around[128 : 128 + sums] = 0
        dtype = sum_dtype(self.case.dtype)
        return {
            "workspace": self._poisoned((parts,), dtype, self.device),
            "counters": around[128 : 128 + sums],
            "around": around,
        }

    def launches(
        self, tile: BoxTile, out: torch.Tensor, sm_count: int, memory: dict[str, torch.Tensor]
    ) -> tuple[Launch, ...]:
        return conv2d_tma_launches(
            self.x,
            self.weight,
            self.bias,
            self.residual,
            out,
            shape=self.case.shape,
            target=Target(90, sm_count),
            x2=self.x2,
            activation=self.case.activation,
            tile=tile,
            allow_tf32=self.case.dtype == FP32,
            workspace=memory["workspace"],
            counters=memory["counters"],
            **self.more,
        )

    def result(self, launches: tuple[Launch, ...], out: torch.Tensor) -> torch.Tensor:
        """The bits of a run over poisoned outputs."""
        out.fill_(float("nan") if out.dtype.is_floating_point else -128)
        for launch in launches:
            launch.run()
        return out.view(torch.uint8).cpu().clone()

    def out(self) -> torch.Tensor:
        s = self.case.shape
        return self._poisoned((s.n, s.p, s.q, s.k), self.case.dtype, self.device)

    def second_kernels(self) -> torch.Tensor:
        """What a second kernel makes of the parts."""
        tile, out = replace(self.case.tile, last_adds=False), self.out()
        launches = self.launches(tile, out, 132, self.memory(tile))
        assert len(launches) == 2
        return self.result(launches, out)


@pytest.fixture
def posed(device: Any, guarded: Any, poisoned: Any) -> Callable[[Case], Posed]:
    def pose(case: Case) -> Posed:
        if case.dtype == FP8 and device.type == "cpu":
            pytest.skip("Triton's interpreter does not round to fp8")
        return Posed(case, device, guarded, poisoned)

    return pose


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[int]], None]]:
    """in_order(numbers): the interpreter runs programs in this order."""
    put = interpreter.interpreter_builder.set_grid_idx

    def choose(numbers: list[int]) -> None:
        monkeypatch.setattr(
            interpreter.interpreter_builder,
            "set_grid_idx",
            lambda x, y, z: put(numbers[x], y, z),
        )

    yield choose


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bits_of_a_second_kernel_again_and_again(posed, case):
    """Two programs that walk over the tiles, as many as there are, and what lies between."""
    given = posed(case)
    wanted = given.second_kernels()
    tile, out = replace(case.tile, last_adds=True), given.out()
    for sm_count in (2, 5, 10_000):
        memory = given.memory(tile)
        launches = given.launches(tile, out, sm_count, memory)
        assert len(launches) == 1
        # the counters are those that the run before left behind; a race does not show at once
        for _ in range(2 if given.device.type == "cpu" else 50):
            assert torch.equal(given.result(launches, out), wanted)
            assert not memory["counters"].any() and len(memory["counters"]) > 0
            rest = memory["around"].cpu()
            assert rest.sum() == 256 * 113 and (rest[:128] == 113).all()


@pytest.mark.interpret
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[7]], ids=lambda case: case.name)
def test_any_order_of_arrival_gives_the_same_bits(posed, case, in_order):
    given = posed(case)
    wanted = given.second_kernels()
    tile, out = replace(case.tile, last_adds=True), given.out()
    memory = given.memory(tile)
    launches = given.launches(tile, out, 10_000, memory)
    programs = launches[0].programs
    assert programs == launches[0].arguments["TILES"]
    shuffled = list(range(programs))
    random.Random(0).shuffle(shuffled)
    for order in (list(reversed(range(programs))), shuffled):
        in_order(order)
        assert torch.equal(given.result(launches, out), wanted)
        assert not memory["counters"].any()


@pytest.mark.interpret
def test_only_the_last_adds(posed):
    """A counter that is ahead has an earlier part taken for the last: the test above can fail."""
    given = posed(CASES[0])
    wanted = given.second_kernels()
    tile, out = replace(CASES[0].tile, last_adds=True), given.out()
    memory = given.memory(tile)
    launches = given.launches(tile, out, 10_000, memory)
    memory["counters"].fill_(1)
    memory["workspace"].fill_(float("nan"))
    assert not torch.equal(given.result(launches, out), wanted)


def test_a_batch_of_none_and_memory_of_its_own(device):
    x = torch.ones((0, 5, 5, 64), dtype=HALF, device=device)
    weight = torch.ones((72, 3, 3, 64), dtype=HALF, device=device)
    y = conv2d_tma(x, weight, padding=(1, 1), tile=BATCH_0.tile)
    assert y.shape == (0, 5, 5, 72)
    x = torch.ones((1, 5, 5, 64), dtype=HALF, device=device)
    tiles = (replace(BATCH_0.tile, last_adds=last) for last in (False, True))
    ours, theirs = (conv2d_tma(x, weight, padding=(1, 1), tile=tile) for tile in tiles)
    assert torch.equal(ours, theirs) and ours.isfinite().all()


def test_memory_that_does_not_do():
    shape, tile = same(3, 5, 5, 64, 72), BATCH_0.tile
    x = torch.zeros((3, 5, 5, 64), dtype=HALF)
    given = new_parts(shape, tile, x)
    boxes = 2 * 2 * 2 * 2  # images, rows, columns, channels
    assert workspace_bytes(shape, tile) == 4 * given["workspace"].numel() == 4 * 3 * boxes * 32 * 64
    assert counter_bytes(shape, tile) == 4 * given["counters"].numel() == 4 * boxes
    assert counter_bytes(shape, replace(tile, last_adds=False)) == 0

    def launches(**memory: torch.Tensor | None) -> None:
        conv2d_tma_launches(
            x,
            torch.zeros((72, 576), dtype=HALF),
            None,
            None,
            torch.zeros((3, 5, 5, 72), dtype=HALF),
            shape=shape,
            target=Target.typical(90),
            tile=tile,
            **{**given, **memory},
        )

    launches()
    with pytest.raises(ValueError, match="counters is missing, expected 16 int32 for tile"):
        launches(counters=None)
    with pytest.raises(ValueError, match="counters is of 15 elements, expected 16 int32"):
        launches(counters=given["counters"][:15])
    with pytest.raises(ValueError, match=r"counters has dtype torch\.float32"):
        launches(counters=torch.zeros(16))
    with pytest.raises(ValueError, match="workspace is of 98303 elements, expected 98304 fp32"):
        launches(workspace=given["workspace"][1:])
    with pytest.raises(ValueError, match="last_adds is set with split_k 1"):
        replace(SMALL, last_adds=True)


def compiled(case: Case) -> tuple[Launch, ...]:
    tile, shape = replace(case.tile, last_adds=True), case.shape

    def meta(*sizes: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, y = meta(shape.n, shape.h, shape.w, shape.c), meta(shape.n, shape.p, shape.q, shape.k)
    scales = {"scale": meta(shape.k, dtype=FP32), "out_scale": 9.5}
    return conv2d_tma_launches(
        x,
        meta(shape.k, shape.r * shape.s * shape.c),
        meta(shape.k, dtype=FP32),
        meta(*y.shape) if case.residual else None,
        y,
        shape=shape,
        target=Target.typical(90),
        activation="relu",
        tile=tile,
        allow_tf32=case.dtype == FP32,
        **new_parts(shape, tile, x),
        **(scales if case.dtype.itemsize == 1 else {}),
    )


LAYER3, LAYER4 = same(1, 14, 14, 256, 256), same(1, 7, 7, 512, 512)
PLANNED = (  # among the tiles that plans of ResNet-50 take at batch 1, and their like
    Case("fp16", LAYER3, BoxTile(1, 2, 16, 64, 64, 4, 4, 4, 3), residual=True),
    Case("fp16-nine", LAYER3, BoxTile(1, 2, 16, 128, 64, 4, 4, 9, 2)),
    Case("tf32", LAYER4, BoxTile(1, 8, 8, 64, 32, 4, 4, 16, 2), FP32),
    Case("int8", LAYER4, BoxTile(1, 4, 4, 64, 128, 4, 6, 4, 3), INT8, residual=True),
    Case("fp8", LAYER4, BoxTile(1, 8, 8, 64, 128, 4, 3, 12, 3), FP8),
)


@triton.jit
def _alone_kernel(parts_ptr, counters_ptr, y_ptr, SUMS, SPLIT_K: tl.constexpr, SIDE: tl.constexpr):
    """Nothing but a sum of parts, which all are the program's number."""
    tile = tl.program_id(0)
    part = tl.zeros((SIDE, SIDE), tl.float32) + tile
    if is_last(part, parts_ptr, counters_ptr, tile, SUMS, SPLIT_K):
        total = sum_in_order(parts_ptr, tile, SUMS, SPLIT_K, SIDE, SIDE)
        at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        tl.store(y_ptr + tile % SUMS * SIDE * SIDE + at, total)


def alone(device: torch.device, sums: int = 3, split_k: int = 4) -> Launch:
    side = 32
    given = {
        "parts_ptr": torch.empty((split_k, sums, side, side), device=device),
        "counters_ptr": torch.zeros(sums, dtype=torch.int32, device=device),
        "y_ptr": torch.empty((sums, side, side), device=device),
        "SUMS": sums,
    }
    return Launch(_alone_kernel, split_k * sums, given, {"SPLIT_K": split_k, "SIDE": side}, 4, 1)


def test_alone(device):
    launch = alone(device)
    for _ in range(2):
        launch.arguments["y_ptr"].fill_(float("nan"))
        launch.run()
        wanted = torch.arange(12.0).view(4, 3).sum(0)
        assert torch.equal(launch.arguments["y_ptr"].cpu().amax((1, 2)), wanted)
        assert torch.equal(launch.arguments["y_ptr"].cpu().amin((1, 2)), wanted)


def memory_steps(ptx: str) -> list[str]:
    """Barriers, and what touches parts, counters and results, in the order of the code."""
    return re.findall(
        r"(?<![\w.])(?:st\.global\.v4|bar\.sync|atom\.global\.\S+|ld\.global\.cg\.v4"
        r"|cp\.async\.bulk\.tensor\.\dd\.global\.shared|st\.global\.b32)",
        ptx,
    )


@pytest.mark.compile
@pytest.mark.parametrize("sm", [90, 100])
def test_every_threads_stores_come_before_the_counter(sm):
    """With no shared memory in use, whose barriers could stand there by chance."""
    steps = memory_steps(compile_kernel(alone(torch.device("meta")), sm).asm["ptx"])
    (counted,) = (i for i, step in enumerate(steps) if step.startswith("atom"))
    assert steps[counted] == "atom.global.gpu.acq_rel.add.u32"
    before, after = steps[:counted], steps[counted + 1 :]
    assert before == ["st.global.v4"] * 2 + ["bar.sync"]
    assert after[0] == "bar.sync" and after.count("ld.global.cg.v4") == 2 * 4


@pytest.mark.compile
@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.name)
@pytest.mark.parametrize("dependent", [False, True])
def test_parts_are_seen_by_whoever_adds_them(case, dependent):
    """In the machine code: every thread's stores, a barrier, the release and the counter, a barrier
    that brings what it was, and only then loads, past the SM's own cache."""
    (launch,) = compiled(case)
    kernel = compile_kernel(launch.overlapping() if dependent else launch, 90)
    facts = facts_of(kernel)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0) and fits(facts, 90)
    assert facts.unguarded == 0 or not dependent
    steps = memory_steps(kernel.asm["ptx"])
    (counted,) = (i for i, step in enumerate(steps) if step.startswith("atom"))
    assert steps[counted] == "atom.global.gpu.acq_rel.add.u32"
    parts = case.tile.pixels * case.tile.block_n // (4 * 32 * case.tile.num_warps)
    stores = [i for i, step in enumerate(steps) if step == "st.global.v4"]
    loads = [i for i, step in enumerate(steps) if step == "ld.global.cg.v4"]
    assert len(stores) == parts and len(loads) == parts * case.tile.split_k
    assert max(stores) < counted < min(loads)
    assert "bar.sync" in steps[max(stores) : counted]
    assert "bar.sync" in steps[counted : min(loads)]
    copies = [i for i, step in enumerate(steps) if step.startswith("cp.async.bulk")]
    assert copies and min(copies) > max(loads)  # the result's, and no part's
    assert facts.count("MEMBAR", "GPU") == 1 and facts.count("ATOMG", "STRONG", "GPU") == 1
    assert facts.count("LDG", "128", "STRONG", "GPU") == len(loads)
