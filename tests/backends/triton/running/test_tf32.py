"""TF32: what products read is rounded beforehand, since tensor cores cut off what they do not take.

Triton's interpreter multiplies fp32 in full. Here its products cut 13 bits of both operands off
first, as compiled ones do, and count the operands that lose something.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LaunchBoxConv2d, LaunchElementwise, Plan
from fastres.backends.triton.planning.regions import factors
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.running import pack
from fastres.backends.triton.running.bind import bind
from fastres.backends.triton.running.contexts import views
from fastres.backends.triton.running.pack import Packed
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch
from fastres.kernels.reference import round_tf32
from fastres.options import Input
from fastres.tolerances import Errors, allowed, errors

PhotoBatch = Callable[[int, int], Tensor]
CPU, HOPPER = torch.device("cpu"), Tiles(Target.typical(90))
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1"),
]


class TensorCores:
    """Counts the products in TF32, and those of their operands that were cut."""

    def __init__(self) -> None:
        self.products = self.cut = 0

    def see(self, operand: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle

        bits = np.ascontiguousarray(operand.data).view(np.int32)
        self.cut += bool((bits & 0x1FFF).any())
        return TensorHandle((bits & -0x2000).view(np.float32), operand.dtype)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorCores]:
    from triton.runtime.interpreter import InterpreterBuilder

    cores, whole = TensorCores(), InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, *more: Any) -> Any:
        if "TF32" in str(precision) and a.data.dtype == np.float32:
            cores.products += 1
            a, b = cores.see(a), cores.see(b)
        return whole(self, a, b, acc, precision, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield cores
    assert cores.products


def compile(model: nn.Module, x: Tensor | Input, **more: Any) -> fastres.Engine:
    settings = {"backend": "triton", "device": "cpu", "precision": "tf32", **more}
    return fastres.compile(model, x, **settings)


def in_float64(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def bottleneck(version: Any) -> nn.Module:
    return fastres.models.ResNet(
        fastres.models.Bottleneck, (1, 1, 1, 1), version=version, num_classes=7, planes=16, seed=0
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cifar": (lambda: fastres.models.cifar_resnet(20, shortcut="A", seed=0), 32),
    "bottleneck v1": (lambda: bottleneck("v1"), 40),
    "bottleneck v1.5": (lambda: bottleneck("v1.5"), 40),
}


class TestNetworks:
    pytestmark = interpreted

    @pytest.mark.parametrize("name", NETWORKS)
    def test_within_the_policy_which_cutting_off_breaks(
        self,
        name: str,
        photo_batch: PhotoBatch,
        tensor_cores: TensorCores,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The RMS error of the logits. Allowed: twice PyTorch's in fp16."""
        make, size = NETWORKS[name]
        model = fastres.models.settle(make(), photo_batch(32, size)).eval()
        x = photo_batch(1, size)
        exact = in_float64(model, x)
        with torch.no_grad():
            bound = allowed(errors(copy.deepcopy(model).half()(x.half()), exact), torch.float16)

        def found() -> Errors:
            with compile(model, x) as engine:
                return errors(engine(x), exact)

        both = found()
        assert tensor_cores.cut == 0
        monkeypatch.setattr(Launch, "rounded", lambda launch: launch)
        weights = found()
        monkeypatch.setattr(pack, "round_tf32", lambda weight: weight)
        neither = found()
        print(f"{name}:", *(f"{each.rms:.1e}" for each in (neither, weights, both, bound)))
        assert both.rms <= bound.rms and both.largest <= bound.largest
        assert 1.5 * both.rms < weights.rms and 1.3 * weights.rms < neither.rms
        assert neither.rms > bound.rms

    def test_verified_layer_by_layer(
        self, photo_batch: PhotoBatch, tensor_cores: TensorCores
    ) -> None:
        """There every value is an output as well: products read rounded copies."""
        model = fastres.models.settle(fastres.models.cifar_resnet(8, seed=0), photo_batch(32, 16))
        x = photo_batch(2, 16)
        with compile(model, x) as engine:
            report = fastres.verify(model, engine, [x], layerwise=True)
            assert report.passed, str(report)
        assert tensor_cores.cut == 0


class Tail(nn.Module):
    """Average and max pools in front of convolutions, groups, a BatchNorm that is not folded,
    sums that no convolution makes, an activation by itself, a pooled map read as a map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.c, self.d = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 1, groups=16)
        self.norm, self.e = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.squeeze, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(F.avg_pool2d(y, 3, 2, 1)) + self.d(F.max_pool2d(y, 3, 2, 1))
        y = self.c(F.gelu(y))
        y = self.e(self.norm(y).relu())
        pooled = F.adaptive_avg_pool2d(y + F.silu(y), 1)
        return self.fc((self.squeeze(pooled) + pooled).flatten(1))


class Features(nn.Module):
    """Gives out what it goes on with: a map, a pooled map as rows, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.a(x).relu()
        rows = F.adaptive_avg_pool2d(self.b(first), 1).flatten(1)
        return first, rows, self.fc(rows), x


class Rows(nn.Module):
    """Rows in, not pictures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Softened(nn.Module):
    """A softmax between convolutions, which no kernel of ours computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().softmax(1))


ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "tail": (Tail, (2, 3, 9, 7), {}),
    "pre-activation": (lambda: fastres.models.PreActResNet(1, seed=0), (2, 3, 16, 16), {}),
    "features": (Features, (2, 3, 8, 8), {}),
    "rows": (Rows, (3, 12), {}),
    "fallback": (Softened, (1, 3, 8, 8), {"on_unsupported": "fallback"}),
    "float64": (lambda: Rows().double(), (3, 12), {}),
}


