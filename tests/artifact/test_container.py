"""Containers: every changed byte shows, nothing strange is read, nothing is half-written."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastres.artifact import container
from fastres.artifact.container import MANIFEST, MARK, SEAL
from fastres.errors import ArtifactError

TEXT = b"{" + MARK + b"}"
FILES = {MANIFEST: TEXT, SEAL: container.seal(TEXT), "data.bin": bytes(range(256))}
FORMS = ("engine", "engine.fastres")


@pytest.fixture(params=FORMS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def content(path: Path) -> dict[str, bytes]:
    opened = container.open_container(path)
    assert container.read_manifest(opened) == opened.read(MANIFEST)
    found = {name: opened.read(name) for name in opened.sizes}
    assert {name: len(data) for name, data in found.items()} == opened.sizes
    return found


def sealed(data: bytes) -> bytes:
    """A zip's bytes with the comment that fits them, as a forger would make it."""
    body = data[: -len(b"sha256:") - 64] + b"sha256:"
    return body + hashlib.sha256(body).hexdigest().encode()


def forged(build: Callable[[zipfile.ZipFile], None]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = b"sha256:" + b"0" * 64
        build(archive)
    return sealed(buffer.getvalue())


class TestWriting:
    def test_what_was_written_is_read(self, path: Path) -> None:
        container.write(path, FILES)
        assert content(path) == FILES
        assert path.is_file() == path.name.endswith(".fastres")
        assert os.listdir(path.parent) == [path.name]

    def test_the_same_bytes_every_time(self, tmp_path: Path) -> None:
        for name in ("a.fastres", "b.fastres"):
            container.write(tmp_path / name, FILES)
        assert (tmp_path / "a.fastres").read_bytes() == (tmp_path / "b.fastres").read_bytes()

    def test_an_engine_is_replaced_and_other_readers_keep_theirs(self, path: Path) -> None:
        container.write(path, FILES)
        with (path / "data.bin" if path.is_dir() else path).open("rb") as old:
            container.write(path, {**FILES, "data.bin": b"new"})
            assert FILES["data.bin"] in old.read()
        assert content(path)["data.bin"] == b"new"
        assert os.listdir(path.parent) == [path.name]

    def test_a_zip_replaces_a_folder(self, tmp_path: Path) -> None:
        folder, path = tmp_path / "engine", tmp_path / "engine.fastres"
        container.write(folder, FILES)
        folder.rename(path)
        container.write(path, FILES)
        assert path.is_file() and content(path) == FILES

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("what", ["file", "folder", "empty folder", "zip", "link", "dead link"])
    def test_anything_else_is_left_alone(self, tmp_path: Path, form: str, what: str) -> None:
        path, target = tmp_path / form, tmp_path / "target"
        if what == "file":
            path.write_text("thesis")
        elif what == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("thesis.txt", "text")
        elif "link" in what:
            if what == "link":
                container.write(target, FILES)
            path.symlink_to(target)
        else:
            path.mkdir()
            if what == "folder":
                (path / "thesis.txt").write_text("text")
        before = snapshot(tmp_path)
        with pytest.raises(ArtifactError, match="left alone"):
            container.write(path, FILES)
        assert snapshot(tmp_path) == before

    def test_an_engine_beside_something_else_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "engine"
        container.write(path, FILES)
        (path / "notes.txt").write_text("mine")
        with pytest.raises(ArtifactError, match=r"it also holds notes\.txt"):
            container.write(path, FILES)
        assert (path / "notes.txt").read_text() == "mine"

    def test_a_sealed_folder_of_another_kind_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "engine"
        path.mkdir()
        (path / MANIFEST).write_bytes(b"{}")
        (path / SEAL).write_bytes(container.seal(b"{}"))
        with pytest.raises(ArtifactError, match="not an engine"):
            container.write(path, FILES)

    def test_no_parent(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="does not exist; make it first"):
            container.write(tmp_path / "away" / "engine", FILES)

    @pytest.mark.parametrize("ending", ["", ".fastres"])
    def test_a_name_as_long_as_names_can_be(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / ("n" * (255 - len(ending)) + ending)
        container.write(path, FILES)
        container.write(path, FILES)
        assert content(container.place(path)) == FILES and os.listdir(tmp_path) == [path.name]

    def test_a_disk_that_is_only_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        for name in ("mkdir", "open", "unlink"):  # unlink so even where there is no such file
            monkeypatch.setattr(Path, name, refuse)
        for form in FORMS:
            with pytest.raises(ArtifactError, match="cannot be written.*Read-only file system"):
                container.write(tmp_path / form, FILES)

    @pytest.mark.parametrize(
        ("form", "replacing", "call", "nth"),
        [
            ("engine", False, "fsync", 1),
            ("engine", False, "rename", 1),
            ("engine", True, "fsync", 2),
            ("engine", True, "rename", 1),
            ("engine.fastres", False, "fsync", 1),
            ("engine.fastres", False, "rename", 1),
            ("engine.fastres", True, "rename", 1),
        ],
    )
    def test_a_failure_changes_nothing(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        form: str,
        replacing: bool,
        call: str,
        nth: int,
    ) -> None:
        if replacing:
            container.write(tmp_path / form, FILES)
        before = snapshot(tmp_path)
        original, calls = getattr(os, call), []

        def failing(*args: object) -> None:
            calls.append(args)
            if len(calls) == nth:
                raise OSError(28, "No space left on device")
            original(*args)

        monkeypatch.setattr(os, call, failing)
        with pytest.raises(ArtifactError, match="cannot be written.*No space left"):
            container.write(tmp_path / form, {**FILES, "data.bin": b"new"})
        assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for entry in sorted(folder.rglob("*")):
        name = str(entry.relative_to(folder))
        if entry.is_symlink():
            found[name] = f"-> {os.readlink(entry)}"
        else:
            found[name] = entry.read_bytes() if entry.is_file() else "folder"
    return found


class TestDamage:
    def test_every_byte_of_a_zip_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "engine.fastres"
        container.write(path, FILES)
        data = path.read_bytes()
        for i in range(len(data)):
            path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
            with pytest.raises(ArtifactError):
                content(path)

    def test_every_byte_of_a_manifest_and_its_seal_counts(self, tmp_path: Path) -> None:
        container.write(tmp_path / "engine", FILES)
        for name in (MANIFEST, SEAL):
            file = tmp_path / "engine" / name
            for i in range(len(FILES[name])):
                changed = bytearray(FILES[name])
                changed[i] ^= 1 << i % 8
                file.write_bytes(changed)
                with pytest.raises(ArtifactError, match="altered"):
                    content(tmp_path / "engine")
            file.write_bytes(FILES[name])

    def test_a_zip_cut_short_or_grown(self, tmp_path: Path) -> None:
        path = tmp_path / "engine.fastres"
        container.write(path, FILES)
        data = path.read_bytes()
        for size in range(0, len(data), 7):
            path.write_bytes(data[:size])
            with pytest.raises(ArtifactError, match="cut short|no zip"):
                content(path)
        for grown in (data + b"x", b"x" + data, data + data):
            path.write_bytes(grown)
            with pytest.raises(ArtifactError):
                content(path)

    @pytest.mark.parametrize("name", [MANIFEST, SEAL])
    def test_missing(self, path: Path, name: str) -> None:
        container.write(path, {n: data for n, data in FILES.items() if n != name})
        with pytest.raises(ArtifactError, match=f"there is no {name}"):
            content(path)

    def test_a_manifest_of_hostile_size(self, tmp_path: Path) -> None:
        container.write(tmp_path / "engine", FILES)
        with (tmp_path / "engine" / MANIFEST).open("r+b") as file:
            file.truncate(2**40)
        with pytest.raises(ArtifactError, match="no manifest is that large"):
            content(tmp_path / "engine")

    def test_nothing_there(self, path: Path) -> None:
        with pytest.raises(ArtifactError, match="there is no saved engine here"):
            container.open_container(path)

    @pytest.mark.parametrize("data", [b"", b"PK", b"hello", b"\x80\x04\x95"])
    def test_another_file(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ArtifactError, match="the file is no zip"):
            container.open_container(tmp_path / "file")


class TestStrangeEntries:
    @pytest.mark.parametrize("kind", ["link", "folder", "pipe", "dead link"])
    def test_in_a_folder(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "engine"
        container.write(path, FILES)
        (tmp_path / "outside.bin").write_bytes(FILES["data.bin"])
        (path / "data.bin").unlink()
        if kind == "link":
            (path / "data.bin").symlink_to(tmp_path / "outside.bin")
        elif kind == "dead link":
            (path / "data.bin").symlink_to(tmp_path / "nothing")
        elif kind == "folder":
            (path / "data.bin").mkdir()
        else:
            os.mkfifo(path / "data.bin")
        with pytest.raises(ArtifactError, match=r"data\.bin is a link or no file at all"):
            container.open_container(path)

    def test_a_link_put_there_after_the_listing_is_not_followed(self, tmp_path: Path) -> None:
        path = tmp_path / "engine"
        container.write(path, FILES)
        opened = container.open_container(path)
        (path / "data.bin").unlink()
        (path / "data.bin").symlink_to("/etc/hostname")
        assert opened.read("data.bin") == FILES["data.bin"]

    def test_a_link_put_there_while_it_is_listed_is_not_followed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, opening = tmp_path / "engine", os.open
        container.write(path, FILES)

        def late(name: object, *args: Any, **kwargs: Any) -> int:
            if name == "data.bin":
                (path / name).unlink()
                (path / name).symlink_to("/etc/hostname")
            return opening(name, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", late)
        with pytest.raises(ArtifactError, match="cannot be read.*symbolic links"):
            container.open_container(path)

    def test_an_unreadable_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        container.write(tmp_path / "engine", FILES)
        opened = container.open_container(tmp_path / "engine")

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(container, "open", refuse, raising=False)
        with pytest.raises(ArtifactError, match=r"data\.bin cannot be read.*Input/output error"):
            opened.read("data.bin")

    def test_a_folder_of_many_files(self, tmp_path: Path) -> None:
        """Each takes a handle of the process, of which there are not many."""
        for i in range(65):
            (tmp_path / f"file.{i}").touch()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ArtifactError, match="it holds more than 64 files"):
            container.open_container(tmp_path)
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize(
        "name", ["../evil.json", "/etc/evil.json", "a/b.json", "a\\b.json", "C:evil.json", ".x", ""]
    )
    def test_names_in_a_zip(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "engine.fastres"
        path.write_bytes(forged(lambda archive: archive.writestr(zipfile.ZipInfo(name), b"x")))
        with pytest.raises(ArtifactError, match="no file of a saved engine"):
            container.open_container(path)

    def test_a_compressed_zip(self, tmp_path: Path) -> None:
        path = tmp_path / "engine.fastres"
        path.write_bytes(forged(lambda a: a.writestr("a.bin", bytes(2**20), zipfile.ZIP_DEFLATED)))
        with pytest.raises(ArtifactError, match="compressed, or a link"):
            container.open_container(path)

    def test_a_link_in_a_zip(self, tmp_path: Path) -> None:
        info = zipfile.ZipInfo("data.bin")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        path = tmp_path / "engine.fastres"
        path.write_bytes(forged(lambda archive: archive.writestr(info, "/etc/passwd")))
        with pytest.raises(ArtifactError, match="compressed, or a link"):
            container.open_container(path)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_name_given_twice(self, tmp_path: Path) -> None:
        def build(archive: zipfile.ZipFile) -> None:
            archive.writestr("data.bin", b"x")
            archive.writestr("data.bin", b"y")

        path = tmp_path / "engine.fastres"
        path.write_bytes(forged(build))
        with pytest.raises(ArtifactError, match="in it twice"):
            container.open_container(path)

    def test_directories_made_to_mislead(self, tmp_path: Path) -> None:
        """Every byte of a zip altered and sealed anew: an ArtifactError, or it is read."""
        path = tmp_path / "engine.fastres"
        container.write(path, FILES)
        data = path.read_bytes()
        errors = 0
        for i in range(4, len(data) - 71):
            for value in (0, 255):
                path.write_bytes(sealed(data[:i] + bytes([value]) + data[i + 1 :]))
                try:
                    content(path)
                except ArtifactError:
                    errors += 1
        assert errors > 500
