"""PyTorch's fused convolution: how it is called, what of it counts as right, and a run with it.

Its operators are cuDNN's alone, so tests give them an implementation on the CPU: calls pass through
PyTorch's own schemas all the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastres
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LaunchVendor, Plan
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Entry, Machine, Table, Tiles
from fastres.backends.triton.planning.vendor import VendorTile, convolve, library, vendor_cost
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.backends.triton.running.timing import recorder
from fastres.backends.triton.tuning import choosing
from fastres.backends.triton.tuning.trial_eight_bits import make_trial
from fastres.backends.triton.tuning.tune import precompile, tune
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.conv2d import conv2d_cost
from fastres.kernels.cost import Target, target_of
from fastres.kernels.geometry import ConvShape
from fastres.kernels.launch import LaunchError

CPU = torch.device("cpu")
HERE = "cuDNN 91900 of PyTorch 2.11.0 on NVIDIA H200"
MACHINE = Machine("NVIDIA H200", 132, "3.6.0", "0123")
ODD = ConvShape(2, 9, 11, 16, 24, 3, 2, (2, 1), (1, 2), (1, 3), 2)
SHAPE = (2, 3, 16, 16)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = CPU if INTERPRETING else torch.device("cuda", 0)
somewhere = [
    pytest.mark.interpret,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETING and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or an NVIDIA GPU",
    ),
]


class StandIn:
    """Both operators on the CPU.

    Args:
        relu: what it does behind the sum.
    """

    def __init__(self) -> None:
        self.relu: Callable[[torch.Tensor], torch.Tensor] = torch.relu
        self.layout: Any = torch.channels_last
        self.operands: list[tuple[torch.Tensor, ...]] = []
        self.benchmark: list[bool] = []

    def conv_relu(self, x: Any, w: Any, bias: Any, *windows: Any) -> torch.Tensor:
        return self.conv_add_relu(x, w, None, None, bias, *windows)

    def conv_add_relu(
        self, x: Any, w: Any, z: Any, alpha: Any, bias: Any, stride: Any, padding: Any, *more: Any
    ) -> torch.Tensor:
        self.operands.append((x, w, bias) if z is None else (x, w, bias, z))
        self.benchmark.append(torch.backends.cudnn.benchmark)
        for operand in self.operands[-1]:
            assert operand.dtype == x.dtype
            last = operand.dim() == 1 or operand.is_contiguous(memory_format=torch.channels_last)
            assert last, "cuDNN's frontend would copy it"
        y = F.conv2d(x.float(), w.float(), bias.float(), stride, padding, *more)
        y = self.relu(y if z is None else y + alpha * z.float())
        return y.to(x.dtype).contiguous(memory_format=self.layout)


@pytest.fixture
def cudnn() -> Iterator[StandIn]:
    stand_in = StandIn()
    with torch.library._scoped_library("aten", "IMPL") as aten:
        aten.impl("cudnn_convolution_relu", stand_in.conv_relu, "CPU")
        aten.impl("cudnn_convolution_add_relu", stand_in.conv_add_relu, "CPU")
        yield stand_in


class TestTheCall:
    def test_operators_are_cudnns_and_their_out_forms_copy(self) -> None:
        """Were there an `out` of CUDA's own, results could lie in the arena."""
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
            assert has(f"aten::{name}", "CUDA") and not has(f"aten::{name}", "CPU")
            assert not has(f"aten::{name}.out", "CUDA")
        names = [
            [argument.name for argument in schema.arguments]
            for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
            for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
            if schema.overload_name == ""
        ]
        windows = ["stride", "padding", "dilation", "groups"]
        assert names == [
            ["self", "weight", "bias", *windows],
            ["self", "weight", "z", "alpha", "bias", *windows],
        ]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("adds", [False, True])
    def test_is_the_formula(self, cudnn: StandIn, dtype: torch.dtype, adds: bool) -> None:
        s, random = ODD, torch.Generator().manual_seed(0)

        def made(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=random).to(dtype)

        x, w, b = made(s.n, s.h, s.w, s.c), made(s.k, s.r, s.s, s.c // s.groups), made(s.k)
        r = made(s.n, s.p, s.q, s.k) if adds else None
        windows = {"stride": s.stride, "padding": s.padding, "dilation": s.dilation}
        y = convolve(x, w, b, r, **windows, groups=s.groups)  # type: ignore[arg-type]
        planes = [t.double().permute(0, 3, 1, 2) for t in (x, w)]
        expected = F.conv2d(*planes, b.double(), *windows.values(), s.groups).permute(0, 2, 3, 1)
        expected = (expected if r is None else expected + r.double()).relu()
        assert y.shape == (s.n, s.p, s.q, s.k) and y.is_contiguous() and y.dtype == dtype
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-4)
        (operands,) = cudnn.operands
        given = [x, w, b] + ([] if r is None else [r])
        assert [t.data_ptr() for t in operands] == [t.data_ptr() for t in given]

    @pytest.mark.parametrize("on", [False, True])
    def test_no_algorithm_is_chosen_by_timing(self, cudnn: StandIn, on: bool) -> None:
        flags = torch.backends.cudnn
        usual = flags.deterministic, flags.allow_tf32
        with flags.flags(enabled=True, benchmark=on):
            _called(cudnn)
            assert flags.benchmark is on
        assert cudnn.benchmark == [False]
        assert (flags.deterministic, flags.allow_tf32) == usual

    def test_another_layout_is_refused(self, cudnn: StandIn) -> None:
        cudnn.layout = torch.contiguous_format
        with pytest.raises(RuntimeError, match="expected channels last"):
            _called(cudnn)

    def test_its_work_is_the_convolutions(self) -> None:
        for adds in (False, True):
            expected = conv2d_cost(ODD, 2, ODD.k if adds else 0)
            assert vendor_cost(ODD, 2, residual=adds) == expected

    def test_there_is_none_without_a_gpu(self) -> None:
        assert library(CPU) is None

    def test_it_is_named_with_its_versions_and_its_gpu(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        if version is not None:
            expected = f"cuDNN {version} of PyTorch {torch.__version__} on NVIDIA H200"
            assert library(torch.device("cuda", 0)) == expected
        with torch.backends.cudnn.flags(enabled=False):
            assert library(torch.device("cuda", 0)) is None


def _called(cudnn: StandIn) -> torch.Tensor:
    x, w, b = (torch.ones(size, dtype=torch.float16) for size in ((1, 4, 4, 8), (8, 1, 1, 8), (8,)))
    one: Any = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    return convolve(x, w, b, None, **one)


def problem(shape: ConvShape = ODD, precision: Any = "fp16", adds: bool = True) -> Problem:
    return Problem("vendor", shape, precision, residual=adds, library=HERE)


def tuned(*problems: Problem) -> tuple[Table, Any]:
    table = Table(MACHINE)
    return table, tune(problems, table, CPU, keep=lambda table: None)


class TestTrials:
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    @pytest.mark.parametrize("adds", [False, True])
    def test_what_is_right_is_timed(self, cudnn: StandIn, precision: Any, adds: bool) -> None:
        asked = problem(precision=precision, adds=adds)
        table, attempts = tuned(asked)
        (attempt,) = attempts[asked]
        assert attempt.milliseconds is not None, attempt.reason
        entry = table.entries[asked.key]
        assert entry.measured and entry.tile == {"library": HERE}
        best = Tiles(Target(90, 1), [table], HERE).best(asked)
        assert best.measured and best.tile == VendorTile(HERE)
        assert all(torch.isfinite(x).all() for x, *_ in cudnn.operands[-2:])  # those timed

    @pytest.mark.parametrize(
        "relu",
        [lambda y: torch.fmax(y, torch.zeros(())), lambda y: y.nan_to_num(posinf=6e4).relu()],
    )
    def test_a_relu_that_hides_what_is_not_finite_is_refused(
        self, cudnn: StandIn, relu: Any
    ) -> None:
        """PyTorch's passes NaN on; finite numbers alone would not tell."""
        cudnn.relu = relu
        table, attempts = tuned(problem())
        (attempt,) = attempts[problem()]
        assert "of its result is not PyTorch's" in attempt.reason and not attempt.wrong
        assert attempt.milliseconds is None and not table.entries

    def test_so_is_what_spreads_over_pixels(self, cudnn: StandIn) -> None:
        """As transforms of whole tiles do, which multiply a NaN by zero."""
        cudnn.relu = lambda y: (y + 0 * y.mean((2, 3), keepdim=True)).relu()
        (attempt,) = tuned(problem())[1][problem()]
        assert "isnan of its result" in attempt.reason

    def test_what_is_wrong_is_marked_as_such(self, cudnn: StandIn) -> None:
        cudnn.relu = lambda y: 1.02 * torch.relu(y)
        table, attempts = tuned(problem())
        (attempt,) = attempts[problem()]
        assert attempt.wrong and not table.entries

    def test_there_is_nothing_to_compile(self) -> None:
        assert precompile(problem(), Target.typical(90)) == 0
        assert (
            make_trial(problem(), torch.device("meta")).launches(
                VendorTile(HERE), Target.typical(90)
            )
            == ()
        )


def a_net() -> torch.nn.Module:
    """Two stages of two blocks: residuals, strides, projections."""
    return fastres.models.cifar_resnet(8, shortcut="B", seed=0).eval()


def a_table(graph: Graph, target: Target) -> Table:
    """In which ours take 9 us each, and the vendor's less."""
    tiles, table = Tiles(target, (), HERE), Table(MACHINE)
    make_plan(graph, (SHAPE,), "fp16", tiles)
    for asked in tiles.asked():
        us = 1.0 if asked.kind == "vendor" else 9.0
        table.entries[asked.key] = Entry(dict(vars(tiles.best(asked).tile)), us)
    return table


def by_vendor(plan: Plan) -> list[LaunchVendor]:
    return [step for step in plan.steps if isinstance(step, LaunchVendor)]


def graph_of(model: torch.nn.Module) -> Graph:
    return optimise(fastres.build(model.state_dict(), inputs=fastres.Input(SHAPE)))


@pytest.fixture
def operators(request: pytest.FixtureRequest) -> Any:
    """cuDNN's own on a GPU."""
    return request.getfixturevalue("cudnn") if INTERPRETING else None


class TestRuns:
    """On a GPU with cuDNN's own operators, taken as if they had been measured."""

    pytestmark = somewhere

    @pytest.fixture
    def engine(
        self, operators: Any, photo_batch: Any, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[torch.nn.Module, torch.Tensor, fastres.Engine]]:
        """Whose tiles are those of a table in which the vendor's form is fastest."""
        model = fastres.models.settle(a_net(), photo_batch(16, 16))
        usual = choosing.tiles_for

        def tiles(options: Any, device: torch.device) -> Tiles:
            target = usual(options, device).target
            return Tiles(target, [a_table(graph_of(model), target)], HERE)

        monkeypatch.setattr(choosing, "tiles_for", tiles)
        x = photo_batch(2, 16)
        with fastres.compile(
            model, x, backend="triton", device=str(DEVICE), precision="fp16"
        ) as made:
            yield model, x, made

    def test_a_network(self, engine: Any) -> None:
        model, x, made = engine
        runner = made._lowered.executable._runner((SHAPE,))
        steps = by_vendor(runner.plan)
        assert len(steps) == 5 and sum(step.residual is not None for step in steps) == 1
        report = fastres.verify(model, made, [x], layerwise=True)
        assert report.passed, str(report)
        assert f"vendor {HERE}" in str(made.info)
        with runner.context() as context:  # whoever runs next gets memory of his own
            assert not {step.target for step in steps} & context.tensors.keys()
        y = made(x.to(DEVICE))
        times = {row.name: row for row in made.profile(x.to(DEVICE)).rows}
        assert all(times[step.node].milliseconds > 0 for step in steps)
        assert torch.equal(made(x.to(DEVICE)), y)

    @pytest.mark.parametrize("recorded", [False, True])
    def test_memory_is_that_of_each_run(
        self, operators: Any, photo_batch: Any, recorded: bool
    ) -> None:
        """Recorded or not: each run's tensors are read by that run, and then given back."""
        model = fastres.models.settle(a_net(), photo_batch(16, 16))
        on_gpu = DEVICE.type == "cuda"
        graph, target = graph_of(model), target_of(DEVICE) if on_gpu else Target(90, 1)
        tables = [a_table(graph, target)]
        found = []
        for known in (HERE, None):
            plan = make_plan(graph, (SHAPE,), "fp16", Tiles(target, tables, known))
            assert bool(by_vendor(plan)) is (known is not None)
            constants = Packed(graph, torch.float16, DEVICE)
            record = recorder(DEVICE) if on_gpu else twice
            runner = PlanRunner(plan, constants, DEVICE, record if recorded else None)
            assert runner.failing() is None
            for seed in range(3):
                x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
                (y,) = runner.run([x.to(DEVICE)])
                found.append(y)
        for theirs, ours in zip(found[:3], found[3:], strict=True):
            torch.testing.assert_close(theirs, ours, rtol=2e-2, atol=2e-2)


def twice(work: Callable[[], None]) -> Callable[[], None]:
    """Runs it as a recording does: once before."""
    work()
    return work


def test_a_bias_beyond_fp16_is_a_launch_that_cannot_be_made(cudnn: StandIn) -> None:
    graph, target = graph_of(a_net()), Target(90, 1)
    tiles = Tiles(target, [a_table(graph, target)], HERE)
    plan = make_plan(graph, (SHAPE,), "fp16", tiles)
    step = by_vendor(plan)[0]
    graph.constants[step.bias][0] = 1e6
    runner = PlanRunner(plan, Packed(graph, torch.float16, CPU), CPU)
    tensors = {step.source: torch.zeros(plan.places[step.source].shape, dtype=torch.float16)}
    with pytest.raises(LaunchError, match="beyond the range"):
        runner._by_vendor(step, tensors)
    choosing.ban(tiles, plan, step.node, "beyond the range")  # as the backend does then
    again = make_plan(graph, (SHAPE,), "fp16", tiles)
    assert step.node not in {other.node for other in by_vendor(again)}
