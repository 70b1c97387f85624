"""What model names mean, and what is said of names that mean nothing."""

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fastres import models as ours
from fastres.cli import models
from fastres.errors import BackendUnavailable, BuildError, InputError


def strides(model: nn.Module) -> tuple[int, int]:
    """Of the first and second convolution of the first bottleneck that halves the picture."""
    block = model.get_submodule("layer2.0")
    return tuple(block.get_submodule(f"conv{i}").stride[0] for i in (1, 2))  # type: ignore


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("fastres:resnet50", None, (1, 2)),
        ("fastres:resnet50@v1", None, (2, 1)),
        ("fastres:resnet50@v1.5", None, (1, 2)),
        ("fastres:resnet50", "v1", (2, 1)),
        ("fastres:resnet50@v1", "v1", (2, 1)),
        ("torchvision:resnet50", None, (1, 2)),
    ],
)
def test_versions(name: str, version: ours.Version | None, expected: tuple[int, int]) -> None:
    model = models.make(name, version)
    assert strides(model) == expected and not model.training


def test_small_networks_are_named_with_their_depth() -> None:
    assert models.is_cifar("fastres:cifar_resnet20") and models.is_cifar("fastres:preact_resnet8")
    assert not models.is_cifar("fastres:resnet18")
    depth = sum(isinstance(m, nn.Conv2d) for m in models.make("fastres:cifar_resnet20").modules())
    assert depth == 19
    assert isinstance(models.make("fastres:preact_resnet8"), ours.PreActResNet)


def test_untrained_weights_are_the_same_at_every_call_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (models.make("fastres:cifar_resnet8").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet50", "models are fastres:NAME"),
        ("fastres:resnet51", "there are resnet18, resnet34"),
        ("fastres:", "there are resnet18"),
        ("fastres:resnet50@v2", "there are v1 and v1.5"),
        ("fastres:resnet50@", "there are v1 and v1.5"),
        ("fastres:cifar_resnet21", "6n [+] 2"),
        ("fastres:settle", "there are resnet18"),
        ("torchvision:nothing", "its residual networks are resnet101"),
        ("no.such.module:net", "there is no module 'no.such.module'"),
        ("fastres.models:nothing", "it has .*resnet18, "),
        ("fastres.models:_Model", "no factory"),
        ("builtins:dict", "gave dict; expected an nn.Module"),
        ("fastres.models:cifar_resnet", "raised TypeError"),
        ("sys:exit", "raised SystemExit"),
        (":net", "raised ValueError"),
    ],
)
def test_an_unknown_name_is_told_what_there_is(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        models.make(name)


def test_contradicting_versions_are_refused() -> None:
    with pytest.raises(InputError, match="contradict"):
        models.make("fastres:resnet50@v1", "v1.5")
    with pytest.raises(InputError, match="--version is for fastres"):
        models.make("torchvision:resnet50", "v1.5")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackendUnavailable, match="pip install timm"):
        models.make("timm:resnet50d")


def test_a_factory_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from fastres.models import cifar_resnet\n"
        "def net():\n    print('chatter')\n    return cifar_resnet(8)\n"
        "ready = cifar_resnet(8)\n"
    )
    (tmp_path / "own_broken.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "own_mute.py").write_text(
        "class Mute(Exception):\n    def __str__(self):\n        raise self\n"
        "def net():\n    raise Mute\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert isinstance(models.make("own_nets:net"), ours.ResNet)
    assert isinstance(models.make("own_nets:ready"), ours.ResNet)
    assert capsys.readouterr().out == ""  # stdout is the report's
    with pytest.raises(InputError, match="ModuleNotFoundError: No module named 'nowhere_to_be_f"):
        models.make("own_broken:net")
    with pytest.raises(InputError, match="own_mute:net raised Mute: its message cannot be shown"):
        models.make("own_mute:net")
    (tmp_path / "own_hollow.py").write_text(
        "import torch\n"
        "class Odd(BaseException):\n    pass\n"
        "def odd():\n    raise Odd('at all')\n"
        "def meta():\n    return torch.nn.Linear(2, 2, device='meta')\n"
        "def lazy():\n    return torch.nn.Sequential(torch.nn.LazyConv2d(4, 3))\n"
    )
    for name, said in (
        ("odd", "raised Odd: at all"),
        ("meta", "has no weights: weight is on the meta device"),
        ("lazy", "has no weights: 0.weight has no shape yet"),
    ):
        with pytest.raises(InputError, match=f"own_hollow:{name} {said}"):
            models.make(f"own_hollow:{name}")
    assert sys.path == path


def test_weights_fit_strictly(trained: Path, tmp_path: Path) -> None:
    model = models.make("fastres:cifar_resnet8")
    assert models.is_fresh(model)
    models.load_weights(model, "small", trained)
    wanted = safetensors.torch.load_file(trained)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert not models.is_fresh(model)

    without_counters = {k: v for k, v in wanted.items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(without_counters, tmp_path / "old.safetensors")
    models.load_weights(model, "small", tmp_path / "old.safetensors")


def test_weights_that_do_not_fit_are_told_where(trained: Path, tmp_path: Path) -> None:
    table = safetensors.torch.load_file(trained)
    table["fc.bias"] = torch.zeros(7)
    table["extra"] = table.pop("conv1.weight")
    torch.save(table, tmp_path / "wrong.pth")
    model = models.make("fastres:cifar_resnet8")
    before = model.state_dict()["fc.weight"].clone()
    with pytest.raises(BuildError) as caught:
        models.load_weights(model, "small", tmp_path / "wrong.pth")
    text = str(caught.value)
    assert "3 places" in text and "fc.bias is [7] in the file and [10]" in text
    assert "conv1.weight is missing" in text and "extra is unknown" in text
    assert torch.equal(before, model.state_dict()["fc.weight"])


def test_weights_as_training_leaves_them(trained: Path, tmp_path: Path) -> None:
    table = safetensors.torch.load_file(trained)
    wrapped = {f"module._orig_mod.{key}": value for key, value in table.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "best.pth.tar")
    model = models.make("fastres:cifar_resnet8")
    models.load_weights(model, "small", tmp_path / "best.pth.tar")
    assert all(torch.equal(value, table[key]) for key, value in model.state_dict().items())

    holder = nn.ModuleDict({"backbone": model})
    own = {f"backbone.{key}": value + 1 for key, value in table.items()}
    torch.save(own, tmp_path / "own.pth")
    models.load_weights(holder, "holder", tmp_path / "own.pth")
    assert torch.equal(model.state_dict()["fc.bias"], table["fc.bias"] + 1)


def test_raw_and_averaged_weights_are_a_question(trained: Path, tmp_path: Path) -> None:
    table = safetensors.torch.load_file(trained)
    raw = {key: value * 2 for key, value in table.items()}
    torch.save({"model": raw, "model_ema": table}, tmp_path / "both.pth")
    model = models.make("fastres:cifar_resnet8")
    with pytest.raises(BuildError, match="pass entry='model' or entry='model_ema'"):
        models.load_weights(model, "small", tmp_path / "both.pth")
    assert models.is_fresh(model)
    models.load_weights(model, "small", tmp_path / "both.pth", "model_ema")
    assert torch.equal(model.state_dict()["fc.bias"], table["fc.bias"])
