"""fastres verify: green, red, and what it says of weights that cannot be checked well."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from fastres.cli import pictures, targets

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


def test_a_fresh_network_is_settled_and_passes(run: Run, small: str) -> None:
    result = run("verify", small, "--batch-size", "1,2")
    assert result.stdout.startswith("PASSED") and "4 images" in result.stdout
    assert "untrained weights, given BatchNorm statistics" in result.stderr


def test_an_engine_is_verified_against_its_weights(
    run_json: RunJson, small: str, engine: Path, trained: Path, photos_folder: Path
) -> None:
    flags = ("--weights", trained, "--images", photos_folder, "--layerwise")
    document = run_json("verify", small, engine, *flags)
    assert document["passed"] and document["images"] == 3
    assert document["weights"] == str(trained) and document["engine"] == str(engine)
    assert len(document["layers"]) > 8 and document["outputs"][0]["cosine"] > 0.9999


def test_without_model_code(run_json: RunJson, engine: Path, trained: Path) -> None:
    document = run_json("verify", engine, "--weights", trained, "--batch-size", "2")
    assert document["passed"] and document["model"] == str(trained)


def test_red_is_1_and_still_one_document(run: Run, small: str, engine: Path) -> None:
    result = run("verify", small, engine, "--layerwise", "--bisect", "--json", status=1)
    document = json.loads(result.stdout)
    assert document["passed"] is False and document["weights"] == "untrained"
    assert document["layers"] and document["bisection"]["node"]["name"] == "conv1"
    assert "untrained weights" in result.stderr and "Traceback" not in result.stderr


def test_tolerances_of_ones_own(run: Run, small: str, engine: Path, trained: Path) -> None:
    flags = ("verify", small, engine, "--weights", trained)
    assert run(*flags, "--atol", "1").stdout.startswith("PASSED")
    assert run(*flags, "--atol", "0", "--rtol", "0", status=1).stdout.startswith("FAILED")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a model"),
        (("ENGINE",), "is a file or folder"),
        (("SMALL", "ENGINE", "third"), "one engine at a time"),
        (("SMALL", "nowhere.fastres"), "there is no model or saved engine"),
        (("SMALL", "ENGINE", "--precision", "bf16"), "--precision cannot be given"),
        (("SMALL", "--images", "nowhere"), "there is no file or folder nowhere"),
        (("SMALL", "--images", "ENGINE"), "cannot be read as an image"),
        (("SMALL", "--weights", "ENGINE"), "is a saved engine"),
        (("SMALL", "--entry", "ema"), "--entry says where in the file of --weights"),
    ],
)
def test_verify_refuses(
    arguments: tuple[str, ...], said: str, run: Run, small: str, engine: Path
) -> None:
    meant = {"SMALL": small, "ENGINE": engine}
    result = run("verify", *(meant.get(a, a) for a in arguments), status=2)
    assert result.stdout == "" and said in result.stderr


def test_pictures_made_in_code_are_steady_and_differ(small: str) -> None:
    target = targets.Target(small, torch.nn.Identity(), (3, 32, 40), torch.float32)
    batch = pictures.synthetic(3, target)
    assert batch.shape == (3, 3, 32, 40) and torch.equal(batch[:2], pictures.synthetic(2, target))
    assert batch.mean().abs() < 1e-3 and abs(batch.std() - 1) < 1e-2
    assert (batch[0] - batch[1]).std() > 0.5
    across = (batch[..., 1:] - batch[..., :-1]).std()  # of white noise: 1.4
    assert across < 1
