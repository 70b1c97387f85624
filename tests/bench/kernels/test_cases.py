"""bench.kernels.cases without a GPU: right in the interpreter, able to fail, work recounted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import fastres
from bench.children import ROOT, environment
from bench.kernels.cases import (
    BATCHES,
    KernelCase,
    MapCase,
    ProductCase,
    cases,
    name_of,
    precompile,
)
from bench.kernels.posed import Posed
from bench.kernels.rates import rates
from bench.kernels.rotation import in_turn, one_pass, operand_bytes, sets_for
from fastres import models
from fastres.backends.triton.planning.table import Tiles
from fastres.graph.cost import multiply_adds, traffic
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.shapes import infer_shapes
from fastres.kernels.cost import Cost, Target
from fastres.kernels.tiles.chain import chain_cost
from fastres.options import Precision

CPU, META = torch.device("cpu"), torch.device("meta")
SM_90 = Tiles(Target.typical(90))
ONE_SM = Tiles(Target(90, 1))
ROUNDED_OTHERWISE = ("bf16", "fp8")  # by Triton's interpreter, which cuts off
CASES = {name_of(case): case for case in cases()}
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


def small_cases() -> list[KernelCase]:
    """Each kernel once, in the precisions that the interpreter can be trusted with."""
    found = {(c.family, c.layer, c.precision): c.small() for c in reversed(CASES.values())}
    return [case for case in found.values() if case.precision not in ROUNDED_OTHERWISE]


def posed(name: str) -> Posed:
    return CASES[name].pose(SM_90, META)


@cache
def resnet50() -> Graph:
    return optimise(fastres.build(models.resnet50(seed=0).state_dict(), version="v1.5"))


@pytest.mark.interpret
@interpreted
@pytest.mark.parametrize("case", small_cases(), ids=name_of)
def test_kernels_agree_with_pytorch_and_the_check_can_fail(case: KernelCase) -> None:
    torch.manual_seed(0)
    posed = case.pose(ONE_SM, CPU)
    assert "not written" in str(posed.wrong())
    one_pass(posed)
    assert posed.wrong() is None
    if not case.family.startswith("stem"):  # which is compared by its picture, not yet folded
        next(iter(posed.calls[0].tensors())).add_(1)
        assert posed.wrong() is not None, "the operands are others now"


@pytest.mark.interpret
@interpreted
@pytest.mark.parametrize(
    "name", [name_of(c) for c in small_cases() if isinstance(c, MapCase) and c.batch == 2]
)
def test_one_wrong_value_is_seen(name: str) -> None:
    case = next(case for case in small_cases() if name_of(case) == name)
    posed = case.pose(ONE_SM, CPU)
    one_pass(posed)
    *_, out = posed.calls[0].tensors()
    out[(-1,) * out.ndim] += 3
    assert "wrong" in str(posed.wrong())


class TestWhatThereIs:
    def test_every_family_in_every_precision_it_has(self) -> None:
        assert len(CASES) == len(cases())
        of: dict[str, set[Precision]] = {}
        for case in CASES.values():
            of.setdefault(case.family, set()).add(case.precision)
        floats = {"fp16", "bf16", "tf32", "int8", "fp8"}
        assert of == {
            "conv2d": floats | {"fp32"},
            "boxes": floats,
            "boxes+projection": {"fp16"},
            **dict.fromkeys(("split_k", "split_k+last"), {"fp16", "int8"}),
            "chain": {"fp16", "bf16", "int8", "fp8"},
            "stem": {"fp16", "int8", "fp8"},
            "stem+pool": {"fp16", "int8", "fp8"},
            "linear": {"fp16", "int8"},
            **dict.fromkeys(("max_pool", "global_pool", "elementwise", "fold"), {"fp16", "int8"}),
            **dict.fromkeys(("avg_pool", "layout"), {"fp16"}),
        }
        for family in of.keys() - {"split_k", "split_k+last"}:
            assert {c.batch for c in CASES.values() if c.family == family} == set(BATCHES)

    def test_kinds_of_convolution(self) -> None:
        shapes = [c.problem.shape for c in CASES.values() if c.family == "conv2d"]  # type: ignore[attr-defined]
        assert {(s.r, s.stride) for s in shapes} >= {(1, (1, 1)), (3, (1, 1)), (3, (2, 2))}
        assert {(1, (2, 2)), (7, (2, 2))} <= {(s.r, s.stride) for s in shapes}
        assert any(s.dilation == (2, 2) for s in shapes) and any(s.groups > 1 for s in shapes)

    def test_what_a_gpu_cannot_run_is_said(self) -> None:
        older, ada = Target.typical(80), Target.typical(89)
        boxes, chain = CASES["boxes-layer1.1.conv2-b256-fp16"], CASES["chain-layer1.1-b256-int8"]
        fp8 = CASES["conv2d-layer4.1.conv3-b256-fp8"]
        assert "sm_90 or newer" in str(boxes.refusal(older))
        assert "sm_90 or newer" in str(chain.refusal(ada))
        assert "sm_89 or newer" in str(fp8.refusal(older)) and fp8.refusal(ada) is None
        assert not [name for name, case in CASES.items() if case.refusal(SM_90.target)]
        kept = {case.family for case in CASES.values() if case.refusal(older) is None}
        assert kept >= {"conv2d", "stem", "stem+pool", "linear", "max_pool", "layout"}

    def test_every_case_has_a_call(self) -> None:
        for name, case in CASES.items():
            posed = case.pose(SM_90, META)
            assert posed.calls and case.shape and case.layout, name
            last, splits = " last " in posed.tiles, " split " in posed.tiles
            assert (len(posed.calls) == 2) == (splits and not last), name
            if case.family.startswith("split_k"):
                assert splits and last == case.family.endswith("last")

    @pytest.mark.compile
    @pytest.mark.parametrize(
        "name",
        [
            "max_pool-maxpool-b256-int8",
            "split_k-layer4.1.conv1-b1-fp16",
            "split_k+last-layer4.1.conv1-b1-fp16",
        ],
    )
    def test_cases_are_compiled_beforehand(self, name: str) -> None:
        assert precompile(name, SM_90.target) == len(posed(name).calls)


class TestWork:
    """Operations and bytes, beside those of the graph's nodes."""

    @pytest.mark.parametrize("batch", [1, 32])
    @pytest.mark.parametrize("family", ["conv2d", "boxes", "linear"])
    def test_layers_are_those_of_resnet50(self, family: str, batch: int) -> None:
        graph, seen = resnet50(), 0
        shapes = infer_shapes(graph, [(batch, 3, 224, 224)])
        nodes = {node.name: node for node in graph}
        for case in CASES.values():
            found = (case.family, case.batch, case.precision) == (family, batch, "fp16")
            if not found or case.layer not in nodes:
                continue
            node = nodes[case.layer]
            cost = self.cost(case)
            assert cost.flops == 2 * multiply_adds(node, shapes, graph)
            bias = 2 * graph.constants[node.params["bias"]].numel()
            wanted = traffic(node, shapes, graph, 2) - bias
            if node.name.endswith("downsample.0"):  # the graph counts pixels that nobody reads
                assert cost.bytes <= wanted
            else:
                assert cost.bytes == wanted, node.name
            seen += 1
        assert seen >= {"conv2d": 7, "boxes": 10, "linear": 1}[family]

    def test_bytes_of_maps_are_those_of_their_tensors(self) -> None:
        """Each operand once, but for vectors of channels."""
        for name, case in CASES.items():
            if isinstance(case, MapCase):
                maps = [t for t in case.pose(SM_90, META).calls[0].tensors() if t.numel() > 1e5]
                cost = self.cost(case)
                assert cost.bytes == pytest.approx(sum(t.nbytes for t in maps), rel=0.02) or (
                    case.batch == 1 or case.family == "global_pool"
                ), name

    def test_merged_and_chained_work_is_the_sum_of_its_parts(self) -> None:
        merged = self.cost(CASES["boxes+projection-layer2.0.conv3+downsample-b32-fp16"])
        graph, sizes = resnet50(), [(32, 3, 224, 224)]
        shapes = infer_shapes(graph, sizes)
        of = {n.name: 2 * multiply_adds(n, shapes, graph) for n in graph}
        assert merged.flops == of["layer2.0.conv3"] + of["layer2.0.downsample.0"]
        chain = CASES["chain-layer1.1-b32-fp16"]
        assert isinstance(chain, ProductCase)
        parts = ("layer1.1.conv2", "layer1.1.conv3", "layer1.2.conv1")
        assert self.cost(chain).flops == sum(of[name] for name in parts)
        assert self.cost(chain) == chain_cost(chain.problem.shape, 2)  # type: ignore[arg-type]

    @staticmethod
    def cost(case: KernelCase) -> Cost:
        launch = case.pose(SM_90, META).calls[0]
        assert launch.cost is not None  # type: ignore[attr-defined]
        return launch.cost  # type: ignore[attr-defined,no-any-return]


