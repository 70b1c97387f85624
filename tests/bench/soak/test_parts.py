"""bench.soak.parts runs, and finds nothing in what it tries here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.soak import parts


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter turns the compiler off"
)
@pytest.mark.parametrize("interpreted", [[], ["--interpret"]], ids=["lowered", "interpreted"])
def test_some_forged_parts(
    interpreted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # and put back what main makes of it
    out = tmp_path / "counts.json"
    flags = ["--count", "60", "--seed", "5", *interpreted, "-o", str(out)]
    assert parts.main(flags) == 0
    counts = json.loads(out.read_text())
    assert counts["ArtifactError"] > 20 and counts["called" if interpreted else "lowered"] > 0
