"""How the tests of a GPU end: each waits for its kernels; a GPU that is lost ends the process."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# a GPU that answers no more from the test "breaks" on, in the process that ran it
FAKE = """
import pytest, torch
broken = []

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore words")

torch.cuda.synchronize, torch.cuda.is_available = synchronize, lambda: True

@pytest.fixture
def broken_gpu():
    return broken
"""
TESTS = """
import pytest
pytestmark = pytest.mark.gpu

def test_before(): pass

def test_breaks(broken_gpu): broken_gpu.append(True)

def test_after(): pass

@pytest.mark.parametrize("i", range(3))
def test_more(i): pass
"""


def results(folder: Path, *flags: str) -> tuple[int, str]:
    (folder / "fake_gpu.py").write_text(FAKE)
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs an NVIDIA GPU\n")
    plugins = ("-p", "fake_gpu", "-p", "conftest")
    command = [sys.executable, "-m", "pytest", *plugins, "-v", "-rA", *flags, str(folder)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment = {**kept, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_test_that_breaks_it_fails_and_the_process_ends(tmp_path: Path) -> None:
    status, said = results(tmp_path)
    assert status == pytest.ExitCode.INTERRUPTED
    assert re.search(r"test_breaks FAILED", said) and re.search(r"test_before PASSED", said)
    assert "test_after" not in said and "test_more" not in said
    assert "the GPU answers no more after test_some.py::test_breaks: CUDA error: an illegal" in said


def test_among_workers_the_others_go_on(tmp_path: Path) -> None:
    status, said = results(tmp_path, "-n", "1")
    assert status == pytest.ExitCode.TESTS_FAILED
    passed = set(re.findall(r"^PASSED test_some.py::(\S+)", said, re.MULTILINE))
    assert passed == {"test_before", "test_after", *(f"test_more[{i}]" for i in range(3))}
    failed = set(re.findall(r"^FAILED test_some.py::(\S+)", said, re.MULTILINE))
    assert failed == {"test_breaks"}


def test_one_of_each_kernel_family_is_marked() -> None:
    """Each file of kernel tests is of one family; its first case on a GPU is the short run's."""

    # both in one process, which imports each file once
    flags = "'--collect-only', '-q', '-m'"
    asked = f"[pytest.main([{flags}, which]) for which in ('gpu', 'gpu and first')]"
    done = subprocess.run(
        [sys.executable, "-c", f"import pytest; {asked}"], cwd=ROOT, capture_output=True, text=True
    )
    found = re.findall(r"^(tests/\S+\.py)::|(tests collected)", done.stdout, re.MULTILINE)
    end = found.index(("", "tests collected"))
    every, first = ([path for path, _ in part if path] for part in (found[:end], found[end:]))
    assert len(every) > 500 and 20 < len(first) < 40
    assert sorted(first) == sorted(set(every))


def test_the_short_run_asks_one_of_each_and_then_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    under_pytest = importlib.import_module("bench.gpu.under_pytest")
    asked: list[list[str]] = []

    def pretend(run: object, flags: list[str]) -> dict[str, object]:
        asked.append(flags)
        return {"name": "pytest", "right": True}

    monkeypatch.setattr(under_pytest, "_pytest", pretend)
    section = under_pytest.tests(None)
    rows, answer = [], None
    try:
        while True:
            row = section.send(answer)
            answer = False if row.get("asked") else None
            rows.append(row)
    except StopIteration:
        pass
    done = [row["name"] for row in rows if "right" in row]
    assert done == ["first", "pytest"]
    assert [flags[1] for flags in asked] == ["gpu and first", "gpu"]
    assert all("-n" in flags and flags[-1] == "tests/backends/triton" for flags in asked)
