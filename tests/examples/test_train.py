"""examples/train.py: what moves and what does not, the same bytes twice, and the committed nets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train as script
from corruptions import KINDS, corrupted
from datasets import Pictures, digits, load, split
from networks import Part, facts_of, freeze, network, preprocess_of, save, take_over
from PIL import Image
from recipes import CIFAR, NVIDIA
from torch import nn
from training import Epoch, batch_size, evaluate, statistics, train

import fastres
from fastres.errors import BuildError, InputError

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "examples" / "weights"
NAMES = ("resnet20", "bottleneck")
Here = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def few() -> Pictures:
    return digits(16).take(np.arange(64))


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Here:
    """here(flag, ...) -> the last line of train.py with these flags, run in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        script.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def command(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train.py"), *flags],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize(
    ("name", "part", "first"),
    [
        ("resnet20", "all", ("",)),
        ("resnet20", "last", ("layer3.", "fc.")),
        ("bottleneck", "last", ("layer4.", "fc.")),
        ("fastres:preact_resnet8", "last", ("layer3.", "bn.", "fc.")),
        ("bottleneck", "head", ("fc.",)),
    ],
)
def test_frozen_layers_do_not_move(
    name: str, part: Part, first: tuple[str, ...], few: Pictures
) -> None:
    model = network(name)
    before = state(model)
    train(model, few, NVIDIA, statistics(few), epochs=1, batch=32, frozen=freeze(model, part))
    # Running statistics are in the state too, and the counters of BatchNorms that saw a batch.
    assert moved(model, before) == {key for key in before if key.startswith(first)}


def test_training_learns(few: Pictures) -> None:
    model = network("fastres:cifar_resnet8")
    recipe = replace(CIFAR, lr=0.02)
    train(model, few, recipe, statistics(few), epochs=25, batch=16, padding=0)
    assert evaluate(model, few, statistics(few))[0] > 0.9 and not model.training


def test_training_stops_early_and_goes_back(few: Pictures) -> None:
    labels = few.labels.copy()
    labels[::2] = (labels[::2] + 1) % 10  # half are wrong: the surer the network, the worse
    doubtful = replace(few, labels=labels)
    model, seen = network("fastres:cifar_resnet8"), list[Epoch]()
    kept = train(
        model,
        few,
        replace(CIFAR, patience=4, lr=0.02),
        statistics(few),
        validation=doubtful,
        epochs=40,
        batch=16,
        padding=0,
        report=seen.append,
    )
    best = min(seen, key=lambda epoch: epoch.validation_loss)
    assert 1 < kept == best.number == len(seen) - 4 < 36
    accuracy, loss = evaluate(model, doubtful, statistics(few))
    assert loss == pytest.approx(best.validation_loss, rel=1e-5)
    assert accuracy == best.validation_accuracy


def test_evaluation_against_a_plain_loop(few: Pictures) -> None:
    model = network("fastres:cifar_resnet8", seed=1).eval()
    preprocess = statistics(few)
    right, losses = 0, []
    for image, label in zip(few.images, few.labels, strict=True):
        logits = model(preprocess(image)[None])[0].detach().double()
        right += int(logits.argmax()) == label
        losses.append(float(logits.logsumexp(0) - logits[label]))
    accuracy, loss = evaluate(model, few, preprocess)
    assert accuracy == right / 64 and loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_statistics_make_mean_0_and_std_1(few: Pictures) -> None:
    found = statistics(few)
    x = torch.stack([found(image) for image in few.images])
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3
    with pytest.raises(InputError, match="same value in every pixel"):
        statistics(replace(few, images=np.zeros_like(few.images)))


def test_batches_leave_twenty_steps() -> None:
    assert batch_size(NVIDIA, 40_000) == 256
    assert batch_size(NVIDIA, 1_438) == 64
    assert batch_size(CIFAR, 10) == 16


