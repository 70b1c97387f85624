"""fastres.artifact: every defect of a saved engine, by accident or forged, is one ArtifactError."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fastres
from fastres import artifact
from fastres.artifact import container
from fastres.artifact.container import MANIFEST, SEAL
from fastres.artifact.contents import Contents
from fastres.artifact.manifest import GRAPH, WEIGHTS
from fastres.errors import ArtifactError

FORMS = ("engine", "engine.fastres")
Json = dict[str, Any]
Tiny = Callable[..., Contents]


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def forge(
    path: Path,
    contents: Contents,
    *,
    manifest: Callable[[Json], object] | None = None,
    graph: Callable[[Json], object] | None = None,
    weights: bytes | None = None,
) -> None:
    """Writes an artifact, changes it, and makes every digest fit, as a forger would."""
    plain = path.with_name("plain")
    artifact.write(contents, plain)
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


def pictures(**changed: object) -> Callable[[Json], object]:
    """A manifest that says so of what becomes of pictures."""
    sound = {
        "resize": 8,
        "crop": 4,
        "mean": [0.5, 0.5, 0.5],
        "std": [1.0, 1.0, 1.0],
        "scale": 1.0,
        "channels": "RGB",
        "interpolation": "bilinear",
    }
    return put("preprocess")({**sound, **changed})


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
    "preprocess std": (pictures(std=[0.0, 1.0, 1.0]), "every entry must be above 0"),
    "preprocess mean": (pictures(mean=[0.0]), "Expected `array` of length 3"),
    "preprocess field": (pictures(run="rm"), "unknown field `run`"),
    "preprocess exif": (pictures(exif=False), "not exactly those"),
    "preprocess limit": (pictures(max_pixels=2**40), "unknown field `max_pixels`"),
    "preprocess size": (pictures(crop=2**40), "crop is 1099511627776"),
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
    def test_every_byte_counts(self, tiny: Tiny, tmp_path: Path) -> None:
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
        assert artifact.read(path).graph.equals(tiny().graph)

    @pytest.mark.parametrize("name", [MANIFEST, SEAL, GRAPH, WEIGHTS])
    @pytest.mark.parametrize("form", FORMS)
    def test_a_file_is_missing(self, tiny: Tiny, tmp_path: Path, form: str, name: str) -> None:
        artifact.write(tiny(), tmp_path / "whole")
        files = files_of(tmp_path / "whole")
        del files[name]
        container.write(tmp_path / form, files)
        with pytest.raises(ArtifactError, match=f"there is no {name}|{name} is missing"):
            artifact.read(tmp_path / form)

    @pytest.mark.parametrize("name", [MANIFEST, SEAL, GRAPH, WEIGHTS])
    def test_a_file_is_cut_short(self, tiny: Tiny, tmp_path: Path, name: str) -> None:
        path = tmp_path / "engine"
        artifact.write(tiny(), path)
        data = (path / name).read_bytes()
        for size in (0, 1, len(data) // 2, len(data) - 1):
            (path / name).write_bytes(data[:size])
            with pytest.raises(ArtifactError, match="altered|were written"):
                artifact.read(path)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_file_too_many(self, tiny: Tiny, tmp_path: Path, form: str) -> None:
        artifact.write(tiny(), tmp_path / "whole")
        container.write(tmp_path / form, {**files_of(tmp_path / "whole"), "code.py": b"import os"})
        with pytest.raises(ArtifactError, match=r"code\.py is no part of it"):
            artifact.read(tmp_path / form)

    @pytest.mark.parametrize("form", FORMS)
    def test_no_artifact(self, tmp_path: Path, form: str) -> None:
        with pytest.raises(ArtifactError, match="there is no saved engine here"):
            fastres.load(tmp_path / form)
        (tmp_path / form).mkdir()
        with pytest.raises(ArtifactError, match=r"there is no manifest\.json"):
            fastres.load(tmp_path / form)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("name", MANIFESTS)
    def test_a_forged_manifest(self, tiny: Tiny, tmp_path: Path, name: str, form: str) -> None:
        mutate, message = MANIFESTS[name]
        forge(tmp_path / form, tiny(), manifest=mutate)
        with pytest.raises(ArtifactError, match=message) as caught:
            artifact.read(tmp_path / form)
        assert str(caught.value).startswith(f"{tmp_path / form}: ")

    @pytest.mark.parametrize("text", [b"", b"null", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
    def test_a_manifest_that_is_none(self, tiny: Tiny, tmp_path: Path, text: bytes) -> None:
        path = tmp_path / "engine"
        artifact.write(tiny(), path)
        (path / MANIFEST).write_bytes(text)
        (path / SEAL).write_bytes(container.seal(text))
        with pytest.raises(ArtifactError, match=r"manifest\.json is not fastres's"):
            artifact.read(path)

    @pytest.mark.parametrize("name", GRAPHS)
    def test_a_forged_graph(self, tiny: Tiny, tmp_path: Path, name: str) -> None:
        mutate, message = GRAPHS[name]
        forge(tmp_path / "engine", tiny(), graph=mutate)
        with pytest.raises(ArtifactError, match=f"contradicts itself: .*{message}"):
            artifact.read(tmp_path / "engine")

    def test_a_source_with_other_inputs(self, tiny: Tiny, tmp_path: Path) -> None:
        def mutate(document: Json) -> None:
            text = json.dumps(document["source"]).replace('"x"', '"y"')
            document["source"] = json.loads(text)

        forge(tmp_path / "engine", tiny(), graph=mutate)
        with pytest.raises(ArtifactError, match="have different inputs"):
            artifact.read(tmp_path / "engine")

    @pytest.mark.parametrize("name", hostile_weights())
    def test_forged_weights(self, tiny: Tiny, tmp_path: Path, name: str) -> None:
        forge(tmp_path / "engine", tiny(), weights=hostile_weights()[name])
        with pytest.raises(ArtifactError, match="weights"):
            artifact.read(tmp_path / "engine")
