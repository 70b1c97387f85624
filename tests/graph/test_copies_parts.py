"""What a model holds: aliases, closures, containers, and what has no copy."""

from __future__ import annotations

import functools
import logging
import os
import threading
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.errors import InputError
from fastres.graph.copies import copied, to_trace


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))


def computed() -> Tensor:
    return torch.ones(2, requires_grad=True) * 3


class Wraps(nn.Module):
    """A network with attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.body = net()
        for name, value in attributes.items():
            setattr(self, name, value)


class TestAliases:
    def test_one_module_twice_and_tied_parameters(self) -> None:
        model = net()
        model.append(model[2])
        model.tied = nn.Conv2d(3, 4, 3)
        model.tied.weight = model[0].weight
        model.table = {"by name": [model[0], model[0].weight]}
        copy = copied(model)
        assert copy[4] is copy[2] and copy.tied.weight is copy[0].weight
        assert copy.table["by name"][0] is copy[0] is not model[0]
        assert copy.table["by name"][1] is copy[0].weight is not model[0].weight

    def test_views_are_views_of_the_copy(self) -> None:
        model = net()
        model.view = model[0].weight.view(-1)
        copy = copied(model)
        copy[0].weight.data.zero_()
        assert not copy.view.any() and model.view.any()

    def test_what_it_refers_to_is_the_copys(self) -> None:
        model = net()
        table = {"weight": model[0].weight}
        model.method, model.lookup, model.table = model.state_dict, table.get, table
        copy = copied(model)
        assert copy.method.__self__ is copy
        assert copy.lookup("weight") is copy.table["weight"] is copy[0].weight

    def test_a_function_that_calls_itself(self) -> None:
        model = net()

        def last(n: int) -> nn.Module:
            return last(n - 1) if n else model

        model.last = last
        copy = copied(model)
        assert copy.last(3) is copy and model.last(3) is model

    def test_a_global_of_a_script(self) -> None:
        """In a notebook the old forward is a global, not a variable of a function."""
        model = net()
        script = {"before": model.forward}
        exec("def forward(x): return before(x)", script)
        model.forward = script["forward"]
        copy = copied(model, dtype=torch.float64)
        assert copy(torch.ones(1, 3, 8, 8).double()).dtype == torch.float64
        assert script["before"].__self__ is model

    def test_functions_of_pytorch_stay_the_same(self) -> None:
        model = Wraps(gelu=F.gelu, pool=F.max_pool2d, relu=torch.relu, dtype=torch.float32)
        copy = copied(model)
        assert copy.gelu is F.gelu and copy.pool is F.max_pool2d
        assert copy.relu is torch.relu and copy.dtype is torch.float32


@dataclass(frozen=True, slots=True)
class Frozen:
    features: Tensor


class Mutters:
    """Holds a tensor and raises when it is copied."""

    def __init__(self) -> None:
        self.features = computed()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ValueError("no")


class Pretends:
    """Holds a tensor and says that it is its own copy."""

    def __init__(self) -> None:
        self.features = computed()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


HOLDERS: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
    "list": ([[computed()]], lambda v: v[0][0]),
    "dict": ({"a": {"b": computed()}}, lambda v: v["a"]["b"]),
    "tuple": ((1, (computed(),)), lambda v: v[1][0]),
    "named tuple of PyTorch": (computed().view(1, 2).max(1), lambda v: v.values),
    "ordered dict": (OrderedDict(a=computed()), lambda v: v["a"]),
    "default dict": (defaultdict(list, a=[computed()]), lambda v: v["a"][0]),
    "deque": (deque([computed()], maxlen=2), lambda v: v[0]),
    "namespace": (types.SimpleNamespace(a=computed()), lambda v: v.a),
    "frozen dataclass": (Frozen(computed()), lambda v: v.features),
    "read-only dict": (types.MappingProxyType({"a": computed()}), lambda v: v["a"]),
    "partial": (functools.partial(torch.add, computed()), lambda v: v.args[0]),
    "refuses": (Mutters(), lambda v: v.features),
    "pretends": (Pretends(), lambda v: v.features),
    "half-way": ([computed(), [computed(), Mutters()]], lambda v: v[1][1].features),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_computed_tensors(name: str) -> None:
    value, look = HOLDERS[name]
    copy = copied(Wraps(held=value), dtype=torch.float64).held
    assert type(copy) is type(value) and copy is not value
    assert look(copy).dtype == torch.float64 and look(value).dtype == torch.float32
    assert torch.equal(look(copy).float(), look(value)) and look(copy).is_leaf


def test_what_has_no_copy_is_shared() -> None:
    with open(os.devnull) as file:
        held = {
            "lock": threading.Lock(),
            "reentrant": threading.RLock(),
            "file": file,
            "numbers": (i for i in range(3)),
            "module": torch,
            "logger": logging.getLogger(__name__),
            "function": lambda x: x,
            "elsewhere": weakref.ref(Wraps),
        }
        copy = copied(Wraps(condition=threading.Condition(), made=torch.Generator(), **held))
    for name, value in held.items():
        assert getattr(copy, name) is value


def test_what_has_neither_is_named() -> None:
    model = nn.Sequential(Wraps(), Wraps(source=(t for t in [torch.ones(1)])))
    with pytest.raises(InputError, match=r"1\.source is generator, which holds tensors") as caught:
        copied(model)
    assert len(str(caught.value).splitlines()) == 1
    assert to_trace(model)[1].source is model[1].source  # tracing reads it, and changes no value


class Stubborn(Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("first line\nsecond line")


def test_tensors_of_other_kinds() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.as_nested_tensor([torch.ones(1), torch.ones(2)])
    model = Wraps(
        sparse=torch.eye(2).to_sparse(),
        complex=torch.ones(2, dtype=torch.complex64),
        nested=nested,
        empty=torch.ones(2, device="meta"),
    )
    copy = copied(model)
    for name in ("sparse", "complex"):
        mine, theirs = getattr(copy, name), getattr(model, name)
        assert mine is not theirs and torch.equal(mine.to_dense(), theirs.to_dense())
    assert copy.nested.is_nested and copy.empty.is_meta
    with pytest.raises(InputError, match=r"Wraps\.bad is Stubborn.*\(RuntimeError: first line\)"):
        copied(Wraps(bad=torch.ones(1).as_subclass(Stubborn)))


def test_attributes_of_parameters_come_along_and_gradients_stay() -> None:
    model = net()
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    model[0].weight.scale = computed()
    copy = copied(model)
    assert copy[0].weight.scale.is_leaf and torch.equal(copy[0].weight.scale, computed())
    assert copy[0].weight.grad is None and model[0].weight.grad is not None
    assert copy[0].weight.requires_grad and isinstance(copy[0].weight, nn.Parameter)


def test_under_inference_mode_a_copy_is_of_usual_tensors() -> None:
    with torch.inference_mode():
        copy = copied(net())
    assert not any(p.is_inference() for p in copy.parameters())


def test_a_changed_copy_of_a_traced_module_leaves_it_alone() -> None:
    model, x = torch.fx.symbolic_trace(net().eval()), torch.randn(1, 3, 8, 8)
    copy, before = copied(model), model(x)
    for node in list(copy.graph.nodes):
        if node.target == "2":
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
    copy.recompile()
    assert torch.equal(model(x), before) and not torch.equal(copy(x), before)


def test_other_tensors_instead() -> None:
    model = net()
    model.tied, stand_in = model[0].weight, torch.empty(4, 3, 3, 3, device="meta")
    copy = copied(model, {id(model[0].weight): stand_in})
    assert copy[0].weight is stand_in and copy.tied is stand_in
    assert not copy[3].weight.is_meta
