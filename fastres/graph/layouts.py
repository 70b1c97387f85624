"""Tracing a model in channels_last as if its weights lay contiguous.

Memory formats change no number, but PyTorch's convolutions ask the sizes which format their result
has, and each answer is a guard: a batch of one would need a second export. So the exporter is shown
a copy whose weights lie contiguous. That would be wrong where the model itself looks at strides, or
reads memory in its order: then nothing is gained, and the model is traced as it is.

While it exports, PyTorch 2.11 answers at random whether a tensor of a free size is contiguous in
channels_last (https://github.com/pytorch/pytorch/pull/178103). There it is answered here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from fastres.graph.aten import READ_MEMORY
from fastres.graph.copies import copied

_QUESTIONS = (
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.storage_offset,
    torch.Tensor.untyped_storage,
    torch.Tensor.data_ptr,
)


_ANSWERS_AT_RANDOM = torch.__version__ < "2.12"  # compares as a version, not as text


def whatever_the_layout(
    model: nn.Module, export: Callable[[nn.Module], ExportedProgram]
) -> ExportedProgram:
    """The model exported, as if its weights lay contiguous where that makes no difference.

    Args:
        model: a copy that is not used again: its `forward` may be replaced.
        export: traces a module.
    """
    if (program := _in_plain_layout(model, export)) is not None:
        return program
    if _ANSWERS_AT_RANDOM:
        _watched(model)
    return export(model)


def _in_plain_layout(
    model: nn.Module, export: Callable[[nn.Module], ExportedProgram]
) -> ExportedProgram | None:
    """None where they do lie contiguous, or it matters."""
    weights: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    weights.update(model.named_parameters(remove_duplicate=False))
    odd = [t for t in weights.values() if t.layout == torch.strided and _is_odd(t)]
    if not odd:
        return None
    instead = {id(t): t for t in weights.values()}
    instead |= {id(t): _without_values(t) for t in odd}
    copy = copied(model, instead)
    watch = _watched(copy)
    program = export(copy)
    if watch.asked or any(_reads_memory(node) for node in program.graph.nodes):
        return None
    for table in (program.state_dict, program.constants):
        table.update((name, t) for name, t in weights.items() if name in table)
    return program


def _is_odd(tensor: torch.Tensor) -> bool:
    """By its strides: of a 1x1 filter in channels_last, `is_contiguous` says that it is."""
    return tensor.stride() != torch.empty(tensor.shape, device="meta").stride()


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """In its place: contiguous, and never written to, so that it takes no memory."""
    stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(stand_in, False) if isinstance(tensor, nn.Parameter) else stand_in


def _reads_memory(node: torch.fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.overloadpacket.__name__ in READ_MEMORY
    )


def _watched(model: nn.Module) -> _Watch:
    """Puts a watch around the model's `forward`."""
    watch, forward = _Watch(), model.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return forward(*args, **kwargs)

    model.forward = watched
    return watch


class _Watch(TorchFunctionMode):
    """Notes whether the code that runs inside asks how tensors lie in memory, and answers it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _QUESTIONS:  # nothing is read of `self`: torch.cond would make a guard of it
            self.asked = True
        last = (kwargs or {}).get("memory_format") == torch.channels_last
        if last and func is torch.Tensor.is_contiguous:
            return _is_channels_last(*args)
        return func(*args, **(kwargs or {}))


def _is_channels_last(tensor: torch.Tensor) -> bool:
    if tensor.dim() != 4:
        return False
    expected = 1
    for dim in (1, 3, 2, 0):
        if tensor.stride(dim) != expected and tensor.shape[dim] != 1:
            return False
        expected *= tensor.shape[dim]
    return True
