"""Machine code in a saved engine: what is refused, when it runs, and what is said otherwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import fastres
from fastres.backends.base import CompiledParts
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping import machine_code
from fastres.backends.triton.shipping.stored_code import code_files, usable_code
from fastres.backends.triton.shipping.stored_kernels import CODE, KERNELS, read_code
from fastres.errors import ArtifactError
from fastres.kernels.compiled.driver import DriverUnavailable

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter turns the compiler off"
    ),
]
CPU, SHAPES = torch.device("cpu"), ((2, 3, 16, 16),)


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
    cifar: Any, damage: Callable[[dict[str, bytes]], object], message: str
) -> None:
    files = cifar.files
    damage(files)
    with pytest.raises(ArtifactError, match=message):
        read_code(files)


def executable(
    engine: fastres.Engine, parts: CompiledParts, device: torch.device = CPU
) -> TritonExecutable:
    """As when an engine is loaded; the CPU stands for an sm_90."""
    return TritonExecutable(engine.graph, engine.options, device, SHAPES, parts)


def test_trusted_machine_code_runs(
    cifar: Any, monkeypatch: pytest.MonkeyPatch, fake_driver: Any
) -> None:
    monkeypatch.setattr(machine_code, "CudaDriver", fake_driver)
    monkeypatch.setattr("fastres.backends.triton.backend._is_gpu", lambda device: True)
    files = cifar.files
    made = executable(cifar.engine, CompiledParts(files, trusted=True))
    runner = made._runner(SHAPES)
    assert isinstance(runner, DriverRunner) and made.account().notes == ()
    assert made.run([torch.zeros(SHAPES[0])])[0].shape == (2, 10)
    again = made.compiled().files
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
    cifar: Any, trusted: bool, change: Callable[[Any], None], message: str
) -> None:
    files = cifar.files
    change(files)
    made = executable(cifar.engine, CompiledParts(files, trusted))
    assert not isinstance(made._runner(SHAPES), DriverRunner)
    (note,) = made.account().notes
    assert re.search(message, note)


def test_machine_code_runs_with_other_weights_too(
    cifar: Any, monkeypatch: pytest.MonkeyPatch, fake_driver: Any
) -> None:
    monkeypatch.setattr(machine_code, "CudaDriver", fake_driver)
    monkeypatch.setattr("fastres.backends.triton.backend._is_gpu", lambda device: True)
    graph = cifar.engine.graph
    made = executable(cifar.engine, CompiledParts(cifar.files, trusted=True))
    other = graph.replace(constants={name: 2 * t for name, t in graph.constants.items()})
    again = TritonExecutable(other, cifar.engine.options, CPU, SHAPES, made.compiled())
    runners = [it._runner(SHAPES) for it in (made, again)]
    assert all(isinstance(runner, DriverRunner) for runner in runners)
    assert again.account().notes == ()
    old, new = (runner._weights for runner in runners)  # type: ignore[attr-defined]
    assert old.keys() == new.keys()
    for key in old:  # two roundings of what is tiny in fp16
        assert torch.allclose(new[key].float(), 2 * old[key].float(), atol=1e-6)


WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None
from fastres import artifact
from fastres.backends.base import CompiledParts
from fastres.backends.triton.shipping import machine_code
from fastres.backends.triton.backend import TritonBackend, TritonExecutable
from fastres.errors import BackendUnavailable
class Fake:
    def __init__(self, kernels, device):
        self.headers, self.launched = tuple(kernel.header for kernel in kernels), 0
    def encode(self, tensor):
        return bytes(128)
    def launch(self, kernel, arguments, programs):
        self.launched += 1
machine_code.CudaDriver = Fake
contents = artifact.read(sys.argv[1])
parts = CompiledParts(contents.compiled, trusted=True)
shape, cpu = (2, 3, 16, 16), torch.device("cpu")
made = TritonExecutable(contents.graph, contents.options, cpu, (shape,), parts)
print(list(made.run([torch.zeros(shape)])[0].shape), made.account().notes)
for given in (parts, CompiledParts(contents.compiled), None):
    print("triton" in TritonBackend().unavailable(None, given).split(" is not ")[0])
for call in (
    lambda: made.run([torch.zeros(shape[0] + 1, *shape[1:])]),
    lambda: TritonExecutable(contents.graph, contents.options, cpu, (shape,)),
):
    try:
        call()
    except BackendUnavailable as error:
        print(error)
"""


@pytest.mark.parametrize("net", ["cifar", "bottleneck"])
def test_runs_where_there_is_no_triton(
    net: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    saved = request.getfixturevalue(net)
    saved.engine.save(tmp_path / "a.fastres")
    code = WITHOUT_TRITON.replace("(2, 3, 16, 16)", str(saved.plan.input_shapes[0]))
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "a.fastres")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first, *available, other, none = done.stdout.splitlines()
    (n, *rest), k = saved.plan.input_shapes[0], saved.plan.outputs[0][1][1]
    assert first == f"[{n}, {k}] ()", done.stderr
    assert available == ["False", "True", "True"]  # then it is the GPU that is missing
    assert other.startswith(f"kernels for inputs {[n + 1, *rest]} must be compiled here: triton")
    assert none.startswith(f"kernels for inputs {[n, *rest]} must be compiled here: triton")


