"""What a model returns: the containers around its tensors, as PyTorch's tree and as JSON.

A graph holds PyTorch's own tree (`TreeSpec`), so an engine returns whatever PyTorch can flatten. A
file holds PyTorch's JSON of it, and beside each container that is not one of Python's the names of
its parts: where its type is not registered with PyTorch when the file is read, a dict with these
names takes its place, or a tuple where the parts have none. Nothing that a file names is imported.
"""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import msgspec
import torch
import torch.utils._pytree as pytree
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fastres.errors import GraphError

LEAF = pytree.tree_structure(0)


class _Nothing:
    """Stands for None in a tree: PyTorch takes None for a leaf, and an engine's are tensors."""


pytree.register_pytree_node(_Nothing, lambda _: ([], None), lambda *_: None)
_NONE = pytree.TreeSpec(_Nothing, None, [])
_PROTOCOL = 1  # of PyTorch's JSON
_DEEPEST = 100  # containers in each other
_NAMEDTUPLE = "collections.namedtuple"
_DEFAULTDICT = "collections.defaultdict"
_PLAIN: dict[str, Callable[..., Any]] = {
    "builtins.tuple": tuple,
    "builtins.list": list,
    "builtins.dict": dict,
    "collections.OrderedDict": OrderedDict,
    "collections.deque": deque,
    "builtins.NoneType": _Nothing,
}
_TRACED: dict[Any, Any] = {immutable_dict: dict, immutable_list: list}  # torch.fx's own containers


class Returned(NamedTuple):
    """The tree read from a file, and what there is to say of types that it could not keep."""

    tree: pytree.TreeSpec
    notes: tuple[str, ...]


class _Node(msgspec.Struct, forbid_unknown_fields=True):
    """PyTorch's JSON form of a tree, where `type` is None for a leaf; `names` are ours.

    They are there for every type that is not one of Python's own, a list, or None if its parts have
    no names. Without a context the type cannot be made again.
    """

    type: str | None
    context: Any
    children_spec: list[_Node]
    names: Any = msgspec.UNSET


def of_program(spec: pytree.TreeSpec | None, returned: Iterable[object]) -> pytree.TreeSpec:
    """The tree that a program returns; torch.fx's dicts and lists were plain ones.

    Args:
        returned: what stands at its leaves, of which those that are None become part of the tree.
    """
    assert spec is not None  # every exported program has one
    return _traced(spec, iter(returned))


def _traced(spec: pytree.TreeSpec, returned: Iterator[object]) -> pytree.TreeSpec:
    if spec.type is None:
        return _NONE if next(returned) is None else spec
    parts = [_traced(part, returned) for part in spec.children()]
    return pytree.TreeSpec(_TRACED.get(spec.type, spec.type), spec.context, parts)


def write(tree: pytree.TreeSpec) -> str:
    """
    Raises:
        GraphError: a dict has keys that JSON has no words for.
    """
    return msgspec.json.encode((_PROTOCOL, _node(tree))).decode()


def read(text: str, outputs: Sequence[torch.Tensor] = ()) -> Returned:
    """The tree that `write` wrote; nothing is taken on trust.

    Args:
        text: from a file.
        outputs: tensors like those that the model returns, to try the types with.

    Raises:
        GraphError: it is no such text, names code to import, or, written by an older version, a
            type that is not registered here.
    """
    try:
        _, root = msgspec.json.decode(text, type=tuple[int, _Node])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise GraphError(f"the output tree cannot be read: {error}") from error
    notes: dict[str, None] = {}
    value = _value(root, chain(outputs, repeat(torch.empty(0))), notes, 0)
    return Returned(pytree.tree_structure(value), tuple(notes))


def _node(tree: pytree.TreeSpec) -> _Node:
    kind, context = tree.type, tree.context
    if kind is None:
        return _Node(None, None, [])
    parts = [_node(part) for part in tree.children()]
    for name, plain in _PLAIN.items():
        if kind is plain:
            return _Node(name, _text(context), parts)
    if kind is defaultdict:  # what it calls for a key that is missing is code
        return _Node(_DEFAULTDICT, None, parts, context[1])
    name, written = f"{kind.__module__}.{kind.__qualname__}", None
    if kind is namedtuple:
        name, written = _NAMEDTUPLE, f"{context.__module__}.{context.__qualname__}"
    try:
        hollow = pytree.TreeSpec(kind, context, [LEAF] * len(parts))
        found = json.loads(pytree.treespec_dumps(hollow))[1]
        if not _names_code(found["context"]):
            name, written = found["type"], found["context"]
    except Exception:  # no name registered, or no words for the context: torch raises many kinds
        pass
    return _Node(name, written, parts, _names(tree))


def _text(context: Any) -> str:
    """A dict's keys, or a deque's length, in JSON."""
    keys = context if isinstance(context, list) else [context]
    if not all(isinstance(key, str | int | float | None) for key in keys):
        raise GraphError(
            f"the model returns a dict with the keys {keys}; only texts and numbers can be written "
            "down: let it return a dict with such keys"
        )
    return json.dumps(context)


