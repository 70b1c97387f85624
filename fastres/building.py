"""`fastres.build`: a residual network out of its weights alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastres.checkpoints.reading import read_weights
from fastres.errors import BuildError
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.ir import Graph
from fastres.models.blocks import Version
from fastres.options import Input, PathLike


def build(
    weights: Mapping[str, Any] | PathLike,
    *,
    version: Version | None = None,
    spec: ResNetSpec | None = None,
    inputs: Input | None = None,
    entry: str | None = None,
    max_bytes: int | None = None,
) -> Graph:
    """Assembles a residual network from weights alone, without the model's code.

    Args:
        weights: a state_dict with torchvision's names, a checkpoint that has one, or the path of
            either, written by torch.save or safetensors.
        version: "v1" or "v1.5"; needed for bottleneck nets, whose weights do not show it.
        spec: what else the weights do not show; see `ResNetSpec`.
        inputs: the image's shape; None takes (N, C, 224, 224), or 32 for a CIFAR stem.
        entry: where in a checkpoint the network lies, if that must be said: of raw and averaged
            weights, "state_dict" or "state_dict_ema"; of a larger model, "state_dict.backbone".
        max_bytes: what the tensors of a file may say they take, each counted as if it shared
            nothing; None is twice the file, or 32 MiB if that is more.

    Raises:
        BuildError: the weights do not describe a residual network, or something must be said.
    """
    if not isinstance(spec, ResNetSpec | None):
        raise BuildError(f"spec is {type(spec).__name__}; give a fastres.ResNetSpec, or None")
    if not isinstance(inputs, Input | None):
        raise BuildError(f"inputs is {type(inputs).__name__}; give a fastres.Input, or None")
    spec = spec or ResNetSpec()
    if version is not None:
        spec = replace(spec, version=version)
    if not isinstance(weights, Mapping | str | os.PathLike):
        raise BuildError(
            f"weights is {type(weights).__name__}; give a state_dict, or the path of a file of "
            "torch.save or safetensors"
        )
    return build_graph(read_weights(weights, entry=entry, max_bytes=max_bytes), spec, inputs)
