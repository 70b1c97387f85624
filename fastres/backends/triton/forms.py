"""In which form a convolution runs, alone or with its neighbours: reckoned, and written down.

A form is a kernel with a tile. On sm_90 and newer, what the copy engine can take goes through it.
Whether a projection is merged into the last 1x1, and whether a whole bottleneck boundary becomes
one kernel, is decided by the sum of the estimates. A recorded plan decides in their stead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from fastres.backends.base import Choice
from fastres.backends.triton.eight_bits import OPERAND_OF, is_whole, precision_of
from fastres.backends.triton.form import SEVERAL, Form, Kind, choice_of, strange
from fastres.backends.triton.plan import (
    AnyStep,
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchLinear,
    LaunchStem,
    LaunchStemPool,
)
from fastres.backends.triton.problems import Problem
from fastres.backends.triton.regions import Boundary
from fastres.backends.triton.table import Tiles
from fastres.errors import UnsupportedError
from fastres.graph.ir import Conv2d, Graph, Node
from fastres.kernels import chain_tiles
from fastres.kernels.boxes import Projection
from fastres.kernels.boxes import refusal as box_refusal
from fastres.kernels.chain_tiles import ChainShape, ChainTile
from fastres.kernels.folding import stem_refusal, stem_shape
from fastres.kernels.geometry import ConvShape, PoolShape, max_pool_cost, mergeable
from fastres.kernels.stem_pool_tiles import StemPoolTile, stem_pool_refusal
from fastres.kernels.tiles import ConvTile
from fastres.options import EIGHT_BITS, Precision, Sizes


class Reckoner:
    """Chooses forms for one graph and one set of shapes, and keeps the reckoning.

    Args:
        shapes: of every value of the graph.
        tiles: the best tile of each problem on the target.
        recorded: a plan's steps by node, whose forms are taken over; None to choose.
        scales: of the values that are read in 8 bits.
    """

    def __init__(
        self,
        graph: Graph,
        shapes: Mapping[str, Sizes],
        precision: Precision,
        tiles: Tiles,
        recorded: Mapping[str, AnyStep] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.choices: list[Choice] = []
        self._graph = graph
        self._shapes = shapes
        self._precision = precision
        self._tiles = tiles
        self._target = tiles.target
        self._recorded = recorded
        self._scales = scales or {}

    def shape(self, node: Node) -> ConvShape:
        """The sizes of a node that is a Conv2d."""
        op = node.op
        assert isinstance(op, Conv2d)
        n, c, h, w = self._shapes[node.inputs[0]]
        k, _, r, s = self._graph.constants[node.params["weight"]].shape
        return ConvShape(n, h, w, c, k, r, s, op.stride, op.padding, op.dilation, op.groups)

    def linear(self, node: Node) -> ConvTile:
        """The tile of a linear layer: a 1x1 convolution of a 1x1 picture."""
        k, c = self._graph.constants[node.params["weight"]].shape
        shape = ConvShape(self._shapes[node.name][0], 1, 1, c, k, 1, 1)
        problem = Problem("pointers", shape, self._in(node))
        if self._recorded is not None:
            step = self._recorded.get(node.name)
            if isinstance(step, LaunchLinear) and problem.takes(step.tile, self._target):
                return step.tile
            raise strange(node)
        form = self._form("pointers", problem)
        self.choices.append(choice_of((node,), form, {}))
        assert isinstance(form.tile, ConvTile)
        return form.tile

    def convolution(self, node: Node, *, plain: bool, projection: Node | None = None) -> Form:
        """The form of a convolution that runs for itself, or with a projection merged into it.

        Args:
            plain: whether its residual, if any, is a whole tensor: no view of another one.
        """
        if self._recorded is not None:
            return self._recorded_form(node, plain, projection)
        form, others = self._convolution(node, plain, projection)
        nodes = (node,) if projection is None else (projection, node)
        self.choices.append(choice_of(nodes, form, others))
        return form

    def pooled_stem(self, node: Node, pool: Node) -> StemPoolTile | None:
        """The tile of a stem and its max pool as one kernel, None if they are two.

        Args:
            node: the stem.
        """
        shape, precision = self.shape(node), self._in(node)
        size = OPERAND_OF[precision].itemsize
        filters = (shape.r, shape.s), shape.stride, shape.padding
        reason = stem_refusal(shape.c, shape.h, shape.w, *filters)
        reason = reason or stem_pool_refusal(shape.p, shape.q, size)
        sizes = (shape.n, shape.p, shape.q, shape.k)
        problem = Problem("stem and pool", stem_shape(*sizes), precision)
        if self._recorded is not None:
            step = self._recorded.get(pool.name)
            if not isinstance(step, LaunchStemPool):
                return None
            if reason is None and problem.takes(step.tile, self._target):
                return step.tile
            raise strange(pool)
        if reason is not None or self._no_tile(problem):
            return None
        together = self._form("stem and pool", problem)
        stem = min(
            self._form("folded stem", Problem("folded stem", stem_shape(*sizes), precision)),
            self._form("pointers", self._problem(node, "pointers")),
            key=lambda form: form.seconds,
        )
        windows = PoolShape(*sizes, (3, 3), (2, 2), (1, 1))
        apart = stem.seconds + max_pool_cost(windows, size).bytes / self._target.dram_bytes
        if apart <= together.seconds:
            return None
        others = {"a stem and a pool": Form(SEVERAL, None, apart).time}
        self.choices.append(choice_of((node, pool), together, others))
        assert isinstance(together.tile, StemPoolTile)
        return together.tile

    def stem(self, node: Node) -> ConvTile | None:
        """The tile with which a stem reads its picture folded; None if it runs as any other."""
        shape = self.shape(node)
        step = None if self._recorded is None else self._recorded.get(node.name)
        if self._recorded is not None and not isinstance(step, LaunchStem):
            return None
        filters = (shape.r, shape.s), shape.stride, shape.padding
        folding = stem_shape(shape.n, shape.p, shape.q, shape.k)
        problem = Problem("folded stem", folding, self._in(node))
        possible = stem_refusal(shape.c, shape.h, shape.w, *filters) is None
        if isinstance(step, LaunchStem):
            if possible and problem.takes(step.tile, self._target):
                return step.tile
            raise strange(node)
        if not possible or self._no_tile(problem):
            return None
        folded = self._form("folded stem", problem)
        plain = self._form("pointers", self._problem(node, "pointers"))
        if plain.seconds <= folded.seconds:
            return None  # the choice is written down where it is planned as a convolution
        self.choices.append(choice_of((node,), folded, {str(plain): plain.time}))
        assert isinstance(folded.tile, ConvTile)
        return folded.tile

    def merges(self, node: Node, projection: Node) -> bool:
        """Whether a projection runs within the convolution that adds it."""
        if self._recorded is not None:
            step = self._recorded.get(node.name)
            return isinstance(step, LaunchBoxConv2d) and step.projection is not None
        problem = self._problem(node, "boxes", projection)
        if self._box_reason(node, True, projection) or self._no_tile(problem):
            return False
        merged, _ = self._convolution(node, True, projection)
        alone, _ = self._convolution(node, True, None)
        apart, _ = self._convolution(projection, True, None)
        return merged.seconds <= alone.seconds + apart.seconds

    def chains(self, boundary: Boundary) -> tuple[Boundary, ChainTile] | None:
        """The boundary that becomes one kernel, and its tile; None if it stays several.

        It may be shorter than the one given: without the next block's first 1x1.
        """
        if self._recorded is not None:
            return self._recorded_chain(boundary)
        apart = self._apart(boundary)
        ways: list[tuple[Form, Boundary | None]] = [(apart, None)]
        others: dict[str, str] = {}
        for candidate in (boundary, boundary.shorter):
            if candidate is None:
                continue
            reason = self._chain_reason(candidate)
            reason = reason or self._no_tile(self._chain_problem(candidate))
            if reason is None:
                chain, rest = self._chain(candidate), self._rest(boundary, candidate)
                ways.append((replace(chain, seconds=chain.seconds + rest), candidate))
            else:
                others[_kind(candidate)] = reason
        taken, chained = min(ways, key=lambda way: way[0].seconds)
        others.update((str(form), form.time) for form, _ in ways if form is not taken)
        self.choices.append(choice_of(boundary.nodes, taken, others))
        if chained is None:
            return None
        assert isinstance(taken.tile, ChainTile)
        return chained, taken.tile

    def _chain(self, boundary: Boundary) -> Form:
        return self._form(_kind(boundary), self._chain_problem(boundary))

    def _chain_problem(self, boundary: Boundary) -> Problem:
        return Problem("chain", self.chain_shape(boundary), self._in(boundary.conv3))

    def _rest(self, whole: Boundary, part: Boundary) -> float:
        """Seconds of what a shorter boundary leaves out."""
        if whole.following is None or part.following is not None:
            return 0.0
        return self._convolution(whole.following, True, None)[0].seconds

    def _recorded_chain(self, boundary: Boundary) -> tuple[Boundary, ChainTile] | None:
        step = (self._recorded or {}).get(boundary.conv3.name)
        if not isinstance(step, LaunchChain):
            return None
        chained = boundary if step.next_target is not None else boundary.shorter or boundary
        possible = self._chain_reason(chained) is None
        if not (possible and self._chain_problem(chained).takes(step.tile, self._target)):
            raise strange(boundary.conv3)
        return chained, step.tile

    def chain_shape(self, boundary: Boundary) -> ChainShape:
        """The sizes of a boundary as one kernel.

        Raises:
            ValueError: no chain has them.
        """
        conv2, conv3 = self.shape(boundary.conv2), self.shape(boundary.conv3)
        next_mid = projected = 0
        shortcut_stride = 1
        if boundary.following is not None:
            next_mid = self.shape(boundary.following).k
        if boundary.projection is not None:
            projection = self.shape(boundary.projection)
            projected, shortcut_stride = projection.c, projection.stride[0]
            if projection.stride[0] != projection.stride[1]:
                raise ValueError(f"the projection's stride is {projection.stride}")
        if conv2.c != conv2.k:
            raise ValueError(f"the 3x3 leads from {conv2.c} to {conv2.k} channels")
        return ChainShape(
            conv2.n,
            conv2.h,
            conv2.w,
            conv2.c,
            conv3.k,
            next_mid,
            projected,
            conv2.stride[0],
            shortcut_stride,
        )

    def _chain_reason(self, boundary: Boundary) -> str | None:
        precisions = {self._in(node) for node in boundary.nodes}
        if len(precisions) > 1 or not precisions <= {"fp16", "bf16", *EIGHT_BITS}:
            return (
                f"{' and '.join(sorted(precisions))} is not chained, only fp16, bf16, int8 or fp8"
            )
        if precisions & {*EIGHT_BITS} and boundary.projection is not None:
            return "a projection in 8 bits is rounded before it is added"
        if precisions & {*EIGHT_BITS} and any(self._in_float(node) for node in boundary.nodes):
            return "what a chain of 8 bits gives, or adds, is in floating point"
        try:
            shape = self.chain_shape(boundary)
        except ValueError as error:
            return str(error)
        itemsize = OPERAND_OF[precisions.pop()].itemsize
        return chain_tiles.refusal(shape, itemsize, self._target)

    def _apart(self, boundary: Boundary) -> Form:
        """The same nodes as kernels of their own."""
        seconds = self._convolution(boundary.conv2, True, None)[0].seconds
        projection = boundary.projection
        if projection is not None and self.merges(boundary.conv3, projection):
            seconds += self._convolution(boundary.conv3, True, projection)[0].seconds
        else:
            seconds += self._convolution(boundary.conv3, True, None)[0].seconds
            if projection is not None:
                seconds += self._convolution(projection, True, None)[0].seconds
        if boundary.following is not None:
            seconds += self._convolution(boundary.following, True, None)[0].seconds
        return Form(SEVERAL, None, seconds)

    def _convolution(
        self, node: Node, plain: bool, projection: Node | None
    ) -> tuple[Form, dict[str, str]]:
        pointers, others = None, {}
        if projection is None:
            pointers = self._pointers(node)
            if pointers.merged > 1:
                single = self._form("pointers", self._problem(node, "pointers"))
                others = {str(single): single.time}
        problem = self._problem(node, "boxes", projection)
        reason = self._box_reason(node, plain, projection) or self._no_tile(problem)
        if reason is not None:
            assert pointers is not None
            return pointers, {**others, "boxes": reason}
        boxed = self._form("boxes", problem)
        if pointers is None:
            return boxed, {}
        # measured times are compared; estimates of the two forms are not of one making
        comparable = boxed.measured and pointers.measured
        quicker = comparable and pointers.seconds < boxed.seconds
        taken, other = (pointers, boxed) if quicker else (boxed, pointers)
        return taken, {**others, str(other): other.time}

    def _pointers(self, node: Node) -> Form:
        """With as many groups in one product as is quickest: a narrow one leaves a tile empty."""
        shape = self.shape(node)
        forms = (
            self._form("pointers", self._problem(node, "pointers", merged=n))
            for n in mergeable(shape.groups, shape.c // shape.groups)
        )
        return min(forms, key=lambda form: (not form.measured, form.seconds))

    def _problem(
        self,
        node: Node,
        kind: Literal["pointers", "boxes"],
        projection: Node | None = None,
        merged: int = 1,
    ) -> Problem:
        op, shape = node.op, self.shape(node)
        assert isinstance(op, Conv2d)
        residual = op.epilogue.residual and projection is None
        shape = replace(shape, groups=shape.groups // merged)
        precision = self._in(node)
        floating = kind == "boxes" and precision in EIGHT_BITS and self._in_float(node)
        projected = self._projection(projection)
        return Problem(kind, shape, precision, projected, residual, floating, merged)

    def _in(self, node: Node) -> Precision:
        return precision_of(node, self._precision)

    def _in_float(self, node: Node) -> bool:
        """Whether a layer of 8 bits gives, or adds, something in floating point."""
        return not {node.name, *node.inputs[1:]} <= self._scales.keys() - {*self._graph.outputs}

    def _form(self, kind: Kind, problem: Problem) -> Form:
        try:
            best = self._tiles.best(problem)
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        return Form(
            kind, best.tile, best.seconds, best.measured, problem.key, merged=problem.merged
        )

    def _no_tile(self, problem: Problem) -> str | None:
        """Why a problem cannot be run; None if it can."""
        try:
            self._tiles.best(problem)
        except ValueError as error:
            return str(error).partition("\n")[0]
        return None

    def _projection(self, node: Node | None) -> Projection | None:
        if node is None:
            return None
        shape = self.shape(node)
        return Projection(shape.c, shape.stride)

    def _box_reason(self, node: Node, plain: bool, projection: Node | None) -> str | None:
        if not plain:
            return "its residual is a strided view of another tensor (shortcut A)"
        if projection is not None and (is_whole(node) or is_whole(projection)):
            return "a projection in 8 bits is rounded before it is added"
        return box_refusal(
            self.shape(node),
            OPERAND_OF[self._in(node)],
            self._target,
            self._projection(projection),
            allow_tf32=self._precision == "tf32",
        )

    def _recorded_form(self, node: Node, plain: bool, projection: Node | None) -> Form:
        step = (self._recorded or {}).get(node.name)
        if isinstance(step, LaunchConv2d) and projection is None:
            shape, merged = self.shape(node), step.merged
            possible = merged in mergeable(shape.groups, shape.c // shape.groups)
            problem = self._problem(node, "pointers", merged=merged if possible else 1)
            if possible and problem.takes(step.tile, self._target):
                return Form("pointers", step.tile, 0.0, merged=merged)
        elif isinstance(step, LaunchBoxConv2d) and not self._box_reason(node, plain, projection):
            if self._problem(node, "boxes", projection).takes(step.tile, self._target):
                return Form("boxes", step.tile, 0.0)
        raise strange(node)


def _kind(boundary: Boundary) -> Kind:
    return "chain" if boundary.following is not None else "chain without the next 1x1"
