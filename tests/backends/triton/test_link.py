"""Linked plans, and running them: against the launches that the JIT would get, on a fake driver.

The fake driver launches nothing; it writes down what it is asked. No GPU has run machine code of a
plan yet: `test_equals_the_jit_bit_for_bit` waits for one.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

import fastres
from fastres.backends.base import CompiledParts
from fastres.backends.triton import machine_code
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.bind import bind
from fastres.backends.triton.contexts import views
from fastres.backends.triton.link import Descriptor, InArena, InConstant, LinkedPlan, check_linked
from fastres.backends.triton.link_build import digest_of, link
from fastres.backends.triton.pack import Packed
from fastres.backends.triton.plan import LaunchBoxConv2d, LaunchChain, LoadInput, Plan
from fastres.backends.triton.run_driver import _BEFORE, DriverRunner
from fastres.backends.triton.stored import recorded
from fastres.backends.triton.stored_code import (
    CODE,
    KERNELS,
    MachineCode,
    read_code,
    usable_code,
    write_code,
)
from fastres.errors import ArtifactError
from fastres.kernels.binary import KernelBinary
from fastres.kernels.binary_build import arguments_of
from fastres.kernels.cost import Target
from fastres.kernels.driver import DriverUnavailable
from fastres.kernels.launch import Launch
from fastres.kernels.space_to_depth import MARGIN
from fastres.kernels.tensor_map import TensorMap

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter turns the compiler off"
    ),
]
CPU, META = torch.device("cpu"), torch.device("meta")
TARGET = Target.typical(90)


class FakeDriver:
    """Writes down what is launched; a tensor map's bytes are a digest of what it says."""

    def __init__(self, kernels: Sequence[KernelBinary], device: torch.device = CPU) -> None:
        self.headers = tuple(kernel.header for kernel in kernels)
        self.launched: list[tuple[str, int, list[bytes]]] = []

    def encode(self, tensor: TensorMap) -> bytes:
        return encoded(tensor)

    def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
        self.launched.append((self.headers[kernel].kernel, programs, list(arguments)))


def encoded(tensor: TensorMap) -> bytes:
    return hashlib.sha512(repr(tensor).encode()).digest() * 2


@cache
def cifar() -> fastres.Engine:
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    return fastres.compile(net, fastres.Input((2, 3, 16, 16)), target="sm_90", precision="fp16")


@cache
def bottleneck() -> fastres.Engine:
    """Boxes, a merged projection, a split depth and a chain; a batch that no box divides."""
    net = fastres.models.ResNet(
        fastres.models.Bottleneck, (2, 1, 1, 1), version="v1.5", num_classes=16, planes=16, seed=0
    )
    graph = fastres.build(net.state_dict(), version="v1.5", inputs=fastres.Input((3, 3, 32, 32)))
    return fastres.compile(graph, target="sm_90", precision="fp16")


@pytest.fixture(scope="module", params=[cifar, bottleneck], ids=["cifar", "bottleneck"])
def engine(request: pytest.FixtureRequest) -> fastres.Engine:
    made: fastres.Engine = request.param()
    return made


@pytest.fixture(scope="module")
def small() -> fastres.Engine:
    return cifar()


def plan_of(engine: fastres.Engine) -> Plan:
    return next(iter(recorded(engine.compiled_parts(), "sm_90").values()))


def code_of(engine: fastres.Engine) -> MachineCode:
    code = read_code(engine.compiled_parts())
    assert code is not None
    return code


def launches(plan: Plan, arena: torch.Tensor, constants: Packed) -> list[Launch]:
    tensors = views(plan, arena)
    return [
        launch
        for step in plan.steps
        for launch in bind(step, tensors, constants, TARGET, plan.allow_tf32)
    ]


def runner_of(engine: fastres.Engine) -> tuple[DriverRunner, FakeDriver, Packed]:
    code, constants = code_of(engine), Packed(engine.graph, torch.float16, CPU)
    driver = FakeDriver(list(code.kernels.values()))
    runner = DriverRunner(plan_of(engine), code.plans[0], driver, constants, CPU)
    return runner, driver, constants