@pytest.mark.parametrize("name", ODD)
class TestOddNetworks:
    pytestmark = interpreted

    def test_no_operand_is_cut(self, name: str, tensor_cores: TensorCores) -> None:
        make, sizes, more = ODD[name]
        model = make().eval()
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
        x = x.to(next(model.parameters()).dtype)
        with compile(model, x, **more) as engine:
            report = fastres.verify(model, engine, [x])
            assert report.passed, str(report)
            assert tensor_cores.cut == 0
            results = engine(x)
        for y in results if isinstance(results, tuple) else (results,):
            assert (y.float().view(torch.int32) & 0x1FFF).any(), "the caller gets rounded values"


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
class TestPictures:
    pytestmark = interpreted

    def test_decoded_pictures_are_rounded_as_they_are_normalised(
        self, channels: Any, tensor_cores: TensorCores
    ) -> None:
        p = fastres.Preprocess(mean=(0.485, 0.456, 0.406), std=(0.3, 0.2, 0.1), channels=channels)
        x = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(0))
        x = x.to(torch.uint8)
        settings = {"preprocess": p, "io_dtype": torch.uint8}
        model = nn.Conv2d(3, 16, 3).eval()
        with compile(model, fastres.Input((1, 3, 8, 8)), **settings) as engine:
            report = fastres.verify(model, engine, x)
            assert report.passed and tensor_cores.cut == 0, str(report)


class TestPlans:
    def test_what_products_read_is_rounded_and_nothing_else(self) -> None:
        net = fastres.models.ResNet(
            fastres.models.Bottleneck, (2, 1, 1, 1), version="v1.5", num_classes=7, planes=16
        )
        plan = plan_of(net, (2, 3, 32, 32))
        assert any(isinstance(s, LaunchBoxConv2d) and s.projection for s in plan.steps)
        exact = {name for name, place in plan.places.items() if not place.tf32}
        scratch = {name for name in exact if name.endswith((":parts", ":counters"))}
        # a stem that is pooled, the last map, which is averaged, and the result
        assert exact - scratch == {"conv1", "layer4.0.conv3", "fc"}
        assert plan.places["maxpool"].tf32 and plan.places["avgpool"].tf32
        assert Plan.from_json(plan.to_json()) == plan

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_other_precisions_round_nothing(self, precision: Any) -> None:
        plan = plan_of(Features(), (2, 3, 8, 8), precision)
        assert not any(place.tf32 for place in plan.places.values()) and len(plan.steps) == 5

    def test_what_the_caller_gets_is_copied_for_products(self) -> None:
        graph, plan = graph_of(Features(), (2, 3, 8, 8)), plan_of(Features(), (2, 3, 8, 8))
        assert factors(graph) == set()
        copies = [step for step in plan.steps if isinstance(step, LaunchElementwise)]
        assert len(copies) == 3 and all(plan.places[step.target].tf32 for step in copies)
        sources = {step.source for step in copies}
        assert sources <= {name for name, _ in plan.outputs}
        assert not any(plan.places[name].tf32 for name in sources)

    def test_a_copy_serves_all_products(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = (nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(3))

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = self.a(x)
                return y, self.b(y) + self.c(y)

        plan = plan_of(Both(), (2, 3, 8, 8))
        assert sum(isinstance(step, LaunchElementwise) for step in plan.steps) == 1

    def test_launches_round_where_the_place_says_so(self) -> None:
        graph, plan = graph_of(Tail(), (2, 3, 9, 7)), plan_of(Tail(), (2, 3, 9, 7))
        arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta")
        constants = Packed(graph, torch.float32, torch.device("meta"), tf32=True)
        tensors = views(plan, arena)
        found = set()
        for step in plan.steps:
            for launch in bind(plan, step, tensors, constants, HOPPER.target):
                assert launch.constants["ROUND_TF32"] == plan.places[step.target].tf32  # type: ignore[attr-defined]
                found.add((type(step), launch.constants["ROUND_TF32"]))
        assert len({kind for kind, rounds in found if rounds}) > 4


def graph_of(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    return optimise(capture(model.eval(), [Input(shape)]).graph)


def plan_of(model: nn.Module, shape: tuple[int, ...], precision: Any = "tf32") -> Plan:
    return make_plan(graph_of(model, shape), (shape,), precision, HOPPER)


class TestWeights:
    """Of every form, once; biases and what normalises stay as they are."""

    def test_weights_are_rounded_and_biases_are_not(self) -> None:
        model = nn.ModuleDict({"a": nn.Conv2d(4, 6, 3), "b": nn.Conv2d(8, 6, 1)})
        model["c"], model["stem"] = nn.Linear(6, 5), nn.Conv2d(3, 8, 7)
        model["n"] = nn.BatchNorm2d(6)
        constants = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        constants["q"] = torch.full((6, 4, 1, 1), 3, dtype=torch.int8)
        constants["n.running_var"] = torch.rand(6) + 0.5
        graph = Graph((), (), (), constants, "")
        packed = Packed(graph, torch.float32, CPU, tf32=True)
        plain = Packed(graph, torch.float32, CPU)
        for key in (
            ("filters", "a.weight"),
            ("matrix", "a.weight", "b.weight"),
            ("grouped", "a.weight", 2, 2),
            ("stem", "stem.weight"),
            ("rows", "c.weight"),
        ):
            assert torch.equal(packed.get(key), round_tf32(plain.get(key)))
            assert not torch.equal(packed.get(key), plain.get(key))
        norm = ("n.running_mean", "n.running_var", "n.weight", "n.bias", 1e-5)
        for key in (("bias", "a.bias", "b.bias"), ("scale", *norm), ("filters", "q")):
            assert torch.equal(packed.get(key), plain.get(key))
        assert (packed.get(("scale", *norm)).view(torch.int32) & 0x1FFF).any()
