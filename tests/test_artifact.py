"""fastres.artifact: a loaded engine is the saved one, and every defect is one ArtifactError."""

from __future__ import annotations

import hashlib
import json
import struct
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
from fastres import artifact, container, models
from fastres.artifact import Contents
from fastres.backends.base import CompiledParts
from fastres.backends.reference import ReferenceBackend
from fastres.calib.images import Preprocess
from fastres.compiler import compile
from fastres.container import MANIFEST, SEAL
from fastres.engine import Engine
from fastres.errors import ArtifactError, InputError
from fastres.graph.ir import Conv2d, Graph, Node, Pad, Value
from fastres.graph.specs import Sym, TensorSpec
from fastres.manifest import GRAPH, SCHEMA, WEIGHTS
from fastres.options import Input, Options

TREE = '[1, {"type": null, "context": null, "children_spec": []}]'
FORMS = ("engine", "engine.fastres")
Json = dict[str, Any]


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


def tiny(value: float = 0.5) -> Contents:
    """One padding and one convolution: small enough to damage it everywhere."""
    shape, padded = (Sym("N"), 1, 4, 4), (Sym("N"), 1, 6, 6)
    weight = torch.tensor([1.0, -2.0, 3.0]).reshape(1, 1, 3, 1)
    graph = Graph(
        (Value("x", TensorSpec(shape)),),
        (
            Node("pad", Pad((0, 0, 1, 1), (0, 0, 1, 1), value), ("x",), TensorSpec(padded)),
            Node(
                "conv",
                Conv2d(),
                ("pad",),
                TensorSpec((Sym("N"), 1, 4, 6)),
                {"weight": "weight"},
            ),
        ),
        ("conv",),
        {"weight": weight},
        TREE,
    )
    source = graph.replace(constants={"weight": weight.to("meta")})
    options = Options(backend=("reference",), precision="fp32")
    return Contents(graph, source, options, (Input((1, 1, 4, 4), torch.float32, name="x"),))


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
        with artifact.load(str(tmp_path / form)) as loaded:
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
        self, tmp_path: Path, trust: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = {"compiled_x_y.bin": b"code"}
        artifact.write(replace(tiny(), compiled=files), tmp_path / "engine")
        given, lower = [], ReferenceBackend.lower

        def noted(self: ReferenceBackend, *rest: Any) -> Any:
            given.append(rest[-1])
            return lower(self, *rest)

        monkeypatch.setattr(ReferenceBackend, "lower", noted)
        with artifact.load(tmp_path / "engine", trust_engine=trust):
            assert given == [CompiledParts(files, trust)]

    def test_trust_is_yes_or_no(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="trust_engine is 'yes'; give True or False"):
            artifact.load(tmp_path, trust_engine="yes")  # type: ignore[arg-type]

    def test_saved_loaded_saved_is_the_same_file(self, engine: Engine, tmp_path: Path) -> None:
        first, second = tmp_path / "a.fastres", tmp_path / "b.fastres"
        engine.save(first)
        with artifact.load(first) as loaded:
            loaded.save(second)
        assert first.read_bytes() == second.read_bytes()

    def test_new_weights_after_loading(
        self, engine: Engine, x: torch.Tensor, tmp_path: Path
    ) -> None:
        engine.save(tmp_path / "engine")
        other = models.cifar_resnet(8, seed=1).eval()
        with artifact.load(tmp_path / "engine") as loaded:
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
        with artifact.load(tmp_path / "engine") as loaded, torch.no_grad():
            model.conv.weight.mul_(2)
            loaded.update_weights(model.state_dict())
            torch.testing.assert_close(loaded(x), model(x))
            loaded.save(tmp_path / "again")
        with artifact.load(tmp_path / "again") as again, torch.no_grad():
            torch.testing.assert_close(again(x), model(x))

    def test_everything_in_the_manifest(self, tmp_path: Path) -> None:
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
from fastres import artifact
folder = sys.argv[1]
x = safetensors.torch.load_file(folder + "/x.safetensors")["x"]
out = {form: artifact.load(folder + "/" + form)(x) for form in sys.argv[2:]}
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

    def test_a_device_that_is_none(self, tmp_path: Path) -> None:
        artifact.write(tiny(), tmp_path / "engine")
        with pytest.raises(InputError, match="'toaster' is not one"):
            artifact.load(tmp_path / "engine", device="toaster")
        with pytest.raises(InputError, match="device is 5"):
            artifact.load(tmp_path / "engine", device=5)  # type: ignore[arg-type]

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
    def test_what_cannot_be_a_path(self, path: Any, what: str) -> None:
        for use in (lambda: artifact.write(tiny(), path), lambda: artifact.load(path)):
            with pytest.raises(ArtifactError, match=f"cannot be a saved engine's path: .*{what}"):
                use()

    def test_a_closed_engine_is_not_saved(self, model: torch.nn.Module, tmp_path: Path) -> None:
        closed = compile(model, torch.zeros(1, 3, 32, 32), backend="reference")
        closed.close()
        with pytest.raises(fastres.errors.FastresError, match="closed"):
            closed.save(tmp_path / "engine")

    def test_what_cannot_be_loaded_again_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="cannot be saved"):
            artifact.write(tiny(float("nan")), tmp_path / "engine")
        assert not list(tmp_path.iterdir())


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def forge(
    path: Path,
    *,
    manifest: Callable[[Json], object] | None = None,
    graph: Callable[[Json], object] | None = None,
    weights: bytes | None = None,
) -> None:
    """Writes an artifact, changes it, and makes every digest fit, as a forger would."""
    plain = path.with_name("plain")
    artifact.write(tiny(), plain)
    files = files_of(plain)
    document = json.loads(files[GRAPH])
    if graph is not None:
        graph(document)
        files[GRAPH] = json.dumps(document, separators=(",", ":")).encode()
    if weights is not None:
        files[WEIGHTS] = weights
    table = json.loads(files[MANIFEST])
    table["files"] = {
        name: {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in table["files"]
    }
    if manifest is not None:
        manifest(table)
    files[MANIFEST] = json.dumps(table, indent=2).encode()
    files[SEAL] = container.seal(files[MANIFEST])
    container.write(path, files)


def put(*steps: str | int) -> Callable[[object], Callable[[Json], object]]:
    """put("options", "hint")("fast") changes that entry of a JSON document."""

    def to(value: object) -> Callable[[Json], object]:
        def mutate(document: Json) -> None:
            place: Any = document
            for step in steps[:-1]:
                place = place[step]
            place[steps[-1]] = value

        return mutate

    return to


MANIFESTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "newer": (put("schema")(7), r"written by schema 7, this fastres .* reads up to 2: upgrade"),
    "newer with news": (lambda m: m.update(schema=3, news=1), "written by schema 3"),
    "schema 0": (put("schema")(0), "says schema 0"),
    "schema is text": (put("schema")("1"), "Expected `int`, got `str`"),
    "schema is true": (put("schema")(True), "Expected `int`, got `bool`"),
    "no schema": (lambda m: m.pop("schema"), "missing required field `schema`"),
    "another format": (put("format")("onnx"), "not fastres's"),
    "unknown field": (put("more")(1), "unknown field `more`"),
    "no options": (lambda m: m.pop("options"), "missing required field `options`"),
    "options are a list": (put("options")([]), "Expected `object`, got `array`"),
    "backend unknown": (put("options", "backend")("abacus"), "the backend 'abacus'; this fastres"),
    "backend a path": (put("options", "backend")("os.system"), "the backend 'os.system'"),
    "precision unknown": (put("options", "precision")("fp7"), "Invalid enum value 'fp7'"),
    "no precision": (put("options", "precision")(None), "got `null`"),
    "hint unknown": (put("options", "hint")("fast"), "Invalid enum value 'fast'"),
    "batch size 0": (put("options", "max_batch_size")(0), "max_batch_size is 0"),
    "batch size 1.5": (put("options", "max_batch_size")(1.5), "Expected `int | null`"),
    "threads below 0": (put("options", "threads")(-1), "threads is -1"),
    "no inputs": (put("inputs")([]), "0 inputs given"),
    "another size": (put("inputs", 0, "usual")([1, 1, 5, 4]), "goes from 4 over 5"),
    "size 0": (put("inputs", 0, "smallest")([0, 1, 4, 4]), "at least 1"),
    "rank": (put("inputs", 0, "usual")([1, 1, 4]), "same rank"),
    "size is a text": (put("inputs", 0, "usual")(["1", 1, 4, 4]), "Expected `int`, got `str`"),
    "input dtype": (put("inputs", 0, "dtype")("float7"), "dtype 'float7'"),
    "input format": (put("inputs", 0, "format")("NHWC"), "Invalid enum value 'NHWC'"),
    "preprocess std": (put("preprocess")({"std": [0.0, 1.0, 1.0]}), "every entry must be above 0"),
    "preprocess mean": (put("preprocess")({"mean": [0.0]}), "Expected `array` of length 3"),
    "preprocess field": (put("preprocess")({"run": "rm"}), "not exactly those"),
    "ignored weights": (put("ignored_weights")([1]), "Expected `str`, got `int`"),
    "file missing": (lambda m: m["files"].pop(WEIGHTS), "it should list"),
    "file more": (lambda m: m["files"].update(a={"size": 1, "sha256": ""}), "it should list"),
    "file outside": (
        lambda m: m["files"].update({"../../etc/passwd": m["files"].pop(WEIGHTS)}),
        r"lists \['../../etc/passwd', 'graph.json'\]",
    ),
    "file absolute": (
        lambda m: m["files"].update({"/etc/passwd": m["files"].pop(GRAPH)}),
        r"lists \['/etc/passwd'",
    ),
    "size differs": (put("files", WEIGHTS, "size")(10**18), "1000000000000000000 were written"),
    "size below 0": (put("files", GRAPH, "size")(-1), "-1 were written"),
    "digest differs": (put("files", GRAPH, "sha256")("0" * 64), "graph.json was altered"),
}
GRAPHS: dict[str, tuple[Callable[[Json], object], str]] = {
    "another operation": (put("graph", "nodes", 0, "op", "type")("Exec"), "Invalid value 'Exec'"),
    "unlawful": (put("graph", "nodes", 1, "inputs")(["y"]), "nothing before it produces"),
    "weight of another shape": (
        put("graph", "constants", "weight", "shape")([1, 1, 1, 3]),
        r"the weights hold torch.float32 \[1, 1, 3, 1\]",
    ),
    "weight of another dtype": (
        put("graph", "constants", "weight", "dtype")("bfloat16"),
        "the weights hold torch.float32",
    ),
    "another source": (
        lambda g: [node.update(name=node["name"] + "2") for node in g["source"]["inputs"]],
        "reads x, which nothing before it produces",
    ),
    "impossible size": (put("graph", "inputs", 0, "spec", "shape", 2)(2**60), "impossible size"),
}


