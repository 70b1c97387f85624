"""fastres.artifact: a loaded engine is the saved one, down to its bits and its file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fastres
from fastres import artifact, models
from fastres.artifact.container import MANIFEST, SEAL
from fastres.artifact.contents import Contents
from fastres.artifact.manifest import GRAPH, SCHEMA, WEIGHTS
from fastres.backends.base import CompiledParts
from fastres.backends.reference import ReferenceBackend
from fastres.calib.images import Preprocess
from fastres.compiler import compile
from fastres.engine.engine import Engine
from fastres.errors import ArtifactError, InputError
from fastres.options import Input, Options

FORMS = ("engine", "engine.fastres")
Tiny = Callable[..., Contents]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return models.cifar_resnet(8, seed=0).eval()


@pytest.fixture(scope="module", params=["cpu", "reference"])
def engine(request: pytest.FixtureRequest, model: torch.nn.Module) -> Iterator[Engine]:
    settings = Preprocess(resize=None, crop=32, mean=(0, 0, 0), channels="BGR")
    sizes = Input(((1, 3, 32, 32), (2, 3, 32, 32), (8, 3, 64, 48)))
    with compile(
        model, sizes, backend=request.param, preprocess=settings, max_batch_size=4, threads=2
    ) as made:
        yield made


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(5, 3, 40, 32, generator=torch.Generator().manual_seed(1))


def same(a: Contents, b: Contents) -> bool:
    settings = ("options", "inputs", "preprocess", "ignored_weights")
    return (
        a.graph.equals(b.graph)
        and a.source.structure() == b.source.structure()
        and all(getattr(a, name) == getattr(b, name) for name in settings)
    )


class TestRoundTrip:
    @pytest.mark.parametrize("form", FORMS)
    def test_the_same_engine(
        self, engine: Engine, x: torch.Tensor, tmp_path: Path, form: str
    ) -> None:
        engine.save(tmp_path / form)
        with fastres.load(str(tmp_path / form)) as loaded:
            assert torch.equal(loaded(x), engine(x))
            assert loaded.graph.equals(engine.graph)
            assert loaded.source.structure() == engine.source.structure()
            assert loaded.backend.name == engine.backend.name
            assert loaded.options.precision == engine.options.precision
            assert loaded.options.max_batch_size == 4
            assert loaded.options.threads == 2
            assert loaded.inputs == engine.inputs
            assert loaded.preprocess == engine.preprocess
            assert loaded.ignored_weights == engine.ignored_weights

    @pytest.mark.parametrize("trust", [True, False])
    def test_whether_compiled_parts_are_trusted(
        self, tiny: Tiny, tmp_path: Path, trust: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = {"compiled_x_y.bin": b"code"}
        artifact.write(replace(tiny(), compiled=files), tmp_path / "engine")
        given, lower = [], ReferenceBackend.lower

        def noted(self: ReferenceBackend, *rest: Any) -> Any:
            given.append(rest[-1])
            return lower(self, *rest)

        monkeypatch.setattr(ReferenceBackend, "lower", noted)
        with fastres.load(tmp_path / "engine", trust_engine=trust):
            assert given == [CompiledParts(files, trust)]

    def test_trust_is_yes_or_no(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="trust_engine is 'yes'; give True or False"):
            fastres.load(tmp_path, trust_engine="yes")  # type: ignore[arg-type]

    def test_saved_loaded_saved_is_the_same_file(self, engine: Engine, tmp_path: Path) -> None:
        first, second = tmp_path / "a.fastres", tmp_path / "b.fastres"
        engine.save(first)
        with fastres.load(first) as loaded:
            loaded.save(second)
        assert first.read_bytes() == second.read_bytes()

    def test_new_weights_after_loading(
        self, engine: Engine, x: torch.Tensor, tmp_path: Path
    ) -> None:
        engine.save(tmp_path / "engine")
        other = models.cifar_resnet(8, seed=1).eval()
        with fastres.load(tmp_path / "engine") as loaded:
            loaded.update_weights(other.state_dict())
            engine_of_other = compile(other, x[:2], backend=engine.backend.name, threads=2)
            got, want = loaded(x[:2]), engine_of_other(x[:2])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_new_weights_for_a_network_with_constants_of_its_own(self, tmp_path: Path) -> None:
        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)
                self.register_buffer("shift", torch.randn(4, 1, 1), persistent=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.conv(x) * torch.tensor([2.0, 3.0, 4.0, 5.0])[:, None, None] + self.shift

        model, x = Shifted().eval(), torch.randn(2, 3, 8, 8)
        with compile(model, x, backend="reference") as engine:
            engine.save(tmp_path / "engine")
        with fastres.load(tmp_path / "engine") as loaded, torch.no_grad():
            model.conv.weight.mul_(2)
            loaded.update_weights(model.state_dict())
            torch.testing.assert_close(loaded(x), model(x))
            loaded.save(tmp_path / "again")
        with fastres.load(tmp_path / "again") as again, torch.no_grad():
            torch.testing.assert_close(again(x), model(x))

    def test_everything_in_the_manifest(self, tiny: Tiny, tmp_path: Path) -> None:
        rich = Contents(
            tiny(float("-inf")).graph,
            tiny(float("-inf")).source,
            Options(("cpu",), "bf16", "throughput", None, 3, "error", "fallback", 1, 2),
            (Input(((1, 1, 4, 4), (2, 1, 4, 4), (9, 1, 4, 4)), torch.float32, name="x"),),
            Preprocess(None, None, (1.5, 0.1, -3.0), (1e-3, 7.0, 0.3), 1.0, "BGR", "bicubic"),
            ("bn.num_batches_tracked", "head.weight"),
        )
        for form in FORMS:
            artifact.write(rich, tmp_path / form)
            assert same(artifact.read(tmp_path / form), rich)

    @pytest.mark.parametrize("engine", ["cpu"], indirect=True)
    def test_in_a_fresh_process(self, engine: Engine, x: torch.Tensor, tmp_path: Path) -> None:
        """Bit-identical, with no model code, no exporter and no unpickling."""
        for form in FORMS:
            engine.save(tmp_path / form)
        safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
        code = """
