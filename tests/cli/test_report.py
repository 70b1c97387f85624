"""fastres report and fastres profile --html: what they write, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
MEASURED = {"target": "fastres cpu", "model": "m", "batch_size": 1, "throughput": 10.0}
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"command": "bench", "schema": 1, "measurements": [MEASURED]}))
    return path


def test_a_page_of_several_documents(run: Run, document: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("report", document, RESULTS / "int8.json", document, "-o", page)
    html = page.read_text()
    assert result.stdout.startswith(f"{page}: ") and result.stderr == ""
    assert html.startswith("<!doctype html>") and "bench.json: " in html and "int8.json" in html


def test_json(run_json: Callable[..., dict[str, Any]], document: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = run_json("report", document, "-o", page)
    assert found["page"] == str(page) and found["bytes"] == page.stat().st_size
    assert found["results"] == [str(document)]


def test_refuses_what_it_cannot_read(run: Run, document: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    bad = tmp_path / "bad.json"
    whole = document.read_text()
    for text, said in (
        (whole[:-5], "not a document of results"),
        (whole.replace('"schema": 1', '"schema": 99'), "upgrade fastres"),
        ('{"command": "doctor", "python": "3"}', "its fields are command, python"),
    ):
        bad.write_text(text)
        result = run("report", document, bad, "-o", page, status=2)
        assert f"error: {bad} " in result.stderr and said in result.stderr
        assert "Traceback" not in result.output and not page.exists()
    missing = run("report", tmp_path / "none.json", "-o", page, status=2)
    assert "none.json cannot be read: No such file" in missing.stderr


def test_refuses_where_it_cannot_write(run: Run, document: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "no" / "folder.html"):
        result = run("report", document, "-o", place, status=2)
        assert f"{place} cannot be written" in result.stderr
    assert "Usage:" in run("report", status=2).output


def test_what_profile_prints_can_be_reported(run: Run, engine: Path, tmp_path: Path) -> None:
    run("profile", engine, "-o", tmp_path / "profile.json", "--html", tmp_path / "net.html")
    run("report", tmp_path / "profile.json", "-o", tmp_path / "report.html")
    assert "layer2.0.conv1" in (tmp_path / "report.html").read_text()
    network = (tmp_path / "net.html").read_text()
    assert network.count('class="network"') >= 5 and "residual add" in network


def test_profile_refuses_a_page_that_cannot_be_written(
    run: Run, engine: Path, tmp_path: Path
) -> None:
    assert "is a folder" in run("profile", engine, "--html", tmp_path, status=2).stderr


def test_pictures(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    peers = RESULTS / "peers.json"
    result = run("report", peers, "-o", tmp_path / "page.html", "--pictures", folder)
    assert f"{folder / 'peers-light.svg'}" in result.stdout
    run("profile", "fastres:cifar_resnet8", "--pictures", folder)
    names = [f"{n}-{t}.svg" for n in ("network", "peers", "roofline") for t in ("dark", "light")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for command in (("report", peers), ("profile", "fastres:cifar_resnet8")):
        refused = run(*command, "--pictures", peers, status=2)
        assert f"{peers} cannot be made a folder" in refused.stderr
