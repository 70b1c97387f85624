"""Models that cannot be deep-copied are compiled, verified and timed, and stay as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fastres
from fastres import models
from fastres.errors import CaptureError, InputError
from fastres.parity.verify import verify
from fastres.timing.checks import check_target, exact, reference
from fastres.timing.peers import make_peer

pytestmark = pytest.mark.usefixtures("one_thread")
PhotoBatch = Callable[[int, int], Tensor]


class Keeps(nn.Module):
    """Leaves feature maps in attributes, in a list and in a dict, and has a constant that is none
    of its buffers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.maps, self.named = body, [], {}
        self.kernel = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(0)) / 3

    def forward(self, x: Tensor) -> Any:
        x = nn.functional.conv2d(x, self.kernel, padding=1, groups=3)
        self.stem = self.body.conv1(x)
        self.maps = [self.stem, x]
        self.named["stem"] = self.stem
        return self.body(x)


class NeverCopied(Keeps):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError("not this one")


def pruned(body: nn.Module) -> nn.Module:
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.3)
    return body


def normed(body: nn.Module) -> nn.Module:
    torch.manual_seed(0)  # spectral_norm begins with random vectors
    nn.utils.spectral_norm(body.conv1)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(body.fc)
    return body


def for_inference(body: nn.Module) -> nn.Module:
    with torch.inference_mode():
        for module in body.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    setattr(module, name, nn.Parameter(parameter.clone(), False))
    return body


MODELS = {
    "keeps features": Keeps,
    "refuses to be copied": NeverCopied,
    "pruned": pruned,
    "normed": normed,
    "for inference": for_inference,
}


@pytest.fixture(scope="module")
def x(photo_batch: PhotoBatch) -> Tensor:
    return photo_batch(4, 32)


def made(name: str, x: Tensor) -> nn.Module:
    body = models.settle(models.cifar_resnet(8, seed=0), x)
    model: nn.Module = MODELS[name](body).eval()
    with torch.set_grad_enabled(name != "for inference"):
        model(x)  # as anybody does to look at it first
    return model


def state(model: nn.Module) -> list[tuple[str, str, object, list[Any]]]:
    """Every attribute, by identity; of tensors also the values, of containers what they hold.

    A weight that a hook computes is made anew by every call.
    """
    found: list[tuple[str, str, object, list[Any]]] = []
    for where, module in model.named_modules():
        for name, value in sorted(vars(module).items()):
            held: list[Any] = [value.detach().sum().item()] if isinstance(value, Tensor) else []
            held += map(id, value.values() if isinstance(value, dict) else ())
            held += map(id, value if isinstance(value, list) else ())
            computed = f"{name}_orig" in module._parameters or f"{name}_g" in module._parameters
            found.append((where, name, computed or id(value), held))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_is_compiled_and_verified(name: str, x: Tensor) -> None:
    model = made(name, x)
    before = state(model)
    with fastres.compile(model, x, verify=True, on_unsupported="fallback") as engine:
        report = verify(model, engine, [x, x[:1]], layerwise=True, bisect=True)
        assert report.passed and report.layers, str(report)
    assert state(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_a_fault_is_still_found(name: str, x: Tensor) -> None:
    """The copy is the model that is given, not one like it."""
    model = made(name, x)
    with fastres.compile(model, x, on_unsupported="fallback") as engine:
        with torch.inference_mode(name == "for inference"), torch.no_grad():
            list(model.parameters())[-1].add_(0.01)
        assert not verify(model, engine, x).passed


@pytest.mark.parametrize("peer", ["eager", "eager_channels_last", "openvino", "onnxruntime"])
@pytest.mark.parametrize("name", MODELS)
def test_peers(name: str, peer: str, x: Tensor) -> None:
    if peer == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model = made(name, x)
    before = state(model)
    target = make_peer(peer, model, x)
    assert not check_target(target, reference(model, x, "fp32"), x, "fp32").wrong
    assert state(model) == before


def test_a_model_in_its_own_dtype_is_called_as_it_is(x: Tensor) -> None:
    """A float64 constant makes the result float64, and so does the engine return it."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = models.settle(models.cifar_resnet(8, seed=0), x)
            self.scale = torch.full((10,), 0.1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.scale

    model = Scales().eval()
    with fastres.compile(model, x, on_unsupported="fallback") as engine:
        assert engine(x).dtype == torch.float64
        assert verify(model, engine, x).passed


class TestRefusals:
    def test_what_cannot_be_copied(self, x: Tensor) -> None:
        model = made("pruned", x)
        model.source = (t for t in [torch.ones(1)])
        with pytest.raises(InputError, match=r"source is generator, which holds tensors"):
            verify(model, model, x)

    def test_hooks_of_others(self, x: Tensor) -> None:
        model, seen = models.settle(models.cifar_resnet(8, seed=0), x), []
        engine = fastres.compile(model, x)
        model.conv1.register_forward_hook(lambda *args: seen.append(args))
        for use in (
            lambda: fastres.compile(model, x),
            lambda: verify(model, engine, x),
            lambda: make_peer("eager", model, x),
            lambda: exact(model, x),
        ):
            with pytest.raises(CaptureError, match="'conv1' has a forward hook"):
                use()
        assert not seen
