"""torch.export program → Graph: how a PyTorch model becomes the IR."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from fastres.errors import CaptureError, GraphError
from fastres.graph import aten, laws
from fastres.graph.ir import (
    DTYPE_NAMES,
    Dim,
    Graph,
    Node,
    Shape,
    Sym,
    TensorSpec,
    Value,
)
from fastres.graph.readers import Alias, Call, Emit, read
from fastres.graph.shapes import node_shape
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

    Args:
        model: in eval() mode, with finite weights; or a program already exported.
        inputs: one per positional argument of the model; ignored for an ExportedProgram.

    Raises:
        CaptureError: training mode, non-finite weights, no export, or a call that cannot be kept.
    """
    program = model if isinstance(model, ExportedProgram) else _export(model, inputs)
    _check_finite(program)
    try:
        return _Reader(program).read()
    except _AliasedMutation:
        # An in-place operation on a tensor that is also seen through a view. PyTorch's own
        # functionalisation sorts that out; it costs seconds, so it is not done for every model.
        return _Reader(program.run_decompositions({})).read()


def _export(model: torch.nn.Module, inputs: Sequence[Input]) -> ExportedProgram:
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise CaptureError(
            f"the module {training or type(model).__name__!r} is in training mode: BatchNorm and "
            "Dropout would behave differently. Call model.eval() first"
        )
    tensor = next(iter(model.parameters()), torch.empty(0))
    examples = tuple(
        # a batch of one would be specialised by the exporter
        torch.zeros((2, *spec.usual[1:]), dtype=spec.dtype or tensor.dtype, device=tensor.device)
        for spec in inputs
    )
    free = tuple({i: ExportDim.AUTO for i in (0, *spec.ranged)} for spec in inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's notes on its own internals
            return torch.export.export(model, examples, dynamic_shapes=_dynamic(model, free))
    except Exception as error:  # torch.export raises whatever the traced code and torch raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CaptureError(
            f"torch.export cannot export {type(model).__name__} for inputs "
            f"{[list(e.shape) for e in examples]}: {type(error).__name__}: {first}. Check that "
            "model(x) runs with such inputs and that its control flow does not depend on values"
        ) from error


def _dynamic(model: torch.nn.Module, free: tuple[dict[int, Any], ...]) -> Any:
    """`free` in the form torch.export wants: nested once more for a forward(*args)."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return (free,) if kinds and kinds[0] is inspect.Parameter.VAR_POSITIONAL else free


def _check_finite(program: ExportedProgram) -> None:
    tensors = {**program.state_dict, **program.constants}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device: it has no values to compile")
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CaptureError(
                f"{name} {list(tensor.shape)} holds {bad} values that are NaN or infinite; the "
                "engine's numbers would be wrong. Load sound weights first"
            )


class _AliasedMutation(Exception):
    """An in-place operation hits a tensor that views share."""


class Namer:
    """Gives torchvision-like names: the module's path, the operation where it is functional."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def name(self, wanted: str) -> str:
        count = self._seen.get(wanted)
        self._seen[wanted] = 0 if count is None else count + 1
        return wanted if count is None else self.name(f"{wanted}_{count + 1}")


