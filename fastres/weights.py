"""Weights: reading files without running anything they contain, and telling sound values."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastres.errors import BuildError
from fastres.graph.specs import GIVEN_DTYPES
from fastres.options import PathLike

_PICKLED = (".pth", ".pt", ".bin")
_PARALLEL = "module."  # what torch.nn.DataParallel puts before every name


def read_weights(path: PathLike) -> dict[str, torch.Tensor]:
    """A state_dict from a .safetensors file, or a .pth / .pt one read with weights_only=True.

    A checkpoint that keeps its weights under `state_dict` or `model` is looked into; the "module."
    that DataParallel puts before every name is taken off.

    Raises:
        BuildError: no such file, not readable, not a table of tensors.
    """
    file = Path(path)
    if not os.path.isfile(file):  # Path.is_file raises for some names that no file can have
        raise BuildError(f"there is no file {file}")
    if file.suffix not in (".safetensors", *_PICKLED):
        raise BuildError(f"{file} is neither .safetensors nor {', '.join(_PICKLED)}")
    try:
        if file.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch and safetensors raise many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's advice is to trust the file
            reason = (
                "it is damaged, or holds more than tensors, and nothing else in it is ever run. A "
                "file made by torch.save(model) must be made anew with "
                "torch.save(model.state_dict())"
            )
        raise BuildError(f"{file} cannot be read as weights: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        what = "nothing" if isinstance(found, Mapping) else type(found).__name__
        raise BuildError(f"{file} holds {what}, not a table of tensors")
    wrong = [
        k for k, v in found.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))
    ]
    if wrong:
        raise BuildError(
            f"{file} holds entries that are no named tensors: {', '.join(map(str, wrong[:5]))}"
        )
    parallel = all(name.startswith(_PARALLEL) for name in found)
    return {name.removeprefix(_PARALLEL) if parallel else name: t for name, t in found.items()}


def oddity(value: object) -> str:
    """What keeps a value from being a tensor of plain numbers in memory; empty if nothing does."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a tensor of {value.layout}"
    return "" if value.dtype in GIVEN_DTYPES else f"a tensor of {value.dtype}"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    The extremes carry both, and one pass finds them: twenty times faster than torch.isfinite.
    """
    if tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor.detach()))
