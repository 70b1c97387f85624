"""fastres.report.network: what is drawn of networks of every kind, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.backends.base import NodeTime
from fastres.backends.triton.planning.form import SEVERAL
from fastres.engine.engine import Engine
from fastres.engine.profile import Profile, make_profile
from fastres.graph.shapes import infer_shapes
from fastres.report.network import draw, network_page
from fastres.report.network_boxes import Box, boxes_of, captured_and_run
from fastres.report.network_drawing import PAGE
from fastres.report.network_layout import Block, blocks_of, place
from fastres.report.records import Machine

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Odd(nn.Module):
    """Branches that a residual network does not have, a skip past two of them, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b, self.c = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=2, dilation=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.a(x))
        b = self.b(a)
        c = self.c(b)
        return torch.cat([c, b], 1).mean((2, 3)), self.d(c) + a


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, 2, groups=4, dilation=2)
    ),
    "basic": lambda: models.cifar_resnet(8, seed=0),
    "bottleneck": lambda: models.ResNet(models.Bottleneck, (1, 1, 2, 1), planes=16, seed=0),
    "before activation": lambda: models.preact_resnet(20, seed=0),
    "odd": Odd,
}


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {
        name: fastres.compile(make().eval(), SMALL, backend="reference")
        for name, make in NETWORKS.items()
    }


@pytest.fixture(scope="module")
def abroad() -> Engine:
    """For a GPU that need not be here: its plan says what is merged."""
    model = models.ResNet(models.Bottleneck, (1, 1, 1, 1), planes=16, num_classes=10, seed=0)
    image = torch.zeros(1, 3, 64, 64)
    return fastres.compile(model.eval(), image, backend="triton", precision="fp16", target="sm_90")


def timed(engine: Engine, *shape: int, skip: Sequence[str] = ()) -> tuple[Profile, Any]:
    """A profile in which the i-th node took i ms."""
    shapes = infer_shapes(engine.graph, [shape])
    nodes = [node.name for node in engine.graph.nodes if node.name not in skip]
    times = [NodeTime(name, float(i + 1), "kernel") for i, name in enumerate(nodes)]
    precisions = {node.name: node.precision for node in engine.info.nodes}
    return make_profile(engine.graph, shapes, times, precisions), shapes


def boxes(engine: Engine, *shape: int, skip: Sequence[str] = ()) -> dict[str, Box]:
    profile, shapes = timed(engine, *shape, skip=skip)
    found = boxes_of(engine.graph, engine.source, engine.info, profile, shapes)
    return {box.name: box for box in found}


def laid_out(engine: Engine) -> list[Block]:
    found = list(boxes(engine, *SMALL.shape).values())
    return [place(block, 0.0, PAGE) for block in blocks_of(found)]


