"""The networks that train.py trains: by name, from weights, in part; and their files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor, nn

from fastres import models
from fastres.calib.images import Preprocess
from fastres.checkpoints.reading import read_weights
from fastres.cli.models import reference
from fastres.errors import BuildError, InputError

Part = Literal["all", "last", "head"]
_KEY = "fastres.training"  # one entry: safetensors writes several in an order of chance


def network(name: str, classes: int = 10, seed: int = 0) -> nn.Module:
    """A fresh network, convolutions drawn as He et al. 2015 do, the same for the same seed.

    Args:
        name: resnet20, the paper's net for 32x32 pictures with shortcut A; bottleneck, ResNet-50
            v1.5 an eighth as wide behind a stem for 32x32 pictures (0.38 M parameters); or a
            fastres:NAME[@v1|@v1.5] of the command line.
        classes: rows of the head, `fc`.

    Returns:
        [N, 3, H, W] fp32 → [N, classes] fp32, in training mode.

    Raises:
        InputError: there is no such network.
    """
    if name == "resnet20":
        return models.cifar_resnet(20, classes, seed=seed)
    if name == "bottleneck":
        return models.ResNet(
            models.Bottleneck, (3, 4, 6, 3), stem="cifar", planes=8, num_classes=classes, seed=seed
        )
    if not name.startswith("fastres:"):
        raise InputError(
            f"there is no network {name!r}; there are resnet20, bottleneck, and fastres: before a "
            "name such as resnet18 or cifar_resnet32"
        )
    return reference(name.removeprefix("fastres:"), num_classes=classes, seed=seed)


def take_over(model: nn.Module, path: str | os.PathLike[str], *, new_head: bool = False) -> bool:
    """Gives a network the weights of a file; the head stays its own if the file's does not fit it.

    Args:
        model: changed in place; its head is `fc`.
        path: a file of torch.save or safetensors.
        new_head: keep the model's own head in any case.

    Returns:
        Whether the head stayed the model's own.

    Raises:
        BuildError: the file cannot be read, or anything but the head does not fit; says where.
    """
    own = model.state_dict()
    table = read_weights(path, names=own)
    head = {key for key in own if key.startswith("fc.")}
    theirs = {key: value.shape for key, value in table.items() if key.startswith("fc.")}
    fresh = new_head or theirs != {key: own[key].shape for key in head}
    wanted = own.keys() - head if fresh else own.keys()
    wrong = [f"{key} is missing" for key in own if key in wanted and key not in table]
    wrong += [
        f"{key} is {list(table[key].shape)} in the file and {list(own[key].shape)} in the network"
        for key in own
        if key in wanted and key in table and table[key].shape != own[key].shape
    ]
    wrong += [
        f"{key} is unknown to the network" for key in table if key not in own and key not in theirs
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if wrong[4:] else ""
        raise BuildError(
            f"{path} does not fit the network: {'; '.join(wrong[:4])}{more}. Name the one that "
            "the weights were trained in with --model"
        )
    model.load_state_dict({key: table[key] for key in wanted}, strict=False)
    return fresh


def freeze(model: nn.Module, part: Part) -> tuple[nn.Module, ...]:
    """Leaves only a part of a network to be trained.

    Args:
        part: "all"; "last" is the last stage and all behind it; "head" is `fc`.

    Returns:
        The frozen layers. Set them to eval() while training: a BatchNorm in training mode would
        move its statistics though gamma and beta stand still.
    """
    layers = dict(model.named_children())
    stages = [name for name in layers if name.startswith("layer") and any(layers[name].children())]
    first = {"all": next(iter(layers)), "last": stages[-1], "head": "fc"}[part]
    names = list(layers)
    frozen = tuple(layers[name] for name in names[: names.index(first)])
    for layer in frozen:
        layer.requires_grad_(False)
    return frozen


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    preprocess: Preprocess,
    facts: Mapping[str, object],
) -> None:
    """Writes weights and what is known of them: the same bytes for the same values.

    Args:
        path: .safetensors; folders above it are made.
        preprocess: what was done to the pictures, and must be done in deployment too.
        facts: what JSON can hold.
    """
    whole = {**facts, "preprocess": msgspec.to_builtins(preprocess)}
    table: dict[str, Tensor] = {k: v.contiguous() for k, v in model.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(table, path, {_KEY: json.dumps(whole, sort_keys=True)})


def facts_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` wrote beside the weights; nothing for other files.

    Raises:
        BuildError: the file is not there or is no such file.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_KEY, "{}")
        facts: dict[str, Any] = msgspec.json.decode(found, type=dict)
        return facts
    except Exception as error:  # safetensors raises kinds of its own
        raise BuildError(f"{path} cannot be read as weights: {error}") from error


def preprocess_of(facts: Mapping[str, Any]) -> Preprocess | None:
    """What is to be done to a picture before a network with these facts sees it."""
    return msgspec.convert(facts["preprocess"], Preprocess) if "preprocess" in facts else None