def test_machine_code_that_does_not_launch_gives_way(
    cifar: Any, monkeypatch: pytest.MonkeyPatch, fake_driver: Any
) -> None:
    class Broken(fake_driver):
        def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
            raise RuntimeError("loading failed: CUDA_ERROR_UNSUPPORTED")

    monkeypatch.setattr(machine_code, "CudaDriver", Broken)
    made = executable(cifar.engine, CompiledParts(cifar.files, trusted=True))
    assert not isinstance(made._runner(SHAPES), DriverRunner)
    assert made.account().notes == (
        "machine code not used, compiled here instead: conv1: loading failed: "
        "CUDA_ERROR_UNSUPPORTED",
    )


def test_other_architectures_and_other_shapes_are_compiled(
    cifar: Any, monkeypatch: pytest.MonkeyPatch, fake_driver: Any
) -> None:
    monkeypatch.setattr(machine_code, "CudaDriver", fake_driver)
    parts = CompiledParts(cifar.files, trusted=True)
    assert usable_code(parts, "sm_80") == (None, None)
    assert usable_code(CompiledParts(), "sm_90") == (None, None)
    made = executable(cifar.engine, parts)
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
    cifar: Any, change: Callable[[dict[str, Any]], object], monkeypatch: Any, fake_driver: Any
) -> None:
    monkeypatch.setattr(machine_code, "CudaDriver", fake_driver)
    files = cifar.files
    edited(change)(files)
    with pytest.raises(ArtifactError, match="other arguments than follow|not go with its plan"):
        executable(cifar.engine, CompiledParts(files, trusted=True))


def test_machine_code_of_other_plans_is_not_kept(cifar: Any) -> None:
    files, shapes = cifar.files, cifar.plan.input_shapes
    kept = {name: files[name] for name in (KERNELS, CODE)}
    assert code_files(files, [cifar.plan], "sm_90") == kept
    other = msgspec.structs.replace(cifar.plan, arena_bytes=2**20)
    assert other.input_shapes == shapes and code_files(files, [other], "sm_90") == {}
    assert code_files(files, [], "sm_90") == code_files(files, [cifar.plan], "sm_80") == {}


def test_batches_are_planned_as_on_the_gpu() -> None:
    """A batch of 17 is served by the plan for 18, which must be the one that is stored."""
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    shape = fastres.Input((17, 3, 8, 8))
    engine = fastres.compile(net, shape, target="sm_90", precision="fp16")
    code = read_code(engine.compiled_parts().files)
    assert code is not None and code.plans[0].input_shapes == ((18, 3, 8, 8),)


def test_the_driver_wants_a_gpu() -> None:
    with pytest.raises(DriverUnavailable, match="not on cpu"):
        machine_code.CudaDriver([], CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("planes", [None, 16], ids=["cifar", "bottleneck"])
def test_equals_the_jit_bit_for_bit(tmp_path: Path, cuda_graph: bool, planes: int | None) -> None:
    major, minor = torch.cuda.get_device_capability()
    shape = (3, 3, 32, 32)
    if planes is None:
        net = fastres.models.cifar_resnet(8, seed=0)
    else:
        blocks = (2, 1, 1, 1)
        net = fastres.models.ResNet(
            fastres.models.Bottleneck, blocks, version="v1.5", planes=planes, seed=0
        )
    net = fastres.models.settle(net, torch.randn(8, *shape[1:]))
    engine = fastres.compile(
        net,
        fastres.Input(shape),
        target=f"sm_{major}{minor}",
        precision="fp16",
        cuda_graph=cuda_graph,
    )
    engine.save(tmp_path / "a.fastres")
    jit = fastres.load(tmp_path / "a.fastres")
    driven = fastres.load(tmp_path / "a.fastres", trust_engine=True)
    assert any("left alone" in note for note in jit.info.account.notes)
    assert driven.info.account.notes == ()
    executable = driven._lowered.executable
    assert isinstance(executable, TritonExecutable)
    assert isinstance(executable._runner((shape,)), DriverRunner)
    for _ in range(3):  # from the second on it is replayed
        x = torch.randn(shape, device="cuda")
        assert torch.equal(driven(x), jit(x))
    assert torch.equal(driven(x[:1]), jit(x[:1]))  # a shape that nobody compiled
    driven.save(tmp_path / "b.fastres")
    again = fastres.load(tmp_path / "b.fastres", trust_engine=True)
    assert again.info.account.notes == () and torch.equal(again(x), jit(x))
