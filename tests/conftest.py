"""What tests of several folders share: real pictures, a settled network, and how it runs.

Pictures, because noise hides errors that photographs show.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import models

if TYPE_CHECKING:
    from PIL import Image

HERE = Path(__file__).parent
GPU_FOLDERS = {  # that have tests of a GPU, and what those need
    "kernels": "triton",
    "backends/triton": "triton",
    "backends/tensorrt": "onnx",
}
# begun first: none is waited for in the end
LONG_FILES = ("test_short_runs.py", "test_networks.py", "test_bench.py", "test_docs.py")

if find_spec("hypothesis") is None:
    run_path(str(HERE / "without_hypothesis.py"))["stand_in"]()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup, and then for all children
    signal.signal(signal.SIGINT, signal.default_int_handler)

PHOTOS = HERE.parent / "examples" / "photos"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What pyproject.toml sets for plugins: the tests of a GPU need not have them."""
    if find_spec("pytest_benchmark") is None:
        parser.addoption("--benchmark-disable", action="store_true")
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take; without pytest-timeout, any")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Asked for the tests of a GPU alone, no other file is imported, and nothing that it needs."""
    if not config.option.markexpr.startswith("gpu"):
        return None
    there = [HERE / folder for folder, needs in GPU_FOLDERS.items() if find_spec(needs)]
    holds = any(collection_path == at or collection_path in at.parents for at in there)
    return None if holds or any(at in collection_path.parents for at in there) else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """What a kernel does wrong shows when it is waited for: each test waits for its own."""
    yield
    if item.get_closest_marker("gpu") and torch.cuda.is_available():  # some run interpreted, too
        torch.cuda.synchronize()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Ends a process whose GPU answers no more: every later test in it would fail, too."""
    done = yield
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            said = f"the GPU answers no more after {item.nodeid}: {error}".splitlines()[0]
            if hasattr(item.config, "workerinput"):  # of xdist, which starts another
                print(said, file=sys.__stderr__, flush=True)
                os._exit(3)
            item.session.shouldstop = said
    return done


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    of_files = {item.path: item for item in reversed(items) if item.get_closest_marker("gpu")}
    for item in of_files.values():  # each file is of one kernel family
        item.add_marker("first")
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def _normalised(picture: Image.Image) -> Tensor:  # -> [3, H, W] fp32
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
    return ((pixels - MEAN) / STD).contiguous()


@pytest.fixture(scope="session")
def pictures() -> tuple[Image.Image, ...]:
    """The three example photographs, decoded."""
    from PIL import Image

    names = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")
    return tuple(Image.open(PHOTOS / name).convert("RGB") for name in names)


@pytest.fixture(scope="session")
def photos(pictures: tuple[Image.Image, ...]) -> Tensor:
    """[3, 3, 224, 224] fp32: centre crops of the photographs, normalised as ImageNet's."""
    from PIL import Image, ImageOps

    size = (224, 224)
    crops = [ImageOps.fit(picture, size, Image.Resampling.BILINEAR) for picture in pictures]
    return torch.stack([_normalised(crop) for crop in crops])


@pytest.fixture(scope="session")
def photo_batch(pictures: tuple[Image.Image, ...]) -> Callable[[int, int], Tensor]:
    """photo_batch(n, size) -> [n, 3, size, size] fp32: crops and flips, the same at every call.

    The first pictures of a longer batch are those of a shorter one.
    """

    from PIL import Image, ImageOps

    def batch(n: int, size: int) -> Tensor:
        out = torch.empty(n, 3, size, size)
        for i in range(n):
            draw = random.Random(i)
            picture = pictures[i % len(pictures)]
            side = int(min(picture.size) * draw.uniform(0.4, 1.0))
            left = draw.randint(0, picture.width - side)
            top = draw.randint(0, picture.height - side)
            crop = picture.resize(
                (size, size),
                Image.Resampling.BILINEAR,
                box=(left, top, left + side, top + side),
            )
            out[i] = _normalised(ImageOps.mirror(crop) if draw.random() < 0.5 else crop)
        return out

    return batch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small nets are slower on two threads, and many times so where others use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bf16() -> None:
    """Skips the test where the CPU backend cannot run in bf16."""
    from fastres.backends.cpu import CpuBackend

    if CpuBackend().precision("bf16") is not None:
        pytest.skip("this processor has no bf16 instructions")


@pytest.fixture(scope="module")
def images(photo_batch: Callable[[int, int], Tensor]) -> Tensor:
    return photo_batch(4, 64)


@pytest.fixture(scope="module")
def net(photo_batch: Callable[[int, int], Tensor]) -> nn.Module:
    """A quarter as wide as ResNet-50, one bottleneck a stage, settled."""
    model = models.ResNet(models.Bottleneck, (1, 1, 1, 1), planes=16, num_classes=10, seed=0)
    return models.settle(model, photo_batch(8, 64))


@pytest.fixture(scope="module")
def engine(net: nn.Module, images: Tensor) -> Iterator[fastres.Engine]:
    with fastres.compile(net, images, backend="cpu") as engine:
        yield engine