def _names(tree: pytree.TreeSpec) -> list[Any] | None:
    """What its registration calls the parts of a container; None if it does not say."""
    try:
        value = pytree.tree_unflatten([torch.empty(0)] * tree.num_leaves, tree)
        found = pytree.tree_leaves_with_path(value, is_leaf=lambda part: part is not value)
        keys = [path[0] for path, _ in found]
    except Exception:  # somebody's class, or a registration without names: either may raise any
        return None
    names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
    fit = all(isinstance(name, str) for name in names) and len(set(names)) == tree.num_children
    return names if fit else None


def _value(node: _Node, outputs: Iterator[torch.Tensor], notes: dict[str, None], depth: int) -> Any:
    """The containers that a node stands for, with tensors in them."""
    if depth > _DEEPEST:
        raise GraphError(f"the output tree is nested more than {_DEEPEST} deep")
    parts = [_value(part, outputs, notes, depth + 1) for part in node.children_spec]
    if (node.type == _DEFAULTDICT and node.context is not None) or _names_code(node.context):
        raise GraphError(
            f"the output tree holds a {node.type} that names code to import; let the model return "
            "a dict with plain keys"
        )
    if node.type in _PLAIN:
        return _plain(node, parts)
    if node.type is not None:
        return _other(node, parts, notes)
    if node.context is not None or parts:
        raise _unreadable(node)
    return next(outputs)


def _plain(node: _Node, parts: list[Any]) -> Any:
    """One of Python's own containers; its context is a text of JSON."""
    make = _PLAIN[str(node.type)]
    context = _json(node.context)
    if make in (dict, OrderedDict) and _fits(context, parts):
        return make(zip(context, parts, strict=True))
    if make in (tuple, list) and context is None:
        return make(parts)
    if make is _Nothing and context is None and not parts:
        return _Nothing()
    longest = len(parts) if context is None else context
    if make is deque and isinstance(longest, int) and longest >= len(parts):
        return deque(parts, maxlen=context)
    raise _unreadable(node)


def _other(node: _Node, parts: list[Any], notes: dict[str, None]) -> Any:
    """A container of a type that is registered with PyTorch, or a dict or tuple in its place."""
    names = node.names
    unnamed = names is msgspec.UNSET  # by an older version, which wrote no others
    fits = node.context is not None if unnamed else names is None or _fits(names, parts)
    if not fits:
        raise _unreadable(node)
    kind = node.context if node.type == _NAMEDTUPLE else node.type
    if node.context is None:
        why = "it cannot be written down"
    else:
        try:
            return _typed(node, parts)
        except NotImplementedError:  # what PyTorch raises for a type that it does not know
            where = str(kind).rpartition(".")[0] or kind
            why = f"it is not registered with PyTorch here; import what does that ({where}) first"
        except Exception as error:  # somebody's class: it may raise anything
            why = f"it cannot be made again ({type(error).__name__}: {error})"
    if unnamed:
        raise GraphError(f"the model returns {kind}: {why}")
    notes[f"the model returns {kind}, this engine a {'dict' if names else 'tuple'}: {why}"] = None
    return dict(zip(names, parts, strict=True)) if names else tuple(parts)


def _typed(node: _Node, parts: list[Any]) -> Any:
    """A container of a type that is registered with PyTorch, made as its registration says."""
    hollow = _Node(node.type, node.context, [_Node(None, None, [])] * len(parts))
    tree = pytree.treespec_loads(msgspec.json.encode((_PROTOCOL, hollow)).decode())
    if tree.type is namedtuple and not pytree.is_namedtuple_class(tree.context):
        raise TypeError(f"{tree.context} is no namedtuple")
    value = pytree.tree_unflatten(parts, tree)
    if len(pytree.tree_leaves(value)) != len(pytree.tree_leaves(parts)):
        raise TypeError("it does not hold its parts")
    return value


def _fits(names: Any, parts: list[Any]) -> bool:
    scalars = isinstance(names, list) and all(
        isinstance(name, str | int | float | None) for name in names
    )
    return scalars and len(names) == len(set(names)) == len(parts)


def _json(context: Any, **options: Any) -> Any:
    try:
        return json.loads(context, **options)
    except (TypeError, ValueError, RecursionError):  # no text, or no JSON
        return msgspec.UNSET


def _names_code(context: Any) -> bool:
    """Whether PyTorch would import a module to make an enum of something in a context."""
    found: list[bool] = []
    text = context if isinstance(context, str) else json.dumps(context)
    # as PyTorch looks for them, which sees entries that a later one of the same name replaces
    _json(text, object_hook=lambda entry: found.append("__enum__" in entry))
    return any(found)


def _unreadable(node: _Node) -> GraphError:
    return GraphError(f"the output tree cannot be read: {node.type} does not fit its parts")
