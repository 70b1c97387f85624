"""fastres.weights: tables of tensors come back as they were, and nothing else is ever run."""

from __future__ import annotations

import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastres import models
from fastres.errors import BuildError
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.weights import is_finite, oddity, read_weights


def table() -> dict[str, Tensor]:
    return dict(models.cifar_resnet(8, seed=0).state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
    @pytest.mark.parametrize(
        "nest",
        [
            lambda t: t,
            lambda t: OrderedDict(t),
            lambda t: {"state_dict": t, "epoch": 90, "best": 76.1},
            lambda t: {"model": t, "optimizer": {"lr": 0.1}},
            lambda t: {"state_dict": {"model": t}},
            lambda t: {k: nn.Parameter(v, v.is_floating_point()) for k, v in t.items()},
        ],
        ids=["plain", "ordered", "state_dict", "model", "both", "parameters"],
    )
    def test_of_torch_save(self, tmp_path: Path, suffix: str, nest: Callable[[Any], Any]) -> None:
        path = tmp_path / f"net{suffix}"
        torch.save(nest(table()), path)
        assert same(read_weights(path), table())

    def test_of_safetensors(self, tmp_path: Path) -> None:
        path = tmp_path / "net.safetensors"
        safetensors.torch.save_file(table(), path)
        assert same(read_weights(str(path)), table())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_every_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        weights = {"a": torch.randn(3, 4).to(dtype), "b": torch.tensor(3)}
        torch.save(weights, tmp_path / "net.pth")
        safetensors.torch.save_file(weights, tmp_path / "net.safetensors")
        for path in tmp_path.iterdir():
            assert same(read_weights(path), weights)

    def test_into_a_graph(self, tmp_path: Path) -> None:
        torch.save({"state_dict": table()}, tmp_path / "net.pth")
        safetensors.torch.save_file(table(), tmp_path / "net.safetensors")
        want = build_graph(table(), ResNetSpec())
        for path in tmp_path.iterdir():
            assert build_graph(read_weights(path), ResNetSpec()).equals(want)


class Malicious:
    """Leaves a file behind if it is ever unpickled by the letter."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


class TestRefusals:
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_a_malicious_pickle(self, tmp_path: Path, protocol: int) -> None:
        trace = tmp_path / "trace"
        path = tmp_path / "net.pth"
        weights = {"conv1.weight": torch.zeros(1), "extra": Malicious(trace)}
        torch.save(weights, path, pickle_protocol=protocol)
        with pytest.raises(BuildError, match=r"net.pth cannot be read as weights: .*"):
            read_weights(path)
        assert not trace.exists()

    def test_a_bare_malicious_pickle(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        path = tmp_path / "net.pt"
        path.write_bytes(pickle.dumps(Malicious(trace)))
        with pytest.raises(BuildError, match="cannot be read as weights"):
            read_weights(path)
        assert not trace.exists()

    def test_a_whole_model(self, tmp_path: Path) -> None:
        path = tmp_path / "net.pth"
        torch.save(nn.Linear(2, 2), path)
        with pytest.raises(BuildError, match=r"made anew with torch.save\(model.state_dict\(\)\)"):
            read_weights(path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("net.onnx", b"x", "net.onnx is neither .safetensors nor .pth, .pt, .bin"),
            ("net", b"x", "is neither .safetensors nor"),
            ("net.pth", b"", "cannot be read as weights"),
            ("net.pth", b"no weights at all", "cannot be read as weights"),
            ("net.pth", b"PK\x03\x04 half a zip", "cannot be read as weights"),
            ("net.safetensors", b"", "cannot be read as weights"),
            ("net.safetensors", b"\xff" * 64, "cannot be read as weights"),
        ],
        ids=["suffix", "no suffix", "empty", "text", "half a zip", "empty st", "damaged st"],
    )
    def test_other_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BuildError, match=message):
            read_weights(path)

    def test_no_file(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.pth", tmp_path):
            with pytest.raises(BuildError, match="there is no file"):
                read_weights(path)

    def test_half_a_file(self, tmp_path: Path) -> None:
        for suffix, save in ((".pth", torch.save), (".safetensors", safetensors.torch.save_file)):
            path = tmp_path / f"net{suffix}"
            save(table(), path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            with pytest.raises(BuildError, match="cannot be read as weights"):
                read_weights(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.zeros(3), "holds Tensor, not a table of tensors"),
            ([torch.zeros(3)], "holds list, not a table"),
            ({}, "holds nothing, not a table"),
            ({"state_dict": {}}, "holds nothing, not a table"),
            ({"a": torch.zeros(3), "epoch": 3}, "entries that are no named tensors: epoch"),
            ({0: torch.zeros(3)}, "entries that are no named tensors: 0"),
            ({"net": {"a": torch.zeros(3)}}, "entries that are no named tensors: net"),
        ],
        ids=["tensor", "list", "empty", "nested empty", "a number", "numbered", "other nesting"],
    )
    def test_other_content(self, tmp_path: Path, content: Any, message: str) -> None:
        torch.save(content, tmp_path / "net.pth")
        with pytest.raises(BuildError, match=message):
            read_weights(tmp_path / "net.pth")


class TestIsFinite:
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    @given(
        size=st.integers(1, 300),
        place=st.floats(0, 1, exclude_max=True),
        value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    )
    def test_finds_one_value_anywhere(
        self, dtype: torch.dtype, size: int, place: float, value: float
    ) -> None:
        tensor = torch.linspace(-3, 3, size).to(dtype)
        assert is_finite(tensor)
        tensor[int(place * size)] = value
        assert not is_finite(tensor)

    def test_other_layouts(self) -> None:
        assert is_finite(torch.zeros(0, 3))
        assert is_finite(torch.zeros(()).expand(3, 4))
        spoilt = torch.zeros(4, 6)
        spoilt[1, 2] = float("nan")
        assert not is_finite(spoilt.t()) and not is_finite(spoilt[:, 2])
        assert is_finite(spoilt[:, 3:]) and is_finite(spoilt[2:])
        assert not is_finite(nn.Parameter(spoilt))


def test_oddities() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that the last two are no lasting features
        odd = {
            "list": [1.0],
            "a tensor of torch.sparse_coo": torch.zeros(2, 3).to_sparse(),
            "a tensor of torch.complex64": torch.zeros(3, dtype=torch.complex64),
            "a tensor of torch.int16": torch.zeros(3, dtype=torch.int16),
            "a tensor of torch.quint8": torch._empty_affine_quantized(
                (2,), scale=1.0, zero_point=0, dtype=torch.quint8
            ),
            "a nested tensor": torch.nested.as_nested_tensor([torch.zeros(3)]),
        }
    assert [oddity(value) for value in odd.values()] == list(odd)
    assert not oddity(torch.zeros(2, 3).t()) and not oddity(nn.Parameter(torch.zeros(2).bfloat16()))


def test_names_as_data_parallel_saves_them(tmp_path: Path) -> None:
    weights = {"conv1.weight": torch.ones(2), "fc.bias": torch.zeros(3)}
    torch.save({f"module.{name}": t for name, t in weights.items()}, tmp_path / "net.pth")
    assert list(read_weights(tmp_path / "net.pth")) == list(weights)
    mixed = {"module.conv1.weight": torch.ones(2), "fc.bias": torch.zeros(3)}
    torch.save(mixed, tmp_path / "mixed.pth")
    assert list(read_weights(tmp_path / "mixed.pth")) == list(mixed)
