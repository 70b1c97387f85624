"""bench.gpu.cache: kernels packed into a file are found by Triton wherever it is unpacked."""

from __future__ import annotations

import json
import lzma
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import triton
from triton import knobs
from triton._C import libtriton

from bench.gpu import __main__ as gpu
from bench.gpu import launches
from bench.gpu.cache import archive as cache
from bench.gpu.cache import making
from bench.gpu.cache.archive import Archive, Kernel, Key, kernel_of, key_here, unfit, unpack
from bench.gpu.plans import FIRST, SECOND
from fastres.kernels.aot import compile_kernel
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch

H200 = Target.typical(90)
KEY = Key("3.6.0", "sources", "sm_90: ptxas 12.8", "options", "[]", "library", "3.11")
SMALL = (
    ("kernel", "max_pool-maxpool-b1-fp16", H200),
    ("kernel", "global_pool-avgpool-b1-int8", H200),
)


@pytest.fixture(scope="module")
def calls() -> list[Launch]:
    return [launch for job in SMALL for launch in launches.launches(job)]


@pytest.fixture(scope="module")
def kernels(calls: list[Launch], tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    if knobs.runtime.interpret:
        pytest.skip("Triton's compiler is off under TRITON_INTERPRET=1")
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("work"))
        return [kernel_of(launch, 90) for launch in calls]


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether Triton found what it was asked to compile, one after the other."""
    found: list[bool] = []
    listener = lambda **told: found.append(told["cache_hit"])  # noqa: E731
    monkeypatch.setattr(knobs.compilation, "listener", listener)
    return found


def packed(path: Path, kernels: Sequence[Kernel], key: Key | None = None, **more: int) -> Archive:
    archive = Archive(path, key or key_here(90), **more)
    for kernel in kernels:
        archive.add(kernel)
    archive.close()
    return archive


def files(path: Path) -> list[str]:
    with lzma.open(path) as opened, tarfile.open(fileobj=opened) as archive:
        return archive.getnames()


def noise(number: int) -> Kernel:
    """A kernel that does not compress: 64 KB."""
    import random

    data = random.Random(number).randbytes(2**16)
    return Kernel("noise", f"-{number}", b"{}", data, ("fastres.kernels.pool:none", ""), "")


@pytest.mark.compile
class TestKernels:
    def test_are_found_where_they_are_unpacked(
        self, kernels: list[Kernel], calls: list[Launch], hits: list[bool], tmp_path: Path
    ) -> None:
        archive = packed(tmp_path / "a.tar.xz", [*kernels, *kernels])
        assert archive.kernels == len(kernels) == len(calls) >= 3
        assert archive.bytes == (tmp_path / "a.tar.xz").stat().st_size
        row = unpack(tmp_path / "a.tar.xz", tmp_path / "there", 90)
        assert row["kernels"] == len(kernels) and row["changed"] == [] and "note" not in row
        with knobs.cache.scope():
            knobs.cache.dir = str(tmp_path / "there")
            found = [compile_kernel(launch, 90) for launch in calls]
            assert hits == [True] * len(calls)
            assert [one.asm["cubin"] for one in found] == [kernel.cubin for kernel in kernels]
            compile_kernel(calls[0], 80)
            assert not hits[-1], "the listener tells of compilations, too"

    def test_hold_nothing_but_machine_code_and_what_triton_says_of_it(
        self, kernels: list[Kernel], tmp_path: Path
    ) -> None:
        packed(tmp_path / "a.tar.xz", kernels)
        unpack(tmp_path / "a.tar.xz", tmp_path / "there", 90)
        there = [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
        assert {path.suffix for path in there} == {".cubin", ".json"}
        assert len(there) == 3 * len(kernels)
        assert set(files(tmp_path / "a.tar.xz")) == {
            *("key.json", "kernel.json", "kernel.cubin", "made.json"),
        }

    def test_of_another_build_of_the_same_triton_are_taken(
        self,
        kernels: list[Kernel],
        calls: list[Launch],
        hits: list[bool],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As of another Python, whose library has other bytes: its keys are made there."""
        key = msgspec.structs.replace(key_here(90), library="another", python="3.99")
        packed(tmp_path / "a.tar.xz", kernels, key)
        row = unpack(tmp_path / "a.tar.xz", tmp_path / "there", 90)
        assert "for Python 3.99 there" in row["note"] and row["kernels"] == len(kernels)
        with knobs.cache.scope():
            knobs.cache.dir = str(tmp_path / "there")
            compile_kernel(calls[0], 90)
        assert hits == [True]

    def test_whose_source_changed_are_named(self, kernels: list[Kernel], tmp_path: Path) -> None:
        place = kernels[0].source[0]
        changed = [kernels[0]._replace(source=(place, "another")), *kernels[1:]]
        packed(tmp_path / "a.tar.xz", changed[::-1])
        row = unpack(tmp_path / "a.tar.xz", tmp_path / "there", 90)
        assert row["changed"] == [place.split(":")[1]]

    def test_a_job_that_cannot_be_compiled_has_none(self) -> None:
        assert making.compiled(("kernel", "no such case", H200)) == []


