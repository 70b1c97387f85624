"""fastres.graph.leftovers: compiling over and over keeps nothing, nor touches others' programs."""

from __future__ import annotations

import gc
import linecache

import pytest
import torch
import torch.fx.graph_module
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastres
from fastres.errors import CaptureError

X = torch.zeros(2, 3, 16, 16)
FREE = ({0: torch.export.Dim.AUTO},)


class Branching(nn.Module):
    """Exported several times, as it asks for its sizes; and in place, so that it is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :1] += 1
        return y if x.shape[0] > 1 else y + 0


def environments() -> int:
    gc.collect()
    return sum(type(one) is ShapeEnv for one in gc.get_objects())


def texts() -> tuple[int, int]:
    generated = sum("eval_with_key" in str(name) for name in linecache.cache)
    return len(torch.fx.graph_module._loader.eval_cache), generated


@pytest.mark.parametrize(
    "net", [nn.Conv2d(3, 4, 3), fastres.models.cifar_resnet(8, seed=0), nn.Flatten()]
)
def test_compiling_keeps_nothing(net: nn.Module) -> None:
    def once() -> None:
        with fastres.compile(net.eval(), X, backend="reference") as engine:
            engine(X)

    once()
    before = environments(), texts()
    for _ in range(3):
        once()
    assert (environments(), texts()) == before


def test_nor_does_a_model_that_is_refused_or_rewritten() -> None:
    def once() -> None:
        try:
            fastres.compile(Branching().eval(), X, backend="reference").close()
        except CaptureError:
            pass

    once()
    before = environments()
    for _ in range(3):
        once()
    assert environments() == before


def test_somebody_elses_program_is_as_before() -> None:
    net = nn.Conv2d(3, 4, 3).eval()
    program = torch.export.export(net, (X,), dynamic_shapes=FREE)
    (environment,) = {
        id(one): one
        for node in program.graph.nodes
        if (one := getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None))
    }.values()
    tracked = environment.tracked_fakes
    with fastres.compile(program, backend="reference") as engine:
        torch.testing.assert_close(engine(X), net(X).detach())
    with fastres.compile(net, X, backend="reference"):
        pass
    assert environment.tracked_fakes is tracked
    for batch in (X, X[:1].expand(5, -1, -1, -1)):
        torch.testing.assert_close(program.module()(batch), net(batch))
    assert program.run_decompositions().module()(X).shape == (2, 4, 14, 14)