def test_head_is_replaced_only_if_it_must_or_is_asked_for(tmp_path: Path, few: Pictures) -> None:
    source = network("resnet20", 10, seed=1)
    file = tmp_path / "w.safetensors"
    save(source, file, statistics(few), {"model": "resnet20"})
    assert preprocess_of(facts_of(file)) == statistics(few)
    for classes, asked, replaced in ((10, False, False), (10, True, True), (3, False, True)):
        model = network("resnet20", classes, seed=2)
        assert take_over(model, file, new_head=asked) == replaced
        own = network("resnet20", classes, seed=2) if replaced else source
        assert torch.equal(model.fc.weight, own.fc.weight)
        assert torch.equal(model.fc.bias, own.fc.bias)
        assert torch.equal(model.layer3[2].conv2.weight, source.layer3[2].conv2.weight)
    with pytest.raises(BuildError, match=r"does not fit the network: .* Name the one"):
        take_over(network("bottleneck"), file)
    with pytest.raises(BuildError, match="there is no file"):
        take_over(source, tmp_path / "none.safetensors")
    file.write_bytes(b"12345678")
    with pytest.raises(BuildError, match="cannot be read as weights"):
        facts_of(file)


def test_networks_by_name() -> None:
    assert sum(p.numel() for p in network("resnet20").parameters()) == 269_722
    bottleneck = network("bottleneck")
    convolutions = [m for m in bottleneck.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 16 * 3 + 4 and bottleneck.fc.in_features == 256
    strides = (bottleneck.layer2[0].conv1.stride, bottleneck.layer2[0].conv2.stride)
    assert strides == ((1, 1), (2, 2))  # v1.5
    v1 = network("fastres:resnet50@v1", classes=3)
    assert v1.layer2[0].conv1.stride == (2, 2) and v1.fc.out_features == 3
    for name in ("resnet21", "fastres:resnet21", "resnet50", "fastres:cifar_resnet21"):
        with pytest.raises(InputError, match="there is no network|6n \\+ 2"):
            network(name)
    same, other = network("resnet20", seed=4), network("resnet20", seed=5)
    assert torch.equal(network("resnet20", seed=4).conv1.weight, same.conv1.weight)
    assert not torch.equal(other.conv1.weight, same.conv1.weight)


def test_a_loss_that_is_not_finite(few: Pictures) -> None:
    model = network("fastres:cifar_resnet8")
    with pytest.raises(InputError, match="not finite in epoch 1 at a learning rate of"):
        train(model, few, replace(CIFAR, lr=1e30), statistics(few), epochs=2, batch=16)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"batch": 1}, {"padding": -1}])
