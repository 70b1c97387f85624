"""torch.export program → Graph: how a PyTorch model becomes the IR."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from fastres.errors import CaptureError, GraphError
from fastres.graph import aten, laws, trees
from fastres.graph.calls import Alias, Call, Emit
from fastres.graph.export import check_finite, export, functional
from fastres.graph.ir import Aten, Conv2d, Graph, Linear, Node, Value
from fastres.graph.names import Namer, place_of, wanted_name
from fastres.graph.readers import PARTS, read, read_part
from fastres.graph.shapes import node_shape
from fastres.graph.specs import DTYPE_NAMES, GIVEN_DTYPES, Dim, Shape, Sym, TensorSpec
from fastres.graph.symbols import Symbols
from fastres.options import Input


@dataclass(frozen=True)
class Captured:
    """A graph beside the program it was read from.

    `values` maps the program's node names to the graph's value names, so that the program's own
    activations can be compared with the graph's (`fastres.oracle`).
    """

    graph: Graph
    program: ExportedProgram
    values: Mapping[str, str]


def capture(model: torch.nn.Module | ExportedProgram, inputs: Sequence[Input]) -> Captured:
    """Reads a model into a Graph; weights are shared with the model, not copied.

    A model that changes its input in place is captured by what it returns: the graph leaves its
    inputs alone.

    Args:
        model: in eval() mode, with finite weights; or a program already exported.
        inputs: one per positional argument of the model; ignored for an ExportedProgram.

    Raises:
        CaptureError: training mode, non-finite weights, no export, or a call that cannot be kept.
    """
    program = model if isinstance(model, ExportedProgram) else export(model, inputs)
    check_finite(program)
    try:
        return _Reader(program).read()
    except _NeedsFunctional:
        return _Reader(functional(program)).read()


class _NeedsFunctional(Exception):
    """An in-place operation changes a tensor in a way that the reader does not follow.

    PyTorch's own functionalisation sorts that out; it costs seconds, so it is not done for every
    model.
    """


class _Reader:
    """One walk over the program's nodes."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.symbols = Symbols()
        self.env: dict[torch.fx.Node, str] = {}  # program node → value or constant
        self.groups: dict[torch.fx.Node, list[torch.fx.Node]] = {}  # nodes that share memory
        self.viewed: set[int] = set()  # ids of groups in which one node may be a view of another
        self.owned: set[torch.fx.Node] = set()  # the model's parameters and buffers
        self.constants: dict[str, torch.Tensor] = {}
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        specs = program.graph_signature.input_specs
        # constants keep their names, whatever the layers are called
        self.namer = Namer(str(s.target) for s in specs if s.kind != InputKind.USER_INPUT)

    def read(self) -> Captured:
        values: dict[str, str] = {}
        outputs: tuple[str, ...] = ()
        self._placeholders()
        if not self.inputs:
            raise CaptureError("the model takes no tensor: what it returns never changes")
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._call(node)
                if node in self.env:
                    values[node.name] = self.env[node]
            elif node.op == "output":
                outputs = self._outputs(node)
            elif node.op != "placeholder" and node.op != "get_attr":
                raise CaptureError(f"the program holds a {node.op} node ({node.name}), not an op")
        used = {n for node in self.nodes for n in (*node.inputs, *node.params.values())}
        graph = Graph(
            inputs=tuple(self.inputs),
            nodes=tuple(self.nodes),
            outputs=outputs,
            constants={name: t for name, t in self.constants.items() if name in used},
            output_tree=trees.of_program(self.program.call_spec.out_spec),
        )
        return Captured(laws.check(graph, "capture"), self.program, values)

    def _placeholders(self) -> None:
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            if not isinstance(spec.arg, TensorArgument):
                raise CaptureError(f"the argument {spec.arg} is no tensor; only tensors are fed")
            node = nodes[spec.arg.name]
            self.groups[node] = [node]
            if spec.kind == InputKind.USER_INPUT:
                self._user_input(node)
                continue
            name = str(spec.target)
            table = self.program.state_dict
            tensor = table[name] if name in table else self.program.constants[name]
            assert isinstance(tensor, torch.Tensor)
            self.constants[name] = tensor.detach().cpu()
            self.env[node] = name
            self.owned.add(node)

    def _user_input(self, node: torch.fx.Node) -> None:
        self.symbols.name_sizes(node.meta["val"], node.name)
        spec = TensorSpec(
            self._shape(node), _dtype_name(node.meta["val"].dtype, f"input {node.name}")
        )
        value = Value(self.namer.name(node.name), spec)
        self.inputs.append(value)
        self._bind(node, value.name, spec)

    def _bind(self, node: torch.fx.Node, name: str, spec: TensorSpec) -> None:
        self.env[node] = name
        self.shapes[name] = spec.shape
        self.dtypes[name] = spec.dtype

    def _call(self, node: torch.fx.Node) -> None:
        val = node.meta.get("val")
        if node.target is operator.getitem and isinstance(val, torch.Tensor):
            self._part(node)
            return
        if not isinstance(val, torch.Tensor):
            self._check_silent(node, val)
            return
        call = Call(node, self._value_of, self._constant)
        if call.converts_in_place:
            raise _NeedsFunctional(node.name)
        step = read(call)
        if isinstance(step, Alias):
            self._alias(node, step, call)
            return
        emit = step if isinstance(step, Emit) else self._aten(call, node)
        self._storage(node, call, self._emit(node, call, emit))

    def _check_silent(self, node: torch.fx.Node, val: Any) -> None:
        """A call that gives no tensor is a size, an assertion, several tensors, or refused."""
        mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if isinstance(val, _SIZES) or (val is None and not mutates):
            return  # the shape rules know better
        if str(node.target) not in PARTS:
            raise CaptureError(
                f"{node.target} in {place_of(node)} returns {type(val).__name__}, not one tensor; "
                "rewrite that part with operations that return one"
            )

    def _part(self, node: torch.fx.Node) -> None:
        """One of the several results of a call."""
        if not node.users:
            return
        parent, index = node.args
        assert isinstance(parent, torch.fx.Node) and isinstance(index, int)
        call = Call(parent, self._value_of, self._constant)
        emit = read_part(call, index)
        if emit is None:
            raise CaptureError(
                f"result {index} of {parent.target} in {place_of(parent)} is used; rewrite that "
                "part with operations that return one tensor"
            )
        self._emit(node, call, emit)
        self._storage(node, call, self.env[node])

    def _alias(self, node: torch.fx.Node, step: Alias, call: Call) -> None:
        if step.copies:
            self.groups[node] = [node]
        else:
            group = self._join(node, step.node)
            if call.is_view:  # or a copy, as the memory's layout decides
                self.viewed.add(id(group))
        self.env[node] = self.env[step.node]

    def _emit(self, node: torch.fx.Node, call: Call, emit: Emit) -> str:
        name = self.namer.name(wanted_name(call.node, call.short_name))
        dtype = _dtype_name(node.meta["val"].dtype, name)
        dtypes = [self._dtype(n) for n in (*emit.inputs, *emit.params.values())]
        first = dtypes[0] if dtypes else dtype
        if isinstance(emit.op, Conv2d | Linear) and dtypes[-1] != first:
            raise CaptureError(
                f"{name} takes {first}, and its weights are {dtypes[-1]}: the model does not run "
                f"on such an input. Give one of {dtypes[-1]}, or call model.to(torch.{first}) first"
            )
        draft = Node(name, emit.op, emit.inputs, TensorSpec((), first), emit.params)
        spec = TensorSpec(self._infer(draft), dtype)
        self._agrees(name, node, spec)
        self.nodes.append(draft.with_(spec=spec))
        self._bind(node, name, spec)
        return name

    def _storage(self, node: torch.fx.Node, call: Call, name: str) -> None:
        """In-place operations change what every alias of their target means from here on."""
        target = call.mutates
        if target is not None:
            group = self._join(node, target)
            if id(group) in self.viewed:
                raise _NeedsFunctional(name)
            for alias in group:
                if alias in self.owned:
                    raise _keeps_state(self.env[alias])
                self.env[alias] = name
        elif call.is_view:
            group = self._join(node, call.node.all_input_nodes[0])
            self.viewed.add(id(group))
        else:
            self.groups[node] = [node]

    def _join(self, node: torch.fx.Node, other: torch.fx.Node) -> list[torch.fx.Node]:
        group = self.groups[other]
        group.append(node)
        self.groups[node] = group
        return group

    def _aten(self, call: Call, node: torch.fx.Node) -> Emit:
        """An operation outside the IR: kept for PyTorch to run, or refused by name."""
        try:
            aten.resolve(call.functional)
        except GraphError as error:
            raise CaptureError(f"{node.name} in {place_of(node)}: {error}") from error
        if call.is_random:
            raise CaptureError(
                f"{call.overload} in {place_of(node)} draws random numbers; an engine gives the "
                "same result for the same input"
            )
        operands = [n for n in node.all_input_nodes if n in self.env]
        index = {n: i for i, n in enumerate(operands)}
        names = [self.env[n] for n in operands]

        def written(arg: Any) -> Any:
            if isinstance(arg, torch.fx.Node):
                if arg in index:
                    return aten.InputOf(index[arg])
                arg = arg.meta.get("val")
            dim = self.symbols.dim(arg) if isinstance(arg, torch.SymInt) else None
            return arg if dim is None else self._size_of(dim, names)

        result = TensorSpec(self._shape(node), _dtype_name(node.meta["val"].dtype, node.name))
        args, kwargs = pytree.tree_map(written, (list(node.args), dict(node.kwargs)))
        return Emit(aten.encode(call.functional, args, kwargs, result), tuple(names))

    def _size_of(self, size: Dim, names: list[str]) -> aten.SizeOf | int:
        """Where a call finds a size among its inputs; a graph input is added if there is none."""
        if isinstance(size, int):
            return size
        bare = Sym(size.symbol)
        for wanted, add, div in ((size, 0, 1), (bare, size.add, size.div)):
            for i, name in enumerate(names):
                if wanted in self.shapes.get(name, ()):
                    return aten.SizeOf(i, self.shapes[name].index(wanted), add, div)
        source = next(value for value in self.inputs if bare in value.spec.shape)
        names.append(source.name)
        return aten.SizeOf(len(names) - 1, source.spec.shape.index(bare), size.add, size.div)

    def _infer(self, draft: Node) -> Shape:
        if isinstance(draft.op, Aten):
            return draft.op.result.shape
        view = Graph((), (), (), self.constants, trees.LEAF)
        try:
            return node_shape(view, draft, self.shapes)
        except GraphError as error:
            raise CaptureError(str(error)) from error

    def _agrees(self, name: str, node: torch.fx.Node, spec: TensorSpec) -> None:
        """What we read must have the shape that PyTorch saw: a misread call stops here."""
        want = node.meta["val"].shape
        if not self.symbols.agree(spec.shape, want):
            raise CaptureError(f"{name} ({node.target}) was read as {spec}, PyTorch has {want}")

    def _dtype(self, name: str) -> str:
        if name not in self.dtypes:
            self.dtypes[name] = _dtype_name(self.constants[name].dtype, name)
        return self.dtypes[name]

    def _shape(self, node: torch.fx.Node) -> Shape:
        dims: list[Dim] = []
        for size, dim in zip(
            node.meta["val"].shape, self.symbols.shape(node.meta["val"]), strict=True
        ):
            if dim is None:
                raise CaptureError(
                    f"{node.target} in {place_of(node)} has a size of {size}, which is not of the "
                    "form (N + a) // b; fix H and W, and write x.size(0) where the batch is meant"
                )
            dims.append(dim)
        return tuple(dims)

    def _value_of(self, node: torch.fx.Node) -> str:
        return self.env[node]

    def _constant(self, node: torch.fx.Node) -> torch.Tensor | None:
        return self.constants.get(self.env.get(node, ""))

    def _outputs(self, node: torch.fx.Node) -> tuple[str, ...]:
        names = []
        leaves = pytree.tree_leaves(node.args[0])
        specs = self.program.graph_signature.output_specs
        for leaf, spec in zip(leaves, specs, strict=True):
            if spec.kind == OutputKind.USER_INPUT_MUTATION:
                continue  # the caller's tensor, see `capture`
            if spec.kind != OutputKind.USER_OUTPUT:
                raise _keeps_state(str(spec.target))
            name = self.env.get(leaf) if isinstance(leaf, torch.fx.Node) else None
            if name is None or name in self.constants:
                what = name or repr(leaf)
                raise CaptureError(f"the model returns {what}, which is no tensor it computed")
            names.append(name)
        return tuple(names)


_SIZES = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _keeps_state(name: str) -> CaptureError:
    return CaptureError(
        f"the model changes {name} when it runs, and an engine keeps no state between calls. If it "
        "was exported in training mode, export it after model.eval()"
    )


def _dtype_name(dtype: torch.dtype, what: str) -> str:
    if dtype not in GIVEN_DTYPES:
        known = ", ".join(name for d, name in DTYPE_NAMES.items() if d in GIVEN_DTYPES)
        raise CaptureError(f"{what} is {dtype}; supported are {known}")
    return DTYPE_NAMES[dtype]
