"""fastres.report.provenance: which machine it was, and what measures the same again."""

from __future__ import annotations

from typing import Any

from fastres.report.provenance import commands, machine_table
from fastres.report.reading import from_memory
from fastres.report.records import Machine

HERE = Machine("Imaginary 9000", 2, 2, versions={"torch": "2.15"}, state={"load": "0.1"})
BUSY = Machine("Imaginary 9000", 2, 2, versions={"torch": "2.15"}, state={"load": "1.9"})
NEWER = Machine("Imaginary 9000", 2, 2, versions={"torch": "2.16"}, state={"load": "0.1"})


def test_a_state_makes_no_other_machine() -> None:
    found = machine_table({"a": HERE, "b": BUSY})
    assert ">a, b</button>" in found and found.count('<th scope="col"') == 2
    assert "<li>a: load 0.1</li><li>b: load 1.9</li>" in found
    assert '<th scope="row">load</th>' not in found


def test_a_state_that_is_the_same_stays_in_the_table() -> None:
    found = machine_table({"a": HERE, "b": HERE})
    assert ">a, b</button>" in found and "<li>" not in found
    assert '<th scope="row">load</th><td>0.1</td>' in found


def test_other_versions_are_another_column() -> None:
    found = machine_table({"a": HERE, "b": NEWER, "c": BUSY})
    assert ">a, c</button>" in found and ">b</button>" in found
    assert "<td>2.15</td><td>2.16</td>" in found and "<li>c: load 1.9</li>" in found
    assert "<li>b" not in found and '<th scope="row">load</th><td>–</td><td>0.1</td>' in found


def test_seed_and_launches_of_a_bench(bench_document: dict[str, Any]) -> None:
    said = commands({"a": from_memory(bench_document, "a").document})
    assert "seed 7; launches 3;" in said
    del bench_document["seed"], bench_document["run"]["launches"]
    said = commands({"a": from_memory(bench_document, "a").document})
    assert "seed" not in said and "launches" not in said


def test_scaling_has_its_seed_in_its_run(scaling_document: dict[str, Any]) -> None:
    assert "seed 0;" in commands({"a": from_memory(scaling_document, "a").document})
