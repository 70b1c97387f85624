"""Graph + input shapes → Plan: which kernels, on which tiles, in which memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from msgspec.structs import replace

from fastres.backends.triton.arena import Lifetime, place
from fastres.backends.triton.forms import Reckoner
from fastres.backends.triton.overlap import has_dependent_launch, with_overlap
from fastres.backends.triton.plan import (
    AnyStep,
    LaunchAvgPool,
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchElementwise,
    LaunchGlobalAvgPool,
    LaunchLinear,
    LaunchMaxPool,
    LaunchStem,
    LaunchStemPool,
    LoadInput,
    Norm,
    Place,
    Plan,
    Shortcut,
)
from fastres.backends.triton.regions import (
    Boundary,
    ShortcutA,
    boundaries,
    entries,
    pool_of,
    projections,
    shortcuts,
    stems,
)
from fastres.backends.triton.table import Tiles
from fastres.errors import ArtifactError
from fastres.graph.ir import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
    Normalize,
)
from fastres.graph.shapes import infer_shapes
from fastres.graph.specs import DTYPE_NAMES
from fastres.kernels.boxes import BoxTile, workspace_bytes
from fastres.kernels.chain_tiles import ChainTile
from fastres.kernels.folding import packed_shape
from fastres.kernels.geometry import Pair
from fastres.kernels.stem_pool_tiles import StemPoolTile
from fastres.kernels.tiles import ConvTile
from fastres.options import DTYPE_OF, Precision, Sizes


def make_plan(
    graph: Graph,
    input_shapes: tuple[Sizes, ...],
    precision: Precision,
    tiles: Tiles,
    recorded: Plan | None = None,
    dependent: bool | None = None,
) -> Plan:
    """Plans a graph whose nodes are all taken, for fixed input shapes.

    Args:
        tiles: the best tile of each problem on the target.
        recorded: a plan of the same graph from a file, whose forms are taken over.
        dependent: whether launches are dependent ones; None where that pays.

    Raises:
        ArtifactError: the recorded plan is not one of this graph's.
    """
    if recorded is None:
        plan = _Planner(graph, input_shapes, precision, tiles, None).plan()
        return with_overlap(plan, tiles.target, dependent)
    steps = {step.node: step for step in recorded.steps}
    plan = _Planner(graph, input_shapes, precision, tiles, steps).plan()
    plan = replace(plan, dependent=recorded.dependent, choices=recorded.choices)
    if plan != recorded or (plan.dependent and not has_dependent_launch(tiles.target)):
        raise ArtifactError("a stored plan does not follow from the graph: copy the engine anew")
    return recorded


class _Planner:
    def __init__(
        self,
        graph: Graph,
        input_shapes: tuple[Sizes, ...],
        precision: Precision,
        tiles: Tiles,
        recorded: Mapping[str, AnyStep] | None,
    ) -> None:
        self.graph = graph
        self.input_shapes = input_shapes
        self.precision = precision
        self.dtype = DTYPE_OF[precision]
        self.shapes = infer_shapes(graph, input_shapes)
        self.reckoner = Reckoner(graph, self.shapes, precision, tiles, recorded)
        self.shortcuts = shortcuts(graph)
        self.covered = {name for view in self.shortcuts.values() for name in view.covers}
        self.folded: set[str] = set()  # entries that stems read
        self.stems: dict[str, ConvTile] = {}  # that read folded pictures
        self.pooled: dict[str, tuple[Node, StemPoolTile]] = {}  # stems, by the name of a max pool
        self.chains: dict[str, tuple[Boundary, ChainTile]] = {}  # by the name of conv3
        self.merged: dict[str, Node] = {}  # by the name of a convolution: its projection
        self.tensor_of: dict[str, str] = {}  # a graph value → the tensor that holds it
        self.places: dict[str, tuple[Sizes, torch.dtype]] = {}
        self.steps: list[AnyStep] = []

    def plan(self) -> Plan:
        self._decide_regions()
        for value, entry in zip(self.graph.inputs, entries(self.graph), strict=True):
            self._place(entry.name)
            folded = entry.name in self.folded
            if folded:
                n, _, h, w = self.shapes[entry.name]
                self.places[entry.name] = packed_shape(n, h, w), self.dtype
            op = entry.op if isinstance(entry, Node) else None
            assert isinstance(op, Normalize | None)
            self.steps.append(LoadInput(entry.name, value.name, entry.name, folded, op))
        for node in self.graph.nodes:
            if node.name not in self.tensor_of and node.name not in self.covered:
                self._node(node)
        outputs = tuple((self.tensor_of[n], self.shapes[n]) for n in self.graph.outputs)
        offsets, total = place(self._lifetimes([name for name, _ in outputs]))
        return Plan(
            input_shapes=self.input_shapes,
            places={
                name: Place(shape, DTYPE_NAMES[dtype], offsets[name])
                for name, (shape, dtype) in self.places.items()
            },
            steps=tuple(self.steps),
            outputs=outputs,
            arena_bytes=total,
            allow_tf32=self.precision == "tf32",
            choices=tuple(self.reckoner.choices),
        )

    def _decide_regions(self) -> None:
        """Which stems read folded pictures, which boundaries become one kernel, and which
        projections are merged."""
        for name, stem in stems(self.graph).items():
            pool = pool_of(self.graph, stem)
            together = None if pool is None else self.reckoner.pooled_stem(stem, pool)
            if pool is not None and together is not None:
                self.folded.add(name)
                self.pooled[pool.name] = stem, together
                self.covered.add(stem.name)
            elif (tile := self.reckoner.stem(stem)) is not None:
                self.folded.add(name)
                self.stems[stem.name] = tile
        for boundary in boundaries(self.graph):
            chain = self.reckoner.chains(boundary)
            if chain is not None:
                self.chains[boundary.conv3.name] = chain
                chained = chain[0]
                inside = (chained.conv2, chained.projection, chained.following)
                self.covered.update(node.name for node in inside if node is not None)
        for name, projection in projections(self.graph).items():
            if name not in self.chains and self.reckoner.merges(self.graph[name], projection):
                self.merged[name] = projection
                self.covered.add(projection.name)

    def _node(self, node: Node) -> None:
        op = node.op
        source = self.tensor_of.get(node.inputs[0], "")
        if isinstance(op, Flatten):  # of [N, C, 1, 1]: the same bytes under another name
            self.tensor_of[node.name] = source
            return
        self._place(node.name)
        if node.name in self.stems or node.name in self.pooled:
            self.steps.append(self._stem(node))
        elif node.name in self.chains:
            self.steps.append(self._chain(*self.chains[node.name]))
        elif isinstance(op, Conv2d):
            self.steps.append(self._conv2d(node, op, source))
        elif isinstance(op, MaxPool):
            self.steps.append(
                LaunchMaxPool(
                    node.name,
                    source,
                    node.name,
                    op.kernel,
                    op.stride,
                    op.padding,
                    op.dilation,
                    op.ceil_mode,
                )
            )
        elif isinstance(op, AvgPool):
            self.steps.append(
                LaunchAvgPool(
                    node.name,
                    source,
                    node.name,
                    op.kernel,
                    op.stride,
                    op.padding,
                    op.ceil_mode,
                    op.count_include_pad,
                )
            )
        elif isinstance(op, Add | BatchNorm | Activation):
            self.steps.append(self._elementwise(node, source))
        elif isinstance(op, GlobalAvgPool):
            self.steps.append(LaunchGlobalAvgPool(node.name, source, node.name))
        else:
            assert isinstance(op, Linear)
            tile = self.reckoner.linear(node)
            weight, bias = node.params["weight"], node.params.get("bias")
            self.steps.append(
                LaunchLinear(node.name, source, node.name, weight, bias, op.activation, tile)
            )

    def _stem(self, node: Node) -> LaunchStem | LaunchStemPool:
        """Of a stem that reads folded pictures, or of the max pool that is computed with one."""
        stem, together = self.pooled.get(node.name, (node, None))
        assert isinstance(stem.op, Conv2d)
        source = self.tensor_of[stem.inputs[0]]
        weight, bias = stem.params["weight"], stem.params.get("bias")
        activation = stem.op.epilogue.activation
        if together is not None:
            return LaunchStemPool(node.name, source, node.name, weight, bias, activation, together)
        tile = self.stems[node.name]
        return LaunchStem(node.name, source, node.name, weight, bias, activation, tile)

    def _elementwise(self, node: Node, source: str) -> LaunchElementwise:
        op, norm, residual = node.op, None, None
        if isinstance(op, Add):
            residual = self.tensor_of[node.inputs[1]]
        if isinstance(op, BatchNorm):
            names = node.params
            norm = Norm(names["mean"], names["var"], names.get("weight"), names.get("bias"), op.eps)
        activation = op.kind if isinstance(op, Activation) else None
        if isinstance(op, Add | BatchNorm):
            activation = op.activation
        return LaunchElementwise(node.name, source, node.name, norm, residual, activation)

    def _conv2d(self, node: Node, op: Conv2d, source: str) -> LaunchConv2d | LaunchBoxConv2d:
        view = self.shortcuts.get(node.name)
        projection = self.merged.get(node.name)
        form = self.reckoner.convolution(node, plain=view is None, projection=projection)
        if isinstance(form.tile, BoxTile):
            return self._box_conv2d(node, op, source, projection, form.tile)
        shortcut = None
        if op.epilogue.residual:
            view = view or ShortcutA(node.inputs[1], 1, 0, ())
            shortcut = Shortcut(self.tensor_of[view.source], view.stride, view.channel_offset)
        assert isinstance(form.tile, ConvTile)
        return LaunchConv2d(
            node=node.name,
            source=source,
            target=node.name,
            weight=node.params["weight"],
            bias=node.params.get("bias"),
            stride=op.stride,
            padding=op.padding,
            dilation=op.dilation,
            groups=op.groups,
            merged=form.merged,
            shortcut=shortcut,
            activation=op.epilogue.activation,
            tile=form.tile,
        )

    def _box_conv2d(
        self, node: Node, op: Conv2d, source: str, projection: Node | None, tile: BoxTile
    ) -> LaunchBoxConv2d:
        shape = self.reckoner.shape(node)
        workspace = None
        if size := workspace_bytes(shape, tile):
            workspace = f"{node.name}:parts"
            self.places[workspace] = (size // 4,), torch.float32
        residual = (
            self.tensor_of[node.inputs[1]] if op.epilogue.residual and not projection else None
        )
        return LaunchBoxConv2d(
            node=node.name,
            source=source,
            target=node.name,
            weight=node.params["weight"],
            biases=_biases(node, projection),
            filter=(shape.r, shape.s),
            stride=op.stride,
            padding=op.padding,
            dilation=op.dilation,
            projected=None if projection is None else self.tensor_of[projection.inputs[0]],
            projection=None if projection is None else projection.params["weight"],
            projection_stride=(1, 1) if projection is None else _stride(projection),
            residual=residual,
            activation=op.epilogue.activation,
            workspace=workspace,
            tile=tile,
        )

    def _chain(self, boundary: Boundary, tile: ChainTile) -> LaunchChain:
        conv2, conv3 = boundary.conv2, boundary.conv3
        projection, following = boundary.projection, boundary.following
        shape = self.reckoner.chain_shape(boundary)
        assert isinstance(conv3.op, Conv2d)
        shortcut = conv3.inputs[1] if projection is None else projection.inputs[0]
        if following is not None:
            self.tensor_of[following.name] = following.name
            self._place(following.name)
        return LaunchChain(
            node=conv3.name,
            source=self.tensor_of[conv2.inputs[0]],
            target=conv3.name,
            weight2=conv2.params["weight"],
            bias2=conv2.params.get("bias"),
            weight3=conv3.params["weight"],
            biases3=_biases(conv3, projection),
            projection=None if projection is None else projection.params["weight"],
            shortcut=self.tensor_of[shortcut],
            weight1=None if following is None else following.params["weight"],
            bias1=None if following is None else following.params.get("bias"),
            next_target=None if following is None else following.name,
            stride=shape.stride,
            shortcut_stride=shape.shortcut_stride,
            activation=conv3.op.epilogue.activation,
            tile=tile,
        )

    def _place(self, name: str) -> None:
        """A tensor of the plan for a value of the graph: NHWC for maps."""
        shape = self.shapes[name]
        if len(shape) == 4:
            n, c, h, w = shape
            shape = (n, h, w, c)
        self.tensor_of[name] = name
        self.places[name] = shape, self.dtype

    def _lifetimes(self, outputs: Sequence[str]) -> list[Lifetime]:
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            first.update(dict.fromkeys(step.writes(), i))
            last.update(dict.fromkeys((*step.writes(), *step.reads()), i))
        last.update(dict.fromkeys(outputs, len(self.steps)))
        return [
            Lifetime(name, math.prod(shape) * dtype.itemsize, first[name], last[name])
            for name, (shape, dtype) in self.places.items()
        ]


def _biases(*nodes: Node | None) -> tuple[str, ...]:
    return tuple(n.params["bias"] for n in nodes if n is not None and "bias" in n.params)


def _stride(node: Node) -> Pair:
    assert isinstance(node.op, Conv2d)
    return node.op.stride