def test_the_bottleneck_net_has_every_form() -> None:
    steps = plan_of(bottleneck()).steps
    boxes = [step for step in steps if isinstance(step, LaunchBoxConv2d)]
    assert any(isinstance(step, LaunchChain) for step in steps)
    assert any(step.projection for step in boxes) and any(step.workspace for step in boxes)


def test_the_driver_gets_what_the_jit_would_get(engine: fastres.Engine) -> None:
    """Kernels, grids, and every byte of every parameter, tensor maps included."""
    runner, driver, constants = runner_of(engine)
    runner.run([torch.zeros(runner.plan.input_shapes[0])])
    with runner.context() as context:
        expected = []
        for launch in launches(runner.plan, context.arena, constants):
            binary = code_of(engine).kernels[digest_of(launch)]
            packed = arguments_of(launch, binary, encode=encoded)
            expected.append((launch.kernel.__name__, launch.programs, packed))
    assert driver.launched == expected


def test_offsets_are_those_of_the_places(engine: fastres.Engine) -> None:
    plan, linked = plan_of(engine), code_of(engine).plans[0]
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8)
    bound = launches(plan, arena, Packed(engine.graph, torch.float16, CPU))
    starts = {place.offset for place in plan.places.values()}
    for launch, written in zip(bound, linked.launches, strict=True):
        for name, given in written.arguments.items():
            tensor = launch.arguments[name]
            if isinstance(given, Descriptor):
                given, tensor = given.base, tensor.base
            if isinstance(given, InArena):
                assert given.offset == tensor.data_ptr() - arena.data_ptr()
                assert given.offset in starts
    assert {launch.step for launch in linked.launches} == {
        i for i, step in enumerate(plan.steps) if not isinstance(step, LoadInput)
    }


def test_survives_json_and_is_linked_anew_to_the_same(engine: fastres.Engine) -> None:
    code, files = code_of(engine), engine.compiled_parts()
    linked = code.plans[0]
    assert msgspec.json.decode(msgspec.json.encode(linked), type=LinkedPlan) == linked
    described = Packed(engine.graph, torch.float16, META)
    assert link(plan_of(engine), described, TARGET, code.headers) == linked
    assert write_code("sm_90", code.kernels, code.plans) == {n: files[n] for n in (KERNELS, CODE)}


def test_saved_again_after_loading_it_is_the_same_file(
    small: fastres.Engine, tmp_path: Path
) -> None:
    small.save(tmp_path / "a.fastres")
    fastres.load(tmp_path / "a.fastres", target="sm_90").save(tmp_path / "b.fastres")
    assert (tmp_path / "a.fastres").read_bytes() == (tmp_path / "b.fastres").read_bytes()


def test_needs_no_triton(small: fastres.Engine, tmp_path: Path) -> None:
    small.save(tmp_path / "a.fastres")
    code = """
import sys, torch
from fastres import artifact
from fastres.backends.triton.pack import Packed
from fastres.backends.triton.run_driver import DriverRunner
from fastres.backends.triton.stored import recorded
from fastres.backends.triton.stored_code import read_code
contents = artifact.read(sys.argv[1])
(plan,) = recorded(contents.compiled, "sm_90").values()
found = read_code(contents.compiled)
class Fake:
    headers = tuple(found.headers.values())
    launched = 0
    def encode(self, tensor):
        return bytes(128)
    def launch(self, kernel, arguments, programs):
        self.launched += 1
fake, cpu = Fake(), torch.device("cpu")
packed = Packed(contents.graph, torch.float16, cpu)
runner = DriverRunner(plan, found.plans[0], fake, packed, cpu)
print(list(runner.run([torch.zeros(2, 3, 16, 16)])[0].shape), fake.launched)
print("triton" in sys.modules)
"""
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "a.fastres")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[2, 10] 9", "False"], done.stderr