class TestBoxes:
    def test_what_was_fused(self, engines: dict[str, Engine]) -> None:
        found = boxes(engines["bottleneck"], *SMALL.shape)
        stem, last = found["conv1"], found["layer1.0.conv3"]
        assert (stem.what, stem.shapes) == ("conv 7×7 /2", "3×32×32 → 16×16×16")
        assert stem.fused == ("BatchNorm", "ReLU") and not stem.adds
        assert last.fused == ("BatchNorm", "residual add", "ReLU") and last.adds
        assert last.inputs == ("layer1.0.conv2", "layer1.0.downsample.0")
        assert (found["x"].what, found["x"].rows) == ("input", ())
        assert (last.group, last.precision, last.ran_as) == ("layer1", "fp32", "kernel")

    def test_words(self, engines: dict[str, Engine]) -> None:
        plain = boxes(engines["plain"], *SMALL.shape)
        assert plain["0"].fused == ("bias", "ReLU") and plain["2"].fused == ("bias",)
        assert plain["2"].what == "conv 1×1 /2, 4 groups, dilation 2"
        before = boxes(engines["before activation"], *SMALL.shape)["layer1.0.bn1"]
        assert (before.what, before.fused) == ("BatchNorm", ("ReLU",))

    def test_quantising_belongs_to_the_node_between(self) -> None:
        model = models.cifar_resnet(8, seed=0).eval()
        table = fastres.quantize(model, SMALL)
        engine = fastres.compile(model, SMALL, backend="cpu", precision="int8", calibration=table)
        found = boxes(engine, *SMALL.shape)
        assert [name for name in found if "quantized" in name] == ["x.quantized"]
        assert not any("dequantized" in name for box in found.values() for name in box.inputs)
        assert found["conv1"].fused == ("BatchNorm", "ReLU", "quantise to uint8")
        assert found["layer1.0.conv2.main"].fused == ("BatchNorm", "quantise to int8")
        add = found["layer1.0.conv2"]
        assert (add.what, add.fused) == ("residual add", ("ReLU", "quantise to uint8"))
        assert add.inputs == ("layer1.0.conv2.main", "conv1") and len(add.rows) == 3
        profile, _ = timed(engine, *SMALL.shape)
        assert sum(box.total.milliseconds for box in found.values()) == profile.total.milliseconds

    @pytest.mark.compile
    def test_what_runs_in_one_launch(self, abroad: Engine) -> None:
        projection, last = "layer2.0.downsample.0", "layer2.0.conv3"
        choices = {choice.nodes: choice.taken for choice in abroad.info.account.choices}
        assert choices["layer2.0.conv2", projection, last, "layer3.0.conv1"] == SEVERAL
        found = boxes(abroad, 1, 3, 64, 64, skip=[projection])
        assert found[projection].note == f"in one launch with {last}"
        assert found[projection].total.milliseconds == 0 < found[last].total.milliseconds
        assert found[last].ran_as == f"kernel {choices[projection, last]}"
        assert found["layer2.0.conv2"].note == ""

    def test_a_node_without_a_time(self, engines: dict[str, Engine]) -> None:
        found = boxes(engines["basic"], *SMALL.shape, skip=["flatten"])
        assert "no time of its own" in found["flatten"].note and found["fc"].note == ""

    def test_counts(self, engines: dict[str, Engine]) -> None:
        counts = captured_and_run(engines["basic"].graph, engines["basic"].source)
        assert counts["batchnorm"] == (7, 0) and counts["conv2d"] == (7, 7)
        assert counts["add"] == (3, 0) and counts["linear"] == (1, 1)


class TestLayout:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_box_once_and_none_upon_another(
        self, name: str, engines: dict[str, Engine]
    ) -> None:
        blocks = laid_out(engines[name])
        names = [box.name for block in blocks for box in block.boxes]
        graph = engines[name].graph
        assert names == [graph.inputs[0].name, *(node.name for node in graph.nodes)]
        for block in blocks:
            assert sorted(n for path in block.paths for n in path) == sorted(block.places)
            for (x, y), (other_x, other_y) in combinations(block.places.values(), 2):
                assert (
                    abs(x - other_x) >= PAGE.width + PAGE.gap
                    or abs(y - other_y) >= PAGE.height + PAGE.gap
                )
            assert all(x + PAGE.width <= block.right for x, _ in block.places.values())

    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_input_is_a_line_that_crosses_no_box(
        self, name: str, engines: dict[str, Engine]
    ) -> None:
        for block in laid_out(engines[name]):
            lines = {(edge.start, edge.end) for edge in block.edges}
            assert lines == {(name, box.name) for box in block.boxes for name in box.inputs}
            for edge in block.edges:
                assert edge.points[-1][1] == block.places[edge.end][1]
                for corner in block.places.values():
                    assert not _crosses(edge.points, corner), (edge.start, edge.end)

    def test_residual_blocks(self, engines: dict[str, Engine]) -> None:
        blocks = {block.name: block for block in laid_out(engines["bottleneck"])}
        convs = [f"layer3.0.conv{i}" for i in (1, 2, 3)]
        assert blocks["layer3.0"].paths == (tuple(convs), ("layer3.0.downsample.0",))
        assert not any(edge.skips for edge in blocks["layer3.0"].edges)
        (skip,) = (edge for edge in blocks["layer3.1"].edges if edge.skips)
        assert (skip.start, skip.end) == ("layer3.0.conv3", "layer3.1.conv3")
        assert max(x for x, _ in skip.points) <= blocks["layer3.1"].right
        assert [len(blocks[name].boxes) for name in ("conv1", "maxpool", "fc")] == [1, 1, 1]

    def test_a_plain_chain_is_a_block_for_each_node(self, engines: dict[str, Engine]) -> None:
        assert [len(block.boxes) for block in laid_out(engines["plain"])] == [1, 1, 1]

    def test_a_block_of_other_names(self, engines: dict[str, Engine]) -> None:
        block = laid_out(engines["odd"])[-1]
        assert block.name.startswith("b to ") and len(block.boxes) == 5


