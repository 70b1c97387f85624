"""The table that a network's values make of calibration data."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.errors import InputError
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.options import Input
from fastres.parity.oracle import activations
from fastres.quantization.calibrate import collect
from fastres.quantization.data import Batches


@pytest.fixture(scope="module")
def small() -> nn.Module:
    model = fastres.models.cifar_resnet(8, seed=0)
    torch.manual_seed(0)
    return fastres.models.settle(model, torch.randn(16, 3, 32, 32))


@pytest.fixture(scope="module")
def graph(small: nn.Module) -> Graph:
    return optimise(capture(small, [Input((1, 3, 32, 32))]).graph)


INPUT = (Input((1, 3, 32, 32)),)


def test_ranges_are_those_of_the_models_own_values(small: nn.Module, graph: Graph) -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 3, 32, 32)
    table = collect(graph, INPUT, [(x[:4],), (x[4:],)], "minmax")
    assert table.samples == 6
    values = activations(capture(small, INPUT), [x])
    for name, entry in table.tensors.items():
        if name == graph.inputs[0].name:
            value = x.double()
        elif name.endswith(".main"):
            origins = graph[name.removesuffix(".main")].origins
            value = values[next(o for o in origins if "bn" in o)]
        else:
            value = values[graph[name].origins[-1]]
        assert entry.largest == pytest.approx(float(value.abs().max()), rel=1e-4), name
        exact = float(torch.quantile(value.abs().flatten()[:10_000_000], 0.9))
        assert entry.quantiles["0.9"] == pytest.approx(exact, abs=2e-3 * entry.largest), name
        if entry.means:
            wanted = value.mean([d for d in range(value.ndim) if d != 1])
            torch.testing.assert_close(
                torch.tensor(entry.means).double(), wanted, rtol=1e-3, atol=1e-4
            )
    read = [node.inputs[0] for node in graph.nodes if "weight" in node.params]
    assert set(read) <= set(table.tensors)


def test_the_same_data_give_the_same_bytes(graph: Graph) -> None:
    x = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, two = (collect(graph, INPUT, [(part,) for part in x.split(4)], "mse") for _ in "ab")
    assert one.to_json() == two.to_json()


def test_memory_does_not_grow_with_the_data(graph: Graph) -> None:
    x = torch.randn(2, 3, 32, 32)

    def peak(count: int) -> int:
        tracemalloc.start()
        collect(graph, INPUT, ((x,) for _ in range(count)), "mse")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(24) < 1.2 * peak(3) + 2**16  # Python's and numpy's share: histograms


def test_progress_counts_images(graph: Graph) -> None:
    seen: list[int] = []
    collect(graph, INPUT, [(torch.randn(3, 3, 32, 32),)] * 2, "mse", moved=seen.append)
    assert seen == [3, 6]


def test_a_constant_image_is_enough(graph: Graph) -> None:
    table = collect(graph, INPUT, [(torch.full((1, 3, 32, 32), 0.25),)], "entropy")
    assert all(table.scale(name) > 0 for name in table.tensors)
    zeros = collect(graph, INPUT, [(torch.zeros(1, 3, 32, 32),)], "mse")
    assert zeros.scale(graph.inputs[0].name) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(graph: Graph, bad: float) -> None:
    x = torch.zeros(2, 3, 32, 32)
    x[1, 0, 0, 0] = bad
    with pytest.raises(
        InputError, match=f"{graph.inputs[0].name} cannot be calibrated.*NaN or inf"
    ):
        collect(graph, INPUT, [(x,)], "mse")


def test_values_out_of_range_are_named(graph: Graph) -> None:
    x = torch.full((1, 3, 32, 32), 9e29)
    with pytest.raises(InputError, match="conv1 cannot be calibrated.*out of any sensible range"):
        collect(graph, INPUT, [(x,)], "mse")


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 31, 32),
        torch.zeros(2, 1, 32, 32),
        torch.zeros(2, 3, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_batches_of_another_shape_are_refused(graph: Graph, x: Tensor) -> None:
    with pytest.raises(InputError, match="the calibration data has .* after 2 images"):
        collect(graph, INPUT, [(torch.zeros(2, 3, 32, 32),), (x,)], "mse")


def test_no_data_is_refused(graph: Graph) -> None:
    with pytest.raises(InputError, match="is empty"):
        collect(graph, INPUT, [], "mse")
    with pytest.raises(InputError, match="is empty"):
        collect(
            graph,
            INPUT,
            iter(Batches(np.zeros((0, 3, 32, 32)), 8, inputs=1, preprocess=None, seed=0)),
            "mse",
        )


def test_photographs_are_no_odd_images_and_raw_ones_are(photo_batch: Any) -> None:
    data = photo_batch(12, 64)
    model = fastres.models.settle(fastres.models.resnet18(num_classes=10, seed=0), data)
    graph = optimise(capture(model, [Input((1, 3, 64, 64))]).graph)
    inputs = (Input((1, 3, 64, 64)),)

    def notes(odd: Tensor, place: int) -> tuple[str, ...]:
        images = torch.cat([data[:place], odd, data[place:]])
        return collect(graph, inputs, [(part,) for part in images.split(5)], "mse").notes

    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    stripes = (4.0 * (torch.arange(64) % 2) - 2).expand(1, 3, 64, 64)
    for sound in (data[:1].flip(-1), 0.3 * data[:1], noise, stripes):
        assert notes(sound, 4) == ()
    raw = (data[1:2] * 0.225 + 0.45) * 255
    for odd, place in ((raw, 0), (100 * data[2:3], 7), (5 * data[:1], 12)):
        (note,) = notes(odd, place)
        assert note.startswith(f"image {place} (") and "far from the rest" in note
    (note,) = notes(torch.zeros(1, 3, 64, 64), 9)
    assert note == "image 9 is blank: all its values are the same"


def test_an_engine_bears_the_notes_of_its_table(small: nn.Module) -> None:
    x = torch.randn(6, 3, 32, 32)
    x[4] *= 50
    with fastres.compile(small, x[:1], calibration=[x], backend="reference") as engine:
        assert "note: image 4 (" in str(engine.info)


def test_tables_of_before_there_were_notes_are_read(graph: Graph, tmp_path: Path) -> None:
    table = collect(graph, INPUT, [(torch.randn(2, 3, 32, 32),)], "mse")
    old = json.loads(table.to_json())
    del old["notes"]
    old["schema"] = 1
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert fastres.CalibrationTable.load(tmp_path / "old.json") == table
