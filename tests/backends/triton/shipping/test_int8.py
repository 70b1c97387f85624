"""Kernels of 8 bits, compiled for GPUs that are not here: every product is one of 8 bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import fastres

PhotoBatch = Callable[[int, int], Tensor]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(INTERPRETING, reason="the interpreter turns the compiler off"),
]


def cifar(images: Tensor, **more: Any) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0, **more), images)


@pytest.mark.parametrize(
    ("target", "wanted", "banned"),
    [("sm_80", "IMMA", "HMMA"), ("sm_90", "IGMMA", "IMMA"), ("sm_120", "IMMA", "HMMA")],
)
class TestBuilds:
    pytestmark = compiles

    def test_every_product_is_one_of_integers(
        self, photo_batch: PhotoBatch, target: str, wanted: str, banned: str
    ) -> None:
        images = photo_batch(8, 32)
        net = cifar(images)
        kept = "layer2.0.conv1"
        table = fastres.quantize(net, images, algorithm="mse", ignored=[kept])
        engine = fastres.compile(
            net, fastres.Input((8, 3, 32, 32)), target=target, calibration=table
        )
        kernels = engine.info.account.kernels
        products = [k for k in kernels if k.kernel.startswith("conv2d") and kept not in k.nodes]
        assert len(products) >= 4
        for kernel in products:
            assert wanted in kernel.instructions and banned not in kernel.instructions
        assert all(kernel.spilled == 0 for kernel in kernels)
        assert [node.name for node in engine.info.not_quantised] == [kept]


class TestFp8:
    @pytest.mark.compile
    @pytest.mark.skipif(INTERPRETING, reason="the interpreter turns the compiler off")
    @pytest.mark.parametrize(("target", "wanted"), [("sm_89", "QMMA"), ("sm_90", "QGMMA")])
    def test_builds(self, photo_batch: PhotoBatch, target: str, wanted: str) -> None:
        images = photo_batch(8, 32)
        engine = fastres.compile(
            cifar(images),
            fastres.Input((8, 3, 32, 32)),
            target=target,
            precision="fp8",
            calibration=[images],
        )
        kernels = engine.info.account.kernels
        products = [k for k in kernels if k.kernel.startswith("conv2d")]
        assert len(products) >= 4 and all(wanted in k.instructions for k in products)
        assert all(k.spilled == 0 for k in kernels)
        assert engine.info.not_quantised == () and "fp8" in engine.info.precisions
