"""Peers: they compute what the network computes, in the precision asked for, or say why not."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastres import models
from fastres.benchmarking import Target
from fastres.errors import BackendUnavailable, InputError, ParityError, UnsupportedError
from fastres.options import Precision
from fastres.peers import PEERS, check_target, contenders, make_peer, reference, torch_threads
from fastres.tolerances import Errors

QUICK = [name for name in PEERS if name != "torch_compile"]


@pytest.fixture(scope="module")
def x(photo_batch: Callable[[int, int], Tensor]) -> Tensor:
    return photo_batch(4, 32)


@pytest.fixture(scope="module")
def model(x: Tensor) -> nn.Module:
    return models.settle(models.cifar_resnet(8, seed=0), x)


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def checked(name: str, model: nn.Module, x: Tensor, precision: Precision) -> Errors:
    """The peer's error at its first batch size, after others have been through it."""
    target = make_peer(name, model, x, precision=precision)
    assert (target.name, target.precision) == (name, precision)
    found = []
    for batch in (x[:1], x.contiguous(memory_format=torch.channels_last), x):
        want = reference(model, batch, precision)
        result = target.call(batch)
        assert result.dtype == torch.float32 and not result.requires_grad
        found.append(check_target(target, want.oracle, batch, precision, baseline=want.baseline))
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

    @pytest.mark.slow
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
        with pytest.raises(UnsupportedError, match="onnxruntime runs fp32 here, not bf16"):
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

        monkeypatch.setattr("fastres.peers.importlib.import_module", without)
        monkeypatch.setattr("fastres.peers.openvino", lambda: without("openvino"))
        with pytest.raises(BackendUnavailable, match=f"pip install {package}"):
            make_peer(package, model, x)

    def test_missing_compiler(
        self, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(BackendUnavailable, match="there is no no-such-compiler; install g"):
            make_peer("torch_compile", model, x)

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


class TestCheckTarget:
    def test_returns_the_error(self, model: nn.Module, x: Tensor) -> None:
        want = reference(model, x, "fp32")
        found = check_target(Target("eager", model), want.oracle, x, "fp32", baseline=want.baseline)
        assert found == want.baseline

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda y: y * 1.001, "largest error .* allowed are"),
            (lambda y: y[:, :-1], r"shape \[4, 9\], expected \[4, 10\]"),
            (lambda y: y / 0, "NaN or infinite"),
            (lambda y: {"logits": y}, "returns dict"),
        ],
    )
    def test_red_parity(
        self, change: Callable[[Tensor], object], message: str, model: nn.Module, x: Tensor
    ) -> None:
        want = reference(model, x, "fp32")
        target = Target("wrong", lambda batch: change(model(batch)))
        with torch.no_grad(), pytest.raises(ParityError, match=f"wrong.*{message}"):
            check_target(target, want.oracle, x, "fp32", baseline=want.baseline)

    def test_the_floor_alone_without_a_baseline(self) -> None:
        x = torch.ones(2, 3)
        check_target(Target("near", lambda x: x + 5e-7), x.double(), x, "fp32")
        with pytest.raises(ParityError):
            check_target(Target("far", lambda x: x + 5e-3), x.double(), x, "fp32")


class TestContenders:
    def test_keeps_the_sound_and_names_the_rest(self, model: nn.Module, x: Tensor) -> None:
        ours = [Target("ours", model), Target("bad at 4", lambda b: model(b) * (1 + len(b) // 4))]
        names = ["eager", "onnxruntime", "nonesuch"]
        with torch.no_grad():
            found, refused = contenders(names, model, {1: x[:1], 4: x}, ours=ours)
        assert [target.name for target in found] == ["ours", "eager", "onnxruntime"]
        assert refused.keys() == {"nonesuch", "bad at 4"}
        assert "at batch size 4" in refused["bad at 4"]

    def test_threads_are_restored_after_an_error(self) -> None:
        before = torch.get_num_threads()
        with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == before
