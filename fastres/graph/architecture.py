"""What network a state_dict describes: read off the weights, or asked for.

What the weights show is block type, depth, widths, groups, stem, classes and shortcut kind. What
they do not show must be said, because v1 and v1.5 have identical weights and a wrong guess is a
silent loss of accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fastres.errors import BuildError
from fastres.models.blocks import Stem, Version
from fastres.options import is_number
from fastres.weights import is_finite, oddity
from fastres.wording import listed, named

_LONGEST = 1024  # letters of the name of a weight


@dataclass(frozen=True)
class ResNetSpec:
    """What a residual network is, beyond its weights; every field left None is inferred.

    Args:
        version: "v1" has the stride of a downsampling bottleneck in its first 1x1 convolution,
            "v1.5" in its 3x3. Needed for bottleneck nets: the weights are the same.
        stem: "imagenet" is 7x7 stride 2 and a 3x3 stride 2 max pool, "cifar" is 3x3 stride 1.
        dilate: per stage from the second on, stride traded for dilation (segmentation nets).
        bn_eps: epsilon of every BatchNorm (PyTorch 1e-5, Keras 1.001e-5).
        head: what follows the global average pool, as layer names and activations in order, such
            as ("fc.0", "relu", "fc.3"); needed if there is more than one Linear.
    """

    version: Version | None = None
    stem: Stem | None = None
    dilate: tuple[bool, ...] = (False, False, False)
    bn_eps: float = 1e-5
    head: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Architecture:
    """A `ResNetSpec` with nothing left open, and what only the weights show.

    Args:
        depths: blocks in each stage.
        projects: whether any shortcut is a projection; else those that change the shape pad with
            zeros (shortcut A).
    """

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    version: Version
    stem: Stem
    dilate: tuple[bool, ...]
    bn_eps: float
    projects: bool
    head: tuple[str, ...]


def infer(weights: Mapping[str, torch.Tensor], spec: ResNetSpec) -> Architecture:
    """Reads off the weights what the spec leaves open.

    Raises:
        BuildError: these are no weights of a residual network, or something must be said.
    """
    _check_names(weights)
    _check_spec(spec)
    depths = _depths(weights)
    bottleneck = "layer1.0.conv3.weight" in weights
    if bottleneck and spec.version is None:
        raise BuildError(
            f"these are the weights of a bottleneck net of {sum(depths)} blocks. v1 (stride in the "
            "first 1x1; the paper, Caffe, Keras) and v1.5 (stride in the 3x3; torchvision, timm, "
            "NVIDIA) have the same weights, so nothing here tells which it is: pass version='v1' "
            "or version='v1.5'"
        )
    if any(spec.dilate) and not bottleneck:
        raise BuildError(f"dilate={spec.dilate}, but only bottleneck nets are dilated")
    stages = len(depths) - 1
    if len(spec.dilate) < stages or any(spec.dilate[stages:]):
        raise BuildError(f"dilate={spec.dilate} needs {stages} entries, one per stage after layer1")
    return Architecture(
        block="bottleneck" if bottleneck else "basic",
        depths=depths,
        version=spec.version or "v1.5",
        stem=spec.stem or _stem(weights),
        dilate=spec.dilate[:stages],
        bn_eps=spec.bn_eps,
        projects=any(".downsample.0." in key for key in weights),
        head=_head(weights) if spec.head is None else spec.head,
    )


def usable(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight that can be computed with, on the CPU.

    Raises:
        BuildError: it is missing, no floating-point tensor, without values, or not finite.
    """
    if name not in weights:
        raise BuildError(f"the weight {name} is missing")
    tensor = weights[name]
    if odd := oddity(tensor):
        raise BuildError(f"{name} is {odd}, not a dense floating-point tensor")
    if not tensor.is_floating_point():
        raise BuildError(f"{name} is {tensor.dtype}, not a floating-point tensor")
    if tensor.is_meta:
        raise BuildError(f"{name} is on the meta device: it has no values to compile")
    if 0 in tensor.shape:
        raise BuildError(f"{name} {list(tensor.shape)} is empty")
    if not is_finite(tensor):
        raise BuildError(f"{name} {list(tensor.shape)} holds NaN or infinite values")
    return tensor.detach().cpu()


def _depths(weights: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    stages: dict[int, set[int]] = {}
    for key in weights:
        if found := re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", key):
            stages.setdefault(int(found[1]), set()).add(int(found[2]))
    if set(stages) != set(range(1, len(stages) + 1)):
        raise BuildError(f"there are the stages layer{sorted(stages)}; some are missing")
    for stage, blocks in stages.items():
        if blocks != set(range(len(blocks))):
            raise BuildError(f"layer{stage} has the blocks {sorted(blocks)}; some are missing")
    return tuple(len(stages[stage]) for stage in sorted(stages))


def _stem(weights: Mapping[str, torch.Tensor]) -> Stem:
    kernel = tuple(usable(weights, "conv1.weight").shape[2:])
    stems: dict[tuple[int, ...], Stem] = {(7, 7): "imagenet", (3, 3): "cifar"}
    if kernel not in stems:
        raise BuildError(f"conv1 is {kernel}; known stems are 7x7 (imagenet) and 3x3 (cifar)")
    return stems[kernel]


def _check_names(weights: Mapping[str, torch.Tensor]) -> None:
    for name in weights:
        if not isinstance(name, str):
            raise BuildError(f"weights holds the name {name!r}; the names of weights are texts")
        if len(name) > _LONGEST:
            raise BuildError(f"weights holds the name {named(name)}; it has at most {_LONGEST}")
    for name in ("conv1.weight", "layer1.0.conv1.weight"):
        if name not in weights:
            some = listed(sorted(weights), 4) or "none"
            raise BuildError(
                f"no {name} among {len(weights)} weights ({some}): only torchvision's names are "
                "known (conv1, bn1, layer1.0.conv1, layer1.0.downsample.0, fc). Load others into "
                "the model they are of, and give that to fastres.compile"
            )


def _check_spec(spec: ResNetSpec) -> None:
    for name, known in (("version", get_args(Version)), ("stem", get_args(Stem))):
        found = getattr(spec, name)
        if not isinstance(found, str | None) or found not in (None, *known):
            raise BuildError(f"{name} is {found!r}; known are {', '.join(map(repr, known))}")
    if not isinstance(spec.dilate, tuple | list) or {type(d) for d in spec.dilate} - {bool}:
        raise BuildError(f"dilate is {spec.dilate!r}; give True or False for each stage")
    if not (is_number(spec.bn_eps) and spec.bn_eps >= 0):
        raise BuildError(f"bn_eps is {spec.bn_eps!r}; it must be a number of at least 0")
    if not isinstance(spec.head, tuple | list | None):
        raise BuildError(f"head is {spec.head!r}; give names of layers and activations in order")


def _head(weights: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    linears = [
        key.removesuffix(".weight")
        for key, tensor in weights.items()
        if re.match(r"fc[.\d]*\.weight$", key) and getattr(tensor, "ndim", 0) == 2
    ]
    if len(linears) > 1:
        example = tuple(part for name in linears for part in (name, "relu"))[:-1]
        raise BuildError(
            f"the head has several Linear layers ({', '.join(linears)}) and the weights do not "
            f"show what stands between them: pass ResNetSpec(head={example!r}) or the like"
        )
    return tuple(linears)
