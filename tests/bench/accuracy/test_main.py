"""bench.accuracy: its statistics by other means, what it holds apart, its three ways to run."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import digits
from PIL import Image
from recipes import NVIDIA
from safetensors.torch import save_file
from torch import nn

import fastres
from bench.accuracy import __main__ as accuracy
from bench.accuracy import nets, parity
from bench.accuracy.engines import Engines, Material, engines, normalised, refusals, remarks, top1
from bench.accuracy.nets import RECIPES, VERSIONS, trained_on_folds
from bench.accuracy.report import AUTO, FIXED, KEPT, Interval, figures, paired, section
from bench.children import ROOT
from fastres.calib.thresholds import ALGORITHMS
from fastres.errors import BuildError, InputError
from fastres.options import Input
from fastres.source import source_of

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 3
SEEN = fastres.Preprocess(resize=36, crop=32)  # of the folders below


def run(*flags: object, out: Path) -> dict[str, Any]:
    """What the script writes as JSON, run in this process."""
    assert accuracy.main([*map(str, flags), "--threads=1", "-o", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("versions", [1, 14])
def test_the_interval_is_that_of_a_bootstrap_over_pictures(versions: int) -> None:
    draw = np.random.default_rng(versions)
    hard = draw.random(1500) * 0.2  # some pictures are hard in all their versions
    before = draw.random((versions, 1500)) > hard
    right = np.where(draw.random((versions, 1500)) < hard / 4, ~before, before)
    found = paired(right, before)
    gained = right.sum(0).astype(float) - before.sum(0)
    means = gained[draw.integers(0, 1500, (2000, 1500))].mean(1) / versions
    low, high = np.percentile(means, (2.5, 97.5))
    assert found.value == pytest.approx(right.mean() - before.mean(), abs=1e-12)
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))


def test_versions_that_change_together_count_once() -> None:
    before = np.ones((1, 400), bool)
    right = before.copy()
    right[0, :10] = False
    one, many = paired(right, before), paired(right.repeat(14, 0), before.repeat(14, 0))
    assert many.low == pytest.approx(one.low) and many.high == pytest.approx(one.high)
    assert many.value == pytest.approx(-10 / 400)
    # the usual formula for one version
    assert one.high - one.low == pytest.approx(2 * 1.96 * (0.025 * 0.975 / 399) ** 0.5, rel=1e-3)


def test_no_change_is_no_certainty() -> None:
    same = np.ones((14, 300), bool)
    assert paired(same, same) == Interval(0.0, -0.01, 0.01)
    assert paired(same[:, :1], same[:, :1]) == Interval(0.0, -1.0, 1.0)


def test_figures_counted_by_hand() -> None:
    labels = np.array([0, 1, 2, 3])
    base = np.array([[0, 1, 2, 0], [0, 1, 0, 0]])
    own = np.array([[0, 1, 0, 3], [0, 0, 2, 1]])
    found = figures(own, base, labels)
    assert (found.predictions, found.top1, found.agreement) == (8, 5 / 8, 3 / 8)
    assert (found.lost, found.won, found.other) == (2, 2, 1)
    assert found.difference.value == 0


def test_a_section_picks_and_judges() -> None:
    labels = np.arange(1000) % 10
    base = np.stack([labels, labels])
    answers = {"fp32": base, "bf16": base}
    for i, name in enumerate(FIXED):
        own = base.copy()
        own[1, : 10 * (i + 1)] = (labels[: 10 * (i + 1)] + 1) % 10
        answers[name] = own
    answers[AUTO] = answers[FIXED[4]]
    found = section("net", "cpu", ("clean", "rotate"), answers, labels, ["said"])
    assert found.best is not None and found.best.name == FIXED[0]
    assert set(found.rows[0].parts) == {"clean", "damaged", "all"}
    damaged = found.rows[2].parts["damaged"]
    assert damaged.top1 == 0.99 and damaged.agreement == 0.99 and damaged.lost == 10
    assert found.rows[2].versions["clean"].agreement == 1
    assert found.rows[2].versions["rotate"].top1 == 0.99
    text = str(found)
    assert "version by version" in text
    assert "-1.00 [-1.62, -0.38]" in text and "said" in text
    rows = {tuple(c.strip() for c in line.split("│")[1:7]) for line in text.splitlines()}
    best, own = f"{FIXED[0]} (best of five)", f"{AUTO} (own choice)"
    assert (best, "all", "-0.50 [-0.81, -0.19]", "NO", "99.500%", "yes") in rows
    assert (own, "damaged", "-5.00 [-6.35, -3.65]", "NO", "95.000%", "NO") in rows
    assert (best, "clean", "+0.00 [-0.30, +0.30]", "yes", "100.000%", "yes") in rows


# ---------------------------------------------------------------- what is held apart


def test_folds_learn_from_nothing_that_they_are_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = digits()
    recipes = []

    def untrained(name: str, training: Any, recipe: Any, seed: int, label: str) -> Any:
        recipes.append(recipe)
        return nn.Identity(), fastres.Preprocess()

    monkeypatch.setattr(nets, "_trained", untrained)
    found = list(trained_on_folds("bottleneck", everything, 5, 3, epochs=2))
    assert np.array_equal(np.sort(np.concatenate([one.held for one in found])), np.arange(1797))
    for one in found:
        rest = [i for i in range(1797) if i not in set(one.held)]
        assert np.array_equal(one.training.images, everything.images[rest])
        assert np.array_equal(one.training.labels, everything.labels[rest])
    assert {(r.epochs, r.mixup) for r in recipes} == {(2, 0.0)}


def test_calibration_and_validation_share_no_picture() -> None:
    first, second = accuracy.drawn(100, 60, 30, seed=1)
    assert len(first) == 60 and len(second) == 30 and not set(first) & set(second)
    assert set(first) | set(second) < set(range(100))
    assert len(accuracy.drawn(100, 60, 0, seed=1)[1]) == 0
    with pytest.raises(InputError, match="there are 100 pictures .* 90 and 20 were asked for"):
        accuracy.drawn(100, 90, 20, seed=1)


def test_networks_are_kept_by_what_made_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nets, "CACHE", tmp_path / "kept")
    few = digits(16).take(np.arange(48))
    recipe = replace(NVIDIA, epochs=1)

    def made(seed: int = 0, mixup: float = 0.2, pictures: Any = few) -> nn.Module:
        how = replace(recipe, mixup=mixup)
        model, _ = nets._trained("resnet20", pictures, how, seed, "one")
        assert not model.training
        return model

    first = made()
    assert "trained one: 1 epochs in" in capsys.readouterr().err
    again = made()
    assert capsys.readouterr().err == "" and len(list((tmp_path / "kept").iterdir())) == 1
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    made(seed=1)
    made(mixup=0.0)
    made(pictures=few.take(np.arange(1, 48)))
    assert len(list((tmp_path / "kept").iterdir())) == 4


# ---------------------------------------------------------------- engines


def test_what_a_backend_does_not_take_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = fastres.models.cifar_resnet(8, seed=0)
    pictures = normalised(digits().images[:24], fastres.Preprocess())
    fastres.models.settle(model, pictures)
    graph = source_of(model, Input((1, 3, 32, 32))).graph
    with ExitStack() as stack:
        material = Material(graph, pictures, 8, validate=lambda engine: 0.5)
        found = engines(stack, material, "reference", threads=1, seed=0)
        assert list(found.named) == ["fp32", *FIXED, KEPT]
        assert refusals(found.refused, "reference")[0].startswith("reference: no bf16: ")
        assert found.chosen[AUTO] in ALGORITHMS and found.chosen[KEPT] == "minmax"
        assert "kept in fp32: no layer (validation 50.00% -> 50.00%)" in remarks(found)[1]
        # a smaller batch is filled up, and what it is filled up with is no answer
        engine = found.named["fp32"]
        assert np.array_equal(top1(engine, pictures[:5], 8), model(pictures[:5]).argmax(1))
        elsewhere = Engines() if torch.cuda.is_available() else None
        if elsewhere is None:
            elsewhere = engines(stack, material, "triton", threads=1, seed=0)
            (line,) = refusals(elsewhere.refused, "triton")
            assert "triton: no fp32: triton cannot run here: " in line
        assert not elsewhere.named


def test_pictures_are_normalised_as_in_deployment() -> None:
    preprocess = fastres.Preprocess(resize=None, crop=None)
    images = digits().images[:3]
    torch.testing.assert_close(normalised(images, preprocess), preprocess.batch(list(images)))


def test_quick_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The committed ResNet-20; tests/examples/test_digits_job.py has the bottleneck net."""
    flags = ("--quick", "--networks=resnet20", "--backends=cpu")
    (found,) = run(*flags, out=tmp_path / "q.json")["sections"]
    assert "resnet20 on cpu: 359 pictures, 5026 predictions" in capsys.readouterr().out
    rows = {row["name"]: row["parts"] for row in found["rows"]}
    assert {"fp32", *FIXED, AUTO} <= set(rows) and KEPT not in rows
    assert list(found["rows"][0]["versions"]) == list(VERSIONS)
    # the figures of examples/weights/README.md, by another program; one picture may differ
    assert rows["fp32"]["clean"]["top1"] == pytest.approx(0.9944, abs=1.5 / 359)
    assert rows["fp32"]["damaged"]["top1"] == pytest.approx(0.9541, abs=0.005)
    for name in (max(FIXED, key=lambda n: rows[n]["all"]["top1"]), AUTO):
        whole = rows[name]["all"]
        noise = whole["difference"]["high"] - whole["difference"]["value"]
        assert whole["difference"]["value"] >= -0.003 - noise and noise < 0.003
        assert whole["agreement"] >= 0.99 and rows[name]["clean"]["agreement"] >= 0.99


