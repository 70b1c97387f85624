"""What the flags for weights, tuning and trust come to: what is read, compiled and loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import Result

import fastres
from fastres.cli.flags import Request
from fastres.cli.targets import open_target
from fastres.errors import BuildError
from fastres.graph.ir import Graph

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


@pytest.fixture
def both(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint with raw weights, the averages of which are those that were trained."""
    averaged = safetensors.torch.load_file(trained)
    raw = {key: value * 2 for key, value in averaged.items()}
    path = tmp_path / "both.pth.tar"
    torch.save({"epoch": 3, "state_dict": raw, "state_dict_ema": averaged}, path)
    return path


@pytest.mark.parametrize("named", [True, False], ids=["MODEL", "built"])
def test_the_entry_says_which_weights(named: bool, small: str, both: Path, trained: Path) -> None:
    request = Request(model=small if named else None, weights=both)
    with pytest.raises(BuildError, match="entry='state_dict' or entry='state_dict_ema'"):
        open_target(request)
    opened = open_target(replace(request, entry="state_dict_ema")).model
    weights = opened.constants if isinstance(opened, Graph) else opened.state_dict()
    assert torch.equal(weights["fc.bias"], safetensors.torch.load_file(trained)["fc.bias"])


def test_the_entry_on_the_command_line(run: Run, small: str, both: Path, engine: Path) -> None:
    assert "pass entry=" in run("summary", small, "--weights", both, status=2).stderr
    run("summary", small, "--weights", both, "--entry", "state_dict_ema")
    flags = ("--weights", both, "--entry", "state_dict_ema", "--backend", "reference")
    run("verify", small, engine, *flags[:4])
    run("verify", small, engine, *flags[:2], "--entry", "state_dict", status=1)
    run("compile", *flags)
    for arguments, said in (
        (("compile", small, "--entry", "ema"), "--entry says where in the file of --weights"),
        (("inspect", engine, "--entry", "ema"), "--entry cannot be given with it"),
        (("inspect", both), "holds weights, not an engine; give it as --weights"),
    ):
        assert said in run(*arguments, status=2).stderr.replace("\n", " ")