class _Reader:
    """One walk over the program's nodes."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.namer = Namer()
        self.symbols: dict[str, str] = {}  # the exporter's symbol → N, H, W
        self.hints: dict[str, int] = {}  # N, H, W → the example's size
        self.env: dict[torch.fx.Node, str] = {}  # program node → value or constant
        self.aliases: dict[torch.fx.Node, list[torch.fx.Node]] = {}  # nodes of one storage
        self.viewed: set[int] = set()  # ids of alias groups that a view shares
        self.constants: dict[str, torch.Tensor] = {}
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}

    def read(self) -> Captured:
        values: dict[str, str] = {}
        outputs: tuple[str, ...] = ()
        self._placeholders()
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
            output_tree=pytree.treespec_dumps(self.program.call_spec.out_spec),
        )
        return Captured(laws.check(graph, "capture"), self.program, values)

    def _placeholders(self) -> None:
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            if not isinstance(spec.arg, TensorArgument):
                raise CaptureError(f"the argument {spec.arg} is no tensor; only tensors are fed")
            node = nodes[spec.arg.name]
            self.aliases[node] = [node]
            if spec.kind == InputKind.USER_INPUT:
                self._user_input(node)
                continue
            name = str(spec.target)
            table = self.program.state_dict
            tensor = table[name] if name in table else self.program.constants[name]
            assert isinstance(tensor, torch.Tensor)
            self.constants[name] = tensor.detach().cpu()
            self.env[node] = name

    def _user_input(self, node: torch.fx.Node) -> None:
        val = node.meta["val"]
        letters = ("N", "C", "H", "W") if val.dim() == 4 else ("N",)
        for i, size in enumerate(val.shape):
            symbol = None if isinstance(size, int) else str(size.node.expr)
            if symbol is not None and symbol not in self.symbols:
                letter = letters[i] if i < len(letters) else f"D{i}"
                if letter in self.symbols.values():
                    letter = f"{letter}_{node.name}"
                self.symbols[symbol] = letter
                self.hints[letter] = int(size.node.hint)
        name = self.namer.name(node.name)
        if val.dtype not in DTYPE_NAMES:
            raise CaptureError(
                f"input {name} is {val.dtype}; supported: {sorted(DTYPE_NAMES.values())}"
            )
        spec = TensorSpec(self._shape(node), DTYPE_NAMES[val.dtype])
        self.inputs.append(Value(name, spec))
        self._bind(node, name, spec)

    def _bind(self, node: torch.fx.Node, name: str, spec: TensorSpec) -> None:
        self.env[node] = name
        self.shapes[name] = spec.shape
        self.dtypes[name] = spec.dtype

    def _call(self, node: torch.fx.Node) -> None:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            if val is None or isinstance(val, int | float | bool | torch.SymInt | torch.SymBool):
                return  # a size, or an assertion on sizes: the shape rules know better
            raise CaptureError(
                f"{node.target} in module {_module(node)[0]!r} returns {type(val).__name__}, "
                "not one tensor; rewrite that part with operations that return one"
            )
        call = Call(node, self._value_of, self._constant)
        step = read(call)
        if isinstance(step, Alias):
            if step.copies:
                self.aliases[node] = [node]
            else:
                self._join(node, step.node)
            self.env[node] = self.env[step.node]
            return
        emit = step if isinstance(step, Emit) else self._aten(call, node)
        name = self.namer.name(_wanted(node, call.short_name))
        first = self._dtype(emit.inputs[0]) if emit.inputs else DTYPE_NAMES[val.dtype]
        draft = Node(name, emit.op, emit.inputs, TensorSpec((), first), emit.params)
        spec = TensorSpec(self._infer(draft), DTYPE_NAMES[val.dtype])
        self._agrees(name, node, spec)
        self.nodes.append(draft.with_(spec=spec))
        self._bind(node, name, spec)
        self._storage(node, call, name)

    def _storage(self, node: torch.fx.Node, call: Call, name: str) -> None:
        """In-place operations change what every alias of their target means from here on."""
        target = call.mutates
        if target is not None:
            group = self._join(node, target)
            if id(group) in self.viewed:
                raise _AliasedMutation(name)
            for alias in group:
                self.env[alias] = name
        elif call.is_view:
            group = self._join(node, node.all_input_nodes[0])
            self.viewed.add(id(group))
        else:
            self.aliases[node] = [node]

    def _join(self, node: torch.fx.Node, other: torch.fx.Node) -> list[torch.fx.Node]:
        group = self.aliases[other]
        group.append(node)
        self.aliases[node] = group
        return group

    def _aten(self, call: Call, node: torch.fx.Node) -> Emit:
        """An operation outside the IR: kept for PyTorch to run, or refused by name."""
        tensors = [n for n in node.all_input_nodes if n in self.env]
        index = {n: i for i, n in enumerate(tensors)}

        def index_of(arg: Any) -> int | None:
            return index.get(arg) if isinstance(arg, torch.fx.Node) else None

        spec = TensorSpec(self._shape(node), DTYPE_NAMES[node.meta["val"].dtype])
        op = aten.encode(call.functional, node.args, dict(node.kwargs), index_of, spec)
        try:
            aten.resolve(op.overload)
        except GraphError as error:
            raise CaptureError(f"{node.name} in {_module(node)[0]!r}: {error}") from error
        return Emit(op, tuple(self.env[n] for n in tensors))

    def _infer(self, draft: Node) -> Shape:
        view = Graph((), (), (), self.constants, "")
        try:
            return node_shape(view, draft, self.shapes)
        except GraphError as error:
            raise CaptureError(str(error)) from error

    def _agrees(self, name: str, node: torch.fx.Node, spec: TensorSpec) -> None:
        """What we read must have the shape that PyTorch saw: a misread call stops here."""
        want = [s if isinstance(s, int) else int(s.node.hint) for s in node.meta["val"].shape]
        got = [d.at(self.hints[d.symbol]) if isinstance(d, Sym) else d for d in spec.shape]
        if got != want:
            raise CaptureError(f"{name} ({node.target}) was read as {got}, PyTorch has {want}")

    def _dtype(self, name: str) -> str:
        if name in self.dtypes:
            return self.dtypes[name]
        return DTYPE_NAMES[self.constants[name].dtype]

    def _shape(self, node: torch.fx.Node) -> Shape:
        return tuple(self._dim(size, node) for size in node.meta["val"].shape)

    def _dim(self, size: int | torch.SymInt, node: torch.fx.Node) -> Dim:
        if isinstance(size, int):
            return size
        dim = self._from_expr(size.node.expr)
        if dim is None:
            raise CaptureError(
                f"{node.target} in module {_module(node)[0]!r} has a size of {size}, which is not "
                "of the form (N + a) // b; fix H and W"
            )
        return dim

    def _from_expr(self, expr: Any) -> Dim | None:
        """The exporter's sympy expression as an integer or a Sym."""
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            return Sym(self.symbols[str(expr)]) if str(expr) in self.symbols else None
        parts = [self._from_expr(a) for a in expr.args]
        syms = [p for p in parts if isinstance(p, Sym)]
        ints = [p for p in parts if isinstance(p, int)]
        if len(syms) != 1 or len(ints) != len(parts) - 1:
            return None
        if expr.is_Add:
            return syms[0].plus(sum(ints))
        if type(expr).__name__ == "FloorDiv" and isinstance(parts[0], Sym):
            return syms[0].floordiv(ints[0])
        return None

    def _value_of(self, node: torch.fx.Node) -> str:
        return self.env[node]

    def _constant(self, node: torch.fx.Node) -> torch.Tensor | None:
        return self.constants.get(self.env.get(node, ""))

    def _outputs(self, node: torch.fx.Node) -> tuple[str, ...]:
        names = []
        leaves = pytree.tree_leaves(node.args[0])
        specs = self.program.graph_signature.output_specs
        for leaf, spec in zip(leaves, specs, strict=True):
            if spec.kind != OutputKind.USER_OUTPUT:
                raise CaptureError(f"the model changes {spec.target} when it runs ({spec.kind})")
            if not isinstance(leaf, torch.fx.Node) or leaf not in self.env:
                raise CaptureError(f"the model returns {leaf!r}, which is no tensor it computed")
            names.append(self.env[leaf])
        return tuple(names)


def _module(node: torch.fx.Node) -> tuple[str, str]:
    """Path and type name of the innermost module that made this call."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    return str(path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _wanted(node: torch.fx.Node, short_name: str) -> str:
    path, kind = _module(node)
    if kind.startswith("torch.nn.modules.") and not kind.endswith("container.Sequential"):
        return path or short_name
    return f"{path}.{short_name}" if path else short_name
