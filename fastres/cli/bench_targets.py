"""What `fastres bench` times, made in the processes that run it: our engines and their peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.cli.flags import Request
from fastres.cli.targets import Target, open_target, precision_ran, to_engine
from fastres.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from fastres.options import Precision
    from fastres.timing.processes import Made


def ours(request: Request, state: Path | None, transfers: bool) -> Made:
    """Our engine for a request.

    Args:
        state: weights to be put into the model that the request names: see `keep_state`.
        transfers: whether a call brings its batch to the device, and its result back.
    """
    import torch
    from torch import nn

    from fastres.options import Options
    from fastres.timing.processes import Made

    torch.set_num_threads(Options(threads=request.threads).num_threads)
    target = open_target(request)
    if isinstance(target.model, nn.Module):
        restore_state(target.model, state)
    engine = to_engine(target, request)
    device = engine.device

    def call(x: torch.Tensor) -> Any:
        return engine(x.to(device)).cpu() if transfers else engine(x)

    def profile(x: torch.Tensor) -> dict[str, Any]:
        return engine.profile(x.to(device)).to_dict()

    def quantised(x: torch.Tensor, rows: Sequence[int]) -> np.ndarray:
        """What our int8 graph means, by PyTorch node by node, for some images of the batch."""
        from fastres.backends.reference import ReferenceExecutable

        result = ReferenceExecutable(engine.graph, x.dtype).run([x.cpu()[list(rows)]])[0]
        return result.float().numpy()

    facts = {
        "backend": engine.info.backend,
        "precision": precision_ran(engine),
        "device": str(device),
    }
    return Made(call, device, facts, {"profile": profile, "quantised": quantised}, transfers)


def peer(
    name: str,
    request: Request,
    state: Path | None,
    precision: Precision,
    example: Path,
    device: str,
    images: Path | None,
    transfers: bool,
) -> Made:
    """A peer that runs the same model in the same precision.

    Args:
        example: a file with a batch [N, C, H, W] float32 to prepare for.
        images: a file with such a batch to calibrate int8 with.
    """
    import torch

    from fastres.options import Options
    from fastres.timing.peers import make_peer
    from fastres.timing.processes import Made

    model = module_of(open_target(request))
    restore_state(model, state)
    where = torch.device(device)
    threads = Options(threads=request.threads).num_threads
    torch.set_num_threads(threads)
    target = make_peer(
        name,
        model,
        torch.load(example, weights_only=True).to(where),
        precision=precision,
        threads=threads,
        images=None if images is None else torch.load(images, weights_only=True),
    )

    def there_and_back(x: torch.Tensor) -> Any:
        return target.call(x.to(where)).cpu()

    call = there_and_back if transfers else target.call
    return Made(call, where, transfers=transfers)


def module_of(target: Target) -> nn.Module:
    """The model's code, which peers and checks need.

    Raises:
        InputError: the target is a saved engine, or was built from weights alone.
    """
    from torch import nn

    if not isinstance(target.model, nn.Module):
        raise InputError(f"peers need the model's code, which {target.name} does not have")
    return target.model


def keep_state(model: nn.Module, path: Path) -> Path:
    """Writes a model's weights and buffers, so that other processes run the very same network."""
    import torch

    state = model.state_dict()
    torch.save({name: t for name, t in state.items() if isinstance(t, torch.Tensor)}, path)
    return path


def restore_state(model: nn.Module, path: Path | None) -> None:
    """Puts back what `keep_state` wrote."""
    import torch

    if path is not None:
        model.load_state_dict(torch.load(path, weights_only=True), strict=False)


def in_precision(request: Request, precision: str | None) -> Request:
    """The request in one of its precisions; a calibration is for 8 bits."""
    from fastres.options import EIGHT_BITS

    table = request.calibration if precision in (None, *EIGHT_BITS) else None
    return replace(request, precision=precision, calibration=table)
