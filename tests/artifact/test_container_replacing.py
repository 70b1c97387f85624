"""A saved engine is replaced in one step: whoever reads, saves or is killed finds one of two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastres.artifact import container
from fastres.artifact.container import MANIFEST, MARK, SEAL
from fastres.errors import ArtifactError

FORMS = ("engine", "engine.fastres")


def files(text: bytes) -> dict[str, bytes]:
    manifest = b"{" + MARK + b', "of": "' + text + b'"}'
    return {MANIFEST: manifest, SEAL: container.seal(manifest), "data.bin": text * 1000}


OLD, NEW = files(b"old"), files(b"newer")


def content(path: Path) -> dict[str, bytes]:
    opened = container.open_container(path)
    container.read_manifest(opened)
    return {name: opened.read(name) for name in opened.sizes}


@pytest.fixture(params=FORMS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


# Forks before torch is imported: each child is killed before one more operation on files.
KILLED = """
import os, signal, sys
from pathlib import Path
from fastres.artifact import container
sys.path.insert(0, sys.argv[1])
from test_container_replacing import NEW, OLD, content

folder, form = Path(sys.argv[2]), sys.argv[3]
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree",
          "mmap.__new__", "os.scandir", "ctypes.dlopen", "os.listdir", "fcntl.flock"}
def attempt(at):
    path = folder / str(at) / form
    path.parent.mkdir()
    container.write(path, OLD)
    child = os.fork()
    if child == 0:
        seen = []
        def hook(event, arguments):
            if event in EVENTS:
                seen.append(event)
                if len(seen) > at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        container.write(path, NEW)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = content(path)
    assert found in (OLD, NEW), (at, sorted(found))
    container.write(path, NEW)
    assert content(path) == NEW
    assert os.listdir(path.parent) == [form], (at, os.listdir(path.parent))
    return killed
at = 0
while attempt(at):
    at += 1
assert at > 8
print(at)
"""


@pytest.mark.parametrize("form", FORMS)
def test_killed_before_every_operation(form: str, tmp_path: Path) -> None:
    line = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), form]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_goes_on_with_what_it_opened(path: Path) -> None:
    container.write(path, OLD)
    opened = container.open_container(path)
    container.write(path, NEW)
    assert {name: opened.read(name) for name in opened.sizes} == OLD
    assert content(path) == NEW


def replacing(path: Path, nth: int, times: int = 1) -> Callable[..., int]:
    """os.open, which has the engine replaced and what was there removed before its nth call."""
    opening, calls = os.open, [0]

    def late(*args: Any, **kwargs: Any) -> int:
        calls[0] += 1
        if calls[0] % nth == 0 and calls[0] <= nth * times:
            before, os.open = os.open, opening
            container.write(path, NEW if calls[0] // nth % 2 else OLD)
            os.open = before
        return opening(*args, **kwargs)

    return late


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_replaced_while_it_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    container.write(path, OLD)
    handles = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "open", replacing(path, nth))
    assert content(path) in (OLD, NEW)
    assert len(os.listdir("/proc/self/fd")) == handles


def test_replaced_as_often_as_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine"
    container.write(path, OLD)
    monkeypatch.setattr(container, "_TRIES", 5)
    monkeypatch.setattr(os, "open", replacing(path, 2, 10**6))
    with pytest.raises(ArtifactError, match="it was replaced 5 times while it was opened"):
        container.open_container(path)


SAVING = """
import sys
from pathlib import Path
from fastres.artifact import container
sys.path.insert(0, sys.argv[1])
from test_container_replacing import NEW, OLD, content
for i in range(40):
    container.write(Path(sys.argv[2]), (OLD, NEW)[i % 2])
    assert content(Path(sys.argv[2])) in (OLD, NEW)
"""


def test_savers_and_readers_at_once(path: Path) -> None:
    container.write(path, OLD)
    line = [sys.executable, "-c", SAVING, str(Path(__file__).parent), str(path)]
    savers = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    while any(saver.poll() is None for saver in savers):
        assert content(path) in (OLD, NEW)
    for saver in savers:
        assert saver.communicate()[1] == "" and saver.returncode == 0
    assert content(path) == NEW and os.listdir(path.parent) == [path.name]
