"""torch.export program → Graph: how a PyTorch model becomes the IR."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from fastres.errors import CaptureError, GraphError
from fastres.graph import aten, laws, trees
from fastres.graph.aliases import Aliases, NeedsFunctional
from fastres.graph.branches import check_branches
from fastres.graph.calls import Alias, Call, Emit, has_sizes
from fastres.graph.export import check_finite, export, functional
from fastres.graph.ir import Aten, Conv2d, Graph, Linear, Node, Value
from fastres.graph.memory import memory_order
from fastres.graph.names import Namer, place_of, wanted_name
from fastres.graph.readers import read, read_part
from fastres.graph.shapes import node_shape
from fastres.graph.specs import DTYPE_NAMES, GIVEN_DTYPES, Dim, Shape, Sym, TensorSpec
from fastres.graph.symbols import Place, Symbols
from fastres.options import Input, Sizes


@dataclass(frozen=True)
class Captured:
    """A graph beside the program it was read from.

    `values` maps the program's node names to the graph's value names, so that the program's own
    activations can be compared with the graph's (`fastres.parity.oracle`).
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
        inputs: one per positional argument of the model; of an ExportedProgram, what it says that
            it takes.

    Raises:
        CaptureError: training mode, non-finite weights, no export, or a call that cannot be kept.
    """
    if isinstance(model, ExportedProgram):
        check_finite(model)
        return _read(model, inputs)
    program = export(model, inputs)
    check_finite(program)
    captured = _read(program, inputs)

    def again(shapes: Sequence[Sizes]) -> ExportedProgram:
        return export(model, inputs, shapes)

    def graph_of(program: ExportedProgram, pins: Mapping[Place, int]) -> Graph:
        return _read(program, inputs, pins).graph

    check_branches(program, captured.graph, inputs, again, graph_of)
    return captured


def _read(
    program: ExportedProgram, inputs: Sequence[Input], pins: Mapping[Place, int] | None = None
) -> Captured:
    try:
        return _Reader(program, inputs, pins).read()
    except NeedsFunctional:
        pass
    try:
        return _Reader(functional(program), inputs, pins).read()
    except NeedsFunctional as error:
        raise CaptureError(
            f"{error} changes tensors in place, or decides by values, in a way that PyTorch's "
            "functionalisation leaves as it is. Rewrite that line with operations that return a "
            "new tensor"
        ) from error


class _Reader:
    """One walk over the program's nodes.

    Args:
        inputs: what it is fed, which its sizes range over.
        pins: sizes of inputs that the graph is to have as numbers.
    """

    def __init__(
        self,
        program: ExportedProgram,
        inputs: Sequence[Input],
        pins: Mapping[Place, int] | None = None,
    ) -> None:
        self.program = program
        self.symbols = Symbols(inputs, pins)
        self.env: dict[torch.fx.Node, str] = {}  # program node → value or constant
        self.aliases = Aliases()
        self.fixed: set[torch.fx.Node] = set()  # the constants, and what is computed of them alone
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
        outputs: tuple[str | None, ...] = ()
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
        self._settle(outputs)
        used = {n for node in self.nodes for n in (*node.inputs, *node.params.values())}
        graph = Graph(
            inputs=tuple(self.inputs),
            nodes=tuple(self.nodes),
            outputs=tuple(name for name in outputs if name is not None),
            constants={name: t for name, t in self.constants.items() if name in used},
            output_tree=trees.of_program(self.program.call_spec.out_spec, outputs),
        )
        return Captured(laws.check(graph, "capture"), self.program, values)

    def _settle(self, outputs: Collection[str | None]) -> None:
        """What is made of numbers alone, as by torch.ones(3), is a constant like any other."""
        for node in [n for n in self.nodes if not n.inputs and n.name not in outputs]:
            assert isinstance(node.op, Aten)  # all others read something
            self.constants[node.name] = aten.made(node.name, node.op)
            self.nodes.remove(node)

    def _placeholders(self) -> None:
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            if not isinstance(spec.arg, TensorArgument):
                raise CaptureError(f"the argument {spec.arg} is no tensor; only tensors are fed")
            node = nodes[spec.arg.name]
            fed = spec.kind == InputKind.USER_INPUT
            self.aliases.alone(node, owned=not fed)
            if fed:
                self._user_input(node)
                continue
            name = str(spec.target)
            table = self.program.state_dict
            tensor = table[name] if name in table else self.program.constants[name]
            assert isinstance(tensor, torch.Tensor)
            self.constants[name] = tensor.detach().cpu()
            self.env[node] = name
            self.fixed.add(node)

    def _user_input(self, node: torch.fx.Node) -> None:
        self.symbols.name_sizes(node.meta["val"], node.name, len(self.inputs))
        spec = TensorSpec(
            self.symbols.shape(node), _dtype_name(node.meta["val"].dtype, f"input {node.name}")
        )
        value = Value(self.namer.name(node.name), spec)
        self.inputs.append(value)
        self._bind(node, value.name, spec)

    def _bind(self, node: torch.fx.Node, name: str, spec: TensorSpec) -> None:
        self.env[node] = name
        self.shapes[name] = spec.shape
        self.dtypes[name] = spec.dtype

    def _call(self, node: torch.fx.Node) -> None:
        if node.target is operator.getitem:
            self._part(node)
            return
        val = node.meta.get("val")
        if isinstance(val, _SIZES):
            return  # the shape rules know better
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NeedsFunctional(f"{node.target} in {place_of(node)}")
        call = Call(node, self._value_of, self.fixed.__contains__)
        if call.changes_oddly:
            raise NeedsFunctional(f"{call.overload} in {place_of(node)}")
        if not isinstance(val, torch.Tensor):
            return  # an assertion, or several results, each of which is read by itself
        self._of_constants(node, node)
        step = read(call)
        if isinstance(step, Alias):
            self._alias(node, step, call)
        elif isinstance(step, Emit) and node not in self.fixed:
            self._storage(node, call, self._emit(node, call, step))
        else:
            self._storage(node, call, self._emit(node, call, self._aten(call, node)))

    def _part(self, node: torch.fx.Node) -> None:
        """One of the several results of a call."""
        parent, index = node.args
        if not node.users or not isinstance(node.meta.get("val"), torch.Tensor):
            return
        assert isinstance(parent, torch.fx.Node) and isinstance(index, int)
        call = Call(parent, self._value_of, self.fixed.__contains__)
        self._of_constants(node, parent)
        emit = None if node in self.fixed else read_part(call, index)
        self._storage(node, call, self._emit(node, call, emit or self._aten(call, node, index)))

    def _of_constants(self, node: torch.fx.Node, call: torch.fx.Node) -> None:
        """Notes whether a call computes of constants alone; PyTorch runs it then, once."""
        if all(used in self.fixed for used in call.all_input_nodes) and not has_sizes(call):
            self.fixed.add(node)

    def _alias(self, node: torch.fx.Node, step: Alias, call: Call) -> None:
        if step.copies:
            self.aliases.alone(node)
        else:  # a view, or a copy, as the memory's layout decides
            self.aliases.join(node, step.node, view=call.is_view and call.mutates is None)
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
        if call.mutates is not None:
            for alias in self.aliases.changed(node, call.mutates):
                if self.aliases.is_owned(alias):
                    raise _keeps_state(self.env[alias])
                self.env[alias] = name
                if node not in self.fixed:
                    self.fixed.discard(alias)
        elif call.is_view:
            self.aliases.join(node, call.node.all_input_nodes[0], view=True)
        else:
            self.aliases.alone(node)

    def _aten(self, call: Call, node: torch.fx.Node, index: int | None = None) -> Emit:
        """An operation outside the IR: kept for PyTorch to run, or refused by name.

        Args:
            node: the call, or that one of its results.
            index: of several results.
        """
        try:
            aten.resolve(call.functional)
        except GraphError as error:
            if call.schema.is_mutable:
                raise NeedsFunctional(f"{call.overload} in {place_of(call.node)}") from error
            raise CaptureError(f"{node.name} in {place_of(call.node)}: {error}") from error
        if call.is_random:
            raise CaptureError(
                f"{call.overload} in {place_of(call.node)} draws random numbers; an engine gives "
                "the same result for the same input"
            )
        operands = [n for n in call.node.all_input_nodes if n in self.env]
        place = {n: i for i, n in enumerate(operands)}
        names = [self.env[n] for n in operands]
        if call.short_name in aten.READ_MEMORY:
            names[0] = self._in_memory(call, operands[0])

        def written(arg: Any) -> Any:
            if isinstance(arg, torch.fx.Node):
                if arg in place:
                    return aten.InputOf(place[arg])
                arg = arg.meta.get("val")
            dim = self.symbols.dim(arg) if isinstance(arg, torch.SymInt) else None
            return arg if dim is None else self._size_of(dim, names)

        result = TensorSpec(
            self.symbols.shape(node), _dtype_name(node.meta["val"].dtype, node.name)
        )
        given = list(call.node.args), dict(call.node.kwargs)
        args, kwargs = pytree.tree_map(written, given)
        return Emit(aten.encode(call.functional, args, kwargs, result, index), tuple(names))

    def _in_memory(self, call: Call, operand: torch.fx.Node) -> str:
        """The operand with its dimensions in the order in which the model has them in memory."""
        name, order = self.env[operand], memory_order(operand.meta["val"])
        shape = self.symbols.shape(operand)
        if order is None or (order != tuple(range(len(shape))) and "scatter" in call.short_name):
            raise CaptureError(
                f"{call.overload} in {place_of(call.node)} reads the memory of {name}, a part of "
                "another tensor or not in order; an engine lays it out in its own way. Call "
                "x.contiguous() before it, or write it with view, slices and unfold"
            )
        if order == tuple(range(len(shape))):
            return name
        spec = TensorSpec(tuple(shape[i] for i in order), self._dtype(name))
        op = aten.encode("aten.permute.default", [aten.InputOf(0), list(order)], {}, spec)
        node = Node(self.namer.name(f"{name}.in_memory"), op, (name,), spec)
        self.nodes.append(node)
        self.shapes[node.name], self.dtypes[node.name] = spec.shape, spec.dtype
        return node.name

    def _size_of(self, size: Dim, names: list[str]) -> aten.SizeOf | int:
        """Where a call finds a size among its inputs; a graph input is added if there is none."""
        if isinstance(size, int):
            return size
        bare = Sym(size.symbol)
        form = size.add, size.div, size.mul
        for wanted, of_it in ((size, ()), (bare, form)):
            for i, name in enumerate(names):
                if wanted in self.shapes.get(name, ()):
                    return aten.SizeOf(i, self.shapes[name].index(wanted), *of_it)
        source = next(value for value in self.inputs if bare in value.spec.shape)
        names.append(source.name)
        return aten.SizeOf(len(names) - 1, source.spec.shape.index(bare), *form)

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

    def _value_of(self, node: torch.fx.Node) -> str:
        return self.env[node]

    def _outputs(self, node: torch.fx.Node) -> tuple[str | None, ...]:
        """The value at each leaf of what the model returns, or None, which it may return, too."""
        names: list[str | None] = []
        leaves = pytree.tree_leaves(node.args[0])
        specs = self.program.graph_signature.output_specs
        for leaf, spec in zip(leaves, specs, strict=True):
            if spec.kind == OutputKind.USER_INPUT_MUTATION:
                continue  # the caller's tensor, see `capture`
            if spec.kind != OutputKind.USER_OUTPUT:
                raise _keeps_state(str(spec.target))
            if leaf is None:
                names.append(None)
                continue
            name = self.env.get(leaf) if isinstance(leaf, torch.fx.Node) else None
            if name is None or name in self.constants:
                what = name or repr(leaf)
                raise CaptureError(
                    f"the model returns {what}, which is no tensor it computed, and an engine "
                    "gives nothing else. Wrap the model in a module whose forward leaves it out"
                )
            names.append(name)
        if set(names) <= {None}:
            raise CaptureError("the model returns no tensor; let its forward return what it found")
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
