"""Linked plans, and running them: against the launches that the JIT would get, on a fake driver.

The fake driver launches nothing; it writes down what it is asked. No GPU has run machine code of a
plan yet: `test_machine_code.py` has a test that waits for one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

import fastres
from fastres.backends.triton.planning.plan import LaunchBoxConv2d, LaunchChain, LoadInput, Plan
from fastres.backends.triton.running.bind import bind
from fastres.backends.triton.running.contexts import views
from fastres.backends.triton.running.link import check_linked
from fastres.backends.triton.running.linked import Descriptor, InArena, InConstant, LinkedPlan
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping.link_build import digest_of, link
from fastres.backends.triton.shipping.stored_code import write_code
from fastres.backends.triton.shipping.stored_kernels import CODE, KERNELS
from fastres.errors import ArtifactError
from fastres.kernels.compiled.build import arguments_of
from fastres.kernels.cost import Target
from fastres.kernels.folding import MARGIN
from fastres.kernels.launch import Launch

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter turns the compiler off"
    ),
]
CPU, META = torch.device("cpu"), torch.device("meta")
TARGET = Target.typical(90)


@pytest.fixture(params=["cifar", "bottleneck"])
def built(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def launches(plan: Plan, arena: torch.Tensor, constants: Packed) -> list[Launch]:
    tensors = views(plan, arena)
    return [
        launch for step in plan.steps for launch in bind(plan, step, tensors, constants, TARGET)
    ]


def runner_of(built: Any, fake_driver: Any) -> tuple[DriverRunner, Any, Packed]:
    constants = Packed(built.engine.graph, torch.float16, CPU)
    driver = fake_driver(list(built.code.kernels.values()))
    runner = DriverRunner(built.plan, built.code.plans[0], driver, constants, CPU)
    return runner, driver, constants


def test_the_bottleneck_net_has_every_form(bottleneck: Any) -> None:
    steps = bottleneck.plan.steps
    boxes = [step for step in steps if isinstance(step, LaunchBoxConv2d)]
    assert any(isinstance(step, LaunchChain) for step in steps)
    assert any(step.projection for step in boxes) and any(step.workspace for step in boxes)


def test_the_driver_gets_what_the_jit_would_get(built: Any, fake_driver: Any) -> None:
    """Kernels, grids, and every byte of every parameter, tensor maps included."""
    runner, driver, constants = runner_of(built, fake_driver)
    runner.run([torch.zeros(runner.plan.input_shapes[0])])
    with runner.context() as context:
        expected = []
        for launch in launches(runner.plan, context.arena, constants):
            binary = built.code.kernels[digest_of(launch)]
            packed = arguments_of(launch, binary, encode=driver.encode)
            expected.append((launch.kernel.__name__, launch.programs, packed))
    assert driver.launched == expected


def test_offsets_are_those_of_the_places(built: Any) -> None:
    plan, linked = built.plan, built.code.plans[0]
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8)
    bound = launches(plan, arena, Packed(built.engine.graph, torch.float16, CPU))
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


def test_survives_json_and_is_linked_anew_to_the_same(built: Any) -> None:
    code, files = built.code, built.files
    linked = code.plans[0]
    assert msgspec.json.decode(msgspec.json.encode(linked), type=LinkedPlan) == linked
    described = Packed(built.engine.graph, torch.float16, META)
    assert link(built.plan, described, TARGET, code.headers) == linked
    assert write_code("sm_90", code.kernels, code.plans) == {n: files[n] for n in (KERNELS, CODE)}


def test_saved_again_after_loading_it_is_the_same_file(cifar: Any, tmp_path: Path) -> None:
    cifar.engine.save(tmp_path / "a.fastres")
    fastres.load(tmp_path / "a.fastres", target="sm_90").save(tmp_path / "b.fastres")
    assert (tmp_path / "a.fastres").read_bytes() == (tmp_path / "b.fastres").read_bytes()


def test_needs_no_triton(cifar: Any, tmp_path: Path) -> None:
    cifar.engine.save(tmp_path / "a.fastres")
    code = """
import sys, torch
from fastres import artifact
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping.stored import recorded
from fastres.backends.triton.shipping.stored_kernels import read_code
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


def test_inputs_are_brought_in_by_copies(cifar: Any, fake_driver: Any) -> None:
    runner, _, _ = runner_of(cifar, fake_driver)
    plain, x = LoadInput("x", "x", "x"), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    target = torch.full((3, 6, 8, 3), float("nan"), dtype=torch.float16)
    runner.load(plain, x, target)
    assert torch.equal(target[:2].permute(0, 3, 1, 2), x.float().half())
    assert target[2].isnan().all()
    rows = torch.zeros(3, 4, dtype=torch.float16)
    runner.load(plain, torch.ones(2, 4), rows)
    assert rows.tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4]


def test_folded_inputs_get_their_margin(cifar: Any, fake_driver: Any) -> None:
    runner, _, _ = runner_of(cifar, fake_driver)
    x = torch.randn(2, 3, 6, 8).half()
    target = torch.full((3, 6, 7, 16), float("nan"), dtype=torch.float16)
    runner.load(LoadInput("x", "x", "x", folded=True), x, target)
    expected = torch.zeros(2, 6, 7, 16, dtype=torch.float16)
    for c, i, j in ((c, i, j) for c in range(3) for i in range(6) for j in range(8)):
        channel = 4 * c + 2 * (i % 2) + j % 2
        expected[:, MARGIN[0] + i // 2, MARGIN[0] + j // 2, channel] = x[:, c, i, j]
    assert torch.equal(target[:2], expected)


def test_profile_knows_work_and_traffic(cifar: Any, fake_driver: Any) -> None:
    runner, _, _ = runner_of(cifar, fake_driver)
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
    cifar: Any, fake_driver: Any, change: Callable[[LinkedPlan], LinkedPlan], message: str
) -> None:
    code, plan = cifar.code, cifar.plan
    constants = Packed(cifar.engine.graph, torch.float16, CPU)
    weights = {key: constants.get(key) for key in code.plans[0].keys()}
    headers = list(code.headers.values())
    check_linked(code.plans[0], plan, headers, weights)
    bad = change(code.plans[0])
    with pytest.raises(ValueError, match=message):
        check_linked(bad, plan, headers, weights)
    driver = fake_driver(list(code.kernels.values()))
    with pytest.raises(ArtifactError, match="does not fit the plan: .*"):
        DriverRunner(plan, bad, driver, constants, CPU)


def test_tensors_of_unknown_memory_are_refused(cifar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    described = Packed(cifar.engine.graph, torch.float16, META)
    monkeypatch.setattr(Packed, "made", lambda self: {})
    with pytest.raises(ValueError, match="outside of the arena and the packed constants"):
        link(cifar.plan, described, TARGET, cifar.code.headers)
    with pytest.raises(ValueError, match="there is no machine code of"):
        link(cifar.plan, described, TARGET, {})
