"""fastres.report.writing: every section that there is data for, and no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastres.errors import BackendUnavailable, InputError
from fastres.report import write_report
from fastres.report.reading import Source, from_memory, read
from fastres.report.writing import report

Document = dict[str, Any]
EVIL = "<script>alert('$x_{1}$')</script>\"&"
SECTIONS = [
    "Summary",
    "Speed over peers",
    "Measurements",
    "Change since an earlier run",
    "Latency",
    "v1 against v1.5",
    "Scaling",
    "Roofline",
    "Layers",
    "INT8 accuracy",
    "Parity",
    "Regression guard",
    "Machine and versions",
    "How to reproduce",
]


def sources(*documents: Document) -> list[Source]:
    return [from_memory(document, f"{i}.json") for i, document in enumerate(documents)]


def test_all_sections_in_order(documents: list[Document], parsed: Callable[[str], Any]) -> None:
    page = parsed(report(sources(*documents)))
    assert page.texts["h2"] == SECTIONS
    labels = " ".join(given["aria-label"] for given in page.attributes("svg"))
    assert "batch 8, nncf 0.864× [0.820, 0.907]" in labels  # a ratio
    assert "fp32 roof 210 GFLOP/s and 18 GB/s" in labels
    assert "layer2 6 and 6.5 ms" in labels  # v1 and v1.5
    told = [text for text in page.texts["td"] if "layer" in text and "[" in text]
    assert "layer2 +0.5 [0.1, 2.8], layer1 +0.5 [0.4, 1.8]" in told  # in layer3 it may be noise
    assert "the same again from 0.990× [0.970, 1.03] to 1.01× [0.970, 1.03]; with" in labels
    assert "int8 auto -0.05 [-0.15, +0.05]" in labels
    assert any("fastres bench fastres:resnet50@v1 " in code for code in page.texts["code"])
    assert "-o 'a b'" in page.texts["code"][0] and "/usr/bin" not in page.texts["code"][0]


def test_the_summary_in_words(documents: list[Document]) -> None:
    html = report(sources(*documents))
    for said in (
        "precision and batch size, by 95 % intervals: 4 no difference shown, 4 slower.",
        "peers that are ahead of fastres: fastres:resnet50@v1 int8 nncf at batch 1 (",
        "v1.5 runs at 0.94 times the speed of v1 (4 comparisons)",
        "All 24 results are within their bounds",
        "Against last week: 1 slower, 1 unclear, 1 same, 1 faster",
        "since then: openvino 2026.3 is now 2026.4",
        "Time grows linearly (no point is off by more than 10 %) in 2 of 2 series",
        "off by 3.4 % at most",
        "by -0.05 [-0.15, +0.05] points",
        "9 of 9 settled networks",
        "called equal runs slower 0 times out of 3, and caught a planted slowdown 2 times out of 3",
    ):
        assert said in html, said


def test_what_is_wrong_is_said(bench_document: Document) -> None:
    bench_document["run"] = {**bench_document["run"], "finished": False}
    bench_document["parity"][3]["rms"] = 1.0
    html = report(sources(bench_document))
    assert "was interrupted" in html and ">FAILED</span>" in html
    assert (
        "1 of 24 results are outside their bounds: fastres:resnet50@v1 int8 fastres at batch 1"
        in html
    )


@pytest.mark.parametrize("field", ["target", "model", "precision"])
def test_names_are_text(field: str, bench_document: Document, parsed: Callable[[str], Any]) -> None:
    for one in (*bench_document["measurements"], *bench_document["profiles"]):
        one[field] = EVIL
    bench_document["baseline"] = EVIL
    page = parsed(report(sources(bench_document)))
    assert EVIL in page.texts["td"] + page.texts["th"]


def test_every_string_of_a_document_is_text(
    documents: list[Document], parsed: Callable[[str], Any]
) -> None:
    def evil(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: evil(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [evil(v) for v in value]
        return EVIL + value if isinstance(value, str) else value

    html = report([from_memory(evil(d), f"{EVIL}{i}") for i, d in enumerate(documents)])
    parsed(html)
    assert html.count("<script>") == 1


def test_an_interrupted_run_without_measurements(parsed: Callable[[str], Any]) -> None:
    page = parsed(report(sources({"measurements": [], "run": {"finished": False}})))
    assert page.texts["h2"][0] == "Summary" and "svg" not in [tag for tag, _ in page.tags]
    assert "nothing was measured." in page.texts["li"]


def test_numbers_that_are_missing(bench_document: Document, parsed: Callable[[str], Any]) -> None:
    for m in bench_document["measurements"]:
        m["speedup"]["low"] = m["quantiles_ms"][7] = m["throughput"] = None
        m["latency_ms"] = {}
    for found in bench_document["ratios"]:
        found["speed"]["high"] = None
    for profile in bench_document["profiles"]:
        for row in profile["rows"]:
            row["gflop_per_s"] = None
    headings = parsed(report(sources(bench_document))).texts["h2"]
    absent = {"Speed over peers", "Speed over the baseline", "Latency", "Roofline"}
    assert not absent & set(headings)
    assert "Measurements" in headings


def test_guard_trials_are_counted(guard_document: Document, parsed: Callable[[str], Any]) -> None:
    html = report(sources(guard_document))
    texts = parsed(html).texts
    assert texts["td"][1:10:2] == ["0", "1", "2", "2", "1"]
    assert "slowed by cifar_resnet:68 for cifar_resnet:62; a run took 17.4" in html
    none = parsed(report(sources({**guard_document, "trials": []})))
    assert "Regression guard" not in none.texts["h2"]


@pytest.mark.parametrize("count", [1, 20])
def test_few_and_many_targets(
    count: int, bench_document: Document, parsed: Callable[[str], Any]
) -> None:
    first = bench_document["measurements"][1]
    bench_document["measurements"] = [{**first, "target": f"target {i}"} for i in range(count)]
    ratio = bench_document["ratios"][0]
    bench_document["ratios"] = [{**ratio, "peer": f"target {i}"} for i in range(count)]
    page = parsed(report(sources(bench_document)))
    assert page.texts["h2"][:2] == SECTIONS[:2]


def test_leads_say_what_was_observed(bench_document: Document) -> None:
    observed = "Shown is the mean over launches of the medians over paired rounds, and its"
    assert observed in report(sources(bench_document))
    once = {**bench_document, "run": {**bench_document["run"], "launches": 1}}
    html = report(sources(once))
    assert "mean over launches" not in html and "Shown is the median over rounds in" in html
    assert "rounds (of a single launch: the median over" in report(sources(once, bench_document))


def test_documents_with_and_without_ratios(
    bench_document: Document, parsed: Callable[[str], Any]
) -> None:
    older = {**bench_document, "ratios": []}
    assert parsed(report(sources(older))).texts["h2"][1] == "Speed over the baseline"
    page = parsed(report(sources(bench_document, older)))
    assert page.texts["h2"][1:3] == ["Speed over peers", "Speed over the baseline"]
    labels = [given["aria-label"] for given in page.attributes("svg")]
    over = [label for label in labels if label.startswith("Speed over")]
    assert len(over) == 4 and all("of 1.json: " in label for label in over)


def test_two_runs_are_told_apart(bench_document: Document, parsed: Callable[[str], Any]) -> None:
    page = parsed(report(sources(bench_document, {**bench_document, "baseline": "openvino"})))
    captions = page.texts["figcaption"]
    first, second = ([c for c in captions if c.startswith(name)] for name in ("0.json:", "1.json:"))
    assert len(first) == len(second) > 8
    assert len([h for h in page.texts["button"] if h == "0.json, 1.json"]) == 1  # one machine


def test_older_documents(results: Path, parsed: Callable[[str], Any]) -> None:
    page = parsed(report([read(results / name) for name in ("int8.json", "parity.json")]))
    assert "Latency" not in page.texts["h2"] and "INT8 accuracy" in page.texts["h2"]


def test_the_same_documents_give_the_same_bytes(documents: list[Document]) -> None:
    assert report(sources(*documents)) == report(sources(*documents))


def test_write_report(
    bench_document: Document, tmp_path: Path, parsed: Callable[[str], Any]
) -> None:
    write_report(tmp_path / "r.html", [bench_document])
    assert "this run" in (tmp_path / "r.html").read_text()
    write_report(tmp_path / "r.html", [bench_document, bench_document])
    assert "run 2" in (tmp_path / "r.html").read_text()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "missing" / "r.html", [bench_document])


def test_without_matplotlib(bench_document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'fastres\[report\]'"):
        report(sources(bench_document))


def test_import_does_not_load_matplotlib() -> None:
    code = "import fastres.report, sys; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
