"""Hooks: those of the network stay, those of somebody who looks at it are named."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils import prune
from torchvision.models import resnet18

from fastres.backends.reference import ReferenceExecutable
from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.graph.hooks import check_hooks
from fastres.options import Input

SEEN: dict[str, Any] = {}
NOTES = SimpleNamespace(calls=0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)
    ).eval()


class Recorder:
    """Keeps what it sees; `seen` is made at the first call."""

    def __call__(self, *args: Any) -> None:
        self.seen = args

    def method(self, *args: Any) -> None:
        self.seen = args


def records_in_a_global(module: nn.Module, args: Any, output: Any) -> None:
    SEEN["output"] = output


def counts_in_a_global(module: nn.Module, args: Any, output: Any) -> None:
    NOTES.calls += 1


def looks_for_nan(module: nn.Module, args: Any, output: Tensor) -> None:
    if not torch.isfinite(output).all():
        raise FloatingPointError


def records_in(store: dict[str, Any], name: str, *args: Any) -> None:
    store[name] = args[-1]


def a_closure(store: Any) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        store["output"] = args[-1]

    return hook


def a_counter() -> Callable[..., None]:
    calls = 0

    def hook(*args: Any) -> None:
        nonlocal calls
        calls += 1

    return hook


def a_default(store: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any, kept: dict[str, Any] = store) -> None:
        kept["output"] = output

    return hook


OUTSIDE: dict[str, tuple[Callable[[], Callable[..., Any]], str]] = {
    "closure": (lambda: a_closure({}), "a_closure.<locals>.hook"),
    "lambda": (lambda: lambda *args: SEEN.update(a=args), "<lambda>.<locals>.<lambda>"),
    "counter": (a_counter, "a_counter.<locals>.hook"),
    "default": (lambda: a_default({}), "a_default.<locals>.hook"),
    "global": (lambda: records_in_a_global, "records_in_a_global"),
    "global object": (lambda: counts_in_a_global, "counts_in_a_global"),
    "check": (lambda: looks_for_nan, "looks_for_nan"),
    "object": (Recorder, "Recorder.__call__"),
    "method": (lambda: Recorder().method, "Recorder.method"),
    "partial": (lambda: functools.partial(records_in, {}, "a"), "records_in"),
    "built in": (lambda: [].insert, "list.insert"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_is_named(name: str) -> None:
    make, function = OUTSIDE[name]
    model = net()
    handle = model[2].register_forward_hook(make())
    where = "" if name == "built in" else r" \(.*test_hooks\.py:\d+\)"
    with pytest.raises(
        CaptureError, match=rf"module '2' has a forward hook, .*{function}{where}: .*no hooks"
    ):
        check_hooks(model)
    handle.remove()
    check_hooks(model)


REGISTER: dict[str, Callable[[nn.Module, Any], Any]] = {
    "pre": lambda m, h: m.register_forward_pre_hook(h),
    "pre, keywords": lambda m, h: m.register_forward_pre_hook(h, with_kwargs=True),
    "keywords": lambda m, h: m.register_forward_hook(h, with_kwargs=True),
    "always": lambda m, h: m.register_forward_hook(h, always_call=True),
    "of every module": lambda m, h: register_module_forward_hook(h),
    "before every module": lambda m, h: register_module_forward_pre_hook(h),
}


@pytest.mark.parametrize("way", REGISTER)
def test_is_named_however_it_was_registered(way: str) -> None:
    model, recorder = net(), Recorder()
    handle = REGISTER[way](model, recorder)
    with pytest.raises(CaptureError, match=r"Recorder\.__call__"):
        capture(model, (Input((2, 3, 16, 16)),))
    assert not hasattr(recorder, "seen")
    handle.remove()
    capture(model, (Input((2, 3, 16, 16)),))


def test_hooks_that_no_engine_would_miss_are_left_alone() -> None:
    model, recorder = net(), Recorder()
    model.register_full_backward_hook(recorder)
    model[0].register_full_backward_pre_hook(recorder)
    model.register_state_dict_pre_hook(recorder)
    model.register_load_state_dict_pre_hook(recorder)
    capture(model, (Input((2, 3, 16, 16)),))
    assert len(model._backward_hooks) == 1


class Collects(nn.Module):
    """A network whose hooks bring together what it returns; `how` makes one of them."""

    def __init__(self, how: Callable[[Collects, str], Callable[..., Any]]) -> None:
        super().__init__()
        self.body, self.features, self.rest = net(), {}, []
        for name in ("0", "2"):
            self.body[int(name)].register_forward_hook(how(self, name))

    def keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features[name] = output

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.body(x)
        return dict(self.features)


def closes_over_it(model: Collects, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        model.features[name] = output

    return hook


def closes_over_reference(model: weakref.ref[Collects], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        model().features[name] = output

    return hook


OWN: dict[str, Callable[[Collects, str], Callable[..., Any]]] = {
    "closure over it": closes_over_it,
    "closure over a part": lambda model, name: a_closure(model.features),
    "weak reference": lambda model, name: closes_over_reference(weakref.ref(model), name),
    "method": lambda model, name: functools.partial(model.keep, name),
    "partial of a function": lambda model, name: functools.partial(
        records_in, model.features, name
    ),
    "lambda": lambda model, name: lambda m, i, o: model.features.update({name: o}),
}


@pytest.mark.parametrize("how", OWN)
def test_what_keeps_things_in_the_model_is_a_part_of_it(how: str) -> None:
    model = Collects(OWN[how])
    check_hooks(model)
    model.body[1].register_forward_hook(a_closure({}))
    with pytest.raises(CaptureError, match=r"'body\.1' has a forward hook, a_closure"):
        check_hooks(model)


def test_one_that_keeps_things_in_the_model_and_elsewhere_is_named() -> None:
    store: list[Any] = []
    model = Collects(lambda model, name: lambda m, i, o: store.append((model, o)))
    with pytest.raises(CaptureError, match="'body.0' has a forward hook"):
        check_hooks(model)


def test_an_object_that_the_model_holds_is_a_part_of_it() -> None:
    model, recorder = net(), Recorder()
    model.register_forward_hook(recorder)
    with pytest.raises(CaptureError, match="keep what it is bound to in an attribute"):
        check_hooks(model)
    model.helpers = [recorder]
    check_hooks(model)


class Halves(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask[::2] = 0
        return mask


def test_hooks_of_pytorch_stay() -> None:
    model = net()
    nn.utils.spectral_norm(model[3])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    prune.l1_unstructured(model[3], "bias", 0.5)
    Halves.apply(model[1], "weight")
    check_hooks(model)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Inside nothing is set in the model, and no container in it gets other contents."""

    def contents() -> list[Any]:
        held = []
        for module in model.modules():
            for name, value in sorted(vars(module).items()):
                inner = value if isinstance(value, dict | list) else ()
                keys = list(inner.items() if isinstance(inner, dict) else inner)
                held.append((name, id(value), [str(key) for key in keys]))
        return held

    before = contents()
    yield
    assert contents() == before


