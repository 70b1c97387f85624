"""What an engine holds goes at once when it is closed or let go of, and there is one of it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.assembly import assemble as assembly
from fastres.errors import FastresError

BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {"backend": "cpu"},
    "reference": {"backend": "reference"},
    "onnxruntime": {"backend": "onnxruntime"},
    "segments": {"backend": "cpu", "on_unsupported": "fallback"},
}


class Rolled(nn.Module):
    """A convolution and an operation that only PyTorch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.conv(x).relu(), 1, 3)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("way", ["close", "del"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_executable_goes_at_once(name: str, way: str) -> None:
    settings = BACKENDS[name]
    net = Rolled().eval() if name == "segments" else fastres.models.cifar_resnet(8, seed=0).eval()
    engine = fastres.compile(net, torch.zeros(2, 3, 16, 16), **settings)
    for n in (1, 2):
        engine(torch.zeros(n, 3, 16, 16))
    list(engine.map([torch.zeros(2, 3, 16, 16)] * 3))
    executable = weakref.ref(engine._lowered.executable)
    if way == "close":
        engine.close()
    else:
        del engine
    assert executable() is None


@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_closed_while_it_takes_new_weights(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Whichever comes first, neither executable is kept."""
    net = nn.Conv2d(3, 4, 3).eval()
    engine = fastres.compile(net, torch.zeros(2, 3, 16, 16), backend="reference")
    made: list[weakref.ref[Any]] = [weakref.ref(engine._lowered.executable)]
    with_weights = assembly.with_weights

    def closing(*args: Any) -> Any:
        if when == "before":
            engine.close()
        lowered = with_weights(*args)
        made.append(weakref.ref(lowered.executable))
        if when == "meanwhile":
            engine.close()
        return lowered

    monkeypatch.setattr("fastres.engine.engine.with_weights", closing)
    if when == "after":
        engine.update_weights(net.state_dict())
        engine.close()
    else:
        with pytest.raises(FastresError, match="this engine was closed"):
            engine.update_weights(net.state_dict())
    assert engine._lowered.executable is None
    assert [ref() for ref in made] == [None] * len(made) and len(made) == 2


COPIES: dict[str, Callable[[fastres.Engine], object]] = {
    "pickle": pickle.dumps,
    "pickle 2": lambda engine: pickle.dumps(engine, 2),
    "torch.save": lambda engine: torch.save(engine, io.BytesIO()),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda engine: copy.deepcopy([engine]),
    "dataclasses.replace": dataclasses.replace,
    "dataclasses.replace one": lambda engine: dataclasses.replace(engine, notes=("mine",)),
}
if sys.version_info >= (3, 13):
    COPIES["copy.replace"] = copy.replace


@pytest.mark.parametrize("name", COPIES)
def test_is_never_copied(name: str) -> None:
    with fastres.compile(
        nn.Conv2d(3, 4, 3).eval(), torch.zeros(2, 3, 16, 16), backend="reference"
    ) as engine:
        with pytest.raises(FastresError, match="cannot be pickled or copied"):
            COPIES[name](engine)
        assert engine(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 14, 14)
        assert engine in {engine} and engine != object()
