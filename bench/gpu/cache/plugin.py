"""A plugin of pytest: the tests marked gpu, on the CPU, with every kernel compiled and none run.

Of a test that is parametrised over devices, the CPU's half runs; what it asks for is compiled for
the GPU that is named. It fails then, of course: nothing has been computed. Tests that have no such
half are left out. For `making.py`, which says in the environment which tests and where to.
"""

from __future__ import annotations

import os
import pickle
from itertools import count
from pathlib import Path

import pytest
from triton import knobs

from bench.gpu.cache.archive import kernel_of
from fastres.backends.triton.planning.table import Tiles, shipped_for
from fastres.backends.triton.tuning import choosing
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch

_NUMBERS = count()
_SM = int(os.environ["KERNELS_SM"])
_TO = Path(os.environ["KERNELS_TO"])


def _compile(launch: Launch) -> None:
    """In place of `Launch.run`."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    found = pickle.dumps(kernel_of(launch, _SM))
    (_TO / f"{next(_NUMBERS):06d}{worker}.pickle").write_bytes(found)


def pytest_configure(config: pytest.Config) -> None:
    """Kernels are decorated for the compiler; only conftest.py takes this for the interpreter."""
    target = Target.typical(_SM)
    Launch.run = _compile  # type: ignore[method-assign]
    choosing.tiles_for = lambda options, device: Tiles(target, shipped_for(target))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    knobs.runtime.interpret = True
    wanted = "first" if os.environ["KERNELS_OF"] == "first" else "gpu"
    asked = {item.nodeid for item in items if item.get_closest_marker(wanted)}
    halves = [item for item in items if item.get_closest_marker("interpret")]
    items[:] = [item for item in halves if item.nodeid.replace("cpu", "cuda") in asked]