class TestRates:
    def test_by_hand(self) -> None:
        (call,) = posed("boxes-layer1.1.conv2-b256-fp16").calls
        found = rates([call], 1e-3, SM_90.target)
        flops, read = 2 * 256 * 56 * 56 * 64 * 9 * 64, 2 * 2 * 256 * 56 * 56 * 64 + 2 * 9 * 64 * 64
        assert found.tflops == pytest.approx(flops / 1e9)
        assert found.gbs == pytest.approx(read / 1e6)
        assert found.least_us == pytest.approx(max(flops / 800e12, read / 4.3e12) * 1e6)
        assert found.share_of_roofline == pytest.approx(found.least_us / 1e3)
        assert found.bound == "arithmetic"

    def test_bounds(self) -> None:
        bounds = {
            "max_pool-maxpool-b256-fp16": "memory",
            "global_pool-avgpool-b1-fp16": "launch",
            "conv2d-layer1.0.conv2-b256-fp32": "arithmetic",
        }
        for name, bound in bounds.items():
            assert rates(posed(name).calls, 1e-3, SM_90.target).bound == bound


class TestRotation:
    def test_sets_are_larger_than_l2(self) -> None:
        l2 = 50 << 20
        for size in (1000, 1 << 20, 49 << 20, 60 << 20, 151 << 20):
            count = sets_for(size, l2, most=10**9)
            assert count * size >= 3 * l2 and (count == 1 or (count - 1) * size < 3 * l2)
        assert sets_for(1, l2, most=8) == 8 and sets_for(1 << 40, l2, most=8) == 1

    def test_operands_count_once(self) -> None:
        class Fake:
            def __init__(self, *tensors: torch.Tensor) -> None:
                self.given, self.runs = tensors, 0

            def run(self) -> None:
                self.runs += 1

            def tensors(self) -> tuple[torch.Tensor, ...]:
                return self.given

        a, b = torch.zeros(10), torch.zeros(5)
        first, second = Fake(a, b), Fake(b)
        sets = [Posed([first], lambda: None), Posed([first, second], lambda: None)]
        assert operand_bytes(sets[1]) == 60
        work = in_turn(sets)
        for _ in range(3):
            work()
        assert (first.runs, second.runs) == (3, 1)


