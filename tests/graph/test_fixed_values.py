"""What is computed of parameters alone is computed first: the network then has plain weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils as nu
import torch.nn.utils.prune as prune
from torch import Tensor, nn

import fastres
from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.graph.ir import Aten, Conv2d, Linear
from fastres.graph.passes.pipeline import optimise
from fastres.options import Input

Agree = Callable[..., None]
GIVEN = Input((1, 3, 12, 12))


class Net(nn.Module):
    """Convolution, norm and classifier; `change` is done to both layers with weights."""

    def __init__(self, change: Callable[[nn.Module], Any] = lambda layer: layer) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)
        change(self.conv)
        change(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


class Standardised(nn.Conv2d):
    """As in BiT's ResNet-v2."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        var = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias, padding=1)


class ByBatchNorm(nn.Conv2d):
    """As timm writes it, also in NF-ResNets with a gain."""

    def __init__(self) -> None:
        super().__init__(3, 6, 3)
        self.gain = nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, 6, -1),
            None,
            None,
            weight=(self.gain * 0.3).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class Masked(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 6, 3)
        self.register_buffer("mask", (torch.rand(6, 3, 3, 3) > 0.5).float())
        self.register_buffer("shift", torch.rand(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.shift.flatten() * 2.0, padding=1)


class InPlace(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight.sub_(weight.mean((1, 2, 3), keepdim=True)).mul_(2.0)
        return F.conv2d(x, weight, self.bias, padding=1)


class Chosen(nn.Conv2d):
    """Of the largest weights: a call with several results, and one of integers."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        least = flat.abs().topk(9, 1)[0][:, -1:]
        index = flat.argsort(1)[:, :1]
        weight = torch.where(flat.abs() >= least, flat, 0.0).scatter(1, index, 0.25)
        return F.conv2d(x, weight.view_as(self.weight), self.bias, padding=1)


class Rounded(nn.Conv2d):
    """Weights that are rounded to half precision on purpose."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.half().float(), self.bias, padding=1)


class Simulated(nn.Conv2d):
    """As integers will have it; PyTorch has no kernel that tells the shape alone."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 0, -128, 127)
        return F.conv2d(x, weight, self.bias, padding=1)


class Bounded(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        var = self.running_var.clamp(min=0.8)
        return F.batch_norm(x, self.running_mean * 2.0, var, self.weight.exp(), self.bias.tanh())


def with_conv(conv: nn.Module) -> nn.Module:
    model = Net()
    model.conv = conv
    return model


def with_norm(norm: nn.BatchNorm2d) -> Net:
    model = Net()
    model.norm = norm
    nn.init.uniform_(model.norm.running_var, 0.5, 1.5)
    return model


def without_norm(conv: nn.Module) -> Any:
    model = with_conv(conv)
    model.norm = nn.Identity()
    return model.eval()


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)


def pruned_twice(layer: nn.Module) -> None:
    prune.random_structured(layer, "weight", 1, dim=0)
    prune.l1_unstructured(layer, "weight", 0.2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: Net(nu.parametrizations.weight_norm),
    "weight_norm of all": lambda: Net(lambda m: nu.parametrizations.weight_norm(m, dim=None)),
    "weight_norm by a hook": lambda: Net(nu.weight_norm),
    "spectral_norm": lambda: Net(nu.parametrizations.spectral_norm),
    "spectral_norm by a hook": lambda: Net(nu.spectral_norm),
    "orthogonal": lambda: Net(
        lambda m: nu.parametrizations.orthogonal(m, use_trivialization=False)
    ),
    "pruned": lambda: Net(pruned),
    "pruned twice": lambda: Net(pruned_twice),
    "standardised": lambda: with_conv(Standardised(3, 6, 3)),
    "standardised by batch_norm": lambda: with_conv(ByBatchNorm()),
    "masked": lambda: with_conv(Masked()),
    "computed in place": lambda: with_conv(InPlace(3, 6, 3)),
    "chosen": lambda: with_conv(Chosen(3, 6, 3)),
    "rounded": lambda: with_conv(Rounded(3, 6, 3)),
    "simulated": lambda: with_conv(Simulated(3, 6, 3)),
    "bounded statistics": lambda: with_norm(Bounded(6)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_are_plain_ones(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    x = torch.randn(3, 3, 12, 12)
    with fastres.compile(model, x, backend="cpu") as engine:  # nothing is refused
        ops = [type(node.op) for node in engine.graph]
        assert Aten not in ops and ops.count(Conv2d) == ops.count(Linear) == 1
        assert len(ops) == 3  # the norm is folded, too
        with torch.no_grad():
            want = model(x)
        assert torch.allclose(engine(x), want, rtol=1e-4, atol=1e-5)
    copy.deepcopy(model)  # what the hooks had left in it could not be copied


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "pruned", "standardised by batch_norm", "masked"])
def test_new_weights_are_computed_anew(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, other = NETWORKS[name]().eval(), NETWORKS[name]().eval()
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        want = other(x)
    with fastres.compile(model, x) as engine:
        engine.save(tmp_path / "net.fastres")
        engine.update_weights(other.state_dict())
        assert torch.allclose(engine(x), want, rtol=1e-4, atol=1e-5)
    with fastres.load(tmp_path / "net.fastres") as engine:
        assert not torch.allclose(engine(x), want, rtol=1e-4, atol=1e-5)
        engine.update_weights(other.state_dict())
        assert torch.allclose(engine(x), want, rtol=1e-4, atol=1e-5)


def test_what_is_computed_of_channels_last_is_laid_out_as_if_loaded(tmp_path: Any) -> None:
    class Along(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x.flatten(2), self.weight.flatten(2), self.bias)

    model = Along(8, 4, 1).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 10)
    with fastres.compile(model, x, on_unsupported="fallback") as engine:
        for tensor in engine.graph.constants.values():
            assert tensor.stride() == torch.empty(tensor.shape).stride()
        y = engine(x)
        engine.save(tmp_path / "along.fastres")
    with fastres.load(tmp_path / "along.fastres") as engine:
        assert torch.equal(engine(x), y)


def test_what_is_made_of_numbers_alone_is_a_constant(tmp_path: Any) -> None:
    class Ramp(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * torch.linspace(0.5, 1.5, 12)) * torch.ones(5)

    net, x = Ramp().eval(), torch.randn(2, 3, 12, 12)
    graph = capture(net, [GIVEN]).graph
    assert all(node.inputs for node in graph) and torch.ones(5).equal(graph.constants["ones"])
    with fastres.compile(net, x, backend="reference") as engine:
        engine.save(tmp_path / "net.fastres")
    again = fastres.load(tmp_path / "net.fastres")
    assert torch.allclose(again(x), net(x), atol=1e-5)
    assert not any(isinstance(node.op, Aten) for node in again.source)


def test_in_float64_and_rounded_once() -> None:
    model = without_norm(Standardised(3, 6, 3))
    graph = optimise(capture(model, [GIVEN]).graph)
    conv = next(node for node in graph if isinstance(node.op, Conv2d))
    exact = model.conv.weight.detach().double()
    mean, var = exact.mean((1, 2, 3), True), exact.var((1, 2, 3), keepdim=True, unbiased=False)
    want = ((exact - mean) / (var + 1e-5).sqrt()).float()
    assert torch.equal(graph.constants[conv.params["weight"]], want)


def test_what_the_model_rounds_is_rounded() -> None:
    model = without_norm(Rounded(3, 6, 3))
    graph = optimise(capture(model, [GIVEN]).graph)
    conv = next(node for node in graph if isinstance(node.op, Conv2d))
    assert torch.equal(graph.constants[conv.params["weight"]], model.conv.weight.half().float())


def test_computed_variances_are_looked_at() -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var - 1.0)

    with pytest.raises(CaptureError, match=r"sub holds \d variances that are negative"):
        fastres.compile(with_norm(Shifted(6)).eval(), torch.randn(2, 3, 12, 12))


def test_statistics_of_the_batch_are_refused_still() -> None:
    model = Net().eval()
    model.norm = nn.BatchNorm2d(6, track_running_stats=False).eval()
    with pytest.raises(CaptureError, match="the batch's own statistics"):
        capture(model, [GIVEN])


def test_a_returned_weight_that_is_computed_with(agree: Agree) -> None:
    class Returns(Net):
        def forward(self, x: Tensor) -> Any:
            weight = self.conv.weight * 2.0
            return F.conv2d(x, weight, padding=1), weight

    model = Returns().eval()
    graph = optimise(capture(model, [GIVEN]).graph)
    assert [type(node.op) for node in graph] == [Aten, Conv2d]
    agree(model, graph, [torch.randn(2, 3, 12, 12)])
    x = torch.randn(2, 3, 12, 12)
    with fastres.compile(model, x, on_unsupported="fallback") as engine:
        for got, want in zip(engine(x), model(x), strict=True):
            assert torch.allclose(got, want, atol=1e-5)


class RuledOut(nn.Module):
    """Adds -inf to the logits of some classes, from a buffer or computed from one."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.net, self.computed = Net(), computed
        out = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
        self.register_buffer("out", out if computed else torch.where(out > 0, -torch.inf, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.out.masked_fill(self.out > 0, -torch.inf) if self.computed else self.out
        return self.net(x) + mask  # type: ignore[no-any-return]


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_infinities_that_are_meant(computed: bool, backend: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = RuledOut(computed).eval(), torch.randn(3, 3, 12, 12)
    options: dict[str, Any] = {"backend": backend, "on_unsupported": "fallback"}
    with fastres.compile(model, x, **options) as engine:
        assert fastres.verify(model, engine, [x]).passed
        assert (
            engine(x)[:, [1, 4]].eq(-torch.inf).all() and engine(x)[:, [0, 2, 3]].isfinite().all()
        )
        engine.save(tmp_path / "engine")
        with fastres.load(tmp_path / "engine") as loaded:
            assert torch.equal(loaded(x), engine(x))
        model.out = model.out.flip(0)
        engine.update_weights(model.state_dict())
        assert fastres.verify(model, engine, [x]).passed


def test_infinite_weights_in_a_buffer() -> None:
    model = Net()
    del model.fc.weight
    model.fc.register_buffer("weight", torch.full((5, 6), torch.inf))
    with pytest.raises(CaptureError, match="fc.weight is infinite.*Load sound weights first"):
        fastres.compile(model.eval(), torch.randn(1, 3, 12, 12), backend="reference")


def stepped(layer: nn.Module) -> None:
    """Weights on the edges of steps of 0.1, where fp32 and float64 fall to different sides."""
    random = torch.Generator().manual_seed(0)
    steps = torch.randint(-9, 9, layer.weight.shape, generator=random)
    layer.weight.data = steps.float() * 0.1


DECIDING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "down to steps": lambda m, w: torch.floor(w / 0.1) * 0.1,
    "to steps": lambda m, w: torch.round(w / 0.2) * 0.2,
    "small ones out": lambda m, w: w * (w.abs() > 0.3),
    "equal ones": lambda m, w: torch.where(w == 0.3, w, 2 * w),
    "signs": lambda m, w: (w - 0.3).sign(),
    "the largest": lambda m, w: w.flatten(1).topk(3, 1).values.sum(1).view(-1, 1, 1, 1) * w,
    "eight bits a channel": lambda m, w: torch.fake_quantize_per_channel_affine(
        w, m.scale, m.zero, 0, -128, 127
    ),
}


@pytest.mark.parametrize("name", DECIDING)
def test_weights_that_decide_do_so_as_in_the_model(name: str) -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
            stepped(self.conv)
            self.register_buffer("scale", torch.full((6,), 0.1))
            self.register_buffer("zero", torch.zeros(6, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, DECIDING[name](self, self.conv.weight), self.conv.bias)
            return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]

    model, x = Deciding().eval(), torch.randn(3, 3, 12, 12)
    with fastres.compile(model, x, backend="reference") as engine, torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
        assert fastres.verify(model, engine, [x]).passed
        model.conv.weight.copy_(model.conv.weight.flip(0))
        engine.update_weights(model.state_dict())
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slot", ["weight", "bias", "running_mean", "running_var"])
def test_statistics_that_are_computed(slot: str, agree: Agree) -> None:
    class Computed(Net):
        def forward(self, x: Tensor) -> Tensor:
            slots = ("running_mean", "running_var", "weight", "bias")
            own = {name: getattr(self.norm, name) for name in slots}
            own[slot] = F.softplus(own[slot] * 2)
            return F.batch_norm(self.conv(x), *own.values())

    model = Computed().eval()
    agree(model, capture(model, [GIVEN]).graph, [torch.randn(3, 3, 12, 12)])
    with fastres.compile(model, torch.randn(1, 3, 12, 12), backend="cpu") as engine:
        assert fastres.verify(model, engine, [torch.randn(3, 3, 12, 12)]).passed
