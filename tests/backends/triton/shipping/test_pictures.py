"""Decoded pictures in machine code: its first launch reads them where the caller has them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

import fastres
from fastres import Preprocess
from fastres.backends.base import CompiledParts
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.plan import LoadInput, Plan
from fastres.backends.triton.running.link import check_linked
from fastres.backends.triton.running.linked import Pictures
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping import machine_code
from fastres.backends.triton.shipping.link_build import digest_of, link, numbered
from fastres.backends.triton.shipping.stored import recorded
from fastres.backends.triton.shipping.stored_kernels import read_code
from fastres.kernels.compiled.build import arguments_of
from fastres.kernels.cost import Target

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CPU, META, TARGET = torch.device("cpu"), torch.device("meta"), Target.typical(90)
compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(INTERPRETING, reason="the interpreter turns the compiler off"),
]


def pictures(n: int, h: int, w: int) -> Tensor:
    """Noise of every value, framed in black: what a padding with bytes would mistake."""
    x = torch.randint(0, 256, (n, h, w, 3), generator=torch.Generator().manual_seed(n))
    x[:, :3], x[:, :, -3:] = 0, 0
    return x.to(torch.uint8)


@pytest.fixture(scope="module")
def crossed() -> fastres.Engine:
    """For sm_90 and a batch of 3."""
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    shape = fastres.Input((3, 3, 16, 16))
    p = Preprocess(mean=(0.6, 0.3, 0.4), std=(0.2, 0.3, 0.25))
    return fastres.compile(
        net, shape, target="sm_90", precision="fp16", preprocess=p, io_dtype=torch.uint8
    )


def plan_of(engine: fastres.Engine) -> Plan:
    (plan,) = recorded(engine.compiled_parts().files, "sm_90").values()
    return plan


class TestMachineCode:
    pytestmark = compiles

    def test_the_load_is_compiled(self, crossed: fastres.Engine) -> None:
        load = crossed.info.account.kernels[0]
        assert (load.kernel, load.nodes, load.spilled) == ("layout", ("x.normalize",), 0)
        code = read_code(crossed.compiled_parts().files)
        assert code is not None
        first = code.plans[0].launches[0]
        assert first.step == 0 and first.arguments["x_ptr"] == Pictures()
        described = Packed(crossed.graph, torch.float16, META)
        assert link(plan_of(crossed), described, TARGET, code.headers) == code.plans[0]

    @pytest.mark.parametrize("n", [1, 3])
    def test_the_driver_gets_what_the_jit_would_get(
        self, crossed: fastres.Engine, fake_driver: Any, n: int
    ) -> None:
        plan, code = plan_of(crossed), read_code(crossed.compiled_parts().files)
        assert code is not None
        driver = fake_driver(list(code.kernels.values()))
        constants = Packed(crossed.graph, torch.float16, CPU)
        runner = DriverRunner(plan, code.plans[0], driver, constants, CPU)
        x = pictures(n, 16, 16)
        assert runner.run(crossed.planar((x,)))[0].shape == (n, 10)
        with runner.context() as context:
            load, *others = numbered(plan, context.arena, constants, TARGET)
            expected = []
            for _, launch in others:
                binary = code.kernels[digest_of(launch)]
                packed = arguments_of(launch, binary, encode=driver.encode)
                expected.append((launch.kernel.__name__, launch.programs, packed))
            assert driver.launched[1:] == expected
            binary = code.kernels[digest_of(load[1])]
            packed = arguments_of(load[1], binary, encode=driver.encode)
        name, programs, given = driver.launched[0]
        assert (name, programs * 3) == (load[1].kernel.__name__, load[1].programs * n)
        assert given[1:] == packed[1:]  # the first is where the caller's pictures lie

    @pytest.mark.parametrize("flip", [False, True], ids=["RGB", "BGR"])
    def test_the_kernel_finds_pictures_packed_and_aligned(
        self, crossed: fastres.Engine, fake_driver: Any, flip: bool
    ) -> None:
        class Reading(fake_driver):  # type: ignore[misc]
            def launch(self, kernel: int, arguments: Any, programs: int) -> None:
                if self.headers[kernel].kernel == "_layout_kernel":
                    address = int.from_bytes(arguments[0], "little")
                    found.append(ctypes.string_at(address, 3 * 16 * 16 * 3))
                    assert address % 16 == 0

        found: list[bytes] = []
        plan, code = plan_of(crossed), read_code(crossed.compiled_parts().files)
        assert code is not None
        load, *others = plan.steps
        assert isinstance(load, LoadInput) and load.normalize is not None
        load = replace(load, normalize=replace(load.normalize, flip=flip))
        constants = Packed(crossed.graph, torch.float16, CPU)
        driver = Reading(list(code.kernels.values()))
        steps = replace(plan, steps=(load, *others))
        runner = DriverRunner(steps, code.plans[0], driver, constants, CPU)
        x = pictures(3, 16, 16)
        wide = torch.zeros(3, 16, 17, 3, dtype=torch.uint8)
        odd = torch.zeros(x.numel() + 1, dtype=torch.uint8)[1:].view(x.shape)
        for given in (x, wide[:, :, 1:].copy_(x), odd.copy_(x)):
            runner.run(crossed.planar((given,)))
        assert found == [(x.flip(3) if flip else x).numpy().tobytes()] * 3

    def test_trusted_machine_code_runs(
        self, crossed: fastres.Engine, monkeypatch: pytest.MonkeyPatch, fake_driver: Any
    ) -> None:
        monkeypatch.setattr(machine_code, "CudaDriver", fake_driver)
        monkeypatch.setattr("fastres.backends.triton.backend._is_gpu", lambda device: True)
        parts = CompiledParts(crossed.compiled_parts().files, trusted=True)
        shapes = ((3, 3, 16, 16),)
        made = TritonExecutable(crossed.graph, crossed.options, CPU, shapes, parts)
        assert isinstance(made._runner(shapes), DriverRunner) and made.account().notes == ()

    def test_a_load_that_does_not_launch_gives_way(
        self, crossed: fastres.Engine, monkeypatch: pytest.MonkeyPatch, fake_driver: Any
    ) -> None:
        class Broken(fake_driver):  # type: ignore[misc]
            def launch(self, kernel: int, arguments: Any, programs: int) -> None:
                if kernel == 0:
                    raise RuntimeError("CUDA_ERROR_UNSUPPORTED")

        monkeypatch.setattr(machine_code, "CudaDriver", Broken)
        parts = CompiledParts(crossed.compiled_parts().files, trusted=True)
        shapes = ((3, 3, 16, 16),)
        made = TritonExecutable(crossed.graph, crossed.options, CPU, shapes, parts)
        assert not isinstance(made._runner(shapes), DriverRunner)
        assert "x.normalize: CUDA_ERROR_UNSUPPORTED" in made.account().notes[0]

    def test_pictures_elsewhere_are_refused(self, crossed: fastres.Engine) -> None:
        plan, code = plan_of(crossed), read_code(crossed.compiled_parts().files)
        assert code is not None
        linked, headers = code.plans[0], list(code.headers.values())
        constants = Packed(crossed.graph, torch.float16, CPU)
        weights = {key: constants.get(key) for key in linked.keys()}
        check_linked(linked, plan, headers, weights)
        first, *rest = linked.launches
        with pytest.raises(ValueError, match="0 launches bring the pictures of x.normalize in"):
            check_linked(replace(linked, launches=tuple(rest)), plan, headers, weights)
        without = replace(first, arguments={**first.arguments, "x_ptr": None})
        moved = replace(rest[0], arguments={**rest[0].arguments, "x_ptr": Pictures()})
        for launches in ((without, *rest), (first, moved, *rest[1:])):
            with pytest.raises(ValueError, match="reads pictures, or does not"):
                check_linked(replace(linked, launches=launches), plan, headers, weights)

    def test_saved_again_it_is_the_same_file(self, crossed: fastres.Engine, tmp_path: Path) -> None:
        crossed.save(tmp_path / "a.fastres")
        loaded = fastres.load(tmp_path / "a.fastres", target="sm_90")
        assert loaded.io_dtype == torch.uint8
        loaded.save(tmp_path / "b.fastres")
        assert (tmp_path / "a.fastres").read_bytes() == (tmp_path / "b.fastres").read_bytes()