TIMED = """
import pytest, torch
from bench.kernels import test_speed as timed
from bench.kernels.cases import cases, name_of
from fastres.backends.triton.planning.table import Tiles
from fastres.kernels.cost import Target

timed.device = lambda: torch.device("cpu")
NAMES = ("max_pool-maxpool-b1-fp16", "boxes-layer1.1.conv1-b1-fp16")
CASES = [case.small() for case in cases() if name_of(case) in NAMES]

@pytest.mark.benchmark(timer=timed.CLOCK.read)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_timed(benchmark, case):
    timed.test_kernel(benchmark, case, Tiles(Target(90, 1)), {"gpu": "none"})
"""


@pytest.mark.interpret
@interpreted
def test_what_pytest_benchmark_keeps(tmp_path: Path) -> None:
    """The benchmark itself, on the CPU: its statistics are of the times that it was given."""
    (tmp_path / "test_timed.py").write_text(TIMED)
    report = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "pytest", "-q", "test_timed.py", "-p", "no:cacheprovider"]
    command += ["--benchmark-enable", f"--benchmark-json={report}", "--rootdir=."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    pool, conv = json.loads(report.read_text())["benchmarks"]
    assert {pool["group"], conv["group"]} == {"max_pool", "boxes"}
    for one in (pool, conv):
        info = one["extra_info"]
        assert one["stats"]["median"] == pytest.approx(info["microseconds"] / 1e6)
        assert one["stats"]["rounds"] == 7 and info["gpu"] == "none" and info["dtype"] == "fp16"
        assert info["layout"] == "NHWC" and info["shape"].startswith("n=1 h=8 w=8 c=")
        wanted = {"tile", "tflops", "gbs", "share_of_roofline", "bound", "passes", "rotated_bytes"}
        assert wanted <= info.keys()
        assert info["share_of_roofline"] == pytest.approx(info["least_us"] / info["microseconds"])


def test_without_a_gpu_all_are_skipped_for_one_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "bench/kernels/test_speed.py"]
    done = subprocess.run(
        [*command, "--benchmark-enable", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (reason,) = (line for line in done.stdout.splitlines() if line.startswith("SKIPPED"))
    assert f"[{len(CASES)}]" in reason and "need an NVIDIA GPU" in reason
    assert done.stdout.splitlines()[-1].startswith(f"{len(CASES)} skipped")
