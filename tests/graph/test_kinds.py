"""fastres.graph.kinds: wrappers are taken off; what is no model that can be read says what is."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers its operators

import fastres
from fastres.errors import CaptureError, FastresError, InputError
from fastres.graph.kinds import accepted

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(2, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()


class Around(nn.Module):
    """A network with something inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 3, 1), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.stem(x))


def in_place() -> nn.Module:
    model = net()
    model.compile(backend="eager")
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "torch.compile": lambda: torch.compile(net(), backend="eager"),
    "Module.compile": in_place,
    "a compiled part": lambda: Around(torch.compile(net(), backend="eager")).eval(),
    "DataParallel": lambda: nn.DataParallel(net()).eval(),
    "one in another": lambda: torch.compile(nn.DataParallel(net()).eval(), backend="eager"),
    "an average": lambda: torch.optim.swa_utils.AveragedModel(net()).eval(),
    "symbolically traced": lambda: torch.fx.symbolic_trace(net()).eval(),
    "stubs that do nothing": lambda: Around(
        nn.Sequential(quantization.QuantStub(), net(), quantization.DeQuantStub())
    ).eval(),
    "arithmetic to be quantised": lambda: torchvision.models.quantization.resnet18(
        quantize=False, num_classes=5
    ).eval(),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off(name: str) -> None:
    model = WRAPPED[name]()
    x = torch.randn(2, 3, 64, 64) if name == "arithmetic to be quantised" else X
    with fastres.compile(model, x, backend="reference") as engine, torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-4)


def test_verify_takes_wrappers_off() -> None:
    model = torch.compile(net(), backend="inductor")  # which would compile it once more
    with fastres.compile(model, X, backend="reference") as engine:
        report = fastres.verify(nn.DataParallel(model).eval(), engine, [X], layerwise=True)
        assert report.passed and report.reference == "Sequential"


def test_verify_refuses_what_was_frozen() -> None:
    model = net()
    with fastres.compile(model, X, backend="reference") as engine:
        assert fastres.verify(torch.jit.trace(model, X), engine, [X]).passed
        with pytest.raises(InputError, match="frozen by TorchScript and cannot run in float64"):
            fastres.verify(torch.jit.freeze(script(model)), engine, [X])


class Quantisable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.body(self.quant(x)))


def prepared(*, training: bool = False, fused: bool = False) -> nn.Module:
    model = Quantisable().train(training)
    model.qconfig = quantization.default_qat_qconfig if training else quantization.default_qconfig
    if fused:
        fuse = quantization.fuse_modules_qat if training else quantization.fuse_modules
        model = fuse(model, [["body.0", "body.1"]])
    model = (quantization.prepare_qat if training else quantization.prepare)(model)
    model(X)
    return model.eval()


def graph_mode(convert: bool) -> nn.Module:
    mapping = quantization.get_default_qconfig_mapping()
    model = quantize_fx.prepare_fx(net(), mapping, (X,))
    model(X)
    return quantize_fx.convert_fx(model) if convert else model


class Decomposed(nn.Module):
    """As the quantiser for exported programs leaves a network."""

    def forward(self, x: Tensor) -> Tensor:
        settings = (0.1, 0, -128, 127, torch.int8)
        q = torch.ops.quantized_decomposed.quantize_per_tensor(x, *settings)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(q, *settings)


def script(model: nn.Module) -> Any:
    return torch.jit.script(model)


def archive(model: nn.Module, folder: Path) -> Any:
    script(model).save(folder / "archive.pt")
    return torch.jit.load(folder / "archive.pt")


def program(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))


