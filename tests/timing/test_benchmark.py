"""fastres.benchmark: planted speeds come out as planted, and the targets really take turns."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.errors import InputError
from fastres.timing.benchmark import Target, benchmark
from fastres.timing.machine import machine
from fastres.timing.turns import MIN_ROUNDS


def sleeper(seconds: float) -> Callable[[Tensor], Tensor]:
    """Takes that long for every image, and cannot be slowed much by what else the machine does."""

    def call(x: Tensor) -> Tensor:
        time.sleep(seconds * len(x))
        return x

    return call


def recorder(name: str, log: list[str]) -> Callable[[Tensor], None]:
    def call(x: Tensor) -> None:
        log.append(name)
        time.sleep(1e-3)

    return call


class TestBenchmark:
    def test_a_target_that_was_held_up_is_named(self) -> None:
        calls = iter(range(1_000_000))

        def stalling(x: Tensor) -> None:
            time.sleep(0.05 if next(calls) % 3 == 0 else 0.001)

        targets = {"steady": sleeper(0.002), "stalling": stalling}
        report = benchmark(targets, {1: torch.zeros(1)}, duration_s=0.3)
        (said,) = report.unsteady
        assert said.startswith("unsteady: stalling at batch 1 took") and said in str(report)

    def test_planted_speeds(self) -> None:
        targets = {"slow": sleeper(0.012), "fast": sleeper(0.003)}
        report = benchmark(targets, {1: torch.zeros(1), 2: torch.zeros(2)}, duration_s=0.3)
        assert report.baseline == "slow"
        for size in (1, 2):
            slow, fast = report.of("slow", size), report.of("fast", size)
            assert slow.min_ms >= 12 * size and fast.min_ms >= 3 * size
            assert fast.speedup.median == pytest.approx(4, rel=0.25)
            assert fast.speedup.low <= fast.speedup.median <= fast.speedup.high
            assert (slow.speedup.low, slow.speedup.high) == (1, 1)
            assert fast.samples > slow.samples >= MIN_ROUNDS
            assert slow.min_ms <= slow.latency_ms["p50"] <= slow.latency_ms["p99"]
            assert 0.5 / 0.012 < slow.throughput <= 1 / 0.012

    def test_another_baseline_inverts_the_ratio(self) -> None:
        targets = {"slow": sleeper(0.004), "fast": sleeper(0.001)}
        report = benchmark(targets, [torch.zeros(1)], duration_s=0.1, baseline="fast")
        there, back = report.of("slow", 1).speedup, report.against("slow").of("fast", 1).speedup
        assert report.of("fast", 1).speedup.median == 1
        assert there.median * back.median == pytest.approx(1, rel=0.05)
        assert there.median < 1 < back.median

    def test_targets_take_turns_in_a_shuffled_order(self) -> None:
        def orders(seed: int) -> list[str]:
            """Who ran in each round, in order; the first, which holds the warm-up, is left out."""
            log: list[str] = []
            targets = [Target(name, recorder(name, log)) for name in "abc"]
            benchmark(
                targets,
                [torch.zeros(1)],
                duration_s=0.03,
                seed=seed,
                progress=lambda done: log.append("|"),
            )
            rounds = "".join(name for name, _ in groupby(log)).split("|")
            return rounds[1:MIN_ROUNDS]

        first, again, other = orders(0), orders(0), orders(1)
        assert all(sorted(order) == ["a", "b", "c"] for order in first)
        assert first == again != other
        assert len(set(first)) > 1

    def test_every_target_gets_the_same_batch_without_gradients(self) -> None:
        x = torch.ones(2, 3, requires_grad=True)
        seen: set[tuple[int, bool]] = set()

        def call(batch: Tensor) -> None:
            seen.add((id(batch), torch.is_grad_enabled()))

        benchmark({"a": call, "b": call}, [x], duration_s=0.01)
        assert seen == {(id(x), False)}

    def test_progress_rises_to_one(self) -> None:
        done: list[float] = []
        examples = [torch.zeros(1), torch.zeros(2)]
        benchmark({"a": sleeper(1e-3)}, examples, duration_s=0.02, progress=done.append)
        assert done == sorted(done) and 0 < done[0] and done[-1] == 1

    def test_slow_target_still_gets_its_rounds(self) -> None:
        report = benchmark({"a": sleeper(0.02)}, [torch.zeros(1)], duration_s=0.01)
        assert len(report.of("a", 1).round_ms) == report.of("a", 1).samples == MIN_ROUNDS

    def test_an_engine_tells_its_precision(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
        x = torch.zeros(1, 3, 8, 8)
        engine = fastres.compile(model, x, backend="cpu", precision="fp32")
        targets = [Target("ours", engine), Target("said", engine, "as said")]
        report = benchmark(targets, [x], duration_s=0.01)
        assert report.of("ours", 1).precision == "fp32"
        assert report.of("said", 1).precision == "as said"

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"targets": {}}, "no target"),
            ({"targets": [Target("a", len), Target("a", len)]}, "two targets are called 'a'"),
            ({"baseline": "b"}, "the targets are a"),
            ({"duration_s": 0.0}, "above 0"),
            ({"duration_s": float("nan")}, "above 0"),
            ({"percentiles": ()}, "percentiles"),
            ({"percentiles": (50, 101)}, "percentiles"),
            ({"examples": []}, "batch sizes are"),
            ({"examples": [torch.zeros(2), torch.ones(2)]}, "each one once"),
            ({"examples": {3: torch.zeros(2)}}, "size 3"),
            ({"examples": [torch.zeros(0)]}, "1 or more"),
            ({"examples": torch.zeros(2, 3)}, r"\[x\]"),
            ({"targets": 5}, "5 is no target; give callables by name"),
            ({"targets": {"a": 5}}, "call=5.* is no target"),
            ({"targets": {5: len}}, "name=5.* is no target"),
            ({"targets": [("a", len)]}, "is no target"),
            ({"examples": 5}, r"examples is int; give a sequence of batches, \[x\]"),
            ({"examples": [5]}, "examples holds 5; a batch is a tensor"),
            ({"examples": {1: torch.tensor(1.0)}}, r"examples holds tensor\(1.\)"),
            ({"duration_s": "x"}, "duration_s is 'x'; it must be a number above 0"),
            ({"duration_s": float("inf")}, "duration_s is inf"),
            ({"percentiles": 5}, "percentiles are 5"),
            ({"percentiles": ("a",)}, "percentiles are"),
            ({"progress": 5}, "progress is 5"),
            ({"seed": -1}, "seed is -1; it must be an integer of at least 0"),
            ({"seed": "x"}, "seed is 'x'"),
        ],
    )
    def test_refuses(self, changed: dict[str, object], message: str) -> None:
        given = {"targets": {"a": len}, "examples": [torch.zeros(1)], **changed}
        with pytest.raises(InputError, match=message):
            benchmark(given.pop("targets"), given.pop("examples"), **given)


class TestReport:
    def test_text_and_json(self) -> None:
        targets = {"one": sleeper(1e-3), "two": sleeper(1e-3)}
        report = benchmark(
            targets, [torch.zeros(1)], duration_s=0.02, percentiles=(50, 99.9), baseline="two"
        )
        text = str(report)
        for word in ("one", "two", "img/s", "p50", "p99.9", "over two", report.machine.cpu):
            assert word in text
        read = json.loads(report.to_json())
        assert read == json.loads(json.dumps(report.to_dict()))
        assert read["machine"]["versions"]["torch"] == torch.__version__
        assert read["measurements"][0]["speedup"].keys() == {"median", "low", "high"}

    def test_asks_for_what_was_measured(self) -> None:
        report = benchmark({"a": len}, [torch.zeros(1)], duration_s=0.01)
        for look in (lambda: report.of("a", 2), lambda: report.against("b")):
            with pytest.raises(InputError, match="was not measured"):
                look()

    def test_machine(self) -> None:
        here = machine()
        assert here.cpu and here.cores >= 1 and here.threads == torch.get_num_threads()
        assert {"python", "torch", "openvino"} <= here.versions.keys()
        assert "some GPU" in str(replace(here, gpu="some GPU"))
