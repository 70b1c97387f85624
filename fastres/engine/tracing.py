"""Calls from inside PyTorch's tracers: an engine runs beside torch.compile's graphs, never in one.

What an engine computes is out of PyTorch's sight, so a tracer that recorded a call would keep the
numbers of its example, or crash where its stand-ins have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastres.errors import InputError

_RECORDING = ("FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode")


def beside_compiler(
    call: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]
) -> Any:
    """Calls an engine from code that torch.compile is reading: as it is, between two graphs."""
    # with fullgraph=True, and in a strict torch.export, PyTorch refuses here and says this
    torch._dynamo.graph_break(msg="a fastres engine runs outside of PyTorch's graphs")
    eager = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return eager(*inputs, **named)


def refuse_tracers() -> None:
    """
    Raises:
        InputError: this call is being recorded.
    """
    if _is_tracing():  # torch.jit.is_tracing, a tenth of a microsecond faster; so are these
        refuse("torch.jit.trace")
    if _len_torch_dispatch_stack():
        modes = {type(mode).__name__ for mode in _get_current_dispatch_mode_stack()}
        if modes.intersection(_RECORDING):  # others look on, such as a counter of FLOPs
            what = "torch.export" if torch.compiler.is_exporting() else "a tracer of PyTorch's"
            refuse(f"{what} ({', '.join(sorted(modes))})")


def refuse(tracer: str) -> NoReturn:
    raise InputError(
        f"this engine was called inside {tracer}: it runs outside of PyTorch's graphs and cannot "
        "be recorded. Call it outside, or give the model itself to the tracer"
    )
