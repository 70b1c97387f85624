"""Compiled parts that are well-formed and lie: refused, or of no influence, at once.

Plans and tables are changed as a forger would, who has this library; bench.soak.parts does so at
random.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fastres.backends import parts
from fastres.backends.base import CompiledParts
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.table import Machine, read_table
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping import cross, machine_code
from fastres.backends.triton.shipping.stored import PLANS, write_plans
from fastres.backends.triton.shipping.stored_code import usable_code
from fastres.backends.triton.shipping.stored_kernels import KERNELS, read_code
from fastres.deploy.plans import Plans
from fastres.deploy.triton import TritonEngine
from fastres.errors import ArtifactError
from fastres.graph.ir import Graph
from fastres.options import Options

CPU = torch.device("cpu")
HUGE = (0, -1, 3, 2**31, 2**62)
Change = Callable[[dict[str, Any]], object]
compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter turns the compiler off"
    ),
]


def changed(files: dict[str, bytes], name: str, change: Change) -> dict[str, bytes]:
    content = msgspec.json.decode(files[name])
    change(content)
    return {**files, name: msgspec.json.encode(content)}


def lowered(saved: Any, files: dict[str, bytes], trusted: bool = False) -> TritonExecutable:
    """As on a GPU; the CPU stands for an sm_90."""
    graph, shapes = saved.engine.graph, saved.plan.input_shapes
    return TritonExecutable(graph, saved.engine.options, CPU, shapes, CompiledParts(files, trusted))


def looked_at(saved: Any, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Any:
    """As with `fastres inspect --target`."""
    monkeypatch.setattr(cross, "compiled_plan", lambda *_: pytest.fail("it is compiled anew"))
    options: Options = saved.engine.options
    parts = CompiledParts(files)
    return cross.build(saved.engine.graph, options, saved.plan.input_shapes, parts)


def step_of(plan: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(
        s
        for s in plan["steps"]
        if s["type"] == kind and (kind != "LaunchBoxConv2d" or s["tile"]["split_k"] > 1)
    )


class TestPlans:
    pytestmark = compiles

    @pytest.mark.parametrize(
        "kind", ["LaunchBoxConv2d", "LaunchStemPool", "LaunchChain", "LaunchLinear"]
    )
    def test_tiles_that_no_kernel_has(self, kind: str, bottleneck: Any) -> None:
        """Each of a tile's numbers, which come from the file whether it is trusted or not."""
        files = bottleneck.files
        plan = msgspec.json.decode(files[PLANS])["plans"][0]
        names = [n for n, v in step_of(plan, kind)["tile"].items() if type(v) is int]
        assert len(names) > 3
        for name in names:
            for value in HUGE:

                def change(content: dict[str, Any], name: str = name, value: int = value) -> None:
                    step_of(content["plans"][0], kind)["tile"][name] = value

                if name in ("num_stages", "chunk_stages", "programs_per_sm") and value == 3:
                    continue  # which they may be
                with pytest.raises(ArtifactError, match="cannot be read|that it cannot have|not f"):
                    lowered(bottleneck, changed(files, PLANS, change))

    @pytest.mark.parametrize(
        ("name", "value"), [("num_stages", 9), ("split_k", 48), ("programs_per_sm", 33)]
    )
    def test_what_would_fit_a_convolution_and_takes_more_than_it_may(
        self, name: str, value: int, bottleneck: Any
    ) -> None:
        """48 parts divide the depth; their workspace would be that many times the output."""

        def change(content: dict[str, Any]) -> None:
            step = step_of(content["plans"][0], "LaunchBoxConv2d")
            step["tile"] |= {"num_stages": 1, "last_adds": False, name: value}

        with pytest.raises(ArtifactError, match="expected each to be at least 1, and at most"):
            lowered(bottleneck, changed(bottleneck.files, PLANS, change))

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.update(arena_bytes=2**62),
            lambda p: p.update(dependent=not p["dependent"]),
            lambda p: p.update(allow_tf32=True),
            lambda p: p["steps"].pop(3),
            lambda p: p["steps"].reverse(),
            lambda p: p["steps"].extend(p["steps"] * 5000),
            lambda p: p["places"].update(x={"shape": [2**40], "dtype": "float16", "offset": 0}),
            lambda p: p["places"][p["outputs"][0][0]].update(offset=-16),
            lambda p: p["outputs"].clear(),
            lambda p: p["choices"].pop(),
            lambda p: p["choices"].extend(p["choices"][:1] * 20_000),
            lambda p: p["choices"][0].update(taken="boxes (1,8,16)x64x16 w4 s6 p4, twice as fast"),
            lambda p: p["choices"][0].update(problem="another"),
            lambda p: p["choices"][0].update(nodes=["x"] * 20_000),
            lambda p: p["choices"][0].update(microseconds=-1e300),
            lambda p: p["choices"][0].update(others={str(i): "" for i in range(20_000)}),
            lambda p: p["choices"][0].update(others={"a": "\x1b[2J"}),
            lambda p: p["choices"][0].update(others={"a": "b" * 10**6}),
        ],
    )
    def test_what_does_not_follow_from_the_graph(
        self, change: Change, cifar: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = changed(cifar.files, PLANS, lambda content: change(content["plans"][0]))
        for read in (lambda: lowered(cifar, files), lambda: looked_at(cifar, files, monkeypatch)):
            with pytest.raises(ArtifactError, match="not follow|cannot have|cannot be read"):
                read()

    def test_times_and_what_else_there_was_are_the_files(self, cifar: Any) -> None:
        def change(content: dict[str, Any]) -> None:
            content["plans"][0]["choices"][0] |= {"microseconds": 7.5, "others": {"a": "b"}}

        account = lowered(cifar, changed(cifar.files, PLANS, change)).account()
        assert (account.choices[0].microseconds, account.choices[0].others) == (7.5, {"a": "b"})

    @pytest.mark.parametrize(
        "change",
        [
            lambda kernels: kernels.pop(),
            lambda kernels: kernels.extend(kernels * 20_000),
            lambda kernels: kernels.reverse(),
            lambda kernels: kernels[0].update(kernel="\x1b[2J"),
            lambda kernels: kernels[0].update(tile="1x1x1"),
            lambda kernels: kernels[0].update(nodes=[]),
            lambda kernels: kernels[0].update(registers=256),
            lambda kernels: kernels[0].update(registers=-1),
            lambda kernels: kernels[0].update(spilled=8),
            lambda kernels: kernels[0].update(shared_bytes=2**30),
            lambda kernels: kernels[0].update(instructions={"\x1b[2J": 1}),
            lambda kernels: kernels[0].update(instructions={"HGMMA": 2**62}),
        ],
    )
    def test_kernels_that_are_not_the_plans(
        self, change: Change, cifar: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = cifar.files
        assert looked_at(cifar, files, monkeypatch).account().kernels
        files = changed(files, PLANS, lambda content: change(content["kernels"]))
        with pytest.raises(ArtifactError, match="lists other kernels|cannot be read"):
            looked_at(cifar, files, monkeypatch)

    def test_two_of_one_shape(self, cifar: Any) -> None:
        for name in (PLANS, KERNELS):
            files = changed(cifar.files, name, lambda c: c["plans"].extend(c["plans"]))
            with pytest.raises(ArtifactError, match="two plans are for the same inputs"):
                lowered(cifar, files, trusted=True)

    def test_of_other_shapes_are_no_ones(self, cifar: Any) -> None:
        def change(content: dict[str, Any]) -> None:
            content["plans"][0]["input_shapes"] = [[2**62, -1, 0, 16]]
            content["plans"][0]["arena_bytes"] = -1

        assert lowered(cifar, changed(cifar.files, PLANS, change)).account().choices

    def test_as_much_is_written_as_is_read(
        self, cifar: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = len(write_plans("sm_90", [cifar.plan], ())[PLANS])
        other = msgspec.structs.replace(cifar.plan, input_shapes=((3, 3, 16, 16),))
        monkeypatch.setattr("fastres.backends.triton.shipping.stored.MOST_BYTES", one + one // 2)
        monkeypatch.setattr(parts, "MOST_BYTES", one + one // 2)
        kept = write_plans("sm_90", [other, cifar.plan], ())
        assert kept == write_plans("sm_90", [cifar.plan], ())
        lowered(cifar, kept)
        with pytest.raises(ArtifactError, match="such a part has at most"):
            lowered(cifar, {PLANS: kept[PLANS] + b" " * one})


class TestMachineCode:
    pytestmark = compiles

    def test_without_trust_it_is_not_even_read(self, cifar: Any) -> None:
        for text in (b"", b"[" * 10**6, b"{}"):
            files = {**cifar.files, KERNELS: text}
            code, why = usable_code(CompiledParts(files), "sm_90")
            assert code is None and "left alone" in str(why)
            assert not isinstance(
                lowered(cifar, files)._runner(cifar.plan.input_shapes), DriverRunner
            )

    @pytest.mark.parametrize(
        "change",
        [
            lambda header: header.update(num_warps=10**9),
            lambda header: header.update(num_ctas=0),
            lambda header: header.update(shared_bytes=-1),
            lambda header: header["global_scratch"].update(bytes=2**62),
            lambda header: header["global_scratch"].update(bytes=16, alignment=0),
            lambda header: header["parameters"][0].update(argument=""),
            lambda header: header["parameters"][0].update(part="global scratch"),
        ],
    )
    def test_headers_out_of_range(self, change: Change, cifar: Any) -> None:
        files = changed(cifar.files, KERNELS, lambda c: change(c["kernels"][0]["header"]))
        with pytest.raises(ArtifactError, match="cannot be read: .*(expected|pass on)"):
            read_code(files)

    @pytest.mark.parametrize(
        "change",
        [
            lambda header: header["parameters"][-3].update(argument="other"),
            lambda header: [
                p.update(divisor=16) for p in header["parameters"] if p["type"] == "i32"
            ],
            lambda header: header["global_scratch"].update(bytes=16),
        ],
    )
    def test_headers_that_are_not_their_launches(
        self, change: Change, cifar: Any, fake_driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where there is no Triton to link the plan anew."""
        monkeypatch.setattr(machine_code, "CudaDriver", fake_driver)
        files = changed(cifar.files, KERNELS, lambda c: change(c["kernels"][0]["header"]))
        with pytest.raises(ArtifactError):
            lowered(cifar, files, trusted=True)
        code = read_code(files)
        assert code is not None
        constants = Packed(cifar.engine.graph, torch.float16, CPU)
        driver = fake_driver(list(code.kernels.values()))
        runner = DriverRunner(cifar.plan, code.plans[0], driver, constants, CPU)
        with pytest.raises(ArtifactError, match="not what its kernel takes"), runner.context():
            pass

    @pytest.mark.parametrize(
        "key",
        [
            ("matrix", "w", "w", "w"),
            ("matrix", "w", "p"),
            ("stem", "w"),
            ("grouped", "w", 0, 0),
            ("grouped", "w", 1e308, 1),
            ("products", "b", 1.0, 2.0, 3.0),
            ("scale", "b", "b", None, None, "b"),
            ("bias", "b", 1.0, 2.0),
        ],
    )
    def test_constants_that_no_plan_reads(self, key: Any) -> None:
        constants = {"w": torch.ones(8, 6, 3, 3), "p": torch.ones(4, 6, 1, 1), "b": torch.ones(8)}
        packed = Packed(Graph((), (), (), constants, ""), torch.float16, CPU)
        with pytest.raises(ValueError):
            packed.get(key)


class Gpu:
    """Addresses without memory; the driver refuses more than a GPU has."""

    def __init__(self, driver: Any) -> None:
        self.encode, self.launch, self.taken = driver.encode, driver.launch, 1 << 40

    def allocate(self, size: int) -> int:
        if size > 2**37:
            raise RuntimeError("2 bytes failed: CUDA_ERROR_OUT_OF_MEMORY")
        self.taken += -(-size // 256) * 256
        return self.taken - -(-size // 256) * 256

    def write(self, address: int, array: Any) -> None:
        pass

    def wait(self) -> None:
        pass


class TestDeployed:
    pytestmark = compiles

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            (PLANS, lambda p: p["steps"].pop(0)),
            (PLANS, lambda p: p["steps"][0].update(target="nowhere")),
            (PLANS, lambda p: p["steps"][0].update(folded=True)),
            (PLANS, lambda p: p.update(outputs=[[p["outputs"][0][0], [2**62, 2**62]]])),
            (PLANS, lambda p: p["places"]["x"].update(shape=[2**32, 2**32, 1, 1])),
            (PLANS, lambda p: p["places"]["x"].update(shape=[2, 16, 16, 4])),
            (PLANS, lambda p: p["places"]["x"].update(shape=[-1])),
            (KERNELS, lambda p: p["launches"][0].update(programs=-1)),
            (KERNELS, lambda p: p["launches"][1]["arguments"].update(no_argument=7)),
            (KERNELS, lambda p: p["launches"][1]["arguments"].clear()),
            (KERNELS, lambda p: p["launches"][1]["arguments"]["x"].update(shape=[2**20] * 4)),
        ],
    )
    def test_plans_that_lie(self, name: str, change: Change, cifar: Any, fake_driver: Any) -> None:
        def first(content: dict[str, Any]) -> None:
            change(content["plans"][0])

        assert self.engine(cifar, cifar.files, fake_driver).ranges
        with pytest.raises(ArtifactError):
            self.engine(cifar, changed(cifar.files, name, first), fake_driver)

    def engine(self, cifar: Any, files: dict[str, bytes], fake_driver: Any) -> TritonEngine:
        code = read_code(files)
        assert code is not None
        plans = parts.read_part(PLANS, files[PLANS], Plans).plans
        constants = cifar.engine.graph.constants
        gpu = Gpu(fake_driver(list(code.kernels.values())))
        return TritonEngine(code, plans, lambda n: constants[n].numpy(), "fp16", gpu)


@pytest.mark.parametrize("time", ["-1", "0", "1e300"])
def test_times_in_tables_are_times(time: str, tmp_path: Path) -> None:
    machine = Machine("a GPU", 1, "3", "digest")
    entry = f'{{"tile":{{}},"microseconds":{time}}}'
    text = f'{{"machine":{msgspec.json.encode(machine).decode()},"entries":{{"a":{entry}}}}}'
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ArtifactError, match="is no table of tiles"):
        read_table(tmp_path / "table.json", machine)


def test_a_table_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "table.json")
    with pytest.raises(ArtifactError, match="no regular file"):
        read_table(tmp_path / "table.json", Machine("a GPU", 1, "3", "digest"))