@pytest.mark.parametrize("how", ["closure over it", "method", "weak reference"])
def test_features_of_own_hooks_are_captured(
    how: str, photo_batch: Callable[[int, int], Tensor]
) -> None:
    model, x = Collects(OWN[how]).eval(), photo_batch(2, 16).double()
    with as_it_was(model):
        graph = capture(model, (Input((2, 3, 16, 16)),)).graph
    values = ReferenceExecutable(graph, torch.float64).values([x])
    want = Collects(OWN[how]).eval().double()(x)
    assert list(want) == ["0", "2"] and len(graph.outputs) == 2
    for name, leaf in zip(graph.outputs, want.values(), strict=True):
        torch.testing.assert_close(values[name], leaf, rtol=0, atol=1e-10)


def test_a_hook_that_changes_the_result_is_captured(
    agree: Callable[..., None], photo_batch: Callable[[int, int], Tensor]
) -> None:
    model = net()
    model[2].register_forward_hook(lambda module, args, output: output.clamp(max=0.1))
    model.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    agree(model, capture(model, (Input((2, 3, 16, 16)),)).graph, [photo_batch(2, 16)])


def test_timms_features_by_hooks(photo_batch: Callable[[int, int], Tensor]) -> None:
    model = timm.create_model("resnet10t", features_only=True, feature_cls="hook", pretrained=False)
    model.eval()
    with as_it_was(model):
        graph = capture(model, (Input((2, 3, 32, 32)),)).graph
    assert len(graph.outputs) == len(model(photo_batch(1, 32)))
    assert not any(model.hooks._feature_outputs.values())


def test_a_model_without_hooks_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastres.graph.hooks.reachable", pytest.fail)
    check_hooks(resnet18(num_classes=2))
