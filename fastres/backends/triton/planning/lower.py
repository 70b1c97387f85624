"""Graph + input shapes → Plan: which kernels, on which tiles, in which memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastres.backends.triton.planning.eight_bits import is_whole, plain
from fastres.backends.triton.planning.forms import Reckoner
from fastres.backends.triton.planning.overlap import with_overlap
from fastres.backends.triton.planning.plan import (
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
    LaunchVendor,
    LinkScales,
    LoadInput,
    Norm,
    Plan,
    Scales,
    Shortcut,
)
from fastres.backends.triton.planning.posing import Posing
from fastres.backends.triton.planning.regions import (
    Boundary,
    ShortcutA,
    boundaries,
    entries,
    factors,
    pool_of,
    projections,
    shortcuts,
    stems,
)
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.planning.tensors import Tensors
from fastres.backends.triton.planning.vendor import VendorTile
from fastres.errors import ArtifactError, UnsupportedError
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
from fastres.kernels.folding import packed_shape
from fastres.kernels.geometry import Pair
from fastres.kernels.tiles import BoxTile, ChainTile, ConvTile, StemPoolTile
from fastres.kernels.tiles.boxes import counter_bytes, workspace_bytes
from fastres.options import Precision, Sizes


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
        UnsupportedError: the target has no products of that precision.
    """
    if precision == "fp8" and tiles.target.sm < 89:
        raise UnsupportedError(
            f"fp8 needs sm_89 or newer, this is sm_{tiles.target.sm}; use precision='int8'"
        )
    if recorded is None:
        plan = _Planner(graph, input_shapes, precision, tiles, None).plan()
        return with_overlap(plan, tiles.target, dependent)
    steps = {step.node: step for step in recorded.steps}
    plan = _Planner(graph, input_shapes, precision, tiles, steps).plan()
    plan = with_overlap(plan, tiles.target, recorded.dependent).timed_as(recorded)
    if plan != recorded:
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
        quantised = plain(graph)
        self.graph = graph = quantised.graph
        self.scales = quantised.scales
        self.input_shapes = input_shapes
        self.precision = precision
        self.shapes = infer_shapes(graph, input_shapes)
        self.posing = Posing(graph, self.shapes, precision, tiles.target, self.scales)
        self.reckoner = Reckoner(self.posing, tiles, recorded)
        self.shortcuts = shortcuts(graph)
        self.covered = {name for view in self.shortcuts.values() for name in view.covers}
        self.folded: set[str] = set()  # entries that stems read
        self.stems: dict[str, ConvTile] = {}  # that read folded pictures
        self.pooled: dict[str, tuple[Node, StemPoolTile]] = {}  # stems, by the name of a max pool
        self.chains: dict[str, tuple[Boundary, ChainTile]] = {}  # by the name of conv3
        self.merged: dict[str, Node] = {}  # by the name of a convolution: its projection
        narrow = factors(graph) if precision == "tf32" else ()
        self.tensors = Tensors(self.shapes, self.scales, graph.outputs, precision, narrow)

    def plan(self) -> Plan:
        self._decide_regions()
        for value, entry in zip(self.graph.inputs, entries(self.graph), strict=True):
            scale = self.tensors.place(entry.name, whole=len(self.shapes[entry.name]) == 4)
            folded = entry.name in self.folded
            if folded:
                n, _, h, w = self.shapes[entry.name]
                self.tensors.fold(entry.name, packed_shape(n, h, w))
            op = entry.op if isinstance(entry, Node) else None
            assert isinstance(op, Normalize | None)
            step = LoadInput(entry.name, value.name, entry.name, folded, op, scale)
            self.tensors.written(step)
        for node in self.graph.nodes:
            if node.name not in self.tensors and node.name not in self.covered:
                self._node(node)
        outputs = tuple((self.tensors[n], self.shapes[n]) for n in self.graph.outputs)
        places, total = self.tensors.placed()
        return Plan(
            input_shapes=self.input_shapes,
            places=places,
            steps=tuple(self.tensors.steps),
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
            tile = self.reckoner.stem(stem, pool)
            if tile is not None:
                self.folded.add(name)
            if pool is not None and isinstance(tile, StemPoolTile):
                self.pooled[pool.name] = stem, tile
                self.covered.add(stem.name)
            elif isinstance(tile, ConvTile):
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
        if isinstance(op, Flatten):  # of [N, C, 1, 1]: the same bytes under another name
            self.tensors.alias(node.name, node.inputs[0])
        else:
            self.tensors.written(self._step(node))

    def _step(self, node: Node) -> AnyStep:
        op, name = node.op, node.name
        if name in self.stems or name in self.pooled:
            return self._stem(node)
        if name in self.chains:
            return self._chain(*self.chains[name])
        if isinstance(op, Conv2d):
            return self._conv2d(node, op)
        if isinstance(op, MaxPool):
            whole = name in self.scales and node.inputs[0] in self.scales
            whole = self.tensors.place(name, whole=whole) is not None
            source = self.tensors.read(node.inputs[0], whole)
            sizes = op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode
            return LaunchMaxPool(name, source, name, *sizes)
        if isinstance(op, AvgPool):
            self.tensors.place(name)
            source = self.tensors.read(node.inputs[0])
            windows = op.kernel, op.stride, op.padding, op.ceil_mode, op.count_include_pad
            return LaunchAvgPool(name, source, name, *windows)
        if isinstance(op, Add | BatchNorm | Activation):
            return self._elementwise(node)
        if isinstance(op, GlobalAvgPool):
            whole = node.inputs[0] in self.scales
            scale = self.tensors.place(name, whole=whole)
            scales = Scales(self.scales[node.inputs[0]], target=scale) if whole else None
            return LaunchGlobalAvgPool(name, self.tensors.read(node.inputs[0], whole), name, scales)
        assert isinstance(op, Linear)
        scales, tile = self._layer(node), self.reckoner.linear(node)
        weight, bias = node.params["weight"], node.params.get("bias")
        source = self.tensors.factor(node.inputs[0], is_whole(node))
        return LaunchLinear(name, source, name, weight, bias, op.activation, tile, scales)

    def _stem(self, node: Node) -> LaunchStem | LaunchStemPool:
        """Of a stem that reads folded pictures, or of the max pool that is computed with one."""
        stem, together = self.pooled.get(node.name, (node, None))
        assert isinstance(stem.op, Conv2d)
        scales = self._layer(stem, target=node.name)
        source = self.tensors.factor(stem.inputs[0], is_whole(stem))
        weight, bias = stem.params["weight"], stem.params.get("bias")
        activation = stem.op.epilogue.activation
        operands = node.name, source, node.name, weight, bias, activation
        if together is not None:
            return LaunchStemPool(*operands, together, scales)
        return LaunchStem(*operands, self.stems[node.name], scales)

    def _elementwise(self, node: Node) -> LaunchElementwise:
        op, norm, residual = node.op, None, None
        scale = self.tensors.place(node.name, whole=True)
        source = self.tensors.read(node.inputs[0], whole=True)
        if isinstance(op, Add):
            residual = self.tensors.read(node.inputs[1], whole=True)
        if isinstance(op, BatchNorm):
            names = node.params
            norm = Norm(names["mean"], names["var"], names.get("weight"), names.get("bias"), op.eps)
        activation = op.kind if isinstance(op, Activation) else None
        if isinstance(op, Add | BatchNorm):
            activation = op.activation
        steps = [self.scales.get(name, 1.0) for name in (*node.inputs, node.name)[:2]]
        scales = Scales(steps[0], None, steps[1] if residual else 1.0, scale)
        return LaunchElementwise(
            node.name,
            source,
            node.name,
            norm,
            residual,
            activation,
            None if scales == Scales() else scales,
        )

    def _conv2d(self, node: Node, op: Conv2d) -> LaunchConv2d | LaunchBoxConv2d | LaunchVendor:
        view = self.shortcuts.get(node.name)
        projection = self.merged.get(node.name)
        form = self.reckoner.convolution(node, plain=view is None, projection=projection)
        if isinstance(form.tile, BoxTile):
            return self._box_conv2d(node, op, projection, form.tile)
        if isinstance(form.tile, VendorTile):
            return self._vendor(node, op, form.tile)
        shortcut, residual = None, None
        if op.epilogue.residual:
            view = view or ShortcutA(node.inputs[1], 1, 0, ())
            residual = view.source
            source = self.tensors.read(view.source, is_whole(node))
            shortcut = Shortcut(source, view.stride, view.channel_offset)
        assert isinstance(form.tile, ConvTile)
        return LaunchConv2d(
            node=node.name,
            source=self.tensors.factor(node.inputs[0], is_whole(node)),
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
            scales=self._layer(node, residual),
        )

    def _box_conv2d(
        self, node: Node, op: Conv2d, projection: Node | None, tile: BoxTile
    ) -> LaunchBoxConv2d:
        shape = self.posing.shape(node)
        sizes = shape, tile, self.posing.projection(projection)
        workspace = counters = None
        if size := workspace_bytes(*sizes):
            parts = torch.int32 if self.precision == "int8" and is_whole(node) else torch.float32
            workspace = self.tensors.scratch(f"{node.name}:parts", size // 4, parts)
        if size := counter_bytes(*sizes):
            counters = self.tensors.counters(size // 4)
        residual = node.inputs[1] if op.epilogue.residual and not projection else None
        return LaunchBoxConv2d(
            node=node.name,
            source=self.tensors.factor(node.inputs[0], is_whole(node)),
            target=node.name,
            weight=node.params["weight"],
            biases=_biases(node, projection),
            filter=(shape.r, shape.s),
            stride=op.stride,
            padding=op.padding,
            dilation=op.dilation,
            projected=None if projection is None else self.tensors.factor(projection.inputs[0]),
            projection=None if projection is None else projection.params["weight"],
            projection_stride=(1, 1) if projection is None else _stride(projection),
            residual=None if residual is None else self.tensors.read(residual, is_whole(node)),
            activation=op.epilogue.activation,
            workspace=workspace,
            tile=tile,
            scales=self._layer(node, residual),
            counters=counters,
        )

    def _vendor(self, node: Node, op: Conv2d, tile: VendorTile) -> LaunchVendor:
        self.tensors.place(node.name, outside=True)
        source, params = self.tensors.read(node.inputs[0]), node.params
        residual = self.tensors.read(node.inputs[1]) if op.epilogue.residual else None
        windows = op.stride, op.padding, op.dilation, op.groups
        operands = source, node.name, params["weight"], params["bias"]
        return LaunchVendor(node.name, *operands, *windows, residual, tile)

    def _layer(
        self, node: Node, residual: str | None = None, target: str | None = None
    ) -> Scales | None:
        """Places what a convolution or linear layer gives; its scales, if it is one of int8.

        Args:
            residual: the value that it adds.
            target: the value that is written, where it is not the node's own.
        """
        scale = self.tensors.place(target or node.name, whole=is_whole(node))
        if not is_whole(node):
            return None
        added = 1.0 if residual is None else self.scales.get(residual, 1.0)
        return Scales(self.scales[node.inputs[0]], node.params["scale"], added, scale)

    def _chain(self, boundary: Boundary, tile: ChainTile) -> LaunchChain:
        conv2, conv3 = boundary.conv2, boundary.conv3
        projection, following = boundary.projection, boundary.following
        shape = self.posing.chain_shape(boundary)
        assert isinstance(conv3.op, Conv2d)
        shortcut = conv3.inputs[1] if projection is None else projection.inputs[0]
        whole = is_whole(conv3)
        self.tensors.place(conv3.name, whole=whole)
        if following is not None:
            self.tensors.place(following.name, whole=whole)
        return LaunchChain(
            node=conv3.name,
            source=self.tensors.read(conv2.inputs[0], whole),
            target=conv3.name,
            weight2=conv2.params["weight"],
            bias2=conv2.params.get("bias"),
            weight3=conv3.params["weight"],
            biases3=_biases(conv3, projection),
            projection=None if projection is None else projection.params["weight"],
            shortcut=self.tensors.read(shortcut, whole),
            weight1=None if following is None else following.params["weight"],
            bias1=None if following is None else following.params.get("bias"),
            next_target=None if following is None else following.name,
            stride=shape.stride,
            shortcut_stride=shape.shortcut_stride,
            activation=conv3.op.epilogue.activation,
            tile=tile,
            scales=self._link_scales(boundary) if whole else None,
        )

    def _link_scales(self, boundary: Boundary) -> LinkScales:
        conv2, conv3, following = boundary.conv2, boundary.conv3, boundary.following
        return LinkScales(
            weight2=conv2.params["scale"],
            weight3=conv3.params["scale"],
            weight1=None if following is None else following.params["scale"],
            source=self.scales[conv2.inputs[0]],
            inner=self.scales[conv2.name],
            target=self.scales[conv3.name],
            next_target=None if following is None else self.scales[following.name],
            shortcut=self.scales[conv3.inputs[1]],
        )


def _biases(*nodes: Node | None) -> tuple[str, ...]:
    return tuple(n.params["bias"] for n in nodes if n is not None and "bias" in n.params)


def _stride(node: Node) -> Pair:
    assert isinstance(node.op, Conv2d)
    return node.op.stride
