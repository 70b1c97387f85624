"""Reading weight files without running anything they contain."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from fastres.errors import BuildError
from fastres.options import PathLike

_PICKLED = (".pth", ".pt", ".bin")


def read_weights(path: PathLike) -> dict[str, torch.Tensor]:
    """A state_dict from a .safetensors file, or a .pth / .pt one read with weights_only=True.

    A checkpoint that keeps its weights under `state_dict` or `model` is looked into.

    Raises:
        BuildError: no such file, not readable, not a table of tensors.
    """
    file = Path(os.fspath(path))
    if not file.is_file():
        raise BuildError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            table: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
            return table
        if file.suffix not in _PICKLED:
            raise BuildError(f"{file} is neither .safetensors nor {', '.join(_PICKLED)}")
        found = torch.load(file, map_location="cpu", weights_only=True)
    except BuildError:
        raise
    except Exception as error:  # a damaged file makes torch and safetensors raise many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BuildError(f"{file} cannot be read as weights: {first}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise BuildError(f"{file} holds {type(found).__name__}, not a table of tensors")
    wrong = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise BuildError(
            f"{file} holds entries that are no tensors: {', '.join(map(str, wrong[:5]))}"
        )
    return dict(found)
