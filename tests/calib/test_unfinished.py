"""fastres.calib.unfinished: put in place in one step, and what killed writers leave is swept."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.calib import unfinished as module
from fastres.calib.files import write_whole
from fastres.calib.unfinished import put_in_place, sweep, unfinished

LEFT = ".0123456789abcdef.fastres.tmp"


def a_folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "data").write_text(text)
    return path


class TestPutInPlace:
    def test_where_nothing_is(self, tmp_path: Path) -> None:
        put_in_place(a_folder(tmp_path / "new", "new"), tmp_path / "it")
        assert (tmp_path / "it" / "data").read_text() == "new"
        assert os.listdir(tmp_path) == ["it"]

    def test_a_folder_changes_places_with_a_folder(self, tmp_path: Path) -> None:
        it, new = a_folder(tmp_path / "it", "old"), a_folder(tmp_path / "new", "new")
        put_in_place(new, it)
        assert ((it / "data").read_text(), (new / "data").read_text()) == ("new", "old")

    @pytest.mark.parametrize("folder_first", [True, False])
    def test_a_folder_and_a_file(self, tmp_path: Path, folder_first: bool) -> None:
        folder, file = a_folder(tmp_path / "folder", "text"), tmp_path / "file"
        file.write_text("file")
        put_in_place(*((folder, file) if folder_first else (file, folder)))
        assert file.is_dir() and folder.read_text() == "file"

    def test_what_was_in_the_way_goes_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        it, new = a_folder(tmp_path / "it", "old"), a_folder(tmp_path / "new", "new")
        exchange = module._exchange

        def late(one: Path, other: Path) -> None:
            os.rename(it, tmp_path / "elsewhere")
            exchange(one, other)

        monkeypatch.setattr(module, "_exchange", late)
        put_in_place(new, it)
        assert (it / "data").read_text() == "new"

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EXDEV, None])
    def test_a_file_system_that_cannot(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
    ) -> None:
        """Nothing is changed, rather than that there is nothing for a moment."""

        def refuse(*args: object) -> int:
            module.ctypes.set_errno(number)
            return -1

        library = type("Library", (), {} if number is None else {"renameat2": refuse})
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: library)
        it, new = a_folder(tmp_path / "it", "old"), a_folder(tmp_path / "new", "new")
        with pytest.raises(OSError) as caught:
            put_in_place(new, it)
        cannot = "cannot replace a folder in one step" in str(caught.value)
        assert cannot == (number != errno.EXDEV)
        assert (it / "data").read_text() == "old"


class TestUnfinished:
    @pytest.mark.parametrize("folder", [True, False])
    def test_is_gone_in_the_end(self, tmp_path: Path, folder: bool) -> None:
        with unfinished(tmp_path / "it", folder=folder) as temporary:
            assert temporary.is_dir() == folder and os.listdir(tmp_path) == [temporary.name]
        with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "it", folder=folder):
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("folder", [True, False])
    def test_a_sweep_spares_a_live_writer(self, tmp_path: Path, folder: bool) -> None:
        with unfinished(tmp_path / "it", folder=folder) as temporary:
            sweep(tmp_path)
            with unfinished(tmp_path / "other", folder=folder):  # sweeps as well
                assert temporary.exists()

    @pytest.mark.parametrize("folder", [True, False])
    def test_what_a_killed_writer_left_is_swept(self, tmp_path: Path, folder: bool) -> None:
        code = (
            "import os, signal, sys; from pathlib import Path\n"
            "from fastres.calib.unfinished import unfinished\n"
            f"with unfinished(Path(sys.argv[1]), folder={folder}) as temporary:\n"
            f"    (temporary / 'data' if {folder} else temporary).write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "it")], check=False)
        assert len(os.listdir(tmp_path)) == 1
        write_whole(tmp_path / "table.json", b"{}")
        assert os.listdir(tmp_path) == ["table.json"]

    def test_nothing_else_is_swept(self, tmp_path: Path) -> None:
        a_folder(tmp_path / "mine", "thesis")
        (tmp_path / LEFT).symlink_to(tmp_path / "mine")
        for name in (".fastres.tmp", f"a{LEFT}", f"{LEFT}.bak", LEFT.upper()):
            (tmp_path / name).write_text("mine")
        before = sorted(os.listdir(tmp_path))
        sweep(tmp_path)
        assert sorted(os.listdir(tmp_path)) == before and len(os.listdir(tmp_path / "mine")) == 1
        sweep(tmp_path / "nowhere")

    @pytest.mark.parametrize("folder", [True, False])
    @pytest.mark.parametrize("when", ["before it is opened", "before it is locked", "held"])
    def test_a_sweep_that_is_faster(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, when: str
    ) -> None:
        """Then another name is taken; the writer never works on what another removes."""
        swept: list[str] = []
        call = "open" if when == "before it is opened" else "flock"
        original = getattr(os if call == "open" else fcntl, call)
        held: list[int] = []

        def first_sweep(what: object, flags: int, *rest: object) -> object:
            for name in os.listdir(tmp_path) if not swept else ():
                swept.append(name)
                if when == "held":
                    held.append(os.open(tmp_path / name, os.O_RDONLY))
                    original(held[0], flags)
                else:
                    (os.rmdir if folder else os.unlink)(tmp_path / name)
            return original(what, flags, *rest)

        monkeypatch.setattr(os if call == "open" else fcntl, call, first_sweep)
        with unfinished(tmp_path / "it", folder=folder) as temporary:
            assert temporary.exists() and temporary.name not in swept
        assert len(swept) == 1
        for handle in held:
            os.close(handle)

    def test_where_there_are_no_locks_nothing_is_swept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        (tmp_path / LEFT).write_text("whose?")
        monkeypatch.setattr(fcntl, "flock", refuse)
        with unfinished(tmp_path / "it") as temporary:
            assert temporary.exists()
        assert os.listdir(tmp_path) == [LEFT]


def test_an_interrupt_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C where the old engine, exchanged for the new one, is half removed."""
    rmtree, asked = shutil.rmtree, []

    def interrupted(path: Path, ignore_errors: bool) -> None:
        asked.append(path)
        if len(asked) == 1:
            (path / "one").unlink()
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    (tmp_path / "engine").mkdir()
    for name in ("one", "two"):
        (tmp_path / "engine" / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with unfinished(tmp_path / "engine", folder=True) as temporary:
            (temporary / "new").write_text("new")
            put_in_place(temporary, tmp_path / "engine")
    assert [path.name for path in tmp_path.rglob("*")] == ["engine", "new"] and len(asked) == 2
