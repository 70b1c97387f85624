"""In place of hypothesis, where it is not installed: its tests are skipped, those beside them run.

The kernels' tests run on machines with a GPU, which have PyTorch, Triton and little else.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class Anything:
    """Every attribute, call, index and sum of it is itself: a strategy that draws nothing."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **options: object) -> Anything:
        return self

    def __or__(self, other: object) -> Anything:
        return self

    def __iter__(self) -> Any:
        return iter(())


def given(*strategies: object, **named: object) -> Any:
    """Makes a test of one that takes nothing and is skipped."""

    def skipped(test: Any) -> Any:
        @pytest.mark.skip(reason="needs hypothesis")
        def instead(*_: object) -> None: ...

        instead.__name__ = test.__name__
        return instead

    return skipped


def settings(*args: object, **options: object) -> Any:
    return lambda test: test


def stand_in() -> None:
    """Puts it where `import hypothesis` looks."""
    module: Any = ModuleType("hypothesis")
    module.given, module.settings, module.strategies = given, settings, Anything()
    module.HealthCheck, module.assume, module.note = Anything(), bool, str
    sys.modules["hypothesis"] = module
    sys.modules["hypothesis.strategies"] = module.strategies
