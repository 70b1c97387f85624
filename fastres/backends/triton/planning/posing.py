"""What the nodes of a graph ask of kernels, as problems; or why a kernel does not take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastres.backends.triton.planning.eight_bits import OPERAND_OF, is_whole, precision_of
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.regions import Boundary, returned
from fastres.backends.triton.planning.vendor import PRECISIONS
from fastres.graph.ir import Conv2d, Graph, Node
from fastres.kernels.cost import Target
from fastres.kernels.folding import stem_refusal, stem_shape
from fastres.kernels.geometry import ConvShape, PoolShape
from fastres.kernels.tiles import chain
from fastres.kernels.tiles.boxes import Projection
from fastres.kernels.tiles.boxes import refusal as box_refusal
from fastres.kernels.tiles.chain import ChainShape
from fastres.kernels.tiles.stem_pool import stem_pool_refusal
from fastres.options import EIGHT_BITS, Precision, Sizes


class Posing:
    """The problems of one graph at one set of shapes.

    Args:
        shapes: of every value of the graph.
        scales: of the values that are read in 8 bits.
    """

    def __init__(
        self,
        graph: Graph,
        shapes: Mapping[str, Sizes],
        precision: Precision,
        target: Target,
        scales: Mapping[str, float],
    ) -> None:
        self._graph = graph
        self._shapes = shapes
        self._precision = precision
        self._target = target
        self._scales = scales
        self._returned = returned(graph)

    def shape(self, node: Node) -> ConvShape:
        """The sizes of a node that is a Conv2d."""
        op = node.op
        assert isinstance(op, Conv2d)
        n, c, h, w = self._shapes[node.inputs[0]]
        k, _, r, s = self._graph.constants[node.params["weight"]].shape
        return ConvShape(n, h, w, c, k, r, s, op.stride, op.padding, op.dilation, op.groups)

    def linear(self, node: Node) -> Problem:
        """A linear layer: a 1x1 convolution of a 1x1 picture."""
        k, c = self._graph.constants[node.params["weight"]].shape
        shape = ConvShape(self._shapes[node.name][0], 1, 1, c, k, 1, 1)
        return Problem("pointers", shape, self._in(node))

    def pointers(self, node: Node, merged: int = 1) -> Problem:
        """A convolution through pointers.

        Args:
            merged: groups that are one product.
        """
        shape = self.shape(node)
        shape = replace(shape, groups=shape.groups // merged)
        return Problem("pointers", shape, self._in(node), residual=self._adds(node), merged=merged)

    def boxes(self, node: Node, projection: Node | None = None) -> Problem:
        """A convolution through boxes, perhaps with a projection merged into it."""
        precision = self._in(node)
        return Problem(
            "boxes",
            self.shape(node),
            precision,
            self.projection(projection),
            residual=self._adds(node) and projection is None,
            floating=precision in EIGHT_BITS and self._in_float(node),
        )

    def box_reason(self, node: Node, plain: bool, projection: Node | None) -> str | None:
        """Why no box kernel takes it; None where one does.

        Args:
            plain: whether its residual, if any, is a whole tensor: no view of another one.
        """
        if not plain:
            return "its residual is a strided view of another tensor (shortcut A)"
        if projection is not None and (is_whole(node) or is_whole(projection)):
            return "a projection in 8 bits is rounded before it is added"
        return box_refusal(
            self.shape(node),
            OPERAND_OF[self._in(node)],
            self._target,
            self.projection(projection),
            allow_tf32=self._precision == "tf32",
        )

    def vendor(self, node: Node, library: str) -> Problem:
        """A convolution by the vendor's library."""
        adds = self._adds(node)
        return Problem("vendor", self.shape(node), self._in(node), residual=adds, library=library)

    def vendor_reason(self, node: Node, plain: bool) -> str | None:
        """Why PyTorch has no one launch for it, or none to be had here; None where it has.

        Args:
            plain: whether its residual, if any, is a whole tensor: no view of another one.
        """
        assert isinstance(node.op, Conv2d)
        if self._in(node) not in PRECISIONS:
            return f"{self._in(node)} is not asked of PyTorch, only {' and '.join(PRECISIONS)}"
        if node.op.epilogue.activation != "relu":
            return "PyTorch fuses a ReLU only"
        if "bias" not in node.params:
            return "PyTorch would make a bias of zeros, in one launch more"
        if not plain:
            return "its residual is a strided view of another tensor (shortcut A)"
        if node.name in self._returned:
            return "the network's caller gets its result, which would lie outside of the arena"
        return None

    def folded_stem(self, node: Node) -> Problem:
        """A stem over a folded picture."""
        return Problem("folded stem", self._stem_shape(node), self._in(node))

    def stem_and_pool(self, node: Node) -> Problem:
        """A stem over a folded picture, with ResNet's max pool in the same kernel."""
        return Problem("stem and pool", self._stem_shape(node), self._in(node))

    def pool_of(self, node: Node) -> Problem:
        """That max pool by itself, of what a stem gives."""
        shape = self.shape(node)
        sizes = (shape.n, shape.p, shape.q, shape.k)
        return Problem("max pool", PoolShape(*sizes, (3, 3), (2, 2), (1, 1)), self._in(node))

    def folding_reason(self, node: Node) -> str | None:
        """Why a stem does not read its picture folded; None where it can."""
        shape = self.shape(node)
        filters = (shape.r, shape.s), shape.stride, shape.padding
        return stem_refusal(shape.c, shape.h, shape.w, *filters)

    def pooling_reason(self, node: Node) -> str | None:
        """Why a stem is no one kernel with its max pool; None where it can be."""
        shape, size = self.shape(node), OPERAND_OF[self._in(node)].itemsize
        return self.folding_reason(node) or stem_pool_refusal(shape.p, shape.q, size)

    def chain(self, boundary: Boundary) -> Problem:
        """A boundary as one kernel."""
        return Problem("chain", self.chain_shape(boundary), self._in(boundary.conv3))

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

    def chain_reason(self, boundary: Boundary) -> str | None:
        """Why a boundary is no one kernel; None where it can be."""
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
        return chain.refusal(shape, itemsize, self._target)

    def _stem_shape(self, node: Node) -> ConvShape:
        shape = self.shape(node)
        return stem_shape(shape.n, shape.p, shape.q, shape.k)

    def projection(self, node: Node | None) -> Projection | None:
        """A 1x1 as what is merged into another convolution; None of none."""
        if node is None:
            return None
        shape = self.shape(node)
        return Projection(shape.c, shape.stride)

    def _adds(self, node: Node) -> bool:
        assert isinstance(node.op, Conv2d)
        return node.op.epilogue.residual

    def _in(self, node: Node) -> Precision:
        return precision_of(node, self._precision)

    def _in_float(self, node: Node) -> bool:
        """Whether a layer of 8 bits gives, or adds, something in floating point."""
        return not {node.name, *node.inputs[1:]} <= self._scales.keys() - {*self._graph.outputs}