import pickle, sys
import safetensors.torch, torch
def never(*args, **kwargs):
    raise SystemExit("this must not be called")
torch.export.export = pickle.load = pickle.loads = pickle.Unpickler = torch.load = never
import fastres
folder = sys.argv[1]
x = safetensors.torch.load_file(folder + "/x.safetensors")["x"]
out = {form: fastres.load(folder + "/" + form)(x) for form in sys.argv[2:]}
assert "torchvision" not in sys.modules and "fastres.models" not in sys.modules
safetensors.torch.save_file(out, folder + "/out.safetensors")
"""
        command = [sys.executable, "-c", code, str(tmp_path), *FORMS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        want = engine(x)
        for form, got in safetensors.torch.load_file(tmp_path / "out.safetensors").items():
            assert torch.equal(got, want), form

    def test_what_lies_on_disk(self, engine: Engine, tmp_path: Path) -> None:
        path = tmp_path / "engine"
        engine.save(path)
        assert {file.name for file in path.iterdir()} == {MANIFEST, SEAL, GRAPH, WEIGHTS}
        manifest = json.loads((path / MANIFEST).read_text())
        assert manifest["schema"] == SCHEMA == 2
        assert manifest["versions"]["fastres"] == fastres.__version__
        assert manifest["options"]["backend"] == engine.backend.name
        assert "twice PyTorch's own error in fp32" in manifest["tolerance"]
        for name, entry in manifest["files"].items():
            data = (path / name).read_bytes()
            assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        check = ["sha256sum", "--check", "--quiet", SEAL]
        assert subprocess.run(check, cwd=path).returncode == 0

    def test_a_device_that_is_none(self, tiny: Tiny, tmp_path: Path) -> None:
        artifact.write(tiny(), tmp_path / "engine")
        with pytest.raises(InputError, match="'toaster' is not one"):
            fastres.load(tmp_path / "engine", device="toaster")
        with pytest.raises(InputError, match="device is 5"):
            fastres.load(tmp_path / "engine", device=5)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("path", "what"),
        [
            (None, "not NoneType"),
            (5, "not int"),
            (b"engine", "not <class 'bytes'>"),
            ("a\0b", "null byte"),
            ("n" * 300, "File name too long"),
            ("\ud800", "surrogates not allowed"),
        ],
        ids=["None", "5", "bytes", "NUL", "long", "surrogate"],
    )
    def test_what_cannot_be_a_path(self, tiny: Tiny, path: Any, what: str) -> None:
        for use in (lambda: artifact.write(tiny(), path), lambda: fastres.load(path)):
            with pytest.raises(ArtifactError, match=f"cannot be a saved engine's path: .*{what}"):
                use()

    def test_a_closed_engine_is_not_saved(self, model: torch.nn.Module, tmp_path: Path) -> None:
        closed = compile(model, torch.zeros(1, 3, 32, 32), backend="reference")
        closed.close()
        with pytest.raises(fastres.errors.FastresError, match="closed"):
            closed.save(tmp_path / "engine")

    def test_what_cannot_be_loaded_again_is_not_saved(self, tiny: Tiny, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="cannot be saved"):
            artifact.write(tiny(float("nan")), tmp_path / "engine")
        assert not list(tmp_path.iterdir())
