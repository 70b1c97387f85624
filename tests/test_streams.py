"""What `map` does on a GPU, with stand-ins for CUDA's streams: order, copies, lifetimes, number."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import fastres
from fastres import streams
from fastres.streams import OnStreams


class Stream:
    """Writes down what is asked of it."""

    log: list[str] = []
    made = 0

    def __init__(self, device: Any = None, name: str = "worker") -> None:
        self.name = name
        Stream.made += name == "worker"

    def __enter__(self) -> Stream:
        self.log.append(f"enter {self.name}")
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append(f"leave {self.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return "event"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} comes to its end")


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    Stream.log, Stream.made = [], 0
    caller = Stream(name="caller")
    monkeypatch.setattr(streams.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(streams.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(streams.torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, s: Stream.log.append(f"kept for {s.name}")
    )


def test_the_order_of_things() -> None:
    def call(x: torch.Tensor) -> dict[str, torch.Tensor]:
        Stream.log.append("call")
        return {"y": x + 1}

    work = OnStreams(torch.device("cpu")).submission(call, (torch.zeros(2),))
    assert Stream.log == ["caller records"]
    assert torch.equal(work()["y"], torch.ones(2))
    assert Stream.log[1:] == [
        "enter worker",
        "worker waits for event",
        "call",
        "leave worker",
        "worker comes to its end",
        "kept for caller",
    ]


def test_odd_inputs_reach_the_engine() -> None:
    seen: list[object] = []

    def call(x: object) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(1)

    on = OnStreams(torch.device("meta"))
    for given in (3, torch.zeros(2), torch.zeros(2, device="meta")):
        on.submission(call, (given,))()
    assert seen[0] == 3
    assert all(isinstance(x, torch.Tensor) and x.is_meta for x in seen[1:])


def test_as_many_streams_as_threads_at_once() -> None:
    on, together = OnStreams(torch.device("cpu")), threading.Barrier(3)

    def call(x: torch.Tensor) -> torch.Tensor:
        together.wait(10)
        return x

    for _ in range(4):  # threads of their own each time, as `map` has them
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                pool.submit(on.submission(call, (torch.zeros(1),)))
    assert Stream.made == 3


def test_a_call_that_fails_gives_its_stream_back() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("wrong")

    on = OnStreams(torch.device("cpu"))
    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"):
            on.submission(call, (torch.zeros(1),))()
    assert Stream.made == 1


def test_an_engine_keeps_its_streams() -> None:
    """Each stream that is new to the backend is an arena that is new to the GPU."""
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    engine = fastres.compile(net, torch.zeros(2, 3, 8, 8), backend="reference")
    engine._streams = OnStreams(engine.device)  # as on a GPU
    xs = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for _ in range(4):
        for x, y in zip(xs, engine.map(xs, depth=1), strict=True):
            assert torch.equal(y, engine(x))
    assert Stream.made == 1
