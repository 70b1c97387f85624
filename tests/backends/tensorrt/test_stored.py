"""Saved engines that bring a TensorRT plan: looked at, refused, never run untrusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.base import CompiledParts
from fastres.backends.tensorrt import executable
from fastres.backends.tensorrt.stored import ABOUT, PLAN, Origin, read_plan, usable
from fastres.errors import ArtifactError, BackendUnavailable, InputError

TARGET = "sm_86"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(images: Tensor) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0), images)


@pytest.fixture(scope="module")
def engine(small: nn.Module, images: Tensor) -> fastres.Engine:
    return fastres.compile(
        small, images[:1], backend="tensorrt", target=TARGET, precision="fp16", max_batch_size=16
    )


@pytest.fixture(scope="module")
def saved(engine: fastres.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "engine"
    engine.save(path)
    return path


@pytest.fixture
def files(saved: Path) -> dict[str, bytes]:
    return {name: (saved / name).read_bytes() for name in (ABOUT, PLAN)}


@pytest.fixture
def origin(files: dict[str, bytes]) -> Origin:
    found = read_plan(files)
    assert found is not None
    return found[0]


def test_an_engine_for_elsewhere_is_told_about_and_not_called(
    engine: fastres.Engine, images: Tensor
) -> None:
    assert engine.backend.name == "tensorrt"
    kinds = {node.precision for node in engine.info.nodes}
    assert kinds <= {"fp16", "merged"}
    assert "tensorrt_rtx" in engine.info.account.notes[0]
    with pytest.raises(BackendUnavailable, match="built for sm_86 and runs there only"):
        engine(images)
    with pytest.raises(BackendUnavailable, match="sm_86"):
        engine.profile(images)


def test_the_origin_says_everything(origin: Origin) -> None:
    assert origin.builder.startswith("tensorrt_rtx ") and origin.architecture == TARGET
    assert origin.gpu == "" and origin.settings == "fp16"
    assert origin.ranges == {"x": ((1, 3, 64, 64), (1, 3, 64, 64), (16, 3, 64, 64))}


def test_looked_at_again_it_is_not_built_again(
    saved: Path, engine: fastres.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(executable, "build", lambda *a, **k: pytest.fail("built"))
    again = fastres.load(saved, target=TARGET)
    assert again.info.nodes == engine.info.nodes
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy" / PLAN).read_bytes() == (saved / PLAN).read_bytes()


def test_without_such_a_gpu_it_is_not_loaded(saved: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match=r"(?s)built for sm_86.*no NVIDIA GPU") as caught:
        fastres.load(saved, trust_engine=True)
    assert str(caught.value).count("target='sm_86'") == 1


class TestUse:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"builder": "tensorrt 11.4.0"}, "its builder is tensorrt_rtx"),
            (
                {"builder": "tensorrt 11.4.0"},
                "tensorrt 11.4.0; pip install tensorrt-rtx==1",
            ),
            ({"architecture": "sm_89"}, "its architecture is sm_86, here it is sm_89"),
            ({"network": "0" * 64}, "another network or other weights"),
            ({"settings": "int8"}, "its settings is fp16"),
            ({"ranges": {}}, "its ranges is"),
        ],
    )
    def test_what_differs_is_built_anew(
        self, files: dict[str, bytes], origin: Origin, change: dict[str, Any], text: str
    ) -> None:
        wanted = msgspec.structs.replace(origin, **change)
        found, why = usable(CompiledParts(files, trusted=True), wanted, runs=True)
        assert found is None and why is not None and text in why and "built anew" in why

    def test_it_runs_on_its_own_gpu_only(self, files: dict[str, bytes], origin: Origin) -> None:
        about = msgspec.json.decode(files[ABOUT])
        about["origin"]["gpu"] = "NVIDIA A10"
        made = {**files, ABOUT: msgspec.json.encode(about)}
        elsewhere = ("NVIDIA A40", "built on NVIDIA A10, here is NVIDIA A40")
        for gpu, wants in (("NVIDIA A10", None), ("", None), elsewhere):  # "": to be looked at
            wanted = msgspec.structs.replace(origin, gpu=gpu)
            found, why = usable(CompiledParts(made, trusted=True), wanted, runs=True)
            assert (found is not None) == (wants is None)
            assert wants is None or (why is not None and wants in why)

    def test_untrusted_it_is_looked_at_but_not_run(
        self, files: dict[str, bytes], origin: Origin
    ) -> None:
        parts = CompiledParts(files, trusted=False)
        assert usable(parts, origin, runs=False)[0] is not None
        found, why = usable(parts, origin, runs=True)
        assert found is None and "trust_engine=True" in str(why)
        assert usable(CompiledParts(files, trusted=True), origin, runs=True)[0] is not None

    def test_nothing_stored_is_nothing_to_say(self, origin: Origin) -> None:
        assert usable(CompiledParts(), origin, runs=True) == (None, None)


class TestDamage:
    @pytest.mark.parametrize("gone", [ABOUT, PLAN])
    def test_a_file_is_missing(self, files: dict[str, bytes], gone: str) -> None:
        del files[gone]
        with pytest.raises(ArtifactError, match="is missing"):
            read_plan(files)

    @pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 9999])
    def test_the_description_is_none(self, files: dict[str, bytes], data: bytes) -> None:
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_plan({**files, ABOUT: data})

    @pytest.mark.parametrize("what", ["builder", "architecture", "gpu", "settings"])
    def test_names_that_would_play_with_a_terminal(
        self, files: dict[str, bytes], what: str
    ) -> None:
        about = msgspec.json.decode(files[ABOUT])
        about["origin"][what] = "sm_86\n\x1b[31m"
        with pytest.raises(ArtifactError, match=f"its {what} is no name"):
            read_plan({**files, ABOUT: msgspec.json.encode(about)})

    @pytest.mark.parametrize("cut", [0, 1, 1000])
    def test_another_plan_or_a_piece_of_one(self, files: dict[str, bytes], cut: int) -> None:
        plan = files[PLAN][:cut] or b""
        with pytest.raises(ArtifactError, match="is not the one"):
            read_plan({**files, PLAN: plan})

    def test_a_flipped_bit_in_a_saved_engine(self, saved: Path, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(saved, tmp_path / "e")
        data = bytearray((saved / PLAN).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "e" / PLAN).write_bytes(data)
        with pytest.raises(ArtifactError, match="was altered"):
            fastres.load(tmp_path / "e", target=TARGET, trust_engine=True)


def test_verify_needs_the_gpu(small: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="verify needs a sm_86 GPU"):
        fastres.compile(small, images[:1], backend="tensorrt", target=TARGET, verify=True)


def test_weights_beyond_float16(images: Tensor) -> None:
    model = fastres.models.cifar_resnet(8, seed=0).eval()
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e5
    with pytest.raises(fastres.errors.UnsupportedError, match="fc: its weight, with BatchNorm"):
        fastres.compile(model, images[:1], backend="tensorrt", target=TARGET, precision="fp16")