def hostile_weights() -> dict[str, bytes]:
    good = safetensors.torch.save({"weight": torch.zeros(1, 1, 3, 1)})
    length = len(good) - 8 - 12

    def with_header(header: Json) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(12)

    entry = {"dtype": "F32", "shape": [1, 1, 3, 1], "data_offsets": [0, 12]}
    return {
        "nothing": b"",
        "garbage": b"\x80\x04\x95garbage",
        "cut short": good[:-1],
        "grown": good + b"\0",
        "a header of 2^62 bytes": struct.pack("<Q", 2**62) + good[8:],
        "a header cut short": struct.pack("<Q", length - 1) + good[8:],
        "offsets beyond the end": with_header({"weight": {**entry, "data_offsets": [0, 2**60]}}),
        "a shape of 2^60": with_header({"weight": {**entry, "shape": [2**30, 2**30]}}),
        "another dtype": with_header({"weight": {**entry, "dtype": "I32"}}),
        "no dtype": with_header({"weight": {**entry, "dtype": "X9"}}),
        "another name": with_header({"gewicht": entry}),
        "one more": safetensors.torch.save(
            {"weight": torch.zeros(1, 1, 3, 1), "more": torch.zeros(1)}
        ),
        "another shape": safetensors.torch.save({"weight": torch.zeros(3)}),
    }


