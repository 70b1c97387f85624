"""What a model's name on the command line means: name → nn.Module in eval()."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastres.cli.flags import NAMES
from fastres.errors import BackendUnavailable, BuildError, InputError, described, missing
from fastres.wording import named

if TYPE_CHECKING:
    from torch import nn

    from fastres.models.blocks import Version

_VERSIONS: dict[str, Version] = {"v1": "v1", "v1.5": "v1.5"}
_IMAGENET = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
_CIFAR = re.compile(r"(cifar_resnet|preact_resnet)(\d+)")
_SEED = 0  # of untrained weights: the same network at every call


def is_name(text: str) -> bool:
    """Whether this names a model rather than a file."""
    return ":" in text and not os.path.exists(text)


def is_cifar(name: str) -> bool:
    """Whether this names one of our networks for 32x32 pictures."""
    return _CIFAR.match(name.removeprefix("fastres:")) is not None


def as_version(text: str | None) -> Version | None:
    """Checks what was given as --version or behind an @.

    Raises:
        InputError: neither v1 nor v1.5.
    """
    if text is None:
        return None
    if text not in _VERSIONS:
        raise InputError(f"there is no version {text!r}; there are {' and '.join(_VERSIONS)}")
    return _VERSIONS[text]


def make(name: str, version: Version | None = None) -> nn.Module:
    """The network of that name, in eval(), its weights untrained unless a factory trains them.

    Args:
        name: fastres:NAME[@v1|@v1.5], torchvision:NAME, timm:NAME or package.module:factory.
        version: of a fastres: network, which may also stand behind its name.

    Raises:
        InputError: there is no such model; says which there are.
        BackendUnavailable: torchvision or timm is wanted and cannot be imported.
    """
    import torch

    source, colon, rest = name.partition(":")
    if not colon:
        raise InputError(f"there is no model or saved engine {name!r}; models are {NAMES}")
    if version is not None and source != "fastres":
        raise InputError(
            f"--version is for fastres: models and for --weights alone, not for {name}"
        )
    makers: dict[str, Callable[[], nn.Module]] = {
        "fastres": lambda: reference(rest, version),
        "torchvision": lambda: _torchvision(rest),
        "timm": lambda: _timm(rest),
    }
    with torch.random.fork_rng(devices=[]), redirect_stdout(sys.stderr):
        torch.manual_seed(_SEED)
        model = makers.get(source, lambda: _factory(source, rest))()
    return model.eval()


def load_weights(
    model: nn.Module,
    name: str,
    file: Path,
    entry: str | None = None,
    max_bytes: int | None = None,
) -> None:
    """Loads a state_dict strictly: nothing missing, left over or misshapen.

    Args:
        entry, max_bytes: where in a checkpoint it lies, and what it may take; see `fastres.build`.

    Raises:
        BuildError: the file is unreadable or does not fit; says where.
    """
    from fastres.checkpoints.reading import read_weights

    own = model.state_dict()
    table = read_weights(file, names=own, entry=entry, max_bytes=max_bytes)
    wrong = [
        f"{key} is {list(table[key].shape)} in the file and {list(value.shape)} in the model"
        for key, value in own.items()
        if key in table and table[key].shape != value.shape
    ]
    counters = ("num_batches_tracked",)  # not used in inference; older files lack them
    missing = [k for k in own if k not in table and not k.endswith(counters)]
    wrong += [f"{key} is missing" for key in missing]
    wrong += [f"{named(key)} is unknown to the model" for key in table if key not in own]
    if wrong:
        some = "".join(f"\n  {line}" for line in wrong[:6]) + ("\n  ..." if wrong[6:] else "")
        raise BuildError(
            f"{file} does not fit {name} in {len(wrong)} places:{some}\n"
            "Choose the model they were trained with, or leave it out to build it from the weights"
        )
    model.load_state_dict(table, strict=False)


def is_fresh(model: nn.Module) -> bool:
    """Whether the model looks untrained: its BatchNorms still hold mean 0 and variance 1."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    tracked = [(m.running_mean, m.running_var) for m in norms]
    return bool(tracked) and all(
        mean is not None and var is not None and not mean.any() and bool((var == 1).all())
        for mean, var in tracked
    )


def reference(text: str, version: Version | None = None, **options: Any) -> nn.Module:
    """One of `fastres.models`, in training mode.

    Args:
        text: NAME[@v1|@v1.5].
        options: num_classes and seed, where they are not to be the network's own.

    Raises:
        InputError: there is no such network, or both say a version and not the same.
    """
    from fastres import models

    name, at, behind = text.partition("@")
    said = as_version(behind) if at else None
    if said and version and said != version:
        raise InputError(f"fastres:{text} and --version {version} contradict each other")
    chosen = said or version or "v1.5"
    cifar = _CIFAR.fullmatch(name)
    try:
        if cifar and cifar[1] == "cifar_resnet":
            return models.cifar_resnet(int(cifar[2]), version=chosen, **options)
        if cifar:
            return models.preact_resnet(int(cifar[2]), **options)
    except ValueError as error:
        raise InputError(f"fastres:{name}: {error}") from error
    if name not in _IMAGENET:
        raise InputError(
            f"there is no fastres:{name}; there are {', '.join(_IMAGENET)}, and cifar_resnet20 and "
            "preact_resnet20 with any depth of 6n + 2"
        )
    made: nn.Module = getattr(models, name)(version=chosen, **options)
    return made


def _torchvision(name: str) -> nn.Module:
    models = _optional("torchvision.models", "torchvision")
    if name not in models.list_models(module=models):
        known = ", ".join(n for n in models.list_models(module=models) if "res" in n)
        raise InputError(f"there is no torchvision:{name}; its residual networks are {known}")
    made: nn.Module = models.get_model(name, weights=None)
    return made


def _timm(name: str) -> nn.Module:
    timm = _optional("timm", "timm")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:12]) or "none of a similar name"
        raise InputError(f"there is no timm:{name}; near it: {near}")
    made: nn.Module = timm.create_model(name, pretrained=False)
    return made


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision beside another build of torch
        raise BackendUnavailable(missing(package, error)) from error


def _factory(module: str, attribute: str) -> nn.Module:
    from torch import nn

    name = f"{module}:{attribute}"
    with _cwd_on_path():
        try:
            found = _attribute(_module(module), attribute)
            made = found if isinstance(found, nn.Module) else found()
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:  # the user's code may raise anything
            raise InputError(f"{name} raised {described(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} gave {type(made).__name__}; expected an nn.Module")
    _check_parameters(made, name)
    return made


def _check_parameters(model: nn.Module, name: str) -> None:
    from torch.nn.parameter import is_lazy

    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            found = "has no shape yet: run it once" if is_lazy(tensor) else "is on the meta device"
            raise InputError(f"{name} has no weights: {key} {found}; give a model that has values")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
            raise  # found, but it imports something that is not there
        raise InputError(f"there is no module {name!r}; models are {NAMES}") from error


def _attribute(module: ModuleType, name: str) -> Any:
    found = getattr(module, name, None)
    if not callable(found):
        offered = getattr(module, "__all__", ())  # of a package, from files inside
        functions = {n: f for n, f in vars(module).items() if inspect.isfunction(f)}
        public = [
            n for n, f in functions.items() if n in offered or f.__module__ == module.__name__
        ]
        have = ", ".join(n for n in public if n[0] != "_") or "no function of its own"
        raise InputError(f"{module.__name__} has no factory {name!r}; it has {have}")
    return found


@contextmanager
def _cwd_on_path() -> Iterator[None]:
    """An installed script does not see modules in the current folder; `python -m` does."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
