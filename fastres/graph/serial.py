"""Graph ↔ JSON and a table of tensors: the form in which a saved engine keeps its network.

The structs of `fastres.graph.ir` are the schema of the JSON, decoded strictly, so what loads is
made of nothing but the operations of the IR. Constants lie beside the JSON, in a table of tensors;
constants that are one tensor under several names (tied weights) are one entry of the table and one
tensor again when loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import torch
import torch.utils._pytree as pytree

from fastres.errors import GraphError
from fastres.graph import aten, laws, trees
from fastres.graph.ir import Aten, Graph, Node, Pad, Value, identity
from fastres.graph.need import need
from fastres.graph.specs import DTYPE_NAMES, DTYPES, Dim, Sym, TensorSpec, spec_of
from fastres.options import Sizes
from fastres.weights import is_finite

_T = TypeVar("_T")
_KEPT = "source:"  # before the names of kept constants; modules cannot have a colon in theirs
_HUGE = 2**48  # more elements than any memory holds


class ConstantEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A constant's spec, and the name of the tensor that holds its values."""

    shape: tuple[int, ...]
    dtype: str
    stored: str


class GraphEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `Graph` without the values of its constants.

    `infinite_pads` names the Pad nodes whose value is infinite: JSON has no such number.
    """

    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    constants: dict[str, ConstantEntry]
    output_tree: str
    infinite_pads: dict[str, Literal["inf", "-inf"]] = {}


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of graph.json: the graph that runs, and the one it was made from.

    `kept` names the constants of the source that no state_dict brings: their values are stored.
    """

    graph: GraphEntry
    source: GraphEntry
    kept: tuple[str, ...] = ()


class Decoded(NamedTuple):
    """Both graphs, and what there is to say of what they return, see `fastres.graph.trees`."""

    graph: Graph
    source: Graph
    notes: tuple[str, ...]


def encode(graph: Graph, source: Graph) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Writes both graphs down.

    Args:
        graph: lawful, constants on the CPU.
        source: lawful; of constants on the meta device only the specs are kept.

    Returns:
        The JSON, and the tensors it refers to, contiguous and each in a storage of its own.

    Raises:
        GraphError: the graph holds something that JSON cannot, such as a NaN.
    """
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def store(key: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)

    for name, stored in same_tensors(graph.constants).items():
        if name == stored:
            store(name, graph.constants[name])
    kept = [
        name
        for name, stored in same_tensors(source.constants).items()
        if name == stored and not source.constants[name].is_meta
    ]
    for name in kept:
        store(_KEPT + name, source.constants[name])
    document = Document(_entry(graph), _entry(source), tuple(kept))
    try:
        return canonical(document, Document), tensors
    except (msgspec.MsgspecError, TypeError) as error:
        raise GraphError(f"the graph cannot be written as JSON: {error}") from error


def decode(
    data: bytes,
    tensors: Mapping[str, torch.Tensor],
    sizes: Sequence[Sizes],
    allow_aten: bool = True,
) -> Decoded:
    """Reads both graphs back; the source's weights come to lie on the meta device.

    Args:
        data: JSON as `encode` writes it; nothing is taken on trust.
        tensors: the table of tensors, by stored name.
        sizes: of the inputs; both graphs must be able to take them.
        allow_aten: whether the graph that runs may call operators of PyTorch.

    Raises:
        GraphError: the JSON is not what this version writes, the tensors do not fit it, or a graph
            breaks the laws of the IR.
    """
    document = strict(data, Document)
    for entry in (document.graph, document.source):
        _check_entry(entry)
    called = {n.name: n.op.overload for n in document.graph.nodes if isinstance(n.op, Aten)}
    if called and not allow_aten:
        some = ", ".join(f"{name} ({overload})" for name, overload in list(called.items())[:5])
        raise GraphError(f"it calls operators of PyTorch, which allow_aten=False refuses: {some}")
    own = {entry.stored: entry for entry in document.source.constants.values()}
    if sorted(document.kept) != sorted(name for name in own if _KEPT + name in tensors):
        raise GraphError("the constants kept of the source are not those among the weights")
    kept = {name: tensors[_KEPT + name] for name in document.kept}
    stored = {_KEPT + name for name in kept}
    weights = {name: tensor for name, tensor in tensors.items() if name not in stored}
    metas = {
        name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for name, entry in own.items()
        if name not in kept
    }
    returned = trees.read(document.graph.output_tree, _outputs(document.graph))
    if document.graph.output_tree != document.source.output_tree:
        raise GraphError("the graph and its source return different things")
    graph = _graph(document.graph, weights, returned.tree)
    source = _graph(document.source, metas | kept, returned.tree)
    graph, source = _lawful(graph, sizes, "graph"), _lawful(source, sizes, "source")
    for each in (graph, source):
        _check_values(each)
    return Decoded(graph, source, returned.notes)


def same_tensors(constants: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each constant, the first name of the same tensor; see `identity`."""
    first: dict[tuple[object, ...], str] = {}
    names: dict[str, str] = {}
    for name, tensor in constants.items():
        names[name] = first.setdefault(identity(tensor), name)
    return names


def canonical(value: Any, kind: type[Any]) -> bytes:
    """The one JSON text of a struct; numbers take the type that the struct declares.

    Raises:
        msgspec.MsgspecError, TypeError: a value does not have its declared type.
    """
    return msgspec.json.encode(msgspec.json.decode(msgspec.json.encode(value), type=kind))