class TestDefects:
    def test_every_byte_counts(self, tmp_path: Path) -> None:
        """One bit of every third byte here; test_container turns to every byte of a zip."""
        path = tmp_path / "engine"
        artifact.write(tiny(), path)
        for name, data in files_of(path).items():
            for i in range(0, len(data), 3):
                changed = data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :]
                (path / name).write_bytes(changed)
                with pytest.raises(ArtifactError, match="altered"):
                    artifact.read(path)
            (path / name).write_bytes(data)
        assert same(artifact.read(path), tiny())

    @pytest.mark.parametrize("name", [MANIFEST, SEAL, GRAPH, WEIGHTS])
    @pytest.mark.parametrize("form", FORMS)
    def test_a_file_is_missing(self, tmp_path: Path, form: str, name: str) -> None:
        artifact.write(tiny(), tmp_path / "whole")
        files = files_of(tmp_path / "whole")
        del files[name]
        container.write(tmp_path / form, files)
        with pytest.raises(ArtifactError, match=f"there is no {name}|{name} is missing"):
            artifact.read(tmp_path / form)

    @pytest.mark.parametrize("name", [MANIFEST, SEAL, GRAPH, WEIGHTS])
    def test_a_file_is_cut_short(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "engine"
        artifact.write(tiny(), path)
        data = (path / name).read_bytes()
        for size in (0, 1, len(data) // 2, len(data) - 1):
            (path / name).write_bytes(data[:size])
            with pytest.raises(ArtifactError, match="altered|were written"):
                artifact.read(path)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_file_too_many(self, tmp_path: Path, form: str) -> None:
        artifact.write(tiny(), tmp_path / "whole")
        container.write(tmp_path / form, {**files_of(tmp_path / "whole"), "code.py": b"import os"})
        with pytest.raises(ArtifactError, match=r"code\.py is no part of it"):
            artifact.read(tmp_path / form)

    @pytest.mark.parametrize("form", FORMS)
    def test_no_artifact(self, tmp_path: Path, form: str) -> None:
        with pytest.raises(ArtifactError, match="there is no saved engine here"):
            artifact.load(tmp_path / form)
        (tmp_path / form).mkdir()
        with pytest.raises(ArtifactError, match=r"there is no manifest\.json"):
            artifact.load(tmp_path / form)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("name", MANIFESTS)
    def test_a_forged_manifest(self, tmp_path: Path, name: str, form: str) -> None:
        mutate, message = MANIFESTS[name]
        forge(tmp_path / form, manifest=mutate)
        with pytest.raises(ArtifactError, match=message) as caught:
            artifact.read(tmp_path / form)
        assert str(caught.value).startswith(f"{tmp_path / form}: ")

    @pytest.mark.parametrize("text", [b"", b"null", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
    def test_a_manifest_that_is_none(self, tmp_path: Path, text: bytes) -> None:
        path = tmp_path / "engine"
        artifact.write(tiny(), path)
        (path / MANIFEST).write_bytes(text)
        (path / SEAL).write_bytes(container.seal(text))
        with pytest.raises(ArtifactError, match=r"manifest\.json is not fastres's"):
            artifact.read(path)

    @pytest.mark.parametrize("name", GRAPHS)
    def test_a_forged_graph(self, tmp_path: Path, name: str) -> None:
        mutate, message = GRAPHS[name]
        forge(tmp_path / "engine", graph=mutate)
        with pytest.raises(ArtifactError, match=f"contradicts itself: .*{message}"):
            artifact.read(tmp_path / "engine")

    def test_a_source_with_other_inputs(self, tmp_path: Path) -> None:
        def mutate(document: Json) -> None:
            text = json.dumps(document["source"]).replace('"x"', '"y"')
            document["source"] = json.loads(text)

        forge(tmp_path / "engine", graph=mutate)
        with pytest.raises(ArtifactError, match="have different inputs"):
            artifact.read(tmp_path / "engine")

    @pytest.mark.parametrize("name", hostile_weights())
    def test_forged_weights(self, tmp_path: Path, name: str) -> None:
        forge(tmp_path / "engine", weights=hostile_weights()[name])
        with pytest.raises(ArtifactError, match="weights"):
            artifact.read(tmp_path / "engine")