def test_inputs_are_brought_in_by_copies(small: fastres.Engine) -> None:
    runner, _, _ = runner_of(small)
    plain, x = LoadInput("x", "x", "x"), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    target = torch.full((3, 6, 8, 3), float("nan"), dtype=torch.float16)
    runner.load(plain, x, target)
    assert torch.equal(target[:2].permute(0, 3, 1, 2), x.float().half())
    assert target[2].isnan().all()
    rows = torch.zeros(3, 4, dtype=torch.float16)
    runner.load(plain, torch.ones(2, 4), rows)
    assert rows.tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4]


def test_folded_inputs_get_their_margin(small: fastres.Engine) -> None:
    runner, _, _ = runner_of(small)
    x = torch.randn(2, 3, 6, 8).half()
    target = torch.full((3, 6, 7, 16), float("nan"), dtype=torch.float16)
    runner.load(LoadInput("x", "x", "x", folded=True), x, target)
    expected = torch.zeros(2, 6, 7, 16, dtype=torch.float16)
    for c, i, j in ((c, i, j) for c in range(3) for i in range(6) for j in range(8)):
        channel = 4 * c + 2 * (i % 2) + j % 2
        expected[:, MARGIN[0] + i // 2, MARGIN[0] + j // 2, channel] = x[:, c, i, j]
    assert MARGIN[0] == _BEFORE and torch.equal(target[:2], expected)


def test_profile_knows_work_and_traffic(small: fastres.Engine) -> None:
    runner, _, _ = runner_of(small)
    times = runner.profile([torch.zeros(2, 3, 16, 16)])
    assert [time.name for time in times][:2] == ["x", "conv1"]
    assert times[1].flop == 2 * 2 * 16 * 16 * 27 * 16 and times[1].ran_as == "LaunchConv2d"


def changed(linked: LinkedPlan, launch: int = 1, **fields: Any) -> LinkedPlan:
    """With other fields of one launch."""
    every = list(linked.launches)
    every[launch] = replace(every[launch], **fields)
    return replace(linked, launches=tuple(every))


def with_arguments(linked: LinkedPlan, change: Callable[[str, Any], Any]) -> LinkedPlan:
    given = {name: change(name, value) for name, value in linked.launches[1].arguments.items()}
    return changed(linked, arguments=given)


def moved(kind: type, offset: int) -> Callable[[str, Any], Any]:
    def move(name: str, value: Any) -> Any:
        if isinstance(value, Descriptor):
            return replace(value, base=move(name, value.base))
        return replace(value, offset=offset) if isinstance(value, kind) else value

    return move


def larger(name: str, value: Any) -> Any:
    if not isinstance(value, Descriptor):
        return value
    return replace(value, shape=(10**6, *value.shape[1:]))


def unknown(name: str, value: Any) -> Any:
    return replace(value, key=("bias", "nobody")) if isinstance(value, InConstant) else value


BAD_LINKS = [
    (lambda x: replace(x, arena_bytes=2**40), "linked for inputs"),
    (lambda x: replace(x, input_shapes=((1, 3, 16, 16),)), "linked for inputs"),
    (lambda x: changed(x, step=99), "is of step 99 and kernel"),
    (lambda x: changed(x, kernel=-1), "kernel -1; there are"),
    (lambda x: changed(x, programs=-1), "has -1 programs"),
    (lambda x: with_arguments(x, moved(InArena, 2**40)), "in the arena, which has"),
    (lambda x: with_arguments(x, moved(InArena, -16)), "at -16 in the arena"),
    (lambda x: with_arguments(x, moved(InArena, 8)), "memory at 8 in the arena, no multiple"),
    (lambda x: with_arguments(x, moved(InConstant, 2**20)), "in the constant"),
    (lambda x: with_arguments(x, larger), "spans .* bytes of a tensor of"),
    (lambda x: with_arguments(x, unknown), "stands for no constants|is not known"),
]
BAD_IDS = "arena shapes step kernel grid beyond before odd constant descriptor key".split()


@pytest.mark.parametrize(("change", "message"), BAD_LINKS, ids=BAD_IDS)
def test_a_linked_plan_stays_within_its_memory(
    small: fastres.Engine, change: Callable[[LinkedPlan], LinkedPlan], message: str
) -> None:
    code, plan = code_of(small), plan_of(small)
    constants = Packed(small.graph, torch.float16, CPU)
    weights = {key: constants.get(key) for key in code.plans[0].keys()}
    headers = list(code.headers.values())
    check_linked(code.plans[0], plan, headers, weights)
    bad = change(code.plans[0])
    with pytest.raises(ValueError, match=message):
        check_linked(bad, plan, headers, weights)
    driver = FakeDriver(list(code.kernels.values()))
    with pytest.raises(ArtifactError, match="does not fit the plan: .*"):
        DriverRunner(plan, bad, driver, constants, CPU)


def test_tensors_of_unknown_memory_are_refused(
    small: fastres.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = Packed(small.graph, torch.float16, META)
    monkeypatch.setattr(Packed, "made", lambda self: {})
    with pytest.raises(ValueError, match="outside of the arena and the packed constants"):
        link(plan_of(small), described, TARGET, code_of(small).headers)
    with pytest.raises(ValueError, match="there is no machine code of"):
        link(plan_of(small), described, TARGET, {})


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        content = msgspec.json.decode(files[KERNELS])
        change(content)
        files[KERNELS] = msgspec.json.encode(content)

    return apply


BAD_FILES = [
    (lambda f: f.pop(CODE), "belong together; one is missing"),
    (lambda f: f.pop(KERNELS), "belong together; one is missing"),
    (lambda f: f.update({CODE: f[CODE][:-1]}), "cannot be read: .*(digest|bytes, expected)"),
    (lambda f: f.update({CODE: f[CODE] + b"\0"}), "bytes, expected"),
    (lambda f: f.update({CODE: f[CODE][:99] + b"?" + f[CODE][100:]}), "has the digest"),
    (lambda f: f.update({KERNELS: f[KERNELS][:-9]}), "cannot be read"),
    (edited(lambda c: c.update(news=1)), "unknown field `news`"),
    (edited(lambda c: c.update(schema=2)), "schema"),
    (edited(lambda c: c["kernels"][1].update(offset=0)), "lies at 0, expected"),
    (edited(lambda c: c["kernels"][1].update(size=-1)), "cannot be read"),
    (edited(lambda c: c["kernels"][1].update(key=c["kernels"][0]["key"])), "have one key"),
    (edited(lambda c: c["kernels"][0]["header"]["parameters"][0].update(type="?")), "pass on"),
    (edited(lambda c: c["plans"][0]["launches"][0]["arguments"].update(x="y")), "cannot be read"),
]
FILE_IDS = "no-code no-json cut longer flipped json field schema gap size key type text".split()


@pytest.mark.parametrize(("damage", "message"), BAD_FILES, ids=FILE_IDS)
def test_damaged_files_are_refused(
    small: fastres.Engine, damage: Callable[[dict[str, bytes]], object], message: str
) -> None:
    files = small.compiled_parts()
    damage(files)
    with pytest.raises(ArtifactError, match=message):
        read_code(files)


SHAPES = ((2, 3, 16, 16),)


def executable(
    engine: fastres.Engine, parts: CompiledParts, device: torch.device = CPU
) -> TritonExecutable:
    """As when an engine is loaded; the CPU stands for an sm_90."""
    return TritonExecutable(engine.graph, engine.options, device, SHAPES, parts)


def test_trusted_machine_code_runs(small: fastres.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "CudaDriver", FakeDriver)
    monkeypatch.setattr("fastres.backends.triton.backend._is_gpu", lambda device: True)
    files = small.compiled_parts()
    made = executable(small, CompiledParts(files, trusted=True))
    runner = made._runner(SHAPES)
    assert isinstance(runner, DriverRunner) and made.account().notes == ()
    assert made.run([torch.zeros(SHAPES[0])])[0].shape == (2, 10)
    again = made.compiled()
    assert {name: again[name] for name in (KERNELS, CODE)} == {
        name: files[name] for name in (KERNELS, CODE)
    }


@pytest.mark.parametrize(
    ("trusted", "change", "message"),
    [
        (False, lambda f: None, "left alone: .*trust_engine=True"),
        (True, lambda f: None, "runs on NVIDIA GPUs, not on cpu"),
        (True, edited(lambda c: c.update(sources="other")), "another version of the kernels"),
    ],
    ids=["not trusted", "no driver", "other sources"],
)
def test_otherwise_kernels_are_compiled_and_a_note_says_so(
    small: fastres.Engine, trusted: bool, change: Callable[[Any], None], message: str
) -> None:
    files = small.compiled_parts()
    change(files)
    made = executable(small, CompiledParts(files, trusted))
    assert not isinstance(made._runner(SHAPES), DriverRunner)
    (note,) = made.account().notes
    assert re.search(message, note)


def test_machine_code_that_does_not_launch_gives_way(
    small: fastres.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FakeDriver):
        def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
            raise RuntimeError("loading failed: CUDA_ERROR_UNSUPPORTED")

    monkeypatch.setattr(machine_code, "CudaDriver", Broken)
    made = executable(small, CompiledParts(small.compiled_parts(), trusted=True))
    assert not isinstance(made._runner(SHAPES), DriverRunner)
    assert made.account().notes == (
        "machine code not used, compiled here instead: conv1: loading failed: "
        "CUDA_ERROR_UNSUPPORTED",
    )


def test_other_architectures_and_other_shapes_are_compiled(
    small: fastres.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "CudaDriver", FakeDriver)
    parts = CompiledParts(small.compiled_parts(), trusted=True)
    assert usable_code(parts, "sm_80") == (None, None)
    assert usable_code(CompiledParts(), "sm_90") == (None, None)
    made = executable(small, parts)
    assert not isinstance(made._runner(((1, 3, 16, 16),)), DriverRunner)
    assert made.account().notes == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["plans"][0]["launches"][0].update(programs=1),
        lambda c: c["plans"][0]["launches"][1]["arguments"].update(TILES=10**6),
        lambda c: c["plans"][0]["launches"].pop(),
        lambda c: c["plans"][0]["launches"][0].update(kernel=3),
        lambda c: c["kernels"][0].update(key="0" * 32),
        lambda c: c["kernels"][0]["header"]["constants"].update(BLOCK_M=1),
    ],
    ids=["grid", "number", "launch", "kernel", "key", "constants"],
)
def test_altered_launches_are_refused(
    small: fastres.Engine, change: Callable[[dict[str, Any]], object], monkeypatch: Any
) -> None:
    monkeypatch.setattr(machine_code, "CudaDriver", FakeDriver)
    files = small.compiled_parts()
    edited(change)(files)
    with pytest.raises(ArtifactError, match="other arguments than follow|not go with its plan"):
        executable(small, CompiledParts(files, trusted=True))


def test_the_driver_wants_a_gpu() -> None:
    with pytest.raises(DriverUnavailable, match="not on cpu"):
        machine_code.CudaDriver([], CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_equals_the_jit_bit_for_bit(tmp_path: Path, cuda_graph: bool) -> None:
    major, minor = torch.cuda.get_device_capability()
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    net = fastres.models.settle(net, torch.randn(8, 3, 16, 16))
    shape = fastres.Input(SHAPES[0])
    engine = fastres.compile(
        net, shape, target=f"sm_{major}{minor}", precision="fp16", cuda_graph=cuda_graph
    )
    engine.save(tmp_path / "a.fastres")
    x = torch.randn(SHAPES[0], device="cuda")
    jit = fastres.load(tmp_path / "a.fastres")
    driven = fastres.load(tmp_path / "a.fastres", trust_engine=True)
    assert any("left alone" in note for note in jit.info.account.notes)
    assert driven.info.account.notes == ()
    executable = driven._lowered.executable
    assert isinstance(executable, TritonExecutable)
    assert isinstance(executable._runner(SHAPES), DriverRunner)
    for _ in range(2):  # the second one is replayed
        assert torch.equal(driven(x), jit(x))
    assert torch.equal(driven(x[:1]), jit(x[:1]))
