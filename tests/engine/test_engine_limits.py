"""Limits of callers: how long a call may take, how many there may be, and what that leaves."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastres
from fastres.backends.reference import ReferenceExecutable
from fastres.deadlines import Callers, Deadline
from fastres.errors import Busy, CallTimeout, FastresError, InputError

X = torch.randn(1, 3, 160, 160)
SHORT = 0.02


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For every test of this file."""


class Slow(nn.Sequential):
    """Many equal steps, and where it is rolled one that only PyTorch knows."""

    def __init__(self, rolled: bool = False) -> None:
        convolutions = [nn.Conv2d(64 if i else 3, 64, 3, padding=1) for i in range(16)]
        super().__init__(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.rolled = rolled

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.roll(x, 1, 3) if self.rolled else x)


PREPROCESS = fastres.Preprocess(resize=160, crop=160)
MADE: dict[str, Callable[[], fastres.Engine]] = {
    "cpu": lambda: fastres.compile(Slow().eval(), X, threads=1, preprocess=PREPROCESS),
    "reference": lambda: fastres.compile(
        Slow().eval(), X, backend="reference", preprocess=PREPROCESS
    ),
    "segments": lambda: fastres.compile(
        Slow(rolled=True).eval(),
        X,
        threads=1,
        backend="cpu",
        on_unsupported="fallback",
        preprocess=PREPROCESS,
    ),
}


