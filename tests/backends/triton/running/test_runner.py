"""Contexts of a plan: recorded once, replayed, one caller each; batches smaller than the plan's."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from msgspec import structs
from triton.runtime.errors import OutOfResources

import fastres
from fastres.backends.base import CompiledParts
from fastres.backends.triton import backend
from fastres.backends.triton.backend import TritonExecutable, bucket
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LaunchConv2d, LoadInput
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.backends.triton.shipping.stored import recorded
from fastres.errors import OutOfMemory, UnsupportedError
from fastres.graph.architecture import ResNetSpec
from fastres.graph.builder import build_graph
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch, LaunchError
from fastres.options import Options

CPU = torch.device("cpu")
FP32 = Options(precision="fp32")
interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
]


def small_graph() -> Graph:
    net = fastres.models.cifar_resnet(8, seed=0)
    return optimise(build_graph(net.state_dict(), ResNetSpec(), fastres.Input((1, 3, 8, 8))))


def runner_of(batch: int, record: Callable[..., Callable[[], None]] | None = None) -> PlanRunner:
    graph = small_graph()
    plan = make_plan(graph, ((batch, 3, 8, 8),), "fp32", Tiles(Target(90, 1)))
    return PlanRunner(plan, Packed(graph, torch.float32, CPU), CPU, record)


@pytest.mark.parametrize(
    ("batch", "planned"), [(1, 1), (16, 16), (17, 18), (33, 36), (100, 104), (255, 256)]
)
def test_bucket(batch: int, planned: int) -> None:
    assert bucket(batch) == planned


def test_buckets_waste_at_most_an_eighth_and_are_few() -> None:
    batches = range(1, 1025)
    assert all(b <= bucket(b) <= 1.125 * b for b in batches)
    assert len({bucket(b) for b in batches}) == 16 + 6 * 8


def test_no_room_says_how_much_was_asked_for() -> None:
    runner = runner_of(1)
    runner.plan = structs.replace(runner.plan, arena_bytes=2**60)
    with pytest.raises(OutOfMemory, match=r"1099511627776 MiB .* \[1, 3, 8, 8\].*smaller batches"):
        runner.run([torch.zeros(1, 3, 8, 8)])
    runner.plan = structs.replace(runner.plan, arena_bytes=2**20)
    with runner.context() as context:  # the next one that fits is served
        assert context.arena.numel() == 2**20


class TestInterpreted:
    pytestmark = interpreted

    def test_recorded_once_and_replayed(self) -> None:
        recorded, replayed = [], []

        def record(work: Callable[[], None]) -> Callable[[], None]:
            recorded.append(work)

            def replay() -> None:
                replayed.append(work)
                work()

            return replay

        runner, plain = runner_of(2, record), runner_of(2)
        x = torch.randn(2, 3, 8, 8)
        first, second = runner.run([x]), runner.run([x])
        assert len(recorded) == 1 and len(replayed) == 2
        assert torch.equal(first[0], second[0]) and torch.equal(first[0], plain.run([x])[0])

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_inputs_are_brought_in_by_the_recording(
        self, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the first call, none but a copy of the input stands between caller and replay."""
        loaded: list[torch.Tensor] = []
        load = PlanRunner.load

        def counted(
            self: PlanRunner, step: LoadInput, given: torch.Tensor, to: torch.Tensor
        ) -> None:
            loaded.append(given)
            load(self, step, given, to)

        def record(work: Callable[[], None]) -> Callable[[], None]:
            def replay() -> None:
                with monkeypatch.context() as during:
                    during.setattr(PlanRunner, "load", load)  # on a GPU no Python runs here
                    work()

            work()  # as a recording begins
            return replay

        runner, plain = runner_of(3, record), runner_of(3)
        every = [torch.randn(n, 3, 8, 8).to(memory_format=layout) for n in (3, 2, 3, 1)]
        want = [plain.run([x])[0] for x in every]
        monkeypatch.setattr(PlanRunner, "load", counted)
        found = [runner.run([x])[0] for x in every]
        assert all(map(torch.equal, found, want))
        assert len(loaded) == 1 and loaded[0].is_contiguous(memory_format=layout)
        with runner.context() as context:
            (room,) = context.given
            assert room.shape == (3, 3, 8, 8) and room is loaded[0]
            assert context.memory() == (context.arena, room)

    def test_a_smaller_batch_uses_the_plan_of_its_bucket(self) -> None:
        runner = runner_of(3)
        x = torch.randn(3, 3, 8, 8)
        with runner.context() as context:
            context.arena.fill_(0xFF)
        whole = runner.run([x])[0]
        with runner.context() as context:
            context.arena.fill_(0xFF)
        part = runner.run([x[:2]])[0]
        assert part.shape[0] == 2 and torch.equal(part, whole[:2])

    def test_several_threads_at_once(self) -> None:
        """Triton's interpreter runs one kernel at a time, which launches see to."""
        runner, x = runner_of(2), torch.randn(2, 3, 8, 8)
        expected = runner.run([x])[0]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: runner.run([x])[0], range(8)))
        assert all(torch.equal(y, expected) for y in found)

    def test_images_beyond_a_smaller_batch_are_not_garbage(self, garbage_in_memory: None) -> None:
        with runner_of(3).context() as context:
            assert not context.arena.any()

    def test_two_callers_get_two_arenas(self) -> None:
        runner = runner_of(1)
        with runner.context() as one, runner.context() as other:
            assert one is not other
            assert one.arena.data_ptr() != other.arena.data_ptr()
        with runner.context() as again:
            assert again in (one, other)

    @pytest.mark.parametrize("switched", [False, True])
    def test_arenas_go_with_the_executable(self, switched: bool, no_collector: None) -> None:
        options = Options(precision="fp32", sync_launches=switched)
        executable = TritonExecutable(small_graph(), options, CPU, ((2, 3, 8, 8),))
        executable.run([torch.randn(2, 3, 8, 8)])
        executable.run([torch.randn(1, 3, 8, 8)])
        arenas = []
        for n in (1, 2):
            with executable._runner(((n, 3, 8, 8),)).context() as context:
                assert context.replay is not None
                arenas.append(weakref.ref(context.arena))
        del context, executable
        assert [arena() for arena in arenas] == [None, None]

    def test_executable_plans_by_bucket(self) -> None:
        executable = TritonExecutable(small_graph(), FP32, CPU, ((17, 3, 8, 8),))
        assert executable._runner(((17, 3, 8, 8),)) is executable._runner(((18, 3, 8, 8),))

    def test_a_tile_that_does_not_compile_gives_way_to_the_next(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = torch.randn(1, 3, 8, 8)
        plain = TritonExecutable(small_graph(), FP32, CPU, ((1, 3, 8, 8),))
        expected = plain.run([x])[0]
        first = convolutions(plain)[0].tile.block_m

        def broken(launch: Launch) -> bool:
            return "BLOCK_N" in launch.constants and launch.constants["BLOCK_M"] == first

        executable = self.on_a_gpu(monkeypatch, broken)
        assert any("not used: conv1: " in note for note in executable.account().notes)
        assert "out of resource: shared memory" in executable.account().notes[0]
        assert not any(step.tile.block_m == first for step in convolutions(executable))
        assert torch.allclose(executable.run([x])[0], expected, atol=1e-4)

    def test_where_no_tile_compiles_there_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UnsupportedError, match=r"(?s)no tile can run pointers fp32 .*conv1: "):
            self.on_a_gpu(monkeypatch, lambda launch: "BLOCK_N" in launch.constants)

    def test_a_kernel_without_tiles_that_does_not_compile_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UnsupportedError, match="avgpool cannot run on sm_90: "):
            self.on_a_gpu(monkeypatch, lambda launch: "PIXELS" in launch.constants)

    def test_an_input_kernel_that_does_not_compile_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executable = self.on_a_gpu(monkeypatch, lambda launch: "layout" in launch.kernel.__name__)
        with pytest.raises(UnsupportedError, match="the input x cannot be brought .*_layout_kern"):
            executable.run([torch.randn(1, 3, 8, 8)])

    def test_a_gpus_plans_are_saved_and_taken_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executable = self.on_a_gpu(monkeypatch, lambda launch: False)
        executable.run([torch.randn(2, 3, 8, 8)])
        files = executable.compiled().files
        assert set(recorded(files, "sm_90")) == {((1, 3, 8, 8),), ((2, 3, 8, 8),)}
        again = TritonExecutable(small_graph(), FP32, CPU, ((2, 3, 8, 8),), CompiledParts(files))
        plan = again._runner(((2, 3, 8, 8),)).plan
        assert plan == executable._runner(((2, 3, 8, 8),)).plan

    def test_the_interpreters_plans_are_not(self) -> None:
        assert TritonExecutable(small_graph(), FP32, CPU, ((1, 3, 8, 8),)).compiled().files == {}

    def on_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Launch], bool]
    ) -> TritonExecutable:
        """An executable that checks its kernels, as on a GPU, where some do not load."""
        run = Launch.run

        def or_fail(launch: Launch) -> None:
            if broken(launch):
                why = OutOfResources(300_000, 232_448, "shared memory")
                raise LaunchError(f"{launch.kernel.__name__}: {why}")
            run(launch)

        monkeypatch.setattr(Launch, "run", or_fail)
        monkeypatch.setattr(backend, "_is_gpu", lambda device: True)
        return TritonExecutable(small_graph(), FP32, CPU, ((1, 3, 8, 8),))


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def garbage_in_memory() -> Iterator[None]:
    """PyTorch fills what `torch.empty` returns: with NaN, and bytes with 255."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def convolutions(executable: TritonExecutable) -> list[LaunchConv2d]:
    steps = executable._runner(((1, 3, 8, 8),)).plan.steps
    return [step for step in steps if isinstance(step, LaunchConv2d)]
