"""bench.soak.files runs, finds nothing in what it tries here, and could."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import pytest

from bench.soak import files


def test_a_few_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert files.main(["--count", "60", "--seed", "7"]) == 0
    assert "60 cases in " in capsys.readouterr().out


def test_what_is_not_well_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise RuntimeError("no refusal")

    found = [("a", b"abc", fails)]
    assert files.case(0, 0, found, tmp_path / "a") == "BAD a: RuntimeError: no refusal"
    monkeypatch.setattr(files, "SECONDS", -1)
    slow = files.case(0, 0, [("a", b"abc", lambda _: None)], tmp_path / "a")
    assert slow.startswith("BAD a: ") and slow.endswith(" s")


def test_damage_is_the_same_each_time_and_there() -> None:
    for seed in range(50):
        once, again = (files.damaged(bytes(999), random.Random(seed)) for _ in range(2))
        assert once == again
    assert files.damaged(bytes(999), random.Random(1)) != bytes(999)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", b"x" * 100)
        archive.writestr("a/data/0", b"y" * 100)
    with zipfile.ZipFile(io.BytesIO(files.damaged_inside(made.getvalue(), random.Random(1)))) as z:
        assert z.read("a/data/0") == b"y" * 100 and z.read("a/data.pkl") != b"x" * 100
