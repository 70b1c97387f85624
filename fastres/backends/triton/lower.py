"""Graph + input shapes → Plan: which kernels, on which tiles, in which memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastres.backends.base import Refusal
from fastres.backends.triton.arena import Lifetime, place
from fastres.backends.triton.plan import (
    AnyStep,
    LaunchConv2d,
    LaunchGlobalAvgPool,
    LaunchLinear,
    LaunchMaxPool,
    LoadInput,
    Place,
    Plan,
    Shortcut,
)
from fastres.backends.triton.regions import ShortcutA, shortcuts
from fastres.errors import ArtifactError
from fastres.graph.ir import (
    DTYPE_NAMES,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
)
from fastres.graph.shapes import infer_shapes
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import ConvTile, choose_conv_tile, is_valid
from fastres.options import DTYPE_OF, Precision, Sizes


def refusals(graph: Graph) -> tuple[Refusal, ...]:
    """The nodes that the planner has no launch for, and why."""
    covered = {name for view in shortcuts(graph).values() for name in view.covers}
    reasons = ((node.name, _refusal(node, graph)) for node in graph.nodes)
    return tuple(Refusal(n, why) for n, why in reasons if why is not None and n not in covered)


def _refusal(node: Node, graph: Graph) -> str | None:
    op = node.op
    if isinstance(op, Conv2d | MaxPool | GlobalAvgPool):
        return None
    if isinstance(op, Linear):
        return None if len(node.spec.shape) == 2 else "triton's linear takes [N, C] inputs only"
    if isinstance(op, Flatten):
        shape = graph.spec(node.inputs[0]).shape
        flat = op.start_dim == 1 and all(size == 1 for size in shape[2:])
        return None if flat else "triton flattens only [N, C, 1, 1]: others change the layout"
    return (
        f"triton has no kernel for {type(op).__name__}; it has Conv2d with residual and "
        "activation, MaxPool, GlobalAvgPool, Linear, and shortcut A inside a Conv2d"
    )


def make_plan(
    graph: Graph,
    input_shapes: tuple[Sizes, ...],
    precision: Precision,
    target: Target,
    recorded: Plan | None = None,
) -> Plan:
    """Plans a graph whose nodes are all taken, for fixed input shapes.

    Args:
        recorded: a plan of the same graph from a file, whose choices are taken over.

    Raises:
        ArtifactError: the recorded plan is not one of this graph's.
    """
    if recorded is None:
        return _Planner(graph, input_shapes, precision, target, {}).plan()
    tiles = {s.node: s.tile for s in recorded.steps if isinstance(s, LaunchConv2d | LaunchLinear)}
    plan = _Planner(graph, input_shapes, precision, target, tiles).plan()
    if plan != recorded:
        raise ArtifactError("a stored plan does not follow from the graph: copy the engine anew")
    return plan


class _Planner:
    def __init__(
        self,
        graph: Graph,
        input_shapes: tuple[Sizes, ...],
        precision: Precision,
        target: Target,
        tiles: Mapping[str, ConvTile],
    ) -> None:
        self.graph = graph
        self.input_shapes = input_shapes
        self.precision = precision
        self.target = target
        self.tiles = tiles  # by node, where they are chosen already
        self.dtype = DTYPE_OF[precision]
        self.shapes = infer_shapes(graph, input_shapes)
        self.shortcuts = shortcuts(graph)
        self.tensor_of: dict[str, str] = {}  # a graph value → the tensor that holds it
        self.steps: list[AnyStep] = []

    def plan(self) -> Plan:
        for value in self.graph.inputs:
            self.tensor_of[value.name] = value.name
            self.steps.append(LoadInput(value.name, value.name, value.name))
        covered = {name for view in self.shortcuts.values() for name in view.covers}
        for node in self.graph.nodes:
            if node.name not in covered:
                self._node(node)
        outputs = tuple((self.tensor_of[n], self.shapes[n]) for n in self.graph.outputs)
        sizes = {name: self._packed(name) for step in self.steps for name in step.writes()}
        offsets, total = place(self._lifetimes(sizes, [name for name, _ in outputs]))
        dtype = DTYPE_NAMES[self.dtype]
        return Plan(
            input_shapes=self.input_shapes,
            places={name: Place(sizes[name], dtype, offsets[name]) for name in sizes},
            steps=tuple(self.steps),
            outputs=outputs,
            arena_bytes=total,
            allow_tf32=self.precision == "tf32",
        )

    def _node(self, node: Node) -> None:
        op = node.op
        source = self.tensor_of.get(node.inputs[0], "")
        self.tensor_of[node.name] = node.name
        if isinstance(op, Conv2d):
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
        elif isinstance(op, GlobalAvgPool):
            self.steps.append(LaunchGlobalAvgPool(node.name, source, node.name))
        elif isinstance(op, Linear):
            self.steps.append(self._linear(node, op, source))
        else:
            assert isinstance(op, Flatten)  # of [N, C, 1, 1]: the same bytes under another name
            self.tensor_of[node.name] = source

    def _conv2d(self, node: Node, op: Conv2d, source: str) -> LaunchConv2d:
        shortcut = None
        if op.epilogue.residual:
            view = self.shortcuts.get(node.name) or ShortcutA(node.inputs[1], 1, 0, ())
            shortcut = Shortcut(self.tensor_of[view.source], view.stride, view.channel_offset)
        weight = self.graph.constants[node.params["weight"]]
        n, c, h, w = self.shapes[node.inputs[0]]
        k, _, r, s = weight.shape
        shape = ConvShape(n, h, w, c, k, r, s, op.stride, op.padding, op.dilation, op.groups)
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
            shortcut=shortcut,
            activation=op.epilogue.activation,
            tile=self._tile(node, shape),
        )

    def _linear(self, node: Node, op: Linear, source: str) -> LaunchLinear:
        weight, bias = node.params["weight"], node.params.get("bias")
        k, c = self.graph.constants[weight].shape
        tile = self._tile(node, ConvShape(self.shapes[node.name][0], 1, 1, c, k, 1, 1))
        return LaunchLinear(node.name, source, node.name, weight, bias, op.activation, tile)

    def _tile(self, node: Node, shape: ConvShape) -> ConvTile:
        size, tensor_cores = self.dtype.itemsize, self.precision != "fp32"
        if node.name not in self.tiles:
            return choose_conv_tile(shape.gemm, size, self.target, tensor_cores=tensor_cores)
        tile = self.tiles[node.name]
        if not is_valid(tile, size, tensor_cores, self.target):
            raise ArtifactError(f"a stored plan has the tile {tile} for {node.name}, which is none")
        return tile

    def _packed(self, name: str) -> Sizes:
        """The shape as it lies in memory: NHWC for maps."""
        shape = self.shapes[name]
        if len(shape) != 4:
            return shape
        n, c, h, w = shape
        return (n, h, w, c)

    def _lifetimes(self, sizes: dict[str, Sizes], outputs: Sequence[str]) -> list[Lifetime]:
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            first.update(dict.fromkeys(step.writes(), i))
            last.update(dict.fromkeys((*step.writes(), *step.reads()), i))
        last.update(dict.fromkeys(outputs, len(self.steps)))
        return [
            Lifetime(name, math.prod(shape) * self.dtype.itemsize, first[name], last[name])
            for name, shape in sizes.items()
        ]
