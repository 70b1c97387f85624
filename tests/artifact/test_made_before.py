"""Files that earlier versions wrote are read: made_before/ was, and is never made anew.

Made with version 0.1.0 before the folders of the code were laid out anew, by `engine.save` and
`table.save`, of a small network with a call that PyTorch runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch

import fastres

HERE = Path(__file__).with_name("made_before")
VALUES = safetensors.torch.load_file(HERE / "values.safetensors")
BOUND = {"fp32": 1e-6, "int8": 2e-2}  # another processor's sums; a step of 8 bits


@pytest.mark.parametrize("precision", BOUND)
def test_an_engine(precision: str) -> None:
    with fastres.load(HERE / precision) as engine:
        assert engine.options.precision == precision
        found = engine(VALUES["x"])
    error = (found - VALUES[precision]).abs().max() / VALUES[precision].abs().max()
    assert found.shape == (2, 3) and float(error) <= BOUND[precision]


def test_a_table(tmp_path: Path) -> None:
    table = fastres.CalibrationTable.load(HERE / "table.json")
    table.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (HERE / "table.json").read_bytes()
