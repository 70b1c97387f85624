"""What `map` does on a GPU, with stand-ins for CUDA's streams: order, copies, lifetimes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastres import streams
from fastres.streams import OnStreams


class Stream:
    """Writes down what is asked of it."""

    log: list[str] = []

    def __init__(self, device: Any = None, name: str = "worker") -> None:
        self.name = name

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
    Stream.log = []
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

    work = OnStreams(call, torch.device("cpu")).submission((torch.zeros(2),))
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


def test_a_thread_keeps_its_stream_and_odd_inputs_reach_the_engine() -> None:
    seen: list[object] = []

    def call(x: object) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(1)

    on = OnStreams(call, torch.device("meta"))
    assert on._stream() is on._stream()
    for given in (3, torch.zeros(2), torch.zeros(2, device="meta")):
        on._run((given,), Stream(name="caller"), "event")  # type: ignore[arg-type]
    assert seen[0] == 3
    assert all(isinstance(x, torch.Tensor) and x.is_meta for x in seen[1:])
