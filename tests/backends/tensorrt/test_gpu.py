"""What only a GPU with TensorRT can show: real engines, built, run, saved and loaded here."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.tensorrt.backend import TensorRtBackend

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def usable() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    if (why_not := TensorRtBackend().unavailable()) is not None:
        pytest.skip(why_not)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "int8"])
def test_numbers_layer_by_layer(net: nn.Module, images: Tensor, precision: Any) -> None:
    more = {"calibration": [images]} if precision == "int8" else {}
    with fastres.compile(net, images, backend="tensorrt", precision=precision, **more) as engine:
        report = fastres.verify(net, engine, [images, images[:1]], layerwise=True)
        assert report.passed, report


def test_int8_products_run_in_int8(net: nn.Module, images: Tensor) -> None:
    """As the engine inspector has it; what else became of them is in the notes."""
    with fastres.compile(net, images, backend="tensorrt", calibration=[images]) as engine:
        assert engine.info.not_quantised == ()
        assert "int8" in engine.info.precisions


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_batches_threads_and_streams(net: nn.Module, images: Tensor, cuda_graph: bool) -> None:
    x = images.cuda()
    with fastres.compile(net, images, backend="tensorrt", cuda_graph=cuda_graph) as engine:
        wanted = {n: engine(x[:n]).clone() for n in (1, 3, 4)}
        large = engine(x.repeat(16, 1, 1, 1))  # more than the first engine takes
        torch.testing.assert_close(large[:4], wanted[4], rtol=1e-3, atol=1e-3)
        wrong: list[int] = []

        def call(n: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    if not torch.equal(engine(x[:n]), wanted[n]):
                        wrong.append(n)
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=call, args=(n,)) for n in wanted for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_saved_and_loaded(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with fastres.compile(net, images, backend="tensorrt", precision="fp16") as engine:
        engine.save(tmp_path / "e")
        wanted = engine(images.cuda()).clone()
    with fastres.load(tmp_path / "e", trust_engine=True) as engine:
        assert torch.equal(engine(images.cuda()), wanted)
        assert not any("built anew" in note for note in engine.info.account.notes)
    with fastres.load(tmp_path / "e") as engine:
        assert any("built anew" in note for note in engine.info.account.notes)


def test_times_stand_under_our_nodes(net: nn.Module, images: Tensor) -> None:
    with fastres.compile(net, images, backend="tensorrt", precision="fp16") as engine:
        names = {node.name for node in engine.graph.nodes}
        timed = {row["name"] for row in engine.profile(images.cuda()).to_dict()["rows"]}
        assert len(names & timed) > len(names) / 2


def test_without_pytorch_it_computes_the_same(
    net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("pycuda.driver")
    with fastres.compile(net, images, backend="tensorrt", precision="fp16") as engine:
        engine.save(tmp_path / "e")
        wanted = engine(images.cuda()).cpu().numpy()
    found = fastres.deploy.load(tmp_path / "e", trust_engine=True)(images.numpy())
    assert (found == wanted).all()