class Sharded(Tensor):
    """As torch.distributed's and torchao's tensors: with operations of their own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def odd_weight() -> nn.Module:
    model = Around(net()).eval()
    weight = torch.zeros(5, 144).as_subclass(Sharded)
    model.inner[4]._parameters["weight"] = weight  # nn.Parameter would call it
    return model


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


SCRIPT = r"is TorchScript \(of a Sequential\).* Give the nn.Module that was scripted or traced"
QUANTISED = r"is quantised \(torch.ao.*fastres.quantize\(model, images\)"
PREPARED = r"is prepared for quantisation \(torch.ao.*fastres.quantize\(model, images\)"
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "scripted": (lambda _: script(net()), f"the model {SCRIPT}"),
    "traced": (lambda _: torch.jit.trace(net(), X), f"the model {SCRIPT}"),
    "frozen": (lambda _: torch.jit.freeze(script(net())), f"the model {SCRIPT}"),
    "optimised": (lambda _: torch.jit.optimize_for_inference(script(net())), SCRIPT),
    "an archive": (lambda folder: archive(net(), folder), f"the model {SCRIPT}"),
    "scripted in part": (lambda _: Around(script(net())), f"the model's part 'inner' {SCRIPT}"),
    "traced in part": (lambda _: Around(torch.jit.trace(net(), X)), f"part 'inner' {SCRIPT}"),
    "frozen in part": (lambda _: Around(torch.jit.freeze(script(net()))), f"'inner' {SCRIPT}"),
    "observed": (lambda _: prepared(), f"part 'quant.activation_post_process' {PREPARED}"),
    "quantisation-aware": (lambda _: prepared(training=True), PREPARED),
    "quantisation-aware, fused": (lambda _: prepared(training=True, fused=True), PREPARED),
    "quantised": (lambda _: quantization.convert(prepared()), f"part 'quant' {QUANTISED}"),
    "quantised and fused": (lambda _: quantization.convert(prepared(fused=True)), QUANTISED),
    "quantised in training": (lambda _: quantization.convert(prepared(training=True)), QUANTISED),
    "quantised on the fly": (
        lambda _: quantization.quantize_dynamic(net(), {nn.Linear}),
        f"part '4' {QUANTISED}",
    ),
    "observed graph": (lambda _: graph_mode(convert=False), PREPARED),
    "quantised graph": (lambda _: graph_mode(convert=True), QUANTISED),
    "a quantised program": (lambda _: program(Decomposed().eval()), "program is quantised"),
    "a program's module": (lambda _: program(net()).module(), "Give the ExportedProgram itself"),
    "a program's module in part": (
        lambda _: Around(program(net()).module()),
        "part 'inner' is the module of an exported program",
    ),
    "lazy": (lambda _: Lazy().eval(), r"weight head.weight has no shape yet.*model\(x\) once"),
    "without values": (lambda _: on_meta(), "weight 0.weight is on the meta device.*assign=True"),
    "sharded": (lambda _: odd_weight(), "weight inner.4.weight is a .*Sharded, which computes by"),
    "no forward": (lambda _: nn.ModuleList([net()]).eval(), "ModuleList, which has no forward"),
    "nothing in it": (lambda _: nn.Module().eval(), "Module, which has no forward of its own"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_models_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    make, message = UNREADABLE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that its own quantisation is deprecated
        model = make(tmp_path)
    with pytest.raises(CaptureError, match=message) as caught:
        fastres.compile(model, None if name == "a quantised program" else X, backend="reference")
    assert "\n" not in str(caught.value)


def double(x: Tensor) -> Tensor:
    return x * 2


def factory() -> nn.Module:
    return net()


NO_MODELS: dict[str, tuple[object, str]] = {
    "a checkpoint": ("model.pt", "your model, or have fastres.build('model.pt', version=...)"),
    "an archive of weights": (Path("a/b.PTH.tar"), "the text 'a/b.PTH.tar': load the weights"),
    "a program": ("m.pt2", "load it, torch.export.load('m.pt2'), and give the program"),
    "safetensors": ("m.safetensors", "fastres.build('m.safetensors', version=...)"),
    "a saved engine": (Path("net.fastres"), "it is read by fastres.load('net.fastres')"),
    "an ONNX file": ("net.onnx", "ONNX is not read; give the PyTorch model"),
    "a name": ("resnet50.a1_in1k", "make the model first"),
    "a name on a hub": ("microsoft/resnet-50", "from_pretrained of transformers"),
    "a class": (torchvision.models.ResNet, "the class ResNet: give an instance, ResNet(...).eval"),
    "another class": (dict, "the class dict: give an instance, an nn.Module"),
    "a factory": (factory, "the function factory: if it makes a model, give what it returns"),
    "a lambda": (lambda x: x, "the function <lambda>: "),
    "a compiled function": (
        torch.compile(lambda x: x * 2, backend="eager"),
        "the function <lambda>: ",
    ),
    "a method": (net().forward, "a method of a Sequential: give the module itself"),
    "a partial": (functools.partial(factory), "partial; expected an nn.Module"),
    "a state_dict": (net().state_dict(), "Load them into your model, or give fastres.build("),
    "a larger checkpoint": ({"model": {}, "epoch": 3}, "a table, as a state_dict is"),
    "an ONNX model": (onnx.ModelProto(), "models of other libraries are not read"),
    "nothing": (None, "NoneType; expected an nn.Module, an ExportedProgram, or a Graph"),
    "a list": ([net()], "list; expected an nn.Module"),
    "a tensor": (X, "Tensor; expected an nn.Module"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model(name: str) -> None:
    given, message = NO_MODELS[name]
    with pytest.raises(InputError) as caught:
        fastres.compile(given, X)  # type: ignore[arg-type]
    said = str(caught.value)
    assert said.startswith("the model is ") and message in said and "\n" not in said


def test_a_scripted_function() -> None:
    with pytest.raises(InputError, match="a function of TorchScript: give an nn.Module whose"):
        fastres.compile(torch.jit.script(double), X)  # type: ignore[arg-type]


def test_an_engine_is_compiled_already() -> None:
    with fastres.compile(net(), X, backend="reference") as engine:
        with pytest.raises(InputError, match="an engine already: it is called as it is"):
            fastres.compile(engine, X)  # type: ignore[arg-type]


def test_models_are_left_as_they_were() -> None:
    model = nn.DataParallel(net()).eval()
    before = copy.deepcopy(model.state_dict())
    assert accepted(model) is model.module
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["quantised", "frozen", "scripted"])
def test_other_ways_in_refuse_the_same(name: str, tmp_path: Path) -> None:
    make, message = UNREADABLE[name]
    model: Any = make(tmp_path)
    with pytest.raises(FastresError, match=message):
        fastres.quantize(model, X)
