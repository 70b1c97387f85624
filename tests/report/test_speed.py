"""fastres.report.speed: ratios to peers of the same lane, and what the table tells of a target."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fastres.report.documents import Bench
from fastres.report.reading import from_memory
from fastres.report.speed import latency_charts, measurement_tables, peer_charts, ratio_charts

Document = dict[str, Any]


def benches(document: Document) -> dict[str, Bench]:
    bench = from_memory(document, "x").document
    assert isinstance(bench, Bench)
    return {"x": bench}


def test_what_bench_writes_is_read(bench_document: Document) -> None:
    bench = benches(bench_document)["x"]
    assert bench.seed == 7 and bench.run.launches == 3 and len(bench.ratios) == 16
    assert bench.lanes["fastres:resnet50@v1 int8 fastres"][0] == "fastres:resnet50@v1 int8 nncf"
    assert bench.measurements[0].ran == "fp32, fp32"
    assert bench.backends["fastres:resnet50@v1 fp32 fastres"] == "cpu"
    assert not bench.is_ours("fastres:resnet50@v1 fp32 openvino")


def test_older_documents_lack_the_newer_fields(bench_document: Document) -> None:
    for field in ("lanes", "ratios", "seed", "backends"):
        del bench_document[field]
    del bench_document["run"]
    for m in bench_document["measurements"]:
        del m["ran"]
    bench = benches(bench_document)["x"]
    assert not bench.ratios and bench.seed is bench.run.launches is None
    assert bench.is_ours("fastres cpu") and not bench.is_ours("eager")


def test_a_chart_for_each_model_and_precision(bench_document: Document) -> None:
    charts = peer_charts(benches(bench_document))
    assert charts.count("<svg") == 4
    assert "<figcaption>fastres:resnet50@v1.5 in int8</figcaption>" in charts
    first = charts.split("</figure>")[0]
    for size in (1, 8):  # each peer at each batch size, by itself and by its own name
        assert f"batch {size}, openvino 1.03× [0.976, 1.08]" in first
        assert f"batch {size}, eager 1.90× [" in first
    assert "nncf" not in first and "times as fast as the peer" in first
    assert "<span>openvino</span>" in first


def test_a_runtime_has_one_colour_in_all_charts(bench_document: Document) -> None:
    charts = peer_charts(benches(bench_document)).split("</figure>")
    legends = [chart.split("<ul")[-1] for chart in charts if "nncf" in chart]
    assert len(legends) == 2 and legends[0] == legends[1]


def test_a_runtime_has_one_colour_on_the_whole_page(bench_document: Document) -> None:
    """Under the name of its lane in one document, under its own in another, in another order."""
    alone = {
        "measurements": [
            {"target": name, "batch_size": 1, "throughput": 1.0, "quantiles_ms": [1.0, 2.0]}
            for name in ("nncf", "eager", "fastres")
        ],
        "lanes": {"fastres": ["nncf", "eager"]},
    }
    first, second = benches(bench_document), benches(alone)
    html = latency_charts({"a": first["x"], "b": second["x"]})
    for runtime in ("nncf", "eager", "fastres"):
        keys = re.findall(
            rf"--series-(\d)[^<]*>[^<]*</span><span>(?:[^<]* )?{runtime}</span>", html
        )
        assert len(keys) >= 2 and len(set(keys)) == 1, (runtime, keys)


def test_equal_speed_is_a_dashed_line(bench_document: Document) -> None:
    first = peer_charts(benches(bench_document)).split("</figure>")[0]
    assert first.count("stroke-dasharray") == 1


def test_what_is_null_is_left_out_of_a_chart(bench_document: Document) -> None:
    for found in bench_document["ratios"]:
        if found["peer"].endswith("eager"):
            found["speed"] = {"median": 1.5, "low": None, "high": None}
    charts = peer_charts(benches(bench_document))
    assert "openvino" in charts and "eager" not in charts


def test_ratios_replace_those_to_the_baseline(bench_document: Document) -> None:
    assert not ratio_charts(benches(bench_document))
    old = benches({**bench_document, "ratios": []})
    charts = ratio_charts(old)
    assert not peer_charts(old) and "times as fast as the baseline" in charts
    assert "resnet50@v1 in fp32, over fastres:resnet50@v1 fp32 eager</figcaption>" in charts


@pytest.mark.parametrize(
    ("target", "cells"),
    [
        ("fp32 fastres", ["fp32, fp32", "cpu", "–"]),
        ("fp32 openvino", ["–", "–", "1.03× [0.976, 1.08]"]),
        ("int8 nncf", ["–", "–", "0.864× [0.820, 0.907]"]),
    ],
)
def test_the_table_of_measurements(target: str, cells: list[str], bench_document: Document) -> None:
    table = measurement_tables(benches(bench_document))
    name = f"fastres:resnet50@v1.5 {target}"
    row = table.split(f'<th scope="row">{name}</th>')[1].split("</tr>")[0]
    found = [cell.split(">")[1] for cell in row.split("</td>")[:-1]]
    assert [found[-3], found[-2], found[2]] == cells  # ran in, backend, speed
    assert "fastres over it" in table and "speed over" not in table


def test_the_table_has_no_columns_for_what_nobody_knows(bench_document: Document) -> None:
    measured = [{**m, "ran": None} for m in bench_document["measurements"]]
    given = {**bench_document, "measurements": measured, "backends": {}, "ratios": []}
    table = measurement_tables(benches(given))
    assert "ran in" not in table and "backend" not in table
    assert "speed over fastres:resnet50@v1 fp32 eager" in table