# ---------------------------------------------------------------- folders of pictures


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A settled network of three classes and its weights."""
    model = fastres.models.cifar_resnet(8, CLASSES, seed=0)
    noise = np.random.default_rng(9).integers(256, size=(16, 5, 6, 3), dtype=np.uint8)
    x = SEEN.batch([Image.fromarray(coarse).resize((60, 50)) for coarse in noise])
    fastres.models.settle(model, x)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)  # each class has its share
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(model.state_dict(), file)
    return model, file


def pictures_in(folder: Path, count: int = 6, classes: int = CLASSES, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"n{label}").mkdir(parents=True)
        for i in range(count):
            coarse = draw.integers(256, size=(5, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((60, 50)).save(folder / f"n{label}" / f"{i}.png")
    return folder


def flags_for(root: Path, weights: Path, *more: object) -> list[object]:
    sizes = ("--resize=36", "--crop=32", "--batch-size=4", "--backends=cpu")
    return ["--imagenet", root, "--weights", weights, *sizes, *more]


def test_a_folder_of_pictures(small: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, weights = small
    pictures_in(tmp_path / "val"), pictures_in(tmp_path / "train", seed=1)
    counts = ("--calibration-images=8", "--validation-images=6")
    found = run(*flags_for(tmp_path, weights, *counts), out=tmp_path / "i.json")
    (one,) = found["sections"]
    rows = {row["name"]: row["parts"]["clean"] for row in one["rows"]}
    assert list(rows) == ["fp32", *(["bf16"] if "bf16" in rows else []), *FIXED, AUTO, KEPT]
    files = sorted((tmp_path / "val").glob("*/*.png"))
    classes = [int(model(SEEN(file)[None]).argmax()) for file in files]
    right = [f"n{label}" == file.parent.name for label, file in zip(classes, files, strict=True)]
    assert len(set(classes)) > 1 and len(files) == 18
    assert rows["fp32"]["top1"] == pytest.approx(np.mean(right))
    assert rows["fp32"]["predictions"] == 18 and rows["fp32"]["agreement"] == 1
    assert rows[FIXED[0]]["agreement"] > 0.5
    assert one["notes"][0] == "calibrated on 8 pictures of train"
    assert found["settings"]["calibration_images"] == 8


def test_without_train_what_calibrates_is_not_judged_by(
    small: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    from bench.accuracy.imagenet import parted

    pictures_in(tmp_path / "val")
    given = accuracy._parser().parse_args(["--imagenet", str(tmp_path)])
    given.calibration_images, given.validation_images = 7, 4
    judged, calibration, validation, where = parted(given)
    sets = [set(files.paths) for files in (judged, calibration, validation)]
    assert [len(s) for s in sets] == [7, 7, 4] and len(set.union(*sets)) == 18
    assert where == "calibrated on 7 pictures of val; judged by the other 7"
    for files in (judged, calibration):
        assert [f"n{label}" for label in files.labels] == [p.parent.name for p in files.paths]


def test_bad_folders_and_weights(small: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, weights = small
    counts = ("--calibration-images=4", "--validation-images=2")

    def refuses(match: str, *more: object, file: Path = weights, kind: type = InputError) -> None:
        with pytest.raises(kind, match=match):
            run(*flags_for(tmp_path, file, *counts, *more), out=tmp_path / "none.json")

    val = tmp_path / "val"
    refuses("there is no folder .*val; --imagenet DIR needs DIR/val with a folder for each")
    pictures_in(val, classes=1)
    refuses("val holds 1 folders; expected one for each class")
    (val / "n1").mkdir()
    refuses("no picture in .*n1; looked for")
    Image.new("RGB", (50, 50)).save(val / "n1" / "0.png")
    refuses("tells 3 classes apart, .*val has 2 folders")
    (val / "n2").mkdir()
    (val / "n2" / "half.png").write_bytes((val / "n1" / "0.png").read_bytes()[:40])
    refuses("half.png cannot be read", "--calibration-images=1", kind=ValueError)
    Image.new("RGB", (50, 50)).save(val / "n2" / "half.png")
    refuses("has no train, and val has 8 pictures: too few", "--calibration-images=7")
    refuses("there is no file", file=tmp_path / "none.safetensors", kind=BuildError)
    refuses("there is no fastres:resnet21", "--model=resnet21")
    pictures_in(tmp_path / "train", classes=2)
    refuses("train has 2 classes and .*val 3")


# ---------------------------------------------------------------- parity, wrong use


def test_parity_of_a_settled_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "PRECISIONS", ("fp32", "fp16", "int8"))
    for name, numbers in (("CALIBRATING", 8), ("JUDGING", 4)):
        start = getattr(parity, name).start
        monkeypatch.setattr(parity, name, range(start, start + numbers))
    found = run("--parity", "--depths=18", "--crop=64", out=tmp_path / "p.json")
    exact, int8 = found["rows"]
    assert exact["precision"] == "fp32" and not exact["failure"] and exact["sqnr_db"] > 80
    assert not int8["failure"] and 3 < int8["sqnr_db"] < 60 and 0.9 < int8["cosine"] < 1
    worst = list(int8["worst"].values())
    assert len(worst) == 5 and worst == sorted(worst) and worst[-1] <= int8["median_db"]
    assert found["notes"][0].startswith("no fp16: cpu refuses the precision")
    assert "no fp16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--quick", "--parity"), "choose one of --quick, --imagenet, --parity"),
        (("--imagenet", "x"), "--imagenet DIR and --weights FILE go together"),
        (("--folds", "1"), "--folds must be at least 2, got 1"),
        (("--networks", "resnet20,vgg"), "--networks has 'vgg'; there are resnet20, bottleneck"),
        (("--backends", "tpu"), "--backends has 'tpu'; there are cpu, triton"),
    ],
)
def test_wrong_use(flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        accuracy.main(flags)
    assert says in capsys.readouterr().err


def test_errors_leave_no_traceback(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.accuracy",
        "--imagenet",
        str(tmp_path),
        "--weights",
        "w.pth",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no folder")


def test_recipes_are_those_of_the_committed_weights() -> None:
    readme = (nets.WEIGHTS / "README.md").read_text()
    for name, recipe in RECIPES.items():
        line = next(x for x in readme.splitlines() if f"--model {name} --recipe" in x)
        assert f"--recipe {recipe.name} --epochs {recipe.epochs}" in line
        assert ("--mixup 0" in line) == (recipe.mixup == 0)
