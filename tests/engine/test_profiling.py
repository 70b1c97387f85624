"""fastres.engine.profile: times joined with the work that was done in them."""

from __future__ import annotations

import json

import pytest
import torch

from fastres import models
from fastres.backends.base import NodeTime
from fastres.compiler import compile
from fastres.engine.profile import group_of, make_profile
from fastres.errors import InputError
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.cost import Shapes, multiply_adds, traffic
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.shapes import infer_shapes


@pytest.fixture(scope="module")
def graph() -> Graph:
    weights = models.cifar_resnet(8, seed=None).state_dict()
    return optimise(build_graph(weights, ResNetSpec()))


@pytest.fixture(scope="module")
def shapes(graph: Graph) -> Shapes:
    return infer_shapes(graph, [(2, 3, 32, 32)])


class TestMakeProfile:
    def test_rates(self, graph: Graph, shapes: Shapes) -> None:
        times = [NodeTime("conv1", 3.0, "gemm"), NodeTime("fc", 1.0, "gemv")]
        profile = make_profile(graph, shapes, times, {"conv1": "bf16"})
        conv, fc = profile.rows
        macs = 2 * 16 * 32 * 32 * 27
        assert (conv.name, conv.op, conv.kernel) == ("conv1", "conv2d", "gemm")
        assert (conv.precision, fc.precision) == ("bf16", "")
        assert conv.share == 0.75 and fc.share == 0.25
        assert conv.flop == 2 * macs == 2 * multiply_adds(graph["conv1"], shapes, graph)
        assert conv.gflop_per_s == pytest.approx(2 * macs / 3e-3 / 1e9)
        assert conv.bytes == traffic(graph["conv1"], shapes, graph, 2)
        assert fc.bytes == traffic(graph["fc"], shapes, graph, 4)  # as its result: float32
        assert fc.gb_per_s == pytest.approx(fc.bytes / 1e-3 / 1e9)
        assert profile.total.milliseconds == 4.0
        assert profile.total.flop == conv.flop + fc.flop

    def test_share_of_the_roofline(self, graph: Graph, shapes: Shapes) -> None:
        times = [
            NodeTime("conv1", 3.0, least=1.0),
            NodeTime("conv1", 1.0, least=2.0),
            NodeTime("fc", 6.0),
        ]
        profile = make_profile(graph, shapes, times, {})
        fc, conv = profile.rows
        assert (conv.roofline, fc.roofline) == (0.75, 0.0)
        assert profile.total.least == 3.0 and profile.total.roofline == 0.3
        assert "roofline" in str(profile) and "75%" in str(profile)
        assert profile.to_dict()["total"]["roofline"] == 0.3
        assert "roofline" not in str(make_profile(graph, shapes, times[2:], {}))

    def test_longest_first_and_groups_in_order(self, graph: Graph, shapes: Shapes) -> None:
        times = [NodeTime(node.name, float(i + 1)) for i, node in enumerate(graph.nodes)]
        profile = make_profile(graph, shapes, times[::-1], {})
        spent = [row.milliseconds for row in profile.rows]
        assert spent == sorted(spent, reverse=True) and len(spent) == len(graph.nodes)
        names = [group.name for group in profile.groups]
        assert names == ["conv1", "layer1", "layer2", "layer3", "avgpool", "flatten", "fc"]
        assert sum(group.share for group in profile.groups) == pytest.approx(1.0)
        assert sum(group.flop for group in profile.groups) == profile.total.flop

    def test_several_steps_of_one_node(self, graph: Graph, shapes: Shapes) -> None:
        times = [NodeTime("fc", 0.5, "reorder"), NodeTime("fc", 1.5, "gemm")]
        (row,) = make_profile(graph, shapes, times, {}).rows
        assert (row.milliseconds, row.kernel) == (2.0, "gemm")
        assert row.flop == 2 * multiply_adds(graph["fc"], shapes, graph)

    def test_a_step_that_is_no_node(self, graph: Graph, shapes: Shapes) -> None:
        times = [NodeTime("fc", 1.0), NodeTime("to_nhwc", 3.0, "reorder")]
        profile = make_profile(graph, shapes, times, {})
        row = profile.rows[0]
        assert (row.name, row.flop, row.bytes, row.op) == ("to_nhwc", 0, 0, "")
        assert [(group.name, group.share) for group in profile.groups] == [
            ("fc", 0.25),
            ("other", 0.75),
        ]

    @pytest.mark.parametrize("times", [[], [NodeTime("fc", 0.0)]], ids=["nothing", "no time"])
    def test_without_time_there_is_no_rate(
        self, graph: Graph, shapes: Shapes, times: list[NodeTime]
    ) -> None:
        profile = make_profile(graph, shapes, times, {})
        assert profile.total.milliseconds == profile.total.gflop_per_s == 0.0
        assert all(row.gb_per_s == row.share == 0.0 for row in profile.rows)
        assert "total" in str(profile)

    def test_text_and_json(self, graph: Graph, shapes: Shapes) -> None:
        times = [NodeTime("conv1", 3.0, "gemm"), NodeTime("fc", 1.0, "gemv")]
        profile = make_profile(graph, shapes, times, {"conv1": "bf16"})
        text = str(profile)
        assert "75.0%" in text and "gemv" in text and "bf16" in text and "GFLOP/s" in text
        table = json.loads(profile.to_json())
        assert table == json.loads(json.dumps(profile.to_dict()))
        assert table["rows"][0]["gflop_per_s"] == profile.rows[0].gflop_per_s
        assert table["total"]["milliseconds"] == 4.0


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("conv1", "conv1"),
        ("maxpool", "maxpool"),
        ("layer1.0.conv1", "layer1"),
        ("layer3.22.downsample.0", "layer3"),
        ("fc", "fc"),
        ("fc.3", "fc"),
        ("backbone.body.layer4.2.conv3", "backbone.body.layer4"),
        ("resnet.encoder.stages.1.layers.0.layer.2.convolution", "resnet.encoder.stages.1"),
        ("stages_2.blocks.0", "stages_2"),
    ],
)
def test_group(name: str, group: str) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_an_engine(backend: str) -> None:
    x = torch.rand(2, 3, 32, 32)
    model = models.cifar_resnet(8, seed=0).eval()
    with compile(model, x, backend=backend, threads=2) as engine:
        profile = engine.profile(x)
        names = {node.name for node in engine.graph.nodes}
        with pytest.raises(InputError, match="batch is empty"):
            engine.profile(x[:0])
    convs = [row for row in profile.rows if row.op == "conv2d"]
    assert len(convs) == 7 and all(row.gflop_per_s > 0 and row.kernel for row in convs)
    assert all(row.precision == "fp32" for row in convs)
    assert len([row for row in profile.rows if row.name in names]) >= 8
    assert sum(row.share for row in profile.rows) == pytest.approx(1.0)
    assert {"conv1", "layer1", "layer2", "layer3", "fc"} <= {g.name for g in profile.groups}