def strict(data: bytes, kind: type[_T]) -> _T:
    """Decodes JSON that must be exactly what this version would write.

    Raises:
        GraphError: it is not JSON, a value has another type, or a field is unknown or given twice.
    """
    try:
        value = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise GraphError(f"it is not what this version of fastres writes: {error}") from error
    if msgspec.json.encode(value) != msgspec.json.format(data, indent=-1):
        raise GraphError("its fields are not exactly those that this version of fastres writes")
    return value


def _entry(graph: Graph) -> GraphEntry:
    pads: dict[str, Literal["inf", "-inf"]] = {}
    nodes = []
    for node in graph.nodes:
        if isinstance(node.op, Pad) and math.isinf(node.op.value):
            pads[node.name] = "inf" if node.op.value > 0 else "-inf"
            node = node.with_(op=msgspec.structs.replace(node.op, value=0.0))
        nodes.append(node)
    constants = {
        name: ConstantEntry(
            tuple(graph.constants[name].shape), DTYPE_NAMES[graph.constants[name].dtype], stored
        )
        for name, stored in same_tensors(graph.constants).items()
    }
    tree = trees.write(graph.output_tree)
    return GraphEntry(graph.inputs, tuple(nodes), graph.outputs, constants, tree, pads)


def _outputs(entry: GraphEntry) -> list[torch.Tensor]:
    """Tensors like those that the graph returns; what has no size yet has a size of 1."""
    specs = {value.name: value.spec for value in entry.inputs}
    specs |= {node.name: node.spec for node in entry.nodes}
    found = (specs.get(name, TensorSpec((0,))) for name in entry.outputs)
    return [
        torch.empty(
            [d if isinstance(d, int) else 1 for d in s.shape], dtype=s.torch_dtype, device="meta"
        )
        for s in found
    ]


def _graph(entry: GraphEntry, tensors: Mapping[str, torch.Tensor], tree: pytree.TreeSpec) -> Graph:
    wanted = {c.stored for c in entry.constants.values()}
    if wanted != set(tensors):
        some = ", ".join(sorted(wanted ^ set(tensors))[:5])
        raise GraphError(f"the graph and the weights do not hold the same tensors: {some}")
    constants: dict[str, torch.Tensor] = {}
    for name, constant in entry.constants.items():
        tensor = tensors[constant.stored]
        if tensor.dtype not in DTYPE_NAMES or spec_of(tensor) != TensorSpec(
            constant.shape, constant.dtype
        ):
            want = TensorSpec(constant.shape, constant.dtype)
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise GraphError(f"the graph says {name} is {want}, the weights hold {got}")
        constants[name] = tensor
    nodes = tuple(_with_infinity(node, entry.infinite_pads) for node in entry.nodes)
    return Graph(entry.inputs, nodes, entry.outputs, constants, tree)


def _lawful(graph: Graph, sizes: Sequence[Sizes], which: str) -> Graph:
    try:
        laws.check(graph, f"loading the {which}", ask=False)
        need(graph, sizes)  # which asks PyTorch, watched
        return graph
    except GraphError:
        raise
    except Exception as error:  # an Aten call that does not fit: PyTorch raises many kinds
        raise GraphError(f"the {which} holds a call that PyTorch refuses: {error}") from error


def _check_values(graph: Graph) -> None:
    """Refuses what the compiler refuses: weights that are no numbers, and NaN in any constant."""
    for name, tensor in graph.constants.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        values = tensor if tensor.dtype.itemsize > 1 else tensor.half()
        if is_finite(values) or (
            name not in graph.taken_as_weights and not bool(values.isnan().any())
        ):
            continue
        raise GraphError(
            f"{name} {list(tensor.shape)} holds values that are NaN or infinite; the engine's "
            "numbers would be wrong"
        )


def _with_infinity(node: Node, pads: Mapping[str, str]) -> Node:
    if node.name not in pads:
        return node
    if not isinstance(node.op, Pad):
        raise GraphError(f"{node.name} is said to pad with infinity, but is no Pad")
    return node.with_(op=msgspec.structs.replace(node.op, value=float(pads[node.name])))


def _check_entry(entry: GraphEntry) -> None:
    """What the laws take for granted, because no pass could break it, but a file can."""
    for name, spec in _specs(entry):
        if spec.dtype not in DTYPES:
            raise GraphError(f"{name} has the dtype {spec.dtype!r}; known are {', '.join(DTYPES)}")
        for dim in spec.shape:
            if not 0 <= _smallest(dim) < _HUGE:
                raise GraphError(f"{name} has the impossible size {dim}")
        if math.prod(d for d in spec.shape if isinstance(d, int)) >= _HUGE:
            raise GraphError(f"{name} is {spec}: more elements than any memory holds")
    for node in entry.nodes:
        if isinstance(node.op, Aten):
            aten.check(node.name, node.op, len(node.inputs))


def _specs(entry: GraphEntry) -> Iterator[tuple[str, TensorSpec]]:
    for name, constant in entry.constants.items():
        yield name, TensorSpec(constant.shape, constant.dtype)
    for value in entry.inputs:
        yield value.name, value.spec
    for node in entry.nodes:
        yield node.name, node.spec
        if isinstance(node.op, Aten):
            yield node.name, node.op.result


def _smallest(dim: Dim) -> int:
    """A lower bound of a size; negative for a form that is no size at all."""
    if isinstance(dim, Sym):
        return 0 if dim.div > 0 and dim.mul > 0 else -1
    return dim
