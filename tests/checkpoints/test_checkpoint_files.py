"""fastres.checkpoints.files: what training saved comes back as data, and nothing is ever run."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import os
import pathlib
import pickle
import sys
import tarfile
import types
import uuid
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.checkpoints.files import read_checkpoint
from fastres.errors import BuildError


def table() -> dict[str, Tensor]:
    return dict(models.cifar_resnet(8, seed=0).state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "name", ["net.pth", "net.pt", "net.bin", "net.ckpt", "best.pth.tar", "net.epoch=3", "net"]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_what_torch_save_wrote(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save(table(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(tmp_path / name), table())


@pytest.mark.parametrize("name", ["net.safetensors", "net.bin"])
def test_what_safetensors_wrote(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file(table(), tmp_path / name)
    assert same(read_checkpoint(str(tmp_path / name)), table())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"a": torch.randn(3, 4).to(dtype), "b": torch.tensor(3)}
    torch.save(weights, tmp_path / "net.pth")
    safetensors.torch.save_file(weights, tmp_path / "net.safetensors")
    for path in tmp_path.iterdir():
        assert same(read_checkpoint(path), weights)


class Reduced:
    """Pickled as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


BESIDE = {
    "plain": {"epoch": 3, "loss": 0.1, "name": "x", "best": None, "raw": b"ab", "big": 2**70},
    "Namespace": argparse.Namespace(lr=0.1, output=Path("/runs/1")),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "path": pathlib.PurePosixPath("/runs/1"),
    "path as a key": {Path("a"): 1},
    "path of Windows": Reduced(pathlib.WindowsPath, "c:\\", "runs"),
    "times": [datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(1)],
    "numbers": [decimal.Decimal("0.1"), 1j, uuid.UUID(int=5), 1e300],
    "numpy scalars": {"acc": np.float64(76.1), "best": np.bool_(True), "epoch": np.int64(3)},
    "numpy arrays": [np.arange(3.0), np.array(["a"]), np.array([1, None], object), np.dtype("f4")],
    "numpy generators": [np.random.get_state(), np.random.default_rng(0)],
    "torch": [torch.float32, torch.Size([1]), torch.device("cpu"), torch.__version__],
    "sets": [{1}, frozenset([2]), range(3), slice(1, 2), bytearray(b"x")],
    "collections": [
        collections.defaultdict(list, {1: [2]}),
        collections.deque([1, 2], 3),
        collections.Counter("ab"),
        collections.OrderedDict(a=1),
    ],
    "types": [int, str, dict],
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_harmless_objects_do_not_stand_in_the_way(
    tmp_path: Path, beside: object, zipped: bool
) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    weights = {"a": torch.randn(3)}
    path = tmp_path / "net.pth"
    torch.save({"x": beside, "model": weights}, path, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path)["model"], weights)
    assert set(torch.serialization.get_safe_globals()) == allowed


class Config(dict[str, Any]):
    """As packages for settings have them: a dict that has attributes too."""


class Node:
    """As OmegaConf's, whose state has types in it."""

    def __getstate__(self) -> dict[str, Any]:
        return {"_metadata": {"ref_type": Any, "object_type": dict}, "_content": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("lightning.fabric.utilities.data.AttributeDict", Config),
        ("pytorch_lightning.utilities.parsing.AttributeDict", Config),
        ("yacs.config.CfgNode", Config),
        ("easydict.EasyDict", Config),
        ("omegaconf.dictconfig.DictConfig", Node),
        ("omegaconf.nodes.AnyNode", Node),
    ],
)
def test_settings_of_packages_that_need_not_be_here(
    tmp_path: Path, module: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name = module.rpartition(".")[::2]
    settings = type(name, (kind,), {"__module__": path})
    with monkeypatch.context() as patch:
        parts = path.split(".")
        for count in range(len(parts)):
            package = ".".join(parts[: count + 1])
            patch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[path], name, settings)
        beside = settings(lr=0.1) if kind is Config else settings()
        beside.more = 3
        torch.save({"hparams": beside, "a": torch.ones(3)}, tmp_path / "net.pth")
    assert read_checkpoint(tmp_path / "net.pth")["a"].sum() == 3


def test_plain_data_comes_as_it_is(tmp_path: Path) -> None:
    torch.save(BESIDE["plain"], tmp_path / "net.pth")
    assert read_checkpoint(tmp_path / "net.pth") == BESIDE["plain"]


def test_weights_in_a_kind_of_dict(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3)}
    torch.save(collections.defaultdict(dict, {"model": weights}), tmp_path / "net.pth")
    assert same(read_checkpoint(tmp_path / "net.pth")["model"], weights)


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the pickle in a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def test_numpy_by_its_names_before_2(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"acc": np.float64(76.1), "a": torch.ones(3)}, path)
    rewritten(path, lambda pickled: pickled.replace(b"numpy._core", b"numpy.core"))
    assert read_checkpoint(path)["a"].sum() == 3


def test_several_threads_read_at_a_time(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(), "a": torch.ones(3)}, tmp_path / "net.pth")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read_checkpoint, [tmp_path / "net.pth"] * 64))
    assert all(f["a"].sum() == 3 for f in found)


