"""Copies: they compute what the model computes, and nothing that runs in them reaches it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from fastres.graph.copies import copied, to_trace
from fastres.graph.objects import reachable


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    nn.init.uniform_(layers[1].running_mean, -0.5, 0.5)
    return layers


def computed() -> Tensor:
    return torch.ones(2, requires_grad=True) * 3


class Wraps(nn.Module):
    """A network with attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.body = net()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Keeps(Wraps):
    """Leaves what it computes in attributes, as to be looked at."""

    def forward(self, x: Tensor) -> Any:
        self.features = self.body[0](x)
        self.pyramid = [self.features, {"first": (self.features,)}]
        return self.body(x)


class RefusesCopies(Keeps):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError("this module is not to be copied")


class IsItsOwnCopy(Keeps):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class RefusesState(Keeps):
    def __getstate__(self) -> Any:
        raise TypeError("this module is not to be written")


class Constants(nn.Module):
    """Tensors that are neither parameters nor buffers, modules in a plain list, and views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = torch.randn(4, 3, 3, 3)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.half = self.weight[:2]
        self.layers = [nn.Conv2d(4, 4, 1).eval()]

    def forward(self, x: Tensor) -> Tensor:
        self.last = F.conv2d(F.conv2d(x, self.kernel), self.weight)
        return self.layers[0](self.last) + self.half.sum()


class LooksUp(Wraps):
    """Finds itself by a weak reference, by a proxy and by a method that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.this, self.run = weakref.ref(self), self.again
        object.__setattr__(self, "proxy", weakref.proxy(self))

    def again(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        self.this().seen = self.proxy.body[0](x)
        return self.run(x)


class Hooked(Wraps):
    """Collects features by hooks that close over it."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        for name, module in self.body.named_children():
            module.register_forward_hook(self.collecting(name))

    def collecting(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self.features[name] = output

        return keep

    def forward(self, x: Tensor) -> Any:
        self.body(x)
        return dict(self.features)


class Named(nn.Module):
    """Has an attribute where its class has a property."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["scale"] = torch.full((3, 1, 1), 2.0)

    @property
    def scale(self) -> Tensor:
        return self.__dict__["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Slotted(nn.Module):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = computed()[0]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def pruned() -> nn.Module:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.2)
    prune.ln_structured(model[3], "weight", 0.4, n=2, dim=0)
    return model


def normed() -> nn.Module:
    model = net()
    nn.utils.spectral_norm(model[3])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    return model


def patched() -> nn.Module:
    """A `forward` in the instance that calls the old one: a closure over a bound method."""
    model, factor = net(), 2.0
    before = model.forward
    model.forward = lambda x: before(x * factor)
    return model


def dispatched() -> nn.Module:
    """As libraries do it that place a model's layers: a partial in the place of `forward`."""

    def forward(module: nn.Module, *args: Any) -> Any:
        return type(module).forward(module, *args)

    model = net()
    model.old_forward = model.forward
    model.forward = functools.update_wrapper(functools.partial(forward, model), model.forward)
    return model


def inference_only() -> nn.Module:
    with torch.inference_mode():
        return net()


def extractor() -> nn.Module:
    torch.manual_seed(0)
    return create_feature_extractor(resnet18(num_classes=3), ["layer1", "fc"])


MODELS = {
    "features in attributes": Keeps,
    "pruned": pruned,
    "old norms of weights": normed,
    "refuses to be copied": RefusesCopies,
    "is its own copy": IsItsOwnCopy,
    "refuses to be written": RefusesState,
    "constants": Constants,
    "weak references": LooksUp,
    "hooks of its own": Hooked,
    "a property": Named,
    "slots": Slotted,
    "a patched forward": patched,
    "a dispatched forward": dispatched,
    "made for inference": inference_only,
    "a feature extractor": extractor,
    "traced by fx": lambda: torch.fx.symbolic_trace(net().eval()),
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "exported": lambda: torch.export.export(net().eval(), (torch.ones(1, 3, 9, 9),)).module(),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest, x: Tensor) -> nn.Module:
    """Each has been run with gradients on, where it can be, as anybody does to look at it first."""
    made = request.param()
    if request.param is not MODELS["exported"]:
        made.eval()
    with torch.set_grad_enabled(request.param is not inference_only):
        made(given(made, x))
    return made


def given(model: nn.Module, x: Tensor) -> Tensor:
    return x[:1, :, :9, :9] if type(model).__name__ == "GraphModule" else x


def state(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, by identity, and the values of those that are tensors."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            values = value.detach().clone() if isinstance(value, Tensor) else None
            found[name, key] = (value, values)
    return found


def same_state(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> bool:
    return before.keys() == after.keys() and all(
        value is after[key][0]
        and (values is after[key][1] if values is None else torch.equal(values, after[key][1]))
        for key, (value, values) in before.items()
    )


def test_computes_the_same(model: nn.Module, x: Tensor) -> None:
    x = given(model, x)
    before = state(model)
    copy = copied(model)
    with torch.no_grad():
        got = torch.utils._pytree.tree_leaves(copy(x))
        assert same_state(before, state(model))
        want = torch.utils._pytree.tree_leaves(model(x))
    assert got and all(map(torch.equal, got, want))
    names = [[name for name, _ in m.named_modules()] for m in (model, copy)]
    flags = [[part.training for part in m.modules()] for m in (model, copy)]
    assert names[0] == names[1] and flags[0] == flags[1]
    assert list(copy.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_another_dtype(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    x = given(model, x)
    before = state(model)
    with torch.no_grad():
        got = torch.utils._pytree.tree_leaves(copied(model, dtype=dtype)(x.to(dtype)))
        assert same_state(before, state(model))
        want = torch.utils._pytree.tree_leaves(model(x))
    close = 1e-5 if dtype == torch.float64 else 0.1
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype
        assert (mine.float() - theirs).abs().max() <= close * theirs.abs().max()


def test_shares_no_part(model: nn.Module) -> None:
    def parts(module: nn.Module) -> Iterator[object]:
        for part in reachable([module]):
            if type(part) in (Tensor, nn.Parameter) and part.numel():
                yield part.untyped_storage().data_ptr()
            elif isinstance(part, nn.Module):
                yield id(part)

    copy = copied(model)
    assert not set(parts(model)) & set(parts(copy))


def test_a_copy_to_trace_has_the_models_weights() -> None:
    model = Keeps().eval()
    copy = to_trace(model)
    assert all(map(lambda a, b: a is b, copy.parameters(), model.parameters()))
    with pytest.warns(UserWarning, match="assigned during export"):
        torch.export.export(copy, (torch.ones(1, 3, 8, 8),))
    assert not hasattr(model, "features") and hasattr(copy, "features")