def test_numbers_out_of_range(wrong: dict[str, Any], few: Pictures) -> None:
    with pytest.raises(InputError, match="give at least"):
        train(network("fastres:cifar_resnet8"), few, CIFAR, statistics(few), **wrong)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten pictures: noise brighter on the left, and brighter on the right."""
    root, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, slope in (("left", -100), ("right", 100)):
        (root / name).mkdir()
        for i in range(10):
            values = 128 + slope * np.linspace(-1, 1, 16)[None, :, None]
            noisy = values + draw.normal(0, 10, (16, 16, 3))
            Image.fromarray(noisy.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_the_same_command_writes_the_same_bytes(
    photographs: Path, tmp_path: Path, here: Here
) -> None:
    flags = ["--data", str(photographs), "--size=16", "--model", "fastres:cifar_resnet8"]
    flags += ["--recipe=nvidia", "--epochs=1", "--threads=1", "--folds=2", "--fold=1", "--out"]
    line = here(*flags, "here.safetensors")
    run = command(*flags, "there.safetensors", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")  # no terminal, no progress
    assert (tmp_path / "here.safetensors").read_bytes() == (
        tmp_path / "there.safetensors"
    ).read_bytes()
    there = json.loads(run.stdout)
    different = {key for key in line if line[key] != there[key]}
    assert different <= {"weights", "seconds"} and line["weights"] == "here.safetensors"
    assert line["test"]["pictures"] == 10 and "validation" not in line and line["epoch"] == 1
    facts = facts_of(tmp_path / "here.safetensors")
    assert facts["classes"] == ["left", "right"] and facts["recipe"]["mixup"] == 0.2
    assert facts["test"] == line["test"]


def test_transfer_to_other_classes(photographs: Path, tmp_path: Path, here: Here) -> None:
    source = WEIGHTS / "digits_resnet20.safetensors"
    said = here("--data", photographs, "--from", source, "--train", "head", "--epochs", 1)
    written = tmp_path / said["weights"]
    model, before = network("resnet20", 2), network("resnet20")
    assert not take_over(model, written) and not take_over(before, source)
    assert moved(model, state(before)) == {"fc.weight", "fc.bias"}
    # What the weights were trained with stays with them.
    assert preprocess_of(facts_of(written)) == preprocess_of(facts_of(source))


def test_without_epochs_weights_are_only_evaluated(photographs: Path, here: Here) -> None:
    source = WEIGHTS / "digits_bottleneck.safetensors"
    data = load(photographs).train
    said = here("--data", photographs, "--from", source, "--epochs", 0, "--corrupted")
    assert said["model"] == "bottleneck" and said["weights"] is None and said["epoch"] == 0
    assert set(said["validation"]["corrupted"]) == {"mean", *KINDS}
    assert said["validation"]["pictures"] == 4 == round(len(data) * 0.2)


def test_folds_of_a_recipe_that_stops_early_hold_a_third_part(
    photographs: Path, here: Here
) -> None:
    flags = ("--data", photographs, "--size", 16, "--model", "fastres:cifar_resnet8")
    said = here(*flags, "--epochs", 1, "--folds", 2, "--fold", 0, "--optimizer", "adam")
    assert said["test"]["pictures"] == 10 and said["validation"]["pictures"] == 2
    assert said["recipe"]["optimizer"] == "adam" and said["recipe"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fold", 1), "--fold needs --folds K"),
        (("--train", "head"), "--train head needs --from"),
        (("--epochs", -1), "--epochs must be at least 0, got -1"),
    ],
)
def test_wrong_use(
    flags: tuple[object, ...], said: str, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        here(*flags)
    assert said in capsys.readouterr().err


def test_errors_leave_no_traceback(tmp_path: Path) -> None:
    run = command("--data", "nowhere", cwd=tmp_path)
    assert run.returncode == 1 and run.stderr.startswith("error: there is no folder nowhere")


def test_a_fold_that_is_not_there(photographs: Path, here: Here) -> None:
    with pytest.raises(InputError, match="--fold is 2; with --folds 2 give"):
        here("--data", photographs, "--folds", 2, "--fold", 2)


@pytest.mark.parametrize("name", NAMES)
def test_committed_weights_are_as_good_as_said(name: str) -> None:
    file = WEIGHTS / f"digits_{name}.safetensors"
    assert file.stat().st_size <= 2_000_000
    facts = facts_of(file)
    assert facts["model"] == name and facts["data"] == "digits" and facts["seed"] == 0
    model = network(name)
    assert not take_over(model, file)
    preprocess = preprocess_of(facts)
    assert preprocess is not None
    everything = digits()
    rows, held = split(everything.labels, 0.2, seed=0)
    part = everything.take(held)
    assert preprocess == statistics(everything.take(rows))
    # One picture of 359 may fall on the other side of a line on another processor.
    accuracy = evaluate(model, part, preprocess)[0]
    assert accuracy == pytest.approx(facts["validation"]["accuracy"], abs=1.5 / 359)
    assert accuracy >= 0.985
    worse = [
        evaluate(model, replace(part, images=corrupted(part.images, kind, 0)), preprocess)[0]
        for kind in KINDS
    ]
    said = facts["validation"]["corrupted"]["mean"]
    assert np.mean(worse) == pytest.approx(said, abs=0.005) and 0.9 <= said <= 0.97
    readme = (WEIGHTS / "README.md").read_text()
    assert f"{facts['validation']['accuracy']:.2%}" in readme and f"{said:.2%}" in readme


@pytest.mark.parametrize("name", NAMES)
def test_fastres_builds_the_networks_from_their_weights(name: str) -> None:
    file = WEIGHTS / f"digits_{name}.safetensors"
    model = network(name)
    take_over(model, file)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with fastres.compile(fastres.build(file, version="v1.5"), backend="reference") as engine:
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model.eval()(x), rtol=1e-4, atol=1e-4)
