"""fastres.graph.trees: what a model returns survives the way to a file, and a file runs nothing."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree

from fastres.errors import GraphError
from fastres.graph import trees

X = torch.zeros(2)
LEAF = {"type": None, "context": None, "children_spec": []}


class Pair(NamedTuple):
    logits: Any
    features: Any


class Named(NamedTuple):
    logits: Any
    features: Any


@dataclass
class Output:
    logits: Any
    hidden: Any = None

    def __post_init__(self) -> None:
        assert self.logits.dim() == 1  # what is tried must look like what the model returns


class Box:
    """Neither a name for the file nor names for its parts."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class Case(Enum):
    LOW = 1


class Cased:
    """Its context is an enum, which PyTorch would import from where the file says."""

    def __init__(self, part: Any, case: Case) -> None:
        self.part, self.case = part, case


def forget(*kinds: type) -> None:
    """As in a process that never heard of them."""
    for kind in kinds:
        pytree._deregister_pytree_node(kind)
    pytree.treespec_loads.cache_clear()


@contextmanager
def registered() -> Iterator[None]:
    pytree._register_namedtuple(Named, serialized_type_name="some.where.Named")
    torch.export.register_dataclass(Output, serialized_type_name="some.where.Output")
    pytree.register_pytree_node(Box, lambda b: (list(b.parts), None), lambda p, _: Box(*p))
    pytree.register_pytree_node(
        Cased,
        lambda c: ([c.part], c.case),
        lambda parts, case: Cased(*parts, case),
        serialized_type_name="some.where.Cased",
        flatten_with_keys_fn=lambda c: ([(pytree.GetAttrKey("part"), c.part)], c.case),
    )
    try:
        yield
    finally:
        forget(Named, Output, Box, Cased)


def kinds(value: Any) -> Any:
    """Types all the way down, with the keys of dicts."""
    if isinstance(value, dict):
        return type(value), {key: kinds(part) for key, part in value.items()}
    if isinstance(value, tuple | list | deque):
        return type(value), [kinds(part) for part in value]
    return type(value)


