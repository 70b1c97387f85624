"""fastres.load: a saved engine, ready to be called."""

from __future__ import annotations

import torch

from fastres.artifact import contents
from fastres.engine.engine import Engine
from fastres.errors import InputError
from fastres.options import PathLike, as_device, integer


def load(
    path: PathLike,
    *,
    device: str | torch.device | None = None,
    target: str | None = None,
    trust_engine: bool = False,
    allow_aten: bool = True,
    max_bytes: int | None = None,
) -> Engine:
    """Loads a saved engine; the model's code and torch.export are not needed.

    Nothing of the file is run before the engine is called; see docs/security.md.

    Args:
        path: folder or file.
        device: None takes the backend's own.
        target: look at an engine that was built for this architecture, such as "sm_90", on a
            machine without it: it can be inspected and saved, not called.
        trust_engine: whether machine code in the file may run: it can do anything that this
            process can. False compiles the kernels on this machine; `engine.info` says so.
        allow_aten: whether the network may call operators of PyTorch, which `fastres inspect` names
            `aten.…`: those without side effects, see `fastres.graph.operators`.
        max_bytes: what a run may hold at once, in place of 64 MiB and 64 times the file; 256 times
            the inputs that it is called with are added to either.

    Raises:
        ArtifactError: the artifact is damaged, incomplete, or newer than this version, or a run of
            it would take more than it may.
        InputError: `device` is none, `trust_engine` or `allow_aten` is neither True nor False, or
            `max_bytes` is no number of bytes.
        BackendUnavailable, UnsupportedError: its backend or precision cannot run on this machine.
    """
    for name, value in (("trust_engine", trust_engine), ("allow_aten", allow_aten)):
        if not isinstance(value, bool):
            raise InputError(f"{name} is {value!r}; give True or False")
    if max_bytes is not None:
        max_bytes = integer("max_bytes", max_bytes)
    return Engine(
        contents.restored(
            path,
            device=as_device(device),
            target=target,
            trust_engine=trust_engine,
            allow_aten=allow_aten,
            max_bytes=max_bytes,
        )
    )
