"""What the flags for tuning and for trust come to: what compile and load are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import fastres

Run = Callable[..., Result]
QUICK = ("--duration=0.02", "--launches=1", "--device=cpu", "--peers=none")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each engine loaded, whether it was trusted."""
    seen, load = [], fastres.load

    def watched(path: Path, *, trust_engine: bool, **more: Any) -> fastres.Engine:
        seen.append(trust_engine)
        return load(path, trust_engine=trust_engine, **more)

    monkeypatch.setattr(fastres, "load", watched)
    return seen


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each model was compiled with."""
    seen, compile_model = [], fastres.compile

    def watched(*operands: Any, **given: Any) -> fastres.Engine:
        seen.append(given)
        return compile_model(*operands, **given)

    monkeypatch.setattr(fastres, "compile", watched)
    return seen


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "ENGINE"),
        ("profile", "ENGINE"),
        ("verify", "SMALL", "ENGINE", "--weights", "WEIGHTS"),
        ("bench", "ENGINE", *QUICK),
        ("bench", "SMALL", "ENGINE", *QUICK),
        ("predict", "ENGINE", "PHOTOS"),
    ],
    ids=" ".join,
)
def test_an_engine_is_trusted_where_that_is_said(
    arguments: tuple[str, ...],
    run: Run,
    loads: list[bool],
    small: str,
    engine: Path,
    trained: Path,
    photos_folder: Path,
) -> None:
    meant = {"SMALL": small, "ENGINE": engine, "WEIGHTS": trained, "PHOTOS": photos_folder}
    given = [meant.get(a, a) for a in arguments]
    run(*given, "--trust-engine")
    run(*given)
    assert loads == [True, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "SMALL"),
        ("inspect", "--weights", "WEIGHTS"),
        ("profile", "SMALL"),
        ("verify", "SMALL"),
        ("bench", "SMALL", *QUICK),
        ("predict", "SMALL", "PHOTOS"),
    ],
    ids=" ".join,
)
def test_there_is_nothing_to_trust_in_a_model(
    arguments: tuple[str, ...], run: Run, small: str, trained: Path, photos_folder: Path
) -> None:
    meant = {"SMALL": small, "WEIGHTS": trained, "PHOTOS": photos_folder}
    result = run(*(meant.get(a, a) for a in arguments), "--trust-engine", status=2)
    assert "--trust-engine is for saved engines" in result.stderr and result.stdout == ""


def test_compile_loads_no_engine_to_trust(run: Run, small: str) -> None:
    assert "No such option" in run("compile", small, "--trust-engine", status=2).stderr


def test_tuning_is_asked_for(
    run: Run, small: str, tmp_path: Path, compiles: list[dict[str, Any]]
) -> None:
    flags = ("--backend", "reference", "--cache-dir", tmp_path)
    tuned = run("compile", small, *flags, "--tune")
    assert "runs on reference, which has no tiles" in tuned.stderr
    assert "nothing was tuned" not in run("compile", small, *flags).stderr
    assert [(given["tune"], given["cache_dir"]) for given in compiles] == [
        (True, tmp_path),
        (False, tmp_path),
    ]
