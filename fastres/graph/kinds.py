"""What a model may be: wrappers are taken off, and kinds that are not taken get one line each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from fastres.errors import CaptureError, InputError
from fastres.graph.ir import Graph

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_FLOATS = ("FloatFunctional", "FXFloatFunctional")  # in torch.ao's place, and plain arithmetic
_QUANTISED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized",
)
_PREPARED = (
    "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.quantization.observer",
    "torch.ao.quantization.fake_quantize",
    "torchao.quantization.pt2e.observer",
    "torchao.quantization.pt2e.fake_quantize",
)
_QUANTISED_CALLS = ("quantized", "quantized_decomposed", "torchao")  # namespaces of operators
_TO_QUANTISE = (
    "Give the float model that it was made from, and have fastres quantise it: "
    "calibration=fastres.quantize(model, images)"
)
_FILES = {  # what to do with a path
    ".pt2": "load it, torch.export.load({0!r}), and give the program",
    ".fastres": "it is read by fastres.load({0!r})",
    ".onnx": "ONNX is not read; give the PyTorch model that it was exported from",
    ".safetensors": "fastres.build({0!r}, version=...) makes a residual network of weights alone",
}
_CHECKPOINT = (
    "load the weights into your model, or have fastres.build({0!r}, version=...) make a residual "
    "network of them; an archive of TorchScript cannot be compiled"
)
_FILES |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".tar"), _CHECKPOINT)
_NAME = (
    "make the model first, such as by torchvision.models.get_model, timm.create_model or "
    "from_pretrained of transformers; a saved engine is read by fastres.load"
)
_ELSEWHERE = ("onnx", "onnxruntime", "openvino", "tensorflow", "keras", "jax", "flax", "tensorrt")

Model = nn.Module | ExportedProgram | Graph


def unwrapped(model: object) -> object:
    """The module inside DataParallel, DistributedDataParallel or torch.compile's wrapper."""
    while isinstance(model, nn.Module):
        wrapped = isinstance(model, _PARALLEL)
        # torch.compile's wrapper has no public type
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
        if inner is None:
            break
        model = inner
    return model


def accepted(model: object) -> Model:
    """The model itself, if it is of a kind that can be captured.

    Raises:
        InputError: it is no model at all; says what to give instead.
        CaptureError: it is one that cannot be read, or holds one; names the part.
    """
    model = unwrapped(model)
    if isinstance(model, ExportedProgram):
        _check_program(model)
    if isinstance(model, Graph | ExportedProgram):
        return model
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is {_no_module(model)}")
    for path, part in model.named_modules():
        if reason := _unreadable(part):
            where = f"the model's part {path!r}" if path else "the model"
            raise CaptureError(f"{where} is {reason}")
    if type(model).forward is nn.Module.forward:
        raise CaptureError(
            f"the model is a {type(model).__name__}, which has no forward of its own. Give a "
            "module that can be called, such as nn.Sequential"
        )
    _check_weights(model)
    return model


def _unreadable(part: nn.Module) -> str:
    """What a module is that cannot be captured; empty if it can."""
    kind = type(part)
    where, shown = kind.__module__, f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(part, torch.jit.ScriptModule):
        was = getattr(part, "original_name", kind.__name__)
        return (
            f"TorchScript (of a {was}), which no longer holds the Python that it was made from. "
            "Give the nn.Module that was scripted or traced"
        )
    if where.startswith(_QUANTISED) and kind.__name__ not in _FLOATS:
        return f"quantised ({shown}). {_TO_QUANTISE}"
    if where.startswith(_PREPARED):
        return f"prepared for quantisation ({shown}). {_TO_QUANTISE}"
    if isinstance(part, torch.fx.GraphModule):
        if _calls_quantised(part.graph):
            return f"quantised (it calls PyTorch's operators for that). {_TO_QUANTISE}"
        if "eval" in vars(part):  # torch.export puts one there that raises
            return (
                "the module of an exported program, as program.module() gives it. Give the "
                "ExportedProgram itself"
            )
    if where.startswith("torch.distributed.fsdp"):
        return f"sharded ({shown}). Load its full state_dict into a model that is not"
    return ""


def _check_program(program: ExportedProgram) -> None:
    if _calls_quantised(program.graph):
        raise CaptureError(
            f"the program is quantised (it calls PyTorch's operators for that). {_TO_QUANTISE}"
        )


def _calls_quantised(graph: torch.fx.Graph) -> bool:
    spaces = {getattr(node.target, "namespace", None) for node in graph.nodes}
    return not spaces.isdisjoint(_QUANTISED_CALLS)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        kind = type(tensor)
        if is_lazy(tensor):
            raise CaptureError(
                f"the weight {name} has no shape yet: its module is a lazy one. Call model(x) once "
                "on a batch of your data, load the trained weights, and compile then"
            )
        # a Parameter of a subclass is of the subclass's type
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise CaptureError(
                f"the weight {name} is a {kind.__module__}.{kind.__qualname__}, which computes by "
                "rules of its own. Give a model whose weights are plain tensors, neither sharded "
                "nor quantised"
            )
        if tensor.is_meta:
            raise CaptureError(
                f"the weight {name} is on the meta device: it has no values to compile. Load them "
                "first, model.load_state_dict(weights, assign=True)"
            )


def _no_module(given: object) -> str:
    """What was given for a model that is none, and what to give instead."""
    kind = type(given)
    if isinstance(given, str | os.PathLike):
        path = os.fspath(given)
        help = _FILES.get(Path(str(path)).suffix.lower(), _NAME)
        return f"the text {path!r}: {help.format(path)}"
    if kind.__module__.split(".")[0] == "fastres" and kind.__name__ == "Engine":
        return "an engine already: it is called as it is"
    if isinstance(given, type):
        made = f"{given.__name__}(...).eval()" if issubclass(given, nn.Module) else "an nn.Module"
        return f"the class {given.__name__}: give an instance, {made}"
    if isinstance(given, torch.jit.ScriptFunction):
        return "a function of TorchScript: give an nn.Module whose forward does what it does"
    if isinstance(given, Mapping):
        return (
            "a table, as a state_dict is: weights do not say what is computed. Load them into your "
            "model, or give fastres.build(weights, version=...), which makes a residual network"
        )
    if callable(given) and hasattr(given, "__name__"):
        owner = getattr(given, "__self__", None)
        if isinstance(owner, nn.Module):
            return f"a method of a {type(owner).__name__}: give the module itself"
        return (
            f"the function {given.__name__}: if it makes a model, give what it returns, in eval(); "
            "if it computes something itself, give an nn.Module whose forward does that"
        )
    if kind.__module__.split(".")[0] in _ELSEWHERE:
        return (
            f"{kind.__module__}.{kind.__qualname__}: models of other libraries are not read. Give "
            "the PyTorch model that it was made from"
        )
    return (
        f"{kind.__name__}; expected an nn.Module, an ExportedProgram, or a Graph from fastres.build"
    )