class TestKey:
    def test_is_of_what_triton_itself_looks_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = key_here(90)
        assert here.triton == triton.__version__ and "sm_90" in here.target
        assert unfit(here, here) is None
        assert "sm and ptxas" in str(unfit(here, key_here(100)))
        variables = {"DISABLE_LLVM_OPT": "1"}
        monkeypatch.setattr(libtriton, "get_cache_invalidating_env_vars", lambda: variables)
        assert "variables" in str(unfit(here, key_here(90)))
        monkeypatch.setattr(cache, "triton_key", lambda: "another")
        assert "Python sources of Triton" in str(unfit(here, key_here(90)))

    @pytest.mark.parametrize(
        ("field", "said"),
        [("triton", "Triton (3.5.0; here 3.6.0)"), ("options", "compiler's options")],
    )
    def test_says_what_differs(self, field: str, said: str) -> None:
        made = msgspec.structs.replace(KEY, **{field: "3.5.0"})
        assert said in str(unfit(made, KEY))

    def test_a_library_for_another_python_fits(self) -> None:
        made = msgspec.structs.replace(KEY, library="another", python="3.12")
        assert unfit(made, KEY) is None

    def test_what_does_not_fit_is_left_alone(self, tmp_path: Path) -> None:
        path, there = tmp_path / "a.tar.xz", tmp_path / "there"
        packed(path, [noise(0)], KEY)
        row = unpack(path, there, 90)
        assert row["name"] == "a.tar.xz" and "Triton (3.6.0; here" in row["refused"]
        assert path.exists() and not there.exists()

    @pytest.mark.parametrize("damage", ["cut off", "no archive", "no file"])
    def test_a_damaged_archive_is_a_row(self, damage: str, tmp_path: Path) -> None:
        path = tmp_path / "a.tar.xz"
        if damage == "cut off":
            packed(path, [noise(0)])
            path.write_bytes(path.read_bytes()[:-500])
        elif damage == "no archive":
            path.write_bytes(b"text" * 1000)
        assert "cannot be read" in unpack(path, tmp_path / "there", 90)["refused"]


class TestSize:
    def test_of_an_archive_is_kept_and_what_came_first_is_in_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "PIECE", 2**17)
        path = tmp_path / "a.tar.xz"
        archive = packed(path, [noise(i) for i in range(40)], limit=10 * 2**16)
        assert archive.full and 6 <= archive.kernels < 10
        assert path.stat().st_size == archive.bytes <= 10 * 2**16
        row = unpack(path, tmp_path / "there", 90)
        assert row["kernels"] == archive.kernels

    def test_what_there_is_no_room_for_is_said_and_not_compiled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "PIECE", 2**17)
        compiled: list[int] = []

        def kernels(first: int) -> Iterator[Kernel]:
            for number in range(first, first + 8):
                compiled.append(number)
                yield noise(number)

        parts = [(f"from {first}", lambda first=first: kernels(first)) for first in (0, 10, 20)]
        row = making.make(parts, tmp_path / "a.tar.xz", 90, limit=14 * 2**16)
        assert row["not_all_for_want_of"] == {"from 10": "room", "from 20": "room"}
        of: Any = row["of"]
        assert of["from 0"] == 8 and 0 < of["from 10"] < 8 and of["from 20"] == 0
        assert max(compiled) < 20

    def test_what_there_is_no_time_for_is_said(self, tmp_path: Path) -> None:
        def kernels() -> Iterator[Kernel]:
            yield noise(0)
            yield from making.of_jobs([SMALL[0]], 1, until=0.0)

        row = making.make([("a", kernels)], tmp_path / "a.tar.xz", 90)
        assert (row["kernels"], row["not_all_for_want_of"]) == (1, {"a": "time"})


