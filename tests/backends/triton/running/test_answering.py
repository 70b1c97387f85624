"""A GPU that answers no more is told from launches that are refused; each launch can be named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import fastres
from fastres.backends.triton import backend
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LoadInput
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Machine, Table, Tiles
from fastres.backends.triton.running import answering as answering_module
from fastres.backends.triton.running import run as run_module
from fastres.backends.triton.running.answering import SWITCH, answering, check_answers
from fastres.backends.triton.running.contexts import Bound, Call, Context, Runner
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping import machine_code
from fastres.backends.triton.shipping.machine_code import ReadyCode
from fastres.backends.triton.tuning import tune as tuning
from fastres.backends.triton.tuning.tune import tune
from fastres.errors import DeviceLost, InputError, OutOfMemory, UnsupportedError
from fastres.graph.architecture import ResNetSpec
from fastres.graph.builder import build_graph
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.launch import Launch, LaunchError
from fastres.options import Options

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = ((1, 3, 8, 8),)
ILLEGAL = "CUDA error: an illegal memory access was encountered"
interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
]


class Gpu:
    """What `torch.cuda.synchronize` asks, in place of a GPU."""

    def __init__(self) -> None:
        self.waits = 0
        self.lost = False

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1
        if self.lost:
            raise torch.AcceleratorError(f"{ILLEGAL}\nSearch for `cudaErrorIllegalAddress'")

    def lose(self) -> None:
        """An access out of bounds: the launch itself is fine."""
        self.lost = True

    def refuse(self) -> None:
        """Nothing is lost, or no call is taken any more: the caller cannot tell."""
        raise RuntimeError("Triton Error [CUDA]: invalid argument")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    return found


class TestAnswering:
    def test_only_a_gpu_is_asked(self, gpu: Gpu) -> None:
        check_answers(CPU, "a kernel")
        assert gpu.waits == 0
        check_answers(CUDA, "a kernel")
        assert gpu.waits == 1

    def test_an_error_that_stays_is_told_with_what_ran_last(self, gpu: Gpu) -> None:
        gpu.lose()
        with pytest.raises(DeviceLost) as raised:
            check_answers(CUDA, "a kernel")
        said = str(raised.value)
        assert said.startswith("cuda:0 answers no more, last was a kernel: AcceleratorError: ")
        assert ILLEGAL in said and f"{SWITCH}=1" in said and "Search for" not in said
        assert len(said.splitlines()) == 1

    def test_what_is_raised_while_it_answers_is_the_launchs_own(self, gpu: Gpu) -> None:
        with pytest.raises(RuntimeError, match="invalid argument"), answering(CUDA, "a kernel"):
            gpu.refuse()
        with pytest.raises(TypeError), answering(CUDA, "a kernel"):
            raise TypeError("whatever it is")

    def test_what_is_raised_when_it_does_not_is_not(self, gpu: Gpu) -> None:
        with pytest.raises(DeviceLost, match="a kernel"), answering(CUDA, "a kernel"):
            gpu.lose()
            gpu.refuse()

    def test_it_is_asked_also_where_nothing_is_raised(self, gpu: Gpu) -> None:
        with pytest.raises(DeviceLost, match="a kernel"), answering(CUDA, "a kernel"):
            gpu.lose()

    def test_the_innermost_name_counts(self, gpu: Gpu) -> None:
        with pytest.raises(DeviceLost, match="last was inner"), answering(CUDA, "outer"):
            with answering(CUDA, "inner"):
                gpu.lose()

    @pytest.mark.parametrize(("value", "told"), [("1", True), ("0", False), ("", False)])
    def test_the_switch_names_what_comes(
        self,
        value: str,
        told: bool,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv(SWITCH, value)
        with answering(CPU, "a kernel"):
            assert capsys.readouterr().err == ("fastres: a kernel\n" if told else "")


class FakeRunner(Runner):
    """Steps "a", "b" and "c" on a GPU that is not there."""

    failures = (RuntimeError,)

    def __init__(self, *calls: Call, record: Any = None) -> None:
        super().__init__(SimpleNamespace(steps=[], outputs=[]), None, CUDA, record)  # type: ignore[arg-type]
        self._only = Context(torch.empty(0), {}, tuple(self.bound(calls)))

    def bound(self, calls: Sequence[Call]) -> Iterator[Bound]:
        for name, call in zip("abc", calls, strict=True):
            yield Bound(SimpleNamespace(node=name), (call, call), None)  # type: ignore[arg-type]

    @contextmanager
    def context(self) -> Iterator[Context]:
        yield self._only

    def bind(self, arena: torch.Tensor, tensors: dict[str, torch.Tensor]) -> list[Bound]:
        return []

    def load(self, step: LoadInput, given: torch.Tensor, target: torch.Tensor) -> None:
        pytest.fail("there are no inputs")


class TestRunner:
    def nothing(self) -> None:
        pass

    def test_a_launch_that_is_refused_is_its_steps_failure(self, gpu: Gpu) -> None:
        failed = FakeRunner(self.nothing, gpu.refuse, pytest.fail).failing()
        assert failed is not None
        assert failed[0].node == "b" and "invalid argument" in str(failed[1])

    @pytest.mark.parametrize("raises", [False, True])
    def test_a_launch_that_breaks_the_gpu_is_named(self, raises: bool, gpu: Gpu) -> None:
        """Also where the launch itself returns, as all do: they run later."""

        def broken() -> None:
            gpu.lose()
            if raises:
                gpu.refuse()

        said = r"last was b \(SimpleNamespace\), launch 1 of 2: "
        with pytest.raises(DeviceLost, match=said):
            FakeRunner(self.nothing, broken, pytest.fail).failing()

    def test_where_all_is_well_nothing_fails(self, gpu: Gpu) -> None:
        assert FakeRunner(*3 * [self.nothing]).failing() is None
        assert gpu.waits == 6

    def test_one_by_one_each_call_is_named_and_waited_for(
        self, gpu: Gpu, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def no_graph(work: Call) -> Call:
            pytest.fail("nothing can be waited for in a graph")

        runner = FakeRunner(*3 * [self.nothing], record=no_graph)
        runner.one_by_one = True
        for _ in range(2):
            runner.run([torch.empty(1)])
        told = capsys.readouterr().err.splitlines()
        assert len(told) == gpu.waits == 12
        assert told[3] == "fastres: b (SimpleNamespace), launch 2 of 2"
        runner = FakeRunner(self.nothing, gpu.lose, pytest.fail)
        runner.one_by_one = True
        with pytest.raises(DeviceLost, match="last was b "):
            runner.run([torch.empty(1)])

    def test_no_room_is_told_from_a_gpu_that_is_lost(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner = plan_runner()
        runner._device = CUDA

        def full(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch, "zeros", full)
        with pytest.raises(OutOfMemory, match="there is no room on cuda:0"):
            runner._new_arena()
        gpu.lose()
        with pytest.raises(DeviceLost, match="before memory was asked for"):
            runner._new_arena()

    def test_an_input_kernel_that_is_refused_is_told_from_one(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: Any) -> None:
            raise LaunchError("invalid argument")

        monkeypatch.setattr(run_module, "load", refused)
        runner = plan_runner()
        runner._device = CUDA
        (step,) = runner._loads
        with pytest.raises(UnsupportedError, match="the input x cannot be brought"):
            runner.load(step, torch.empty(0), torch.empty(0))
        gpu.lose()
        with pytest.raises(DeviceLost, match=r"\(LoadInput\)"):
            runner.load(step, torch.empty(0), torch.empty(0))


class TestMachineCode:
    def ready(self, monkeypatch: pytest.MonkeyPatch, failing: Call) -> ReadyCode:
        """Machine code for `SHAPES`, which is tried out by `failing`."""
        linked = SimpleNamespace(input_shapes=SHAPES)
        fake: Any = SimpleNamespace(failing=failing)
        monkeypatch.setattr(machine_code, "DriverRunner", lambda *_: fake)
        monkeypatch.setattr(ReadyCode, "_compare", lambda *_: None)
        code: Any = SimpleNamespace(plans=[linked])
        return ReadyCode(code, None, CUDA, None, [])  # type: ignore[arg-type]

    def test_what_the_driver_refuses_is_compiled_here(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ready, plan = self.ready(monkeypatch, gpu.refuse), SimpleNamespace(input_shapes=SHAPES)
        assert ready.runner(plan, None, None) is None  # type: ignore[arg-type]
        assert "compiled here instead: Triton Error [CUDA]: invalid argument" in ready.notes[0]

    def test_what_a_lost_gpu_refuses_is_not(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ready, plan = self.ready(monkeypatch, gpu.refuse), SimpleNamespace(input_shapes=SHAPES)
        gpu.lose()
        with pytest.raises(DeviceLost, match="machine code"):
            ready.runner(plan, None, None)  # type: ignore[arg-type]
        assert ready.notes == []

    @pytest.mark.parametrize("lost", [False, True])
    def test_kernels_that_bring_pictures_in(
        self, lost: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Bringing(DriverRunner):
            def __init__(self) -> None:
                """Without a plan."""

            @contextmanager
            def context(self) -> Iterator[Context]:
                yield Context(torch.empty(0), {"y": torch.empty(0)}, ())

            def load(self, *_: Any) -> None:
                gpu.lost = lost
                gpu.refuse()

        runner, step = Bringing(), SimpleNamespace(node="x", target="y")
        runner.plan = SimpleNamespace(input_shapes=SHAPES)  # type: ignore[assignment]
        runner._loads, runner._device = [step], CUDA  # type: ignore[list-item]
        monkeypatch.setattr(
            "fastres.backends.triton.running.run_driver.takes_pictures", lambda step: True
        )
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.empty(0))
        if lost:
            with pytest.raises(DeviceLost, match="last was x "):
                runner.failing()
        else:
            failed = runner.failing()
            assert failed is not None and failed[0] is step


PROBLEMS = [Problem("pointers", ConvShape(2, 4, 4, 64, k, 1, 1), "fp16") for k in (64, 128)]


class TestTuning:
    """Tiles that run, are refused, or break the GPU, in the order of the estimates."""

    def found(
        self, what: Sequence[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Table, dict[Problem, list[tuning.Attempt]]]:
        doing = iter(what)

        class FakeTrial:
            def __init__(self, problem: Problem, device: torch.device) -> None:
                self.device = device

            def poison(self) -> None:
                pass

            def calls(self, tile: Any, target: Target) -> tuple[Any, ...]:
                self.do = next(doing)
                return (self.run,)

            def run(self) -> None:
                self.said = self.do()

            def difference(self) -> Any:
                return self.said

        monkeypatch.setattr(tuning, "make_trial", FakeTrial)
        monkeypatch.setattr(tuning, "milliseconds", lambda work, device: 1.0)
        monkeypatch.setattr(tuning, "target_of", lambda device: Target.typical(90))
        table = Table(Machine("NVIDIA H200", 132, "3.6.0", "0123"))
        return table, tune(PROBLEMS, table, CUDA, keep=lambda table: None, tried=2)

    def test_a_tile_that_is_refused_gives_way_to_the_next(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        well = [gpu.refuse, lambda: None, lambda: None, gpu.refuse]
        table, attempts = self.found(well, monkeypatch)
        assert set(table.entries) == {problem.key for problem in PROBLEMS}
        first, second = attempts[PROBLEMS[0]]
        assert first.reason == "RuntimeError: Triton Error [CUDA]: invalid argument"
        assert not first.wrong and second.milliseconds == 1.0

    def test_a_wrong_tile_is_marked_as_such(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = "3 values of output 0 are not the reference's"
        every = [lambda: said, lambda: None, lambda: None, gpu.refuse]
        _, attempts = self.found(every, monkeypatch)
        tried = [attempt for problem in PROBLEMS for attempt in attempts[problem]]
        assert tried[0].reason == said and tried[0].milliseconds is None
        assert [attempt.wrong for attempt in tried] == [True, False, False, False]

    @pytest.mark.parametrize("raises", [False, True])
    def test_a_tile_that_breaks_the_gpu_is_named_and_the_last(
        self, raises: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> None:
            gpu.lose()
            if raises:
                gpu.refuse()

        tile = PROBLEMS[1].candidates(Target.typical(90))[0]
        with pytest.raises(DeviceLost) as raised:
            self.found([lambda: None, lambda: None, broken, pytest.fail], monkeypatch)
        assert f"last was {PROBLEMS[1].key} with {tile}: " in str(raised.value)


def small_graph() -> Graph:
    net = fastres.models.cifar_resnet(8, seed=0)
    return optimise(build_graph(net.state_dict(), ResNetSpec(), fastres.Input(SHAPES[0])))


def plan_runner() -> PlanRunner:
    graph = small_graph()
    plan = make_plan(graph, SHAPES, "fp32", Tiles(Target(90, 1)))
    return PlanRunner(plan, Packed(graph, torch.float32, CPU), CPU)


def test_a_loaded_engine_asks_the_environment_and_a_bad_request_is_refused() -> None:
    assert Options().sync_launches is None
    with pytest.raises(InputError, match="sync_launches is 1; give True, False or None"):
        fastres.compile(fastres.models.cifar_resnet(8).eval(), sync_launches=1)  # type: ignore[arg-type]


class Refused(InterpretedFunction):  # type: ignore[misc]
    """A kernel whose launch the driver refuses, as Triton says that."""

    def __init__(self, given: InterpretedFunction) -> None:
        self.fn = given.fn  # which names it

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(**_: Any) -> None:
            raise RuntimeError("Triton Error [CUDA]: invalid argument")

        return launch


class TestInterpreted:
    pytestmark = interpreted

    def on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> TritonExecutable:
        """As on a GPU whose driver refuses the tile that the estimate finds best for conv1."""
        run, first = Launch.run, list[int]()

        def or_refuse(launch: Launch) -> None:
            if "BLOCK_N" in launch.constants:
                first.append(int(launch.constants["BLOCK_M"] or 0))
                if launch.constants["BLOCK_M"] == first[0]:
                    launch = replace(launch, kernel=Refused(launch.kernel))
            run(launch)

        monkeypatch.setattr(Launch, "run", or_refuse)
        monkeypatch.setattr(backend, "_is_gpu", lambda device: True)
        return TritonExecutable(small_graph(), Options(precision="fp32"), CPU, SHAPES)

    def test_a_tile_that_the_driver_refuses_is_banned(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notes = self.on_a_gpu(monkeypatch).account().notes
        assert any(note.startswith("not used: conv1: ") for note in notes)
        said = r"stages: RuntimeError: Triton Error [CUDA]: invalid argument"
        assert said in notes[0] and "'BLOCK_M': " in notes[0]

    def test_none_is_banned_where_the_gpu_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lost(device: torch.device, last: str) -> None:
            raise DeviceLost(f"last was {last}")

        monkeypatch.setattr(answering_module, "check_answers", lost)
        with pytest.raises(DeviceLost, match=r"^last was conv1 \(LaunchConv2d\), launch 1 of 1$"):
            self.on_a_gpu(monkeypatch)

    @pytest.mark.parametrize(
        ("given", "environment", "named"),
        [(True, "0", True), (None, "1", True), (False, "1", False), (None, "0", False)],
    )
    def test_the_switch(
        self,
        given: bool | None,
        environment: str,
        named: bool,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv(SWITCH, environment)
        net = fastres.models.cifar_resnet(8, seed=0).eval()
        x = torch.randn(1, 3, 8, 8)
        more: dict[str, Any] = {"backend": "triton", "device": "cpu", "sync_launches": given}
        with fastres.compile(net, x, **more) as engine:
            capfd.readouterr()
            y = engine(x)
            told = capfd.readouterr().err.splitlines()
            steps = engine._lowered.executable._runner(SHAPES).plan.steps  # type: ignore[attr-defined]
            said = "each launch is waited for" in str(engine.info.account.notes)
        assert torch.allclose(y, net(x), atol=1e-4)
        assert said == named
        nodes = [line.removeprefix("fastres: ").partition(" (")[0] for line in told]
        assert nodes == ([step.node for step in steps] if named else [])
