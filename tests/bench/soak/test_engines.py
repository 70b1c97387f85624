"""bench.soak.engines runs, finds nothing in what it tries here, and could."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fastres
from bench.soak import engines
from bench.soak.forged_engines import Source, forged, sources
from fastres.artifact.container import MANIFEST, SEAL, seal


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return sources(tmp_path_factory.mktemp("sound"))


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0.2, 0.9])
def test_some_forged_engines(calls: float, tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    flags = ["--count", "80", "--seed", "5", "--calls", str(calls), "-o", str(out)]
    assert engines.main(flags) == 0
    counts = json.loads(out.read_text())
    assert counts["ArtifactError loading"] > 20 and counts["answer"] > 0


def test_forged_engines_have_fitting_digests(known: list[Source]) -> None:
    files = forged(known[0].files, random.Random(3), 0.5)
    assert files[SEAL] == seal(files[MANIFEST])
    assert set(json.loads(files[MANIFEST])["files"]) == set(files) - {MANIFEST, SEAL}
    assert files == forged(known[0].files, random.Random(3), 0.5) != known[0].files


def test_what_is_not_well_is_found(
    known: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "forged", lambda files, chance, calls: files)
    assert engines.case(1, 0, 0.0, known, tmp_path) == "answer"
    monkeypatch.setattr(engines, "SECONDS", -1.0)
    assert "BAD" in engines.case(2, 0, 0.0, known, tmp_path)
    monkeypatch.setattr(engines, "SECONDS", 60.0)
    real = fastres.Engine.__call__
    monkeypatch.setattr(
        fastres.Engine,
        "__call__",
        lambda *a: torch.utils._pytree.tree_map(lambda y: y + 1, real(*a)),
    )
    assert engines.case(3, 0, 0.0, known, tmp_path).endswith(": another answer than its graph's")

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(fastres, "load", broken)
    assert "loading: KeyError: 'x'" in engines.case(4, 0, 0.0, known, tmp_path)
