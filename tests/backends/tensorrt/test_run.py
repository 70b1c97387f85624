"""The runner against a module that stands for TensorRT: addresses, shapes, streams, recordings.

There is no GPU here: memory is the CPU's, and streams are numbers. What a real engine computes is
for tests marked gpu.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.backends.tensorrt.api import Api
from fastres.backends.tensorrt.plan import Layer
from fastres.backends.tensorrt.run import TensorRtRunner
from fastres.errors import BackendUnavailable, OutOfMemory, UnsupportedError

NAMES = (["x"], ["y"])
CPU = torch.device("cpu")


class Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class Execution:
    """y = 2 x, [N, 4] both, at most 8 rows."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profiler: Any = None
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        count = self.shape[0] * self.shape[1]
        x, y = ((ctypes.c_float * count).from_address(self.addresses[n]) for n in "xy")
        for i in range(count):
            y[i] = 2 * x[i]
        if self.profiler is not None:
            self.profiler.report_layer_time("double", 0.5)
            self.profiler.report_layer_time("reformat", 0.1)
        return self.engine.works


class Engine:
    def __init__(self, about: dict[str, Any]) -> None:
        self.tensors = about["tensors"]
        self.num_io_tensors = len(self.tensors)
        self.works = about.get("works", True)
        self.room = about.get("room", 99)
        self.contexts: list[Execution] = []

    def get_tensor_name(self, i: int) -> str:
        return str(self.tensors[i][0])

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode[dict(self.tensors)[name]]

    def create_execution_context(self) -> Execution | None:
        if len(self.contexts) >= self.room:
            return None
        self.contexts.append(Execution(self))
        return self.contexts[-1]

    def create_engine_inspector(self) -> Any:
        layer = {
            "Name": "double",
            "LayerType": "Convolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Channel major INT8 format"}],
            "Outputs": [{"Name": "y", "Datatype": "Float"}],
            "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: conv1/relu]",
        }
        text = json.dumps({"Layers": [layer, "without details"], "Bindings": ["x", "y"]})
        return SimpleNamespace(get_engine_information=lambda form: text)


class Runtime:
    def __init__(self, log: Any) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Engine(json.loads(plan)) if plan.startswith(b"{") else None


class Profiler:
    def __init__(self) -> None:
        pass


def logger(level: Any) -> None:
    return None


logger.ERROR = 2  # type: ignore[attr-defined]
MODULE = SimpleNamespace(
    Logger=logger,
    Runtime=Runtime,
    TensorIOMode=Mode,
    LayerInformationFormat=SimpleNamespace(JSON=1),
    IProfiler=Profiler,
)
API = Api(MODULE, "tensorrt", (11, 4))
GOOD = {"tensors": [["x", "INPUT"], ["y", "OUTPUT"]]}


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The current stream, a number that tests change."""
    current = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return current


Record = Callable[[Callable[[], None]], Callable[[], None]]


def runner(record: Record | None = None, limit: int = 8, **about: Any) -> TensorRtRunner:
    plan = json.dumps({**GOOD, **about}).encode()
    return TensorRtRunner(API, plan, NAMES, CPU, record, limit)


def batch(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def run(engine: TensorRtRunner, x: Tensor) -> Tensor:
    (y,) = engine.run([x], [tuple(x.shape)])
    return y


def test_outputs_are_written_to_memory_of_their_own(stream: SimpleNamespace) -> None:
    engine = runner()
    first, second = run(engine, batch(3)), run(engine, batch(3, seed=1))
    assert torch.equal(first, 2 * batch(3)) and torch.equal(second, 2 * batch(3, seed=1))
    (execution,) = engine._engine.contexts
    assert execution.streams == [7, 7]


def test_recorded_work_reads_and_writes_where_it_was_recorded() -> None:
    recorded: list[Callable[[], None]] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        work()
        recorded.append(work)
        return work

    engine = runner(record)
    given = [batch(2, seed) for seed in range(3)]
    outputs = [run(engine, x) for x in given]
    for x, y in zip(given, outputs, strict=True):
        assert torch.equal(y, 2 * x)
    assert len(recorded) == 1
    run(engine, batch(5))
    assert len(recorded) == 2  # another shape, another recording


def test_threads_have_a_context_each() -> None:
    engine = runner(lambda work: work)
    wrong: list[int] = []

    def call(seed: int) -> None:
        x = batch(4, seed)
        for _ in range(50):
            if not torch.equal(run(engine, x), 2 * x):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 1 <= len(engine._engine.contexts) <= 4


def test_contexts_of_shapes_not_seen_for_long_are_dropped() -> None:
    engine = runner(limit=2)
    for n in (1, 2, 3, 1):
        run(engine, batch(n))
    assert len(engine._pools) == 2 and len(engine._engine.contexts) == 4


def test_layers_are_the_inspector_s() -> None:
    assert runner().layers() == (Layer("double", "Convolution", ("conv1",), ("int8",), ("fp32",)),)


def test_times_stand_under_our_nodes() -> None:
    engine = runner()
    times = engine.profile([batch(2)], [(2, 4)], engine.layers())
    assert [(t.name, t.milliseconds, t.ran_as) for t in times] == [
        ("conv1", 0.5, "double"),
        ("reformat", 0.1, "reformat"),
    ]


class TestRefusals:
    def test_a_plan_that_is_none(self) -> None:
        with pytest.raises(BackendUnavailable, match="does not take this engine"):
            TensorRtRunner(API, b"\0" * 64, NAMES, CPU, None, 8)

    @pytest.mark.parametrize(
        "tensors",
        [[["x", "INPUT"]], [["x", "INPUT"], ["z", "OUTPUT"]], [["x", "OUTPUT"], ["y", "INPUT"]]],
    )
    def test_an_engine_of_another_network(self, tensors: Any) -> None:
        with pytest.raises(UnsupportedError, match="belongs to another network"):
            runner(tensors=tensors)

    def test_a_shape_out_of_range(self) -> None:
        with pytest.raises(UnsupportedError, match=r"does not take x as \[9, 4\]"):
            run(runner(), batch(9))

    def test_an_output_of_another_shape(self) -> None:
        with pytest.raises(UnsupportedError, match=r"gives y the shape \[2, 4\], expected \[2, 5"):
            runner().run([batch(2)], [(2, 5)])

    def test_no_room(self) -> None:
        with pytest.raises(OutOfMemory, match="another execution context"):
            run(runner(room=0), batch(1))

    def test_a_run_that_fails(self) -> None:
        with pytest.raises(UnsupportedError, match="could not run"):
            run(runner(works=False), batch(1))
