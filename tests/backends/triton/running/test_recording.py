"""A GPU that is not the current one: runs, recordings and measurements are on it all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastres
from fastres.backends.base import NodeTime
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LoadInput
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.running.contexts import Bound, Runner
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.timing import milliseconds, record_cuda_graph, recorder
from fastres.graph.architecture import ResNetSpec
from fastres.graph.builder import build_graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
Record = Callable[[Callable[[], None]], Callable[[], None]]


class Sums(Runner):
    """A network whose one kernel, the classifier's, gives the sum of the picture.

    Args:
        gpus: where it is launched; memory is the CPU's.
    """

    failures = (ValueError,)

    def __init__(self, gpus: Any, device: torch.device, record: Record | None) -> None:
        net = fastres.models.cifar_resnet(8, seed=0)
        graph = optimise(build_graph(net.state_dict(), ResNetSpec(), fastres.Input((1, 3, 8, 8))))
        plan = make_plan(graph, ((2, 3, 8, 8),), "fp32", Tiles(Target(90, 1)))
        super().__init__(plan, Packed(graph, torch.float32, CPU), device, record)
        self.gpus = gpus
        self.current: list[int] = []  # while an input was loaded or a kernel launched

    def bind(self, arena: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Iterator[Bound]:
        (load,) = (step for step in self.plan.steps if isinstance(step, LoadInput))
        ((output, _),) = self.plan.outputs

        def kernel() -> None:
            tensors[output].copy_(tensors[load.target].sum((1, 2, 3)).view(-1, 1))

        def launch() -> None:
            self.current.append(self.gpus.now)
            self.gpus.launch(kernel, self._device)

        for step in self.plan.steps:
            yield Bound(step, (launch,) if step is self.plan.steps[-1] else (), None)

    def load(self, step: LoadInput, given: torch.Tensor, target: torch.Tensor) -> None:
        def kernel() -> None:
            target[: len(given)].copy_(given.permute(0, 2, 3, 1))

        self.current.append(self.gpus.now)
        self.gpus.launch(kernel, self._device)

    def _new_arena(self) -> torch.Tensor:
        return torch.zeros(self.plan.arena_bytes, dtype=torch.uint8)

    def check(self) -> None:
        for seed in range(4):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            (y,) = self.run([x])
            assert torch.allclose(y[:, 0], x.sum((1, 2, 3)), atol=1e-4), f"call {seed}"


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("device", [FIRST, SECOND])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_gpu_computes_whichever_is_current(
    gpus: Any, device: torch.device, current: int, recorded: bool
) -> None:
    """After recordings on both, as PyTorch keeps the stream of the first one."""
    for other in (FIRST, SECOND):
        Sums(gpus, other, recorder(other)).check()
    gpus.now = current
    runner = Sums(gpus, device, recorder(device) if recorded else None)
    runner.check()
    assert set(runner.current) == {device.index} and gpus.now == current


def test_recordings_are_made_on_one_stream_a_gpu(gpus: Any) -> None:
    for device in (FIRST, SECOND, FIRST, SECOND):
        replayed: list[int] = []

        def kernel(log: list[int] = replayed) -> None:
            log.append(1)

        replay = record_cuda_graph(lambda k=kernel, d=device: gpus.launch(k, d), device)
        assert len(replayed) == 1  # as it was run before
        replay()
        assert len(replayed) == 2
    assert [stream.device for stream in gpus.streams] == [FIRST, SECOND]
    assert gpus.now == 0


def test_what_is_tried_and_timed_is_on_it_too(gpus: Any) -> None:
    runner = Sums(gpus, SECOND, recorder(SECOND))
    assert runner.failing() is None
    runner._least = lambda cost: None  # type: ignore[method-assign]
    times = runner.profile([torch.zeros(2, 3, 8, 8)])
    assert all(isinstance(time, NodeTime) for time in times)
    assert set(runner.current) == {1} and gpus.now == 0
    launched: list[int] = []
    milliseconds(lambda: gpus.launch(lambda: launched.append(gpus.now), SECOND), SECOND)
    assert set(launched) == {1}


def test_streams_of_one_engine_share_few_arenas(gpus: Any) -> None:
    """As `Engine.map` and callers of their own streams come and go, with work still queued."""
    runner = Sums(gpus, SECOND, recorder(SECOND))
    for seed in range(12):
        stream = gpus.Stream(SECOND)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with gpus.stream(stream):
            (y,) = runner.run([x])
            stream.busy = True
        assert torch.allclose(y[:, 0], x.sum((1, 2, 3)), atol=1e-4)
    assert len(runner._pool) == 4
