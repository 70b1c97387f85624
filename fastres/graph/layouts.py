"""Tracing a model in channels_last as if its weights lay contiguous.

Memory formats change no number, but PyTorch's convolutions ask the sizes which format their result
has, and each answer is a guard: a batch of one would need a second export. So the exporter is shown
a copy whose weights lie contiguous. That would be wrong where the model itself looks at strides, or
reads memory in its order: then nothing is gained, and the model is traced as it is.
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


def in_plain_layout(
    model: nn.Module, export: Callable[[nn.Module], ExportedProgram]
) -> ExportedProgram | None:
    """The model exported as if its weights lay contiguous; None where they do, or it matters.

    Args:
        export: traces a module.
    """
    weights: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    weights.update(model.named_parameters(remove_duplicate=False))
    odd = [t for t in weights.values() if t.layout == torch.strided and _is_odd(t)]
    if not odd:
        return None
    instead = {id(t): t for t in weights.values()}
    instead |= {id(t): _without_values(t) for t in odd}
    copy = copied(model, instead)
    watch = _Watch()
    forward = copy.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return forward(*args, **kwargs)

    copy.forward = watched
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


class _Watch(TorchFunctionMode):
    """Notes whether the code that runs inside asks how tensors lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.asked = self.asked or func in _QUESTIONS
        return func(*args, **(kwargs or {}))