@pytest.fixture(scope="module", params=MADE)
def slow(request: pytest.FixtureRequest) -> Iterator[fastres.Engine]:
    with MADE[request.param]() as engine:
        yield engine


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class TestTimeout:
    def test_a_call_is_given_up_and_the_next_is_as_before(self, slow: fastres.Engine) -> None:
        want = slow(X)
        whole = min(seconds_of(lambda: slow(X)) for _ in range(2))
        assert whole > 3 * SHORT

        def timed() -> None:
            with pytest.raises(CallTimeout, match=rf"no answer within timeout={SHORT:g} s"):
                slow(X, timeout=SHORT)

        # the end of a step is waited for in PyTorch; on a busy machine all takes longer
        assert min(seconds_of(timed) for _ in range(4)) < 0.7 * whole
        for _ in range(3):
            assert torch.equal(slow(X), want)
            assert torch.equal(slow(X, timeout=100), want)

    def test_it_is_for_the_whole_of_a_batch_in_parts(self, slow: fastres.Engine) -> None:
        net = Slow().eval()
        with fastres.compile(net, X, threads=1, backend=slow.backend.name, max_batch_size=1) as e:
            one = seconds_of(lambda: e(X))
            with pytest.raises(CallTimeout):
                e(torch.cat([X] * 40), timeout=5 * one)

    def test_also_where_openvino_would_lose_a_nan(self, slow: fastres.Engine) -> None:
        bad = X.clone()
        bad[0, 0, 0, 0] = float("nan")
        assert slow(bad).isnan().all()
        with pytest.raises(CallTimeout):
            slow(bad, timeout=SHORT)

    def test_also_for_those_who_wait(self) -> None:
        """Behind others on the one stream: the time is kept, whatever is ahead."""
        with MADE["cpu"]() as engine:
            want = engine(X)
            whole = seconds_of(lambda: engine(X))
            others = [threading.Thread(target=engine, args=(X,)) for _ in range(4)]
            for other in others:
                other.start()
            with pytest.raises(CallTimeout):
                engine(X, timeout=0.3 * whole)
            assert any(other.is_alive() for other in others)
            for other in others:
                other.join()
            assert torch.equal(engine(X), want)

    def test_what_was_given_up_goes_when_it_has_ended(self) -> None:
        with MADE["cpu"]() as engine:
            want = engine(X)
            for _ in range(5):
                with pytest.raises(CallTimeout):
                    engine(X.clone(), timeout=SHORT)  # its memory is kept as long as it is read
                gc.collect()
            (plan,) = engine._lowered.executable._plans.entries()  # type: ignore[attr-defined]
            until = time.monotonic() + 60
            while plan._given_up and time.monotonic() < until:
                assert torch.equal(engine(X), want)
            assert not plan._given_up

    def test_an_engine_may_be_closed_behind_it(self) -> None:
        engine = MADE["cpu"]()
        with pytest.raises(CallTimeout):
            engine(X, timeout=SHORT)
        executable = weakref.ref(engine._lowered.executable)
        engine.close()
        assert executable() is None

    def test_predict(self, slow: fastres.Engine) -> None:
        picture = Image.fromarray(np.zeros((128, 128, 3), np.uint8))
        one = seconds_of(lambda: slow.predict([picture]))
        with pytest.raises(CallTimeout):
            slow.predict([picture] * 60, batch_size=2, timeout=4 * one)
        assert len(slow.predict([picture], timeout=100)) == 1

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9, "1", True, [1]])
    @pytest.mark.parametrize("batch", [0, 1])
    def test_what_is_no_time(self, slow: fastres.Engine, timeout: Any, batch: int) -> None:
        with pytest.raises(InputError, match="timeout is .*; give seconds above 0"):
            slow(X[:batch], timeout=timeout)
        with pytest.raises(InputError, match="timeout is .*; give seconds above 0"):
            slow.predict([], timeout=timeout)

    def test_a_backend_that_cannot_be_stopped(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        with fastres.compile(net, X, backend="onnxruntime", preprocess=PREPROCESS) as engine:
            for batch in (X, X[:0]):
                with pytest.raises(InputError, match="timeout= is for the backends cpu and refer"):
                    engine(batch, timeout=1)
            with pytest.raises(InputError, match="timeout= is for the backends cpu and reference"):
                engine.predict(["nowhere.jpg"], timeout=1)

    def test_an_input_of_that_name_is_given_by_its_place(self) -> None:
        class Named(nn.Module):
            def forward(self, x: Tensor, timeout: Tensor) -> Tensor:
                return x + timeout

        with fastres.compile(Named().eval(), [X, X], backend="reference") as engine:
            assert torch.equal(engine(X, X, timeout=10), X + X)

    def test_inside_of_torch_compile(self) -> None:
        torch._dynamo.reset()
        with fastres.compile(nn.Conv2d(3, 4, 3).eval(), X, backend="reference") as engine:
            model = torch.compile(lambda x: engine(x + 1, timeout=100) * 2, backend="eager")
            assert torch.equal(model(X), engine(X + 1) * 2)


class Held(ReferenceExecutable):
    """Waits inside of a run until it is told to go on."""

    def __init__(self, engine: fastres.Engine) -> None:
        super().__init__(engine.graph, torch.float32)
        self.inside, self.go_on = threading.Semaphore(0), threading.Event()

    def run(self, inputs: Any) -> list[Tensor]:
        self.inside.release()
        assert self.go_on.wait(60)
        return super().run(inputs)


class TestCallers:
    def test_one_too_many_is_refused(self) -> None:
        with fastres.compile(nn.Conv2d(3, 4, 3).eval(), X, backend="reference") as engine:
            want, held = engine(X), Held(engine)
            object.__setattr__(engine._lowered, "executable", held)
            assert engine.max_callers is None
            engine.max_callers = 2
            found: list[Tensor] = []
            callers = [threading.Thread(target=lambda: found.append(engine(X))) for _ in range(2)]
            for caller in callers:
                caller.start()
                assert held.inside.acquire(timeout=60)
            with pytest.raises(Busy, match="2 callers, as many as max_callers allows"):
                engine(X)
            held.go_on.set()
            for caller in callers:
                caller.join()
            assert len(found) == 2 and all(torch.equal(y, want) for y in found)
            assert torch.equal(engine(X), want)

    def test_a_call_that_fails_counts_no_more(self) -> None:
        callers = Callers(1)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt), callers:
                raise KeyboardInterrupt
        with callers, pytest.raises(Busy), callers:
            pass

    def test_map_and_predict_keep_within_it(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        with fastres.compile(net, X, backend="reference", preprocess=PREPROCESS) as engine:
            engine.max_callers = 1
            assert len(list(engine.map([X] * 9, depth=4))) == 9
            picture = Image.fromarray(np.zeros((128, 128, 3), np.uint8))
            assert len(engine.predict([picture] * 5, batch_size=1)) == 5
            engine.max_callers = None
            assert engine.max_callers is None and engine(X) is not None

    @pytest.mark.parametrize("most", [0, -1, 1.5, "2", True])
    def test_what_is_no_count(self, most: Any) -> None:
        with fastres.compile(nn.Conv2d(3, 4, 3).eval(), X, backend="reference") as engine:
            with pytest.raises(InputError, match="max_callers is"):
                engine.max_callers = most


def test_a_deadline_says_what_was_asked_for() -> None:
    deadline = Deadline.after(1e-9)
    time.sleep(0.001)
    with pytest.raises(TimeoutError, match="timeout=1e-09 s") as caught:
        deadline.left()
    assert isinstance(caught.value, FastresError)
    assert 0 < Deadline.after(5).left() <= 5
