"""Building for a GPU that is not here: what is compiled, listed, saved, and read again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

import fastres
from fastres.backends.base import CompiledParts
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.shipping import cross
from fastres.backends.triton.shipping.stored import PLANS, read_plans, recorded, write_plans
from fastres.backends.triton.shipping.stored_kernels import CODE, KERNELS
from fastres.errors import ArtifactError, BackendUnavailable, InputError, UnsupportedError
from fastres.graph.ir import Flatten, Pad, Slice
from fastres.kernels.aot import KernelFacts
from fastres.kernels.compiled.binary import KernelBinary
from fastres.kernels.compiled.build import Built
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter turns the compiler off"
    ),
]
SHAPE = fastres.Input((8, 3, 32, 32))


@pytest.fixture(scope="module")
def engine() -> fastres.Engine:
    net = fastres.models.cifar_resnet(14, seed=0).eval()
    return fastres.compile(net, SHAPE, target="sm_90", precision="fp16")


def test_every_launch_stands_in_one_kernel(engine: fastres.Engine) -> None:
    kernels = engine.info.account.kernels
    nodes = [name for kernel in kernels for name in kernel.nodes]
    runs = [n.name for n in engine.graph if not isinstance(n.op, Flatten | Pad | Slice)]
    assert sorted(nodes) == sorted(runs) and len(kernels) < len(nodes)
    assert all(kernel.spilled == 0 for kernel in kernels)
    convolutions = [kernel for kernel in kernels if kernel.kernel == "conv2d"]
    assert all("HGMMA" in kernel.instructions for kernel in convolutions)
    assert all("HMMA" not in kernel.instructions for kernel in convolutions)


def test_the_account_shows_them(engine: fastres.Engine) -> None:
    text, fields = str(engine.info), engine.info.to_dict()
    assert f"{len(engine.info.account.kernels)} kernels, 15 launches" in text and "HGMMA" in text
    assert fields["kernels"][0]["kernel"] == "conv2d"
    assert [step["node"] for step in fields["bounds"]][:2] == ["x", "conv1"]
    assert "what holds up each step" in text and f"{len(fields['bounds'])} steps" in text


def test_an_older_target_gets_its_own_instructions() -> None:
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    kernels = fastres.compile(net, SHAPE, target="sm_80", precision="bf16").info.account.kernels
    found = {name for kernel in kernels for name in kernel.instructions}
    assert "HMMA" in found and "HGMMA" not in found


def test_it_cannot_run_here(engine: fastres.Engine) -> None:
    executable = engine._lowered.executable
    for call in (executable.run, executable.profile):
        with pytest.raises(BackendUnavailable, match="built for sm_90 and runs there only: save"):
            call([torch.zeros(8, 3, 32, 32)])


def test_saved_and_looked_at_again_without_compiling(
    engine: fastres.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.save(tmp_path / "e.fastres")
    monkeypatch.setattr(cross, "build_launch", None)
    again = fastres.load(tmp_path / "e.fastres", target="sm_90")
    assert again.info == engine.info
    again.save(tmp_path / "f.fastres")
    assert (tmp_path / "e.fastres").read_bytes() == (tmp_path / "f.fastres").read_bytes()


def test_plans_for_another_architecture_are_left_alone(engine: fastres.Engine) -> None:
    files = engine.compiled_parts().files
    assert set(files) == {PLANS, KERNELS, CODE}
    assert list(recorded(files, "sm_90")) == [((8, 3, 32, 32),)]
    assert recorded(files, "sm_80") == {} and recorded({}, "sm_90") == {}


def test_a_plan_is_taken_over_with_its_choices(engine: fastres.Engine) -> None:
    stored = next(iter(recorded(engine.compiled_parts().files, "sm_90").values()))
    step = stored.steps[1]
    tile = msgspec.structs.replace(step, tile=type(step.tile)(64, 16, 16, 4, 3))
    other = msgspec.structs.replace(stored, steps=(stored.steps[0], tile, *stored.steps[2:]))
    tiles = Tiles(Target.typical(90))
    with pytest.raises(ArtifactError, match="does not follow from the graph"):
        make_plan(engine.graph, stored.input_shapes, "fp16", tiles, other)  # its choice says not so
    choices = tuple(
        msgspec.structs.replace(choice, taken=choice.taken.replace(str(step.tile), str(tile.tile)))
        if step.node in choice.nodes
        else choice
        for choice in stored.choices
    )
    other = msgspec.structs.replace(other, choices=choices)
    plan = make_plan(engine.graph, stored.input_shapes, "fp16", tiles, other)
    assert plan == other != stored


def tampered(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        content = msgspec.json.decode(data)
        change(content)
        return msgspec.json.encode(content)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tampered(lambda c: c["plans"][0].update(arena_bytes=16)), "does not follow from"),
        (tampered(lambda c: c["plans"][0]["places"]["x"].update(offset=10**9)), "does not follow"),
        (tampered(lambda c: c["plans"][0]["steps"].pop(3)), "for layer1.0.conv2 that it cannot"),
        (
            tampered(lambda c: c["plans"][0]["steps"][1]["tile"].update(block_m=4096)),
            "a form or a tile for conv1 that it cannot have",
        ),
        (
            tampered(lambda c: c["plans"][0]["steps"][1]["tile"].update(block_m=100)),
            "cannot be read: blocks are",
        ),
        (tampered(lambda c: c.update(news=1)), "cannot be read: .*unknown field `news`"),
        (lambda data: data[:-1], "cannot be read"),
        (lambda data: b"\xff" + data, "cannot be read"),
    ],
    ids=["arena", "place", "step", "tile", "no tile", "news", "cut", "no text"],
)
def test_no_plan_from_a_file_is_trusted(
    engine: fastres.Engine, change: Callable[[bytes], bytes], message: str
) -> None:
    files = {PLANS: change(engine.compiled_parts().files[PLANS])}
    with pytest.raises(ArtifactError, match=message):
        plan = recorded(files, "sm_90")[((8, 3, 32, 32),)]
        make_plan(engine.graph, plan.input_shapes, "fp16", Tiles(Target.typical(90)), plan)


def test_a_loaded_engine_uses_the_stored_choices(engine: fastres.Engine) -> None:
    """The CPU stands for an sm_90, so the plan is taken over; it is not run here."""
    stored = next(iter(recorded(engine.compiled_parts().files, "sm_90").values()))
    files = write_plans("sm_90", [stored], ())
    assert read_plans(files) is not None
    shapes, parts = ((8, 3, 32, 32),), CompiledParts(files)
    executable = TritonExecutable(engine.graph, engine.options, torch.device("cpu"), shapes, parts)
    assert executable._runner(((8, 3, 32, 32),)).plan == stored


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"target": "hopper"}, InputError, "target is 'hopper'; give a GPU architecture"),
        ({"target": 90}, InputError, "target is 90"),
        (
            {"target": "sm_75"},
            BackendUnavailable,
            "cannot build for sm_75: kernels are built for sm_80",
        ),
        ({"target": "sm_200"}, BackendUnavailable, "kernels are built for sm_80, sm_86, .* sm_121"),
        ({"cache_dir": ""}, InputError, "cache_dir is ''; give a folder, or None"),
        ({"cache_dir": "a\0b"}, InputError, "cache_dir is 'a"),
        ({"target": "sm_91"}, BackendUnavailable, "triton cannot build for sm_91: kernels are"),
        ({"target": "sm_90", "backend": "cpu"}, BackendUnavailable, "for this machine only"),
        ({"target": "sm_90", "backend": "reference"}, BackendUnavailable, "this machine only"),
        ({"target": "sm_90", "verify": True}, InputError, "verify needs a sm_90 GPU"),
        ({"target": "sm_90", "on_unsupported": "fallback"}, InputError, "cannot be built for"),
        ({"cuda_graph": "yes"}, InputError, "cuda_graph is 'yes'"),
        ({"dependent_launch": 1}, InputError, "dependent_launch is 1; give True, False or None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_requests(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastres.compile(fastres.models.cifar_resnet(8).eval(), SHAPE, **given)


def built(facts: KernelFacts) -> Built:
    """What compiling would give, without machine code."""
    return Built(facts, cast(KernelBinary, None))


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(launch: object, sm: int) -> Built:
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(cross, "build_launch", broken)
    with pytest.raises(UnsupportedError, match=r"(?s)no tile .*conv1: conv2d_kernel with .*ptxas"):
        fastres.compile(fastres.models.cifar_resnet(8).eval(), SHAPE, target="sm_90")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (KernelFacts(32, 0, 0, 300_000, 4, {}), "asks for 300000 bytes of shared memory; sm_90"),
        (KernelFacts(255, 16, 16, 1000, 4, {}), "spills 16 bytes of registers"),
        (KernelFacts(32, 0, 0, 1000, 4, {}, 3), "memory 3 times before it waits for its input"),
    ],
    ids=["too large", "spills", "does not wait"],
)
def test_a_kernel_that_does_not_fit_is_named(
    facts: KernelFacts, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross, "build_launch", lambda launch, sm: built(facts))
    with pytest.raises(UnsupportedError, match=message):
        fastres.compile(fastres.models.cifar_resnet(8).eval(), SHAPE, target="sm_90")


def test_a_tile_that_spills_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(launch: Launch, sm: int) -> Built:
        spilled = 8 * (launch.num_warps == 4 and "BLOCK_N" in launch.constants)
        return built(KernelFacts(64, spilled, 0, 1000, launch.num_warps, {}))

    monkeypatch.setattr(cross, "build_launch", compiled)
    monkeypatch.setattr(cross, "_linked", lambda *given: {})  # there is no machine code to link
    net = fastres.models.cifar_resnet(8).eval()
    engine = fastres.compile(net, SHAPE, target="sm_80", precision="fp16")
    convolutions = [k for k in engine.info.account.kernels if k.kernel == "conv2d"]
    assert convolutions and all(" w8 " in kernel.tile for kernel in convolutions)


def test_loaded_where_there_is_no_gpu_it_says_what_it_is(
    engine: fastres.Engine, tmp_path: Path
) -> None:
    engine.save(tmp_path / "a.fastres")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(
        BackendUnavailable, match=r"(?s)was built for sm_90: .*--target sm_90.*no NV"
    ):
        fastres.load(tmp_path / "a.fastres")


@pytest.mark.parametrize(
    "use",
    [
        lambda engine, x: engine(x),
        lambda engine, x: engine.map([x]),
        lambda engine, x: engine.profile(x),
        lambda engine, x: engine.predict([]),
        lambda engine, x: fastres.verify(engine.graph, engine, x),
    ],
    ids=["call", "map", "profile", "predict", "verify"],
)
def test_used_here_it_says_where_it_runs(engine: fastres.Engine, use: Any) -> None:
    with pytest.raises(BackendUnavailable, match="built for sm_90 and runs there only: save it"):
        use(engine, torch.zeros(1, 3, 32, 32))


def test_new_weights_compile_nothing(
    engine: fastres.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.compiled_parts()
    monkeypatch.setattr(cross, "build_launch", None)
    engine.update_weights(fastres.models.cifar_resnet(14, seed=1).state_dict())
    assert engine.compiled_parts() == before and engine.info.account.kernels
