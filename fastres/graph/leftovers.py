"""What torch.export leaves in a process, given back once its programs have been read.

The sizes of its stand-ins for tensors refer, in C++, to the environment that refers to the
stand-ins: a circle that Python's collector does not see. Caches of PyTorch refer to it as well, and
keep the text of all code that was generated on the way.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.fx.graph_module
from torch.export import ExportedProgram

_Environments = dict[int, Any]
_MADE: ContextVar[_Environments | None] = ContextVar("made", default=None)
_GENERATED = "<eval_with_key>"


@contextmanager
def given_back() -> Iterator[None]:
    """In the end, the sizes of the programs that were `made` within are computed with no more."""
    environments: _Environments = {}
    texts = torch.fx.graph_module._loader.eval_cache
    before = set(texts)
    token = _MADE.set(environments)
    try:
        yield
    finally:
        _MADE.reset(token)
        for environment in environments.values():
            environment.tracked_fakes = None
            environment.fake_tensor_cache.clear()
        for kind in set(map(type, environments.values())):
            for name in dir(kind):
                forget = getattr(getattr(kind, name), "cache_clear", None)
                if forget is not None:
                    forget()
        for name in [name for name in list(texts) if name not in before and _GENERATED in name]:
            texts.pop(name, None)
            linecache.cache.pop(name, None)


def made(program: ExportedProgram) -> ExportedProgram:
    """The same, noted for who gives back what it leaves."""
    environments = _MADE.get()
    if environments is not None:
        for node in program.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            environment = getattr(mode, "shape_env", None)
            if environment is not None:
                environments[id(environment)] = environment
    return program
