"""fastres.report.reading: what is read, and what is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastres.errors import InputError
from fastres.report.documents import Accuracy, Bench, GuardTrials, Parities, Scaling
from fastres.report.reading import decode, from_memory, read
from fastres.report.records import Difference

Document = dict[str, Any]


def test_kinds_are_told_apart(documents: list[Document]) -> None:
    kinds = [type(from_memory(document, "x").document) for document in documents]
    assert kinds == [Bench, Scaling, Accuracy, Parities, GuardTrials]


@pytest.mark.parametrize(
    ("name", "kind"), [("int8", Bench), ("parity", Parities), ("guard_trials", GuardTrials)]
)
def test_documents_of_the_repository(name: str, kind: type, results: Path) -> None:
    assert isinstance(read(results / f"{name}.json").document, kind)


def test_an_older_document_says_its_model_once(results: Path) -> None:
    bench = read(results / "int8.json").document
    assert isinstance(bench, Bench) and bench.sqnr_db["fastres int8"] == pytest.approx(5.78, 1e-2)
    assert {bench.model_of(m) for m in bench.measurements} == {"resnet50"}


def test_a_profile_by_itself(bench_document: Document) -> None:
    profile = bench_document["profiles"][0]
    printed = {"command": "profile", "fastres": "0.1.0", "precision_ran": "fp32", **profile}
    bench = from_memory(printed, "x").document
    assert isinstance(bench, Bench) and len(bench.profiles[0].rows) == len(profile["rows"])


def test_unknown_fields_are_passed_over_and_numbers_may_be_null(bench_document: Document) -> None:
    bench_document["from the future"] = {"a": [1]}
    bench_document["measurements"][0] |= {"throughput": None, "min_ms": float("nan"), "new": 1}
    bench = from_memory(bench_document, "x").document
    assert isinstance(bench, Bench)
    assert bench.measurements[0].throughput is bench.measurements[0].min_ms is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "truncated"),
        (b'{"measurements": [', "truncated"),
        (b"not json", "malformed"),
        (b"\xff\xfe{}", "not a document"),
        (b"[]", "Expected `object`"),
        (b"{}", "its fields are none"),
        (b'{"a": 1, "b": 2}', "its fields are a, b; supported are"),
        (b'{"measurements": {}}', "Expected `array`"),
        (b'{"measurements": [{"target": "x"}]}', "missing required field"),
        (b'{"measurements": [], "machine": {"cores": "two"}}', "$.machine.cores"),
        (b'{"measurements": [], "schema": "1"}', "Expected `int`"),
        (b'{"measurements": [], "schema": 2}', "newer fastres: its schema is 2"),
        (b'{"series": [{"name": "x", "target": "t", "points": [{"x": "1"}]}]}', "Expected `float`"),
        (b'{"sections": 1}', "Expected `array`"),
        (b'{"rows": [{}]}', "missing required field"),
        (b'{"trials": [{}]}', "missing required field"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a document"),
    ],
    ids=range(17),
)
def test_what_is_refused_and_why(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match="^results.json ") as caught:
        decode(data, "results.json")
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, 1e300, True, "fast", [1.0]])
def test_a_throughput_is_a_number_of_at_least_0(value: object) -> None:
    measurement = {"target": "t", "batch_size": 1, "throughput": value}
    with pytest.raises(InputError, match="throughput"):
        from_memory({"measurements": [measurement]}, "x")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(InputError, match=f"{path} cannot be read"):
            read(path)


def test_every_prefix_of_a_document_is_refused(
    bench_document: Document, saved: Callable[[Document], Path]
) -> None:
    data = json.dumps(bench_document).encode()
    for end in range(0, len(data), len(data) // 40):
        with pytest.raises(InputError):
            decode(data[:end], "x")


@pytest.mark.parametrize(
    ("rms", "allowed", "passed"),
    [(1.0, 2.0, True), (3.0, 2.0, False), (None, 2.0, False), (3.0, None, True)],
)
def test_passed(rms: float | None, allowed: float | None, passed: bool) -> None:
    assert Difference("t", 1, rms=rms, allowed_rms=allowed).passed is passed