def _crosses(points: Sequence[tuple[float, float]], corner: tuple[float, float]) -> bool:
    """Whether a line of upright and level pieces goes through the inside of a box."""
    left, top = corner
    return any(
        min(a, c) < left + PAGE.width
        and max(a, c) > left
        and min(b, d) < top + PAGE.height
        and max(b, d) > top
        for (a, b), (c, d) in zip(points, points[1:], strict=False)
    )


class TestPage:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_any_network(
        self, name: str, engines: dict[str, Engine], parsed: Callable[[str], Any]
    ) -> None:
        engine = engines[name]
        page = parsed(network_page(name, engine, [SMALL], engine.profile(SMALL)))
        drawn = " ".join(given["aria-label"] for given in page.attributes("svg"))
        assert all(f"{node.name} (" in drawn for node in engine.graph.nodes)
        assert "The network" in page.texts["h2"] and page.texts["h1"] == [name]

    def test_a_skip_and_a_projection_in_words(self, engines: dict[str, Engine]) -> None:
        profile, shapes = timed(engines["bottleneck"], *SMALL.shape)
        engine = engines["bottleneck"]
        html = draw("x", engine.graph, engine.source, engine.info, profile, shapes, Machine())
        assert "; beside it layer3.0.downsample.0 (conv 1×1 /2, " in html
        assert "; layer3.0.conv3 is added to layer3.1.conv3." in html
        assert html.count('<polyline class="edge skip"') == 1
        assert html.count('<circle class="sum"') == 5

    @pytest.mark.compile
    def test_the_plan_of_a_gpu(self, abroad: Engine, parsed: Callable[[str], Any]) -> None:
        profile, shapes = timed(abroad, 1, 3, 64, 64)
        html = draw("x", abroad.graph, abroad.source, abroad.info, profile, shapes, Machine())
        page = parsed(html)
        assert any("in one launch with" in words for words in page.texts["text"])
        assert any(words.startswith("dependent launches: ") for words in page.texts["li"])

    def test_names_are_text(self, parsed: Callable[[str], Any]) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
        with fastres.compile(model.eval(), SMALL, backend="reference") as engine:
            html = network_page("<script>x</script>", engine, [SMALL], engine.profile(SMALL))
        assert parsed(html).texts["h1"] == ["<script>x</script>"]

    def test_steps_that_are_no_node_and_no_time_at_all(
        self, engines: dict[str, Engine], parsed: Callable[[str], Any]
    ) -> None:
        engine = engines["plain"]
        shapes = infer_shapes(engine.graph, [tuple(SMALL.shape)])
        for times in ([NodeTime("to_nhwc", 3.0, "reorder")], [NodeTime("0", 0.0)], []):
            profile = make_profile(engine.graph, shapes, times, {})
            page = parsed(
                draw("x", engine.graph, engine.source, engine.info, profile, shapes, Machine())
            )
            assert ("to_nhwc" in page.texts["th"]) == (len(times) > 0 and times[0].name != "0")