PLAIN: dict[str, Any] = {
    "a tensor": X,
    "a tuple": (X, X),
    "nothing in it": (X, (), {}, []),
    "a list in a dict": {"b": [X, (X,)], "a": X},
    "numbers as keys": {1: X, -2.5: X, None: X, "1": X, "": X},
    "an OrderedDict": OrderedDict(out=X, aux=X),
    "a deque": deque([X, X], 3),
    "an endless deque": deque([X]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_containers_of_python(name: str) -> None:
    tree = pytree.tree_structure(PLAIN[name])
    text = trees.write(tree)
    assert trees.read(text) == (tree, ())
    assert pytree.treespec_loads(text) == tree  # PyTorch reads the same
    assert trees.read(pytree.treespec_dumps(tree)) == (tree, ())  # as older versions wrote it
    leaves = [X] * tree.num_leaves
    assert kinds(pytree.tree_unflatten(leaves, trees.read(text).tree)) == kinds(PLAIN[name])


OTHERS: dict[str, tuple[Any, Any, str]] = {
    # what is returned, what takes its place, and why
    "a namedtuple": (Pair(X, (X,)), {"logits": X, "features": (X,)}, "not registered"),
    "a defaultdict": (defaultdict(list, {"a": X, 3: X}), {"a": X, 3: X}, "cannot be written down"),
    "a registered namedtuple": (Named(X, X), {"logits": X, "features": X}, "not registered"),
    "a dataclass": (Output(X, [X]), {"logits": X, "hidden": [X]}, r"\(some.where\)"),
    "a field that is None": (Output(X), {"logits": X}, "not registered"),
    "without a name": (Box(X, X), (X, X), "cannot be written down"),
    "with an enum": (Cased(X, Case.LOW), {"part": X}, "cannot be written down"),
    "inside others": ([Output(X, Named(X, X))],)
    + ([{"logits": X, "hidden": {"logits": X, "features": X}}], "some.where.Output"),
    "with empty parts": (Pair(X, ()), {"logits": X, "features": ()}, "not registered"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_types_where_they_are_not_known(name: str) -> None:
    value, instead, why = OTHERS[name]
    with registered():
        tree = pytree.tree_structure(value)
        text = trees.write(tree)
    found = trees.read(text, [X] * tree.num_leaves)
    assert found.tree == pytree.tree_structure(instead)
    assert kinds(pytree.tree_unflatten([X] * tree.num_leaves, found.tree)) == kinds(instead)
    assert any(why in note or why.replace("\\", "") in note for note in found.notes)
    assert all(note.startswith("the model returns ") for note in found.notes)


@pytest.mark.parametrize(
    "name", ["a registered namedtuple", "a dataclass", "a field that is None", "inside others"]
)
def test_other_types_where_they_are_known(name: str) -> None:
    with registered():
        tree = pytree.tree_structure(OTHERS[name][0])
        assert trees.read(trees.write(tree), [X] * tree.num_leaves) == (tree, ())
        # an older version wrote no names beside them
        assert trees.read(pytree.treespec_dumps(tree), [X] * tree.num_leaves) == (tree, ())


def test_a_type_that_an_older_version_wrote_without_names() -> None:
    with registered():
        text = pytree.treespec_dumps(pytree.tree_structure(Output(X)))
    with pytest.raises(GraphError, match=r"returns some.where.Output: .* import what .*\(some"):
        trees.read(text)


def test_a_class_that_refuses_what_the_file_says() -> None:
    with registered():
        text = trees.write(pytree.tree_structure(Output(X)))
        found = trees.read(text, [torch.zeros(2, 2)])
    assert found.tree == pytree.tree_structure({"logits": X})
    assert "cannot be made again (AssertionError" in found.notes[0]


@pytest.mark.parametrize("keys", [(1, 2), Case.LOW, b"a"], ids=repr)
def test_keys_that_cannot_be_written(keys: object) -> None:
    with pytest.raises(GraphError, match="only texts and numbers can be written down"):
        trees.write(pytree.tree_structure([{keys: X}]))


def node(kind: str | None, context: Any, *parts: Any, **more: Any) -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": list(parts), **more}


ENUM = '{"%s": true, "fqn": "antigravity:A", "name": "b"}'
FORGED: dict[str, tuple[Any, str]] = {
    "no tree": ([1, 2], "cannot be read"),
    "no protocol": (LEAF, "cannot be read"),
    "no type": ([1, {"context": None, "children_spec": []}], "cannot be read"),
    "more fields": ([1, {**LEAF, "run": "rm"}], "cannot be read"),
    "a leaf with parts": ([1, node(None, None, LEAF)], "does not fit"),
    "a leaf with a context": ([1, node(None, "null")], "does not fit"),
    "a dict of fewer keys": ([1, node("builtins.dict", '["a"]', LEAF, LEAF)], "does not fit"),
    "a key twice": ([1, node("builtins.dict", '["a", "a"]', LEAF, LEAF)], "does not fit"),
    "keys that are lists": ([1, node("builtins.dict", "[[1]]", LEAF)], "does not fit"),
    "keys that are no JSON": ([1, node("builtins.dict", "[", LEAF)], "does not fit"),
    "keys that are no text": ([1, node("builtins.dict", ["a"], LEAF)], "does not fit"),
    "a tuple with a context": ([1, node("builtins.tuple", '"x"', LEAF)], "does not fit"),
    "None with parts": ([1, node("builtins.NoneType", "null", LEAF)], "does not fit"),
    "None with a context": ([1, node("builtins.NoneType", "1")], "does not fit"),
    "a deque too short": ([1, node("collections.deque", "1", LEAF, LEAF)], "does not fit"),
    "a deque below 0": ([1, node("collections.deque", "-1")], "does not fit"),
    "unknown, without names": ([1, node("os.system", None, LEAF)], "does not fit"),
    "unknown, in an old file": ([1, node("os.system", "[]", LEAF)], "os.system: it is not regist"),
    "too few names": ([1, node("a.B", None, LEAF, LEAF, names=["a"])], "does not fit"),
    "names that are none": ([1, node("a.B", None, LEAF, names="a")], "does not fit"),
    "names that are lists": ([1, node("a.B", None, LEAF, names=[["a"]])], "does not fit"),
    "names without a type": ([1, node(None, None, LEAF, names=["a"])], "does not fit"),
    "a factory": (
        [
            1,
            node(
                "collections.defaultdict",
                {
                    "default_factory_module": "antigravity",
                    "default_factory_name": "fly",
                    "dict_context": ["a"],
                },
                LEAF,
            ),
        ],
        "names code to import",
    ),
    "an enum": ([1, node("builtins.dict", f"[{ENUM % '__enum__'}]", LEAF)], "names code"),
    "an enum in disguise": (
        [1, node("builtins.dict", f"[{ENUM % '__enum' + chr(92) + 'u005f_'}]", LEAF)],
        "does not fit|names code",
    ),
    "an enum of a registered type": (
        [1, node("some.where.Cased", ENUM % r"\u005f_enum__", LEAF, names=["part"])],
        "names code",
    ),
    "an enum behind another": (
        [
            1,
            node(
                "some.where.Cased",
                '{"a": %s, "a": 1}' % (ENUM % "__enum__"),
                LEAF,
                names=["part"],
            ),
        ],
        "names code",
    ),
    "deep": ([1, json.loads('{"type": "builtins.list", "context": "null", "children_spec": ['
             * 200 + json.dumps(LEAF) + "]}" * 200)], "more than 100 deep"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_trees(name: str) -> None:
    forged, message = FORGED[name]
    with registered(), pytest.raises(GraphError, match=message):
        trees.read(json.dumps(forged))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("text", ["", "(", "[" * 100_000, "null"], ids=lambda t: t[:4])
def test_text_that_is_no_tree(text: str) -> None:
    with pytest.raises(GraphError, match="output tree cannot be read"):
        trees.read(text)


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("collections.namedtuple", "builtins.list"),  # registered, and no namedtuple
        ("some.where.Output", '[["logits", "hidden"], []]'),  # more fields than parts
        ("some.where.Output", '[["other"], []]'),
        ("some.where.Output", "7"),
        ("some.where.Named", '"x"'),
    ],
)
def test_a_forged_context_of_a_known_type(kind: str, context: str) -> None:
    """What its registration refuses is a dict of the names; nothing crashes at the first call."""
    text = json.dumps([1, node(kind, context, LEAF, names=["a"])])
    with registered():
        found = trees.read(text, [X])
        assert found.tree == pytree.tree_structure({"a": X}) and len(found.notes) == 1
