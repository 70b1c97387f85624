"""One small network, its weights and its saved engine, shared by all tests of the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

import fastres
from fastres import models
from fastres.cli.main import app

SMALL = "fastres:cifar_resnet8"
Run = Callable[..., Result]


@pytest.fixture(scope="session")
def photos_folder() -> Path:
    return Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture
def run() -> Run:
    """run("verify", "x", status=1): the command in this process, its exit status checked."""

    def invoke(*arguments: str | Path, status: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="fastres")
        assert result.exit_code == status, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture
def run_json(run: Run) -> Callable[..., dict[str, Any]]:
    """The same with --json: what stdout holds, which must be one document and nothing else."""

    def invoke(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
        document = json.loads(run(*arguments, "--json", status=status).stdout)
        assert document["command"] == arguments[0]
        assert document["fastres"] == fastres.__version__
        return dict(document)

    return invoke


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in a process of its own, with pipes for its output."""

    def invoke(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            timeout=120,
        )

    return invoke


COMMAND = [sys.executable, "-c", "from fastres.cli.main import main; main()"]


@pytest.fixture
def command() -> list[str]:
    return COMMAND


@pytest.fixture(scope="session")
def small() -> str:
    return SMALL


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the small network with BatchNorm statistics that matter: not a fresh one's."""
    model = models.cifar_resnet(8, seed=1)
    models.settle(model, torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """An engine with those weights, saved by the command itself."""
    path = tmp_path_factory.mktemp("engine") / "small.fastres"
    arguments = ["compile", SMALL, "--weights", str(trained), "-o", str(path), "--backend", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return path
