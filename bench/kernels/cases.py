"""What kernel benchmarks are about: every kernel family on ResNet's layers, in many precisions.

A case lays out its own operands over poisoned outputs and knows how to check them; nothing is
timed here. The layers are those of `fastres.kernels.aot.layers`, whose machine code is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from bench.kernels.maps import (
    Lay,
    add_relu,
    avg_pool,
    batch_norm,
    global_pool,
    max_pool,
    pictures,
    squeeze_excite,
    transpose,
)
from bench.kernels.posed import Posed, compiled
from fastres.backends.triton.planning.eight_bits import OPERAND_OF
from fastres.backends.triton.planning.problems import AnyTile, Problem
from fastres.backends.triton.planning.table import Tiles, shipped_for
from fastres.backends.triton.tuning.trial_eight_bits import make_trial
from fastres.kernels.aot.layers import BOXES, CHAINS, CLASSIFIER, LAYERS, STEM, Layer
from fastres.kernels.cost import Target
from fastres.kernels.folding import stem_shape
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import BoxTile, boxes
from fastres.kernels.tiles import chain as chain_tiles
from fastres.kernels.tiles.chain import ChainShape
from fastres.options import Precision

BATCHES = (256, 1, 32)
_SMALL = 8  # rows and columns of a small case's map; both strides and dilations still fit
_DILATED = Layer("dilated.layer4.1.conv2", 14, 512, 512, taps=3)  # as in segmentation
_SPLIT = ("layer3.1.conv2", "layer4.1.conv1", "layer4.1.conv2", "layer4.1.conv3")
_OTHERS: tuple[Precision, ...] = ("bf16", "tf32")
_FEW = ("layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv3", "layer4.1.conv3")


class KernelCase(Protocol):
    """One kernel on one layer in one precision, at one batch size."""

    @property
    def family(self) -> str: ...

    @property
    def layer(self) -> str: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def batch(self) -> int: ...

    @property
    def shape(self) -> str:
        """Sizes in words."""

    @property
    def layout(self) -> str:
        """Of what is read, and of what is written where that is another one."""

    def refusal(self, target: Target) -> str | None:
        """Why a GPU cannot run it; None if it can."""

    def small(self) -> KernelCase:
        """The same kernel on two small pictures, for Triton's interpreter."""

    def pose(self, tiles: Tiles, device: torch.device) -> Posed:
        """Operands, calls and check; on "meta" the calls can be compiled, and nothing more."""


def name_of(case: KernelCase) -> str:
    """As in "conv2d-layer1.0.conv2-b256-fp16"."""
    return f"{case.family}-{case.layer}-b{case.batch}-{case.precision}"


@dataclass(frozen=True)
class ProductCase:
    """A kernel that multiplies matrices: a problem that plans have tiles for.

    Args:
        last_adds: of a depth that is cut into parts: whether the last one's program sums them, or
            a second kernel; None where tiles say whether it is cut.
    """

    family: str
    layer: str
    problem: Problem
    last_adds: bool | None = None
    layout: str = "NHWC"

    @property
    def precision(self) -> Precision:
        return self.problem.precision

    @property
    def batch(self) -> int:
        return self.problem.shape.n

    @property
    def shape(self) -> str:
        return self.problem.key.removeprefix(f"{self.problem.kind} {self.precision} ")

    def refusal(self, target: Target) -> str | None:
        problem, shape = self.problem, self.problem.shape
        if self.precision == "fp8" and target.sm < 89:
            return f"sm_{target.sm} has no products of fp8, expected sm_89 or newer"
        if isinstance(shape, ChainShape):
            return chain_tiles.refusal(shape, problem.itemsize, target)
        if problem.kind != "boxes":
            return None
        dtype, narrow = OPERAND_OF[self.precision], self.precision == "tf32"
        return boxes.refusal(shape, dtype, target, problem.projection, allow_tf32=narrow)

    def small(self) -> ProductCase:
        return replace(self, problem=replace(self.problem, shape=_small(self.problem)))

    def pose(self, tiles: Tiles, device: torch.device) -> Posed:
        trial = make_trial(self.problem, device)
        trial.poison()
        tile = self._tile(tiles)
        return Posed(trial.launches(tile, tiles.target), trial.difference, str(tile))

    def _tile(self, tiles: Tiles) -> AnyTile:
        """The best that is known, or of those that split the depth so the best by estimate."""
        if self.last_adds is None:
            return tiles.best(self.problem).tile
        boxes = (
            tile for tile in self.problem.candidates(tiles.target) if isinstance(tile, BoxTile)
        )
        return next(x for x in boxes if x.split_k > 1 and x.last_adds == self.last_adds)


@dataclass(frozen=True)
class MapCase:
    """A kernel that multiplies no matrices, on a square map.

    Args:
        side, channels: of what is read.
        lay: its operands.
    """

    family: str
    layer: str
    precision: Precision
    batch: int
    side: int
    channels: int
    lay: Lay
    layout: str = "NHWC"

    @property
    def shape(self) -> str:
        return f"n={self.batch} h={self.side} w={self.side} c={self.channels}"

    def refusal(self, target: Target) -> str | None:
        return None

    def small(self) -> MapCase:
        return replace(self, batch=min(self.batch, 2), side=min(self.side, _SMALL))

    def pose(self, tiles: Tiles, device: torch.device) -> Posed:
        sizes = (self.batch, self.side, self.channels)
        return self.lay(device, OPERAND_OF[self.precision], *sizes)


def cases() -> list[KernelCase]:
    """Every case, those of the largest batch first."""
    found = (*_pointers(), *_boxes(), *_chains(), *_stems(), *_maps())
    return sorted(found, key=lambda case: BATCHES.index(case.batch))


