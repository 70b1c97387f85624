"""Decoded pictures in plans: normalised by the kernels that bring inputs in, and by those alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import Preprocess
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LaunchStem, LaunchStemPool, LoadInput
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Entry, Machine, Table, Tiles
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.graph.ir import Normalize
from fastres.kernels.cost import Target
from fastres.kernels.folding import stem_shape
from fastres.kernels.tiles import ConvTile, StemPoolTile
from fastres.options import Precision
from fastres.tolerances import errors

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
CPU, META, TARGET = torch.device("cpu"), torch.device("meta"), Target.typical(90)
P = Preprocess(mean=(0.6, 0.3, 0.4), std=(0.2, 0.3, 0.25), channels="BGR")
runs = [
    pytest.mark.interpret,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETING and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or an NVIDIA GPU",
    ),
]


def pictures(n: int, h: int, w: int) -> Tensor:
    """Noise of every value, framed in black: what a padding with bytes would mistake."""
    x = torch.randint(0, 256, (n, h, w, 3), generator=torch.Generator().manual_seed(n))
    x[:, :3], x[:, :, -3:] = 0, 0
    return x.to(torch.uint8)


def oracle(net: nn.Module, x: Tensor, p: Preprocess = P) -> Tensor:
    """The model in float64 on pictures normalised as anybody writes it; the net stays as it was."""
    planes = x.double().permute(0, 3, 1, 2)
    planes = planes.flip(1) if p.channels == "BGR" else planes
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (p.mean, p.std))
    with torch.no_grad():
        result = net.double()((planes * p.scale - mean) / std)
    net.float()
    return result


def compile(net: nn.Module, h: int, w: int, precision: Precision, **more: Any) -> fastres.Engine:
    settings = {"preprocess": P, "backend": "triton", "device": DEVICE, **more}
    return fastres.compile(
        net, fastres.Input((1, 3, h, w)), precision=precision, io_dtype=torch.uint8, **settings
    )


def runner_of(engine: fastres.Engine, x: Tensor) -> Any:
    executable = engine._lowered.executable
    assert isinstance(executable, TritonExecutable)
    return executable._runner(tuple(tuple(p.shape) for p in engine.planar((x,))))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("size", [(33, 35), (32, 40)], ids=["odd", "even"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
class TestRuns:
    pytestmark = runs

    def test_as_the_model(
        self, net: nn.Module, precision: Precision, size: tuple[int, int], channels: Any
    ) -> None:
        x = pictures(2, *size)
        p = Preprocess(mean=P.mean, std=P.std, channels=channels)
        with compile(net, *size, precision, preprocess=p) as engine:
            runner = runner_of(engine, x)
            with runner.context() as context:
                context.arena.fill_(0xFF)
            assert runner.plan.steps[0].normalize == Normalize.of(p)
            got = engine(x.to(DEVICE)).cpu()
            assert errors(got, oracle(net, x, p)).rms < (2e-6 if precision == "fp32" else 4e-3)
            report = fastres.verify(net, engine, x)
            assert report.passed, str(report)
            assert engine(x[:0].to(DEVICE)).shape == (0, 10)


class TestMore:
    pytestmark = runs

    def test_strided_pictures_parts_and_flight(self, net: nn.Module) -> None:
        x = pictures(3, 32, 32)
        with compile(net, 32, 32, "fp32", max_batch_size=2) as engine:
            want = engine(x.to(DEVICE)).cpu()
            wide = torch.zeros(3, 32, 64, 3, dtype=torch.uint8, device=DEVICE)
            wide[:, :, ::2] = x.to(DEVICE)
            assert torch.equal(engine(wide[:, :, ::2]).cpu(), want)
            (mapped,) = engine.map([x])
            assert torch.equal(mapped.cpu(), want)

    @pytest.mark.parametrize(
        ("problem", "tile", "step"),
        [
            ("folded stem", ConvTile(64, 16, 16, 4, 3), LaunchStem),
            ("stem and pool", StemPoolTile(4, 16, 16, 4, 3), LaunchStemPool),
        ],
        ids=["by itself", "with its pool"],
    )
    def test_folded_stems(self, net: nn.Module, problem: Any, tile: Any, step: type) -> None:
        """Each measured to be by far the fastest."""
        asked = Tiles(TARGET)
        with compile(net, 32, 40, "fp16") as engine:
            make_plan(engine.graph, ((2, 3, 32, 40),), "fp16", asked)
        times = {p: 1.0 if p.kind == "max pool" else 9.0 for p in asked.asked()}
        entries = {p.key: Entry(dict(vars(asked.best(p).tile)), us) for p, us in times.items()}
        key = Problem(problem, stem_shape(2, 16, 20, 16), "fp16").key
        table = Table(Machine("a GPU", 1, "", ""), {**entries, key: Entry(dict(vars(tile)), 0.001)})
        x, device = pictures(2, 32, 40), torch.device(DEVICE)
        with compile(net, 32, 40, "fp16") as engine:
            plan = make_plan(engine.graph, ((2, 3, 32, 40),), "fp16", Tiles(TARGET, [table]))
            load, stem, *_ = plan.steps
            assert isinstance(stem, step) and plan.places["x.normalize"].shape == (2, 19, 23, 16)
            assert load == LoadInput("x.normalize", "x", "x.normalize", True, Normalize.of(P))
            runner = PlanRunner(plan, Packed(engine.graph, torch.float16, device), device)
            with runner.context() as context:
                context.arena.fill_(0xFF)
            (got,) = runner.run(engine.planar((x.to(DEVICE),)))
            assert errors(got.cpu(), oracle(net, x)).rms < 4e-3

    def test_layer_by_layer_and_profile(self, net: nn.Module) -> None:
        x = pictures(2, 33, 35)
        with compile(net, 33, 35, "fp16") as engine:
            report = fastres.verify(net, engine, x, layerwise=True)
            assert report.passed and report.layers[0].name == "x.normalize", str(report)
            rows = {row.name: row for row in engine.profile(x.to(DEVICE)).rows}
            assert rows["x.normalize"].kernel == "LoadInput"

    def test_a_refused_first_operation(self) -> None:
        model, x = Rolled().eval(), pictures(2, 9, 7)
        with compile(model, 9, 7, "fp32", on_unsupported="fallback") as engine:
            assert len(engine.info.fallbacks) == 1
            assert errors(engine(x.to(DEVICE)).cpu(), oracle(model, x)).rms < 1e-6


class Rolled(nn.Module):
    """Its first operation is one that no kernel of ours computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.roll(x, 1, 2))