class TestJobs:
    def test_come_in_the_order_of_the_run(self) -> None:
        kinds = list(dict.fromkeys(job[0] for job in launches.jobs(FIRST, H200)))
        assert kinds == ["kernel", "plan", "question", "tile"]

    def test_the_best_tile_of_every_problem_comes_before_any_second(self) -> None:
        tiles = [job for job in launches.jobs(FIRST, H200) if job[0] == "tile"]
        ranks = [job[2] for job in tiles]
        assert ranks == sorted(ranks) and ranks.count(0) == ranks.count(9) > 20
        second = launches.jobs(SECOND, H200)
        assert {job[1].precision for job in tiles} == {"fp16"}
        assert {job[1].precision for job in second if job[0] == "tile"} == {"fp16", "int8"}

    def test_networks_are_in_both_kinds_of_launch_and_bring_their_pictures_in(self) -> None:
        job = ("plan", "cifar_resnet:8", "v1.5", "fp16", 2, H200, 32)
        found = list(launches.launches(job))
        dependent = [launch for launch in found if launch.dependent]
        loads = [launch for launch in found if "DEPENDENT" not in launch.constants]
        assert len(found) - len(loads) == 2 * len(dependent) > 16
        read = {next(launch.tensors()).dtype for launch in loads}
        assert read == {torch.float32, torch.float16}


def test_a_run_unpacks_first_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gpu, "_section", lambda command, seconds: asked.append("section") or 0)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    packed(tmp_path / "a.tar.xz", [noise(0)])
    flags = [f"--out={tmp_path}", "--device=cpu", "--only=facts"]
    assert gpu.main([*flags, f"--cache={tmp_path / 'a.tar.xz'}"]) == 0
    row = json.loads((tmp_path / "gpu.jsonl").read_text())
    assert (row["section"], row["kernels"]) == ("cache", 1) and asked == ["section"]
    assert len(list((tmp_path / "triton_cache").rglob("*.cubin"))) == 1
    packed(tmp_path / "a.tar.xz", [noise(0)], KEY)
    assert gpu.main([*flags, f"--cache={tmp_path / 'a.tar.xz'}"]) == 0
    assert "refused" in json.loads((tmp_path / "gpu.jsonl").read_text().splitlines()[-1])


class TestLaunchers:
    """The C that starts a kernel, which Triton 3.6 builds for each signature."""

    @pytest.mark.parametrize("fails", [False, True])
    def test_are_built_before_the_first_launch(
        self, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built: list[str] = []

        def compile_module(source: str, name: str, *dirs: object) -> None:
            if fails:
                raise RuntimeError("no C compiler")
            built.append(f"{source} in {knobs.cache.dir}")

        make = SimpleNamespace(compile_module_from_src=compile_module)
        monkeypatch.setattr(cache, "build", make)
        monkeypatch.setattr(cache.driver, "library_dirs", lambda: [])
        kernels = [noise(i)._replace(launcher=f"C {i % 2}") for i in range(4)]
        packed(tmp_path / "a.tar.xz", kernels)
        row = unpack(tmp_path / "a.tar.xz", tmp_path / "there", 90)
        assert row["kernels"] == 4 and row["launchers"] == (0 if fails else 2)
        assert len(built) == (0 if fails else 2)
        assert all(one.endswith(str(tmp_path / "there")) for one in built)
        assert ("no C compiler" in row.get("launchers_not_built", "")) == fails


@pytest.mark.compile
def test_what_tests_of_a_gpu_launch_is_compiled_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if knobs.runtime.interpret:
        pytest.skip("Triton's compiler is off under TRITON_INTERPRET=1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(making, "_FOLDERS", ("tests/kernels/test_pool.py",))
    (kernel,) = making.of_tests("first", 90, 1, time.time() + 100)
    assert kernel.name == "_max_pool_kernel" and kernel.cubin.startswith(b"\x7fELF")