def precompile(name: str, target: Target) -> int:
    """Compiles one case's kernels into Triton's cache; needs no GPU, and says how many it were."""
    case = next(case for case in cases() if name_of(case) == name)
    return compiled(partial(case.pose, Tiles(target, shipped_for(target))), target)


def _small(problem: Problem) -> ConvShape | ChainShape:
    shape, n = problem.shape, min(problem.shape.n, 2)
    if problem.kind in ("folded stem", "stem and pool"):
        return stem_shape(n, _SMALL, _SMALL, 64)
    return replace(shape, n=n, h=min(shape.h, _SMALL), w=min(shape.w, _SMALL))


def _pointers() -> Iterator[KernelCase]:
    """Convolutions of every kind, and the classifier, which is one."""
    for layer in LAYERS:
        for batch in BATCHES:
            yield _pointer_case(layer, batch, "fp16")
        if layer.name in _FEW:
            for precision in (*_OTHERS, "fp32", "fp8"):
                yield _pointer_case(layer, 256, precision)
        if layer is not STEM:
            yield _pointer_case(layer, 256, "int8")
    for batch in BATCHES:
        shape = replace(_DILATED.shape(batch), dilation=(2, 2), padding=(2, 2))
        yield ProductCase("conv2d", _DILATED.name, Problem("pointers", shape, "fp16"))


def _pointer_case(layer: Layer, batch: int, precision: Precision) -> ProductCase:
    shape, merged = layer.shape(batch), layer.merged
    problem = Problem("pointers", shape, precision, residual=layer.residual, merged=merged)
    return ProductCase("linear" if layer is CLASSIFIER else "conv2d", layer.name, problem)


def _boxes() -> Iterator[KernelCase]:
    """Convolutions through the copy engine, with their depth split where pixels are few."""
    for name, given in BOXES.items():
        family = "boxes" if given.projection is None else "boxes+projection"
        for precision, batches in _precisions(name, quantised=given.projection is None):
            for batch in batches:
                shape = replace(given.shape, n=batch)
                problem = Problem("boxes", shape, precision, given.projection, given.residual)
                yield ProductCase(family, name, problem)
    for name in _SPLIT:
        for kind in ("fp16", "int8"):
            shape = replace(BOXES[name].shape, n=1)
            problem = Problem("boxes", shape, kind, residual=BOXES[name].residual)
            yield ProductCase("split_k", name, problem, last_adds=False)
            yield ProductCase("split_k+last", name, problem, last_adds=True)


def _precisions(name: str, quantised: bool = True) -> Iterator[tuple[Precision, Iterable[int]]]:
    """fp16 everywhere, int8 where plans have it, what is left on a few layers."""
    yield "fp16", BATCHES
    if quantised:
        yield "int8", (256, 1)
    if name in _FEW:
        for precision in (*_OTHERS, *(("fp8",) if quantised else ())):
            yield precision, (256,)


def _chains() -> Iterator[KernelCase]:
    """Bottleneck boundaries; in 8 bits those without a projection, as plans have them."""
    for name, shape in CHAINS.items():
        for batch in BATCHES:
            yield _chain_case(name, shape, batch, "fp16")
        if not shape.projected:
            yield _chain_case(name, shape, 256, "int8")
    for precision in ("bf16", "fp8"):
        yield _chain_case("layer1.1", CHAINS["layer1.1"], 256, precision)


def _chain_case(name: str, shape: ChainShape, batch: int, precision: Precision) -> ProductCase:
    return ProductCase("chain", name, Problem("chain", replace(shape, n=batch), precision))


def _stems() -> Iterator[KernelCase]:
    """The stem over folded pictures, alone and with its pool."""
    for precision, batches in (("fp16", BATCHES), ("int8", (256, 1)), ("fp8", (256,))):
        for batch in batches:
            shape = stem_shape(batch, 112, 112, 64)
            for family, kind in (("stem", "folded stem"), ("stem+pool", "stem and pool")):
                yield ProductCase(family, "conv1", Problem(kind, shape, precision))


def _maps() -> Iterator[KernelCase]:
    """Pools, sums, and layouts."""
    single, byte = torch.float32, torch.uint8
    for batch in BATCHES:
        half = partial(MapCase, precision="fp16", batch=batch)
        whole = partial(MapCase, precision="int8", batch=batch)
        for make in (half, whole):
            yield make("max_pool", "maxpool", side=112, channels=64, lay=max_pool)
            yield make("global_pool", "avgpool", side=7, channels=2048, lay=global_pool)
            yield make("elementwise", "add_relu", side=56, channels=256, lay=add_relu)
            bytes_in = partial(make, side=224, channels=3, layout="NHWC bytes to folded NHWC")
            yield bytes_in("fold", "bytes", lay=partial(pictures, "folded", byte))
        yield half("avg_pool", "resnet-d.avgpool", side=56, channels=256, lay=avg_pool)
        yield half("elementwise", "batch_norm", side=56, channels=256, lay=batch_norm)
        yield half("elementwise", "squeeze_excite", side=56, channels=256, lay=squeeze_excite)
        planes = partial(half, side=224, channels=3)
        fold, plain = partial(pictures, "folded", single), partial(pictures, "plain", single)
        yield planes("fold", "picture", lay=fold, layout="NCHW fp32 to folded NHWC")
        yield planes("layout", "picture", lay=plain, layout="NCHW fp32 to NHWC")
        lay = partial(pictures, "plain", byte)
        yield planes("layout", "bytes", lay=lay, layout="NHWC bytes to NHWC")
        plane = partial(half, "layout", side=56, channels=64)
        yield plane(layer="to_nhwc", lay=partial(transpose, "nhwc"), layout="NCHW to NHWC")
        yield plane(layer="to_nchw", lay=partial(transpose, "nchw"), layout="NHWC to NCHW")
