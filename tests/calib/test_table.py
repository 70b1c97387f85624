"""The calibration table as a file: the same bytes, and no damage goes unnoticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fastres.calib.table import AccuracyPoint, CalibrationTable, TensorRange
from fastres.calib.thresholds import ALGORITHMS


def tensor(largest: float) -> TensorRange:
    steps = {name: largest / (i + 1) for i, name in enumerate(ALGORITHMS)}
    return TensorRange(largest, steps, {"0.5": largest / 9}, (largest / 16, -largest / 4))


@pytest.fixture
def table() -> CalibrationTable:
    return CalibrationTable(
        algorithm="entropy",
        samples=7,
        graph="ab" * 32,
        weights="cd" * 32,
        tensors={"x": tensor(4.0), "layer1.0.conv1": tensor(0.0)},
        keep=("fc",),
        sensitivity={"fc": 12.5},
        curve=(AccuracyPoint("", (), 0.99), AccuracyPoint("entropy", ("fc",), 0.98)),
        backend="cpu",
    )


def test_scales_are_float32(table: CalibrationTable) -> None:
    assert table.scale("x") == np.float32(1.0) / np.float32(127)
    assert table.using("minmax").scale("x") == np.float32(4.0) / np.float32(127)
    assert table.scale("layer1.0.conv1") == 1.0  # nothing but zeros
    with pytest.raises(KeyError):
        table.scale("y")


def test_a_file_gives_the_table_back(table: CalibrationTable, tmp_path: Path) -> None:
    table.save(tmp_path / "a.json")
    again = CalibrationTable.load(tmp_path / "a.json")
    assert again == table
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def changed(table: CalibrationTable, **changes: Any) -> bytes:
    document = msgspec.to_builtins(table)
    return json.dumps({**document, **changes}).encode()


def reaching(largest: float, threshold: float | None = None) -> dict[str, Any]:
    """A range as it lies in a file."""
    saturates = dict.fromkeys(ALGORITHMS, largest if threshold is None else threshold)
    return {"largest": largest, "thresholds": saturates}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 3}, "reads up to 2"),
        ({"format": "other"}, "format"),
        ({"algorithm": "best"}, "algorithm"),
        ({"tensors": {"x": {"largest": -1.0, "thresholds": {}}}}, "not negative"),
        ({"tensors": {"x": {"largest": 1.0, "thresholds": {}}}}, "thresholds are of"),
        ({"tensors": {"x": 3}}, "tensors"),
        ({"samples": "many"}, "samples"),
        ({"samples": 0}, "made of 0 images"),
        (
            {"tensors": {"x": {"largest": 1.0, "thresholds": dict.fromkeys(ALGORITHMS, 0.0)}}},
            "a threshold is 0",
        ),
        ({"more": 1}, "more"),
        ({"tensors": {"x": reaching(1e31)}}, r"up to 1e\+30"),
        ({"tensors": {"x": reaching(1.0, 2.0)}}, "2.0 is above the largest magnitude, 1.0"),
        ({"tensors": {"x": {**reaching(1.0), "quantiles": {"0.5": 9.0}}}}, "9.0 is above"),
        ({"tensors": {"x": {**reaching(1.0), "means": [1.5]}}}, "mean is beyond"),
        ({"tensors": {"x": {**reaching(1.0), "means": [-1e308]}}}, "mean is beyond"),
    ],
)
def test_what_is_no_table_is_refused(
    table: CalibrationTable, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(changed(table, **changes))
    with pytest.raises(ValueError, match=says) as caught:
        CalibrationTable.load(file)
    assert str(file) in str(caught.value)


def test_every_truncation_is_refused(table: CalibrationTable, tmp_path: Path) -> None:
    data = table.to_json()
    file = tmp_path / "short.json"
    for length in range(0, len(data) - 2, 97):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match="is no calibration table"):
            CalibrationTable.load(file)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b"NaN"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd.json").write_bytes(data)
    with pytest.raises(ValueError, match="is no calibration table"):
        CalibrationTable.load(tmp_path / "odd.json")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match="cannot be read: it is a pipe or a device"):
            CalibrationTable.load(path)
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="cannot be read: it is larger than 33554432 bytes"):
        CalibrationTable.load(tmp_path / "sparse.json")


def test_names_in_tables_are_cut_and_printable(table: CalibrationTable, tmp_path: Path) -> None:
    for name in ("x" * 10**6, "\x1b[31mred\n"):
        (tmp_path / "odd.json").write_bytes(changed(table, **{name: 1}))
        with pytest.raises(ValueError, match="is no calibration table") as caught:
            CalibrationTable.load(tmp_path / "odd.json")
        said = str(caught.value)
        assert len(said) < 1200 and said.isprintable()


def test_files_that_are_not_there(table: CalibrationTable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        CalibrationTable.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot be read"):
        CalibrationTable.load(tmp_path)
    with pytest.raises(ValueError, match="cannot be written"):
        table.save(tmp_path / "no" / "such" / "folder.json")


def test_a_failed_write_leaves_the_old_table(
    table: CalibrationTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.json"
    table.save(file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        table.using("minmax").save(file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