class Settings:
    """A class of the user's."""

    def __init__(self) -> None:
        self.lr = 0.1


def test_a_class_that_the_user_allowed_is_made(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model": {"a": torch.ones(3)}, "settings": Settings(), "at": Path("x")}, path)
    with pytest.raises(BuildError, match=rf"more than tensors and plain data: {__name__}.Settings"):
        read_checkpoint(path)
    with torch.serialization.safe_globals([Settings]):
        assert read_checkpoint(path)["settings"].lr == 0.1
        assert Settings in torch.serialization.get_safe_globals()


def bad(trace: Path) -> Reduced:
    """Leaves a folder behind if it is ever unpickled by the letter."""
    return Reduced(os.mkdir, str(trace))


@pytest.mark.parametrize("protocol", [2, 3, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_malicious_pickle(tmp_path: Path, protocol: int, zipped: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "net.pth"
    weights = {"conv1.weight": torch.zeros(1), "extra": bad(trace), "args": argparse.Namespace()}
    torch.save(weights, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    said = "posix.mkdir" if protocol < 5 else "pickle's protocol 5"
    with pytest.raises(BuildError, match=f"net.pth cannot be read as weights: .*{said}"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "function", [eval, getattr, open, print, Path.unlink, np.load, np.random.seed, models.settle]
)
def test_functions_are_no_data(tmp_path: Path, function: Callable[..., Any]) -> None:
    torch.save({"a": torch.zeros(1), "x": Reduced(function, "x")}, tmp_path / "net.pth")
    with pytest.raises(BuildError, match="more than tensors and plain data"):
        read_checkpoint(tmp_path / "net.pth")


def test_a_pickle_that_hides_what_it_calls(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"a": torch.ones(1)}, path)
    mkdir = str(tmp_path / "trace").encode()
    for pickled in (
        b"\x80\x02\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(mkdir)]) + mkdir + b"\x85R.",
        b"\x80\x02(ios\nmkdir\n.",
        b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R.",
    ):
        rewritten(path, lambda _, pickled=pickled: pickled)
        with pytest.raises(BuildError, match="asks for more than weights need, which is never run"):
            read_checkpoint(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_model_and_an_optimizer(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for content, named in (
        (model, "torch.nn.modules.linear.Linear"),
        ({"model": model, "epoch": 3}, "torch.nn.modules.linear.Linear"),
        (models.cifar_resnet(8), "fastres.models.resnet.ResNet"),
        ({"model": table(), "optimizer": torch.optim.SGD(model.parameters())}, "torch.optim.sgd"),
    ):
        torch.save(content, tmp_path / "net.pth")
        with pytest.raises(BuildError, match=rf"{named}.*torch.save\(model.state_dict\(\)\)"):
            read_checkpoint(tmp_path / "net.pth")


def _script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), path)


def _export(path: Path) -> None:
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), path)


def _engine(path: Path) -> None:
    whole = path.with_suffix(".fastres")
    with fastres.compile(nn.ReLU().eval(), torch.ones(1, 3), backend="reference") as engine:
        engine.save(whole)
    whole.rename(path)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(table()))


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_script, r"is a TorchScript archive \(torch.jit.save\).*torch.save\(model.state_dict\(\)"),
        (_export, r"is a program of torch.export: give torch.export.load\(path\) to fastres"),
        (_engine, r"is a saved engine: fastres.load\(path\) opens it"),
        (_pickle, "is a bare pickle, which torch.save did not write"),
        (_tar, "is a tar archive: unpack it"),
        (_zip, "is a zip file, but none of torch.save"),
    ],
)
@pytest.mark.parametrize("name", ["net.pt", "net.pth.tar"])
def test_other_kinds_are_told(
    tmp_path: Path, write: Callable[[Path], None], said: str, name: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(BuildError, match=f"{name} cannot be read as weights: it {said}") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("net.pth", b"", "is empty"),
        ("net.onnx", b"x", "is an ONNX file"),
        ("net.pt", b"\x08\x08\x12\x07pytorch", "is an ONNX file"),
        ("net.h5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        ("net.npy", b"\x93NUMPY\x01", "is an array of NumPy"),
        ("net.pth", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("net.pth", b"\n<!DOCTYPE html>", "is a web page"),
        ("net.pth.gz", b"\x1f\x8b\x08", "is compressed by gzip"),
        ("net.pth", b"no weights at all", "is no file of torch.save or safetensors"),
        ("net.pth", b"\x08", "is no file of torch.save or safetensors"),
        ("net.pth", b"PK\x03\x04 half a zip", "is damaged"),
        ("net.pth", b"\x80", "is damaged"),
        ("net.safetensors", b"\0" * 8 + b"{", "is damaged"),
        ("net.safetensors", b"\xff" * 64, "is no file of torch.save or safetensors"),
    ],
)
def test_other_content(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BuildError, match=f"{name} cannot be read as weights: it {said}"):
        read_checkpoint(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(BuildError, match="there is no file"):
            read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_half_a_file(tmp_path: Path, zipped: bool) -> None:
    torch.save(table(), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    safetensors.torch.save_file(table(), tmp_path / "net.safetensors")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(BuildError, match="cannot be read as weights: it is damaged"):
            read_checkpoint(path)
