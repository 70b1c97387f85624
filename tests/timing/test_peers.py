"""Peers: they compute what the network computes, in the precision asked for, or say why not."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.errors import BackendUnavailable, InputError, UnsupportedError
from fastres.options import Precision
from fastres.timing.checks import OWN_SCALES, Verdict, check_target, judge, reference
from fastres.timing.peers import PEERS, make_peer
from fastres.timing.peers_torch import torch_threads

QUICK = [
    name
    for name, peer in PEERS.items()
    if "fp32" in peer.precisions and peer.only_on != "cuda" and not name.startswith("torch_compile")
]


@pytest.fixture(scope="module")
def x(photo_batch: Callable[[int, int], Tensor]) -> Tensor:
    return photo_batch(4, 32)


@pytest.fixture(scope="module")
def model(x: Tensor) -> nn.Module:
    return models.settle(models.cifar_resnet(8, seed=0), x)


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def checked(name: str, model: nn.Module, x: Tensor, precision: Precision) -> Verdict:
    """The peer's error at its first batch size, after others have been through it."""
    target = make_peer(name, model, x, precision=precision)
    assert (target.name, target.precision) == (name, precision)
    found = []
    for batch in (x[:1], x.contiguous(memory_format=torch.channels_last), x):
        want = reference(model, batch, precision)
        result = target.call(batch)
        assert result.dtype == torch.float32 and not result.requires_grad
        found.append(check_target(target, want, batch, precision))
    return found[-1]


class TestPeers:
    @pytest.mark.parametrize("name", QUICK)
    def test_fp32(self, name: str, model: nn.Module, x: Tensor) -> None:
        assert checked(name, model, x, "fp32").largest < 1e-4

    @pytest.mark.parametrize("name", [n for n in QUICK if "bf16" in PEERS[n].precisions])
    def test_bf16_is_really_bf16(self, name: str, model: nn.Module, x: Tensor) -> None:
        if name == "openvino" and not has_bf16():
            with pytest.raises(UnsupportedError, match="no bf16 instructions"):
                make_peer(name, model, x, precision="bf16")
        else:
            assert checked(name, model, x, "bf16").rms > 1e-4  # float32: below 1e-5

    @pytest.mark.parametrize("name", ["nncf", "onnxruntime"])
    def test_int8_is_really_int8(self, name: str, model: nn.Module, x: Tensor) -> None:
        pytest.importorskip(name)
        table = fastres.quantize(model, x, algorithm="mse", backend="cpu")
        ours = fastres.compile(model, x, backend="cpu", calibration=table)
        want = reference(model, x, "int8", ours.graph)
        target = make_peer(name, model, x, precision="int8", images=x)
        found = judge(target.call(x), want, name, "int8", len(x), OWN_SCALES)
        assert not found.wrong and 1e-3 < found.rms

    def test_int8_needs_images(self, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(InputError, match="needs images to calibrate with"):
            make_peer("onnxruntime", model, x, precision="int8")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of 2.11, at itself
    def test_torch_compile(self, model: nn.Module, x: Tensor) -> None:
        assert checked("torch_compile", model, x, "fp32").largest < 1e-4
        assert checked("torch_compile", model, x, "bf16").rms > 1e-4

    @pytest.mark.parametrize("name", QUICK)
    def test_leaves_model_and_threads_alone(self, name: str, model: nn.Module, x: Tensor) -> None:
        threads, before = torch.get_num_threads(), model(x)
        make_peer(name, model, x, threads=threads + 1).call(x)
        assert torch.get_num_threads() == threads
        assert model.conv1.weight.is_contiguous() and model.conv1.weight.dtype == torch.float32
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("name", ["eager", "eager_channels_last"])
    def test_torch_peers_run_with_the_threads_asked_for(self, name: str, x: Tensor) -> None:
        seen: list[tuple[int, bool]] = []

        class Spy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
                return x

        threads = torch.get_num_threads() + 1
        make_peer(name, Spy().eval(), x, threads=threads).call(x)
        assert seen[-1] == (threads, False)


class TestRefusals:
    def test_unknown_peer(self, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(InputError, match="no peer 'tvm'; there are eager,"):
            make_peer("tvm", model, x)

    def test_onnxruntime_has_no_bf16(self, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(UnsupportedError, match="onnxruntime runs fp32, int8 here, not bf16"):
            make_peer("onnxruntime", model, x, precision="bf16")

    @pytest.mark.parametrize("package", ["openvino", "onnxruntime"])
    def test_missing_package(
        self, package: str, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = importlib.import_module

        def without(name: str) -> object:
            if name == package:
                raise ImportError(f"No module named {name!r}")
            return real(name)

        monkeypatch.setattr("fastres.timing.peers_exported.importlib.import_module", without)
        monkeypatch.setattr("fastres.timing.peers_exported.openvino", lambda: without("openvino"))
        with pytest.raises(BackendUnavailable, match=f"pip install {package}"):
            make_peer(package, model, x)

    def test_missing_compiler(
        self, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(BackendUnavailable, match="there is no no-such-compiler; install g"):
            make_peer("torch_compile", model, x)

    @pytest.mark.parametrize("name", ["torch_tensorrt", "tensorrt"])
    def test_on_a_gpu_only(self, name: str, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(UnsupportedError, match=f"{name} is compared on cuda only"):
            make_peer(name, model, x)

    def test_cuda_graphs_on_the_cpu(self, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(UnsupportedError, match="reduce-overhead means CUDA graphs"):
            make_peer("torch_compile_reduce_overhead", model, x)

    def test_threads_are_restored_after_an_error(self) -> None:
        before = torch.get_num_threads()
        with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == before

    def test_training_mode(self, x: Tensor) -> None:
        with pytest.raises(InputError, match="training mode"):
            make_peer("eager", models.cifar_resnet(8), x)

    def test_half_precision_input(self, model: nn.Module, x: Tensor) -> None:
        with pytest.raises(InputError, match="peers are fed torch.float32"):
            make_peer("eager", model, x.half())

    def test_several_outputs(self, x: Tensor) -> None:
        class Pair(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, x

        with pytest.raises(InputError, match="returns tuple; peers need one tensor"):
            make_peer("eager", Pair().eval(), x)

    def test_no_onnx_form(self, x: Tensor) -> None:
        class Sine(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.sin()

        with pytest.raises(UnsupportedError, match="no ONNX form of .*sin"):
            make_peer("onnxruntime", Sine().eval(), x)
