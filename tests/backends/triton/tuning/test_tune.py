"""Tables of measurements, and measuring them: keys, files, what is taken and what is not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres import kernels
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import (
    Entry,
    Machine,
    Table,
    Tiles,
    cache_path,
    digest_of,
    kernels_digest,
    read_table,
    shipped,
    write_table,
)
from fastres.backends.triton.tuning import trial_eight_bits as eight_bits
from fastres.backends.triton.tuning import tune as tuning
from fastres.backends.triton.tuning.trial import Trial
from fastres.backends.triton.tuning.trial_eight_bits import make_trial
from fastres.backends.triton.tuning.tune import tune
from fastres.errors import ArtifactError
from fastres.kernels.cost import Target
from fastres.kernels.folding import stem_shape
from fastres.kernels.geometry import ConvShape, PoolShape
from fastres.kernels.reference import round_tf32
from fastres.kernels.tiles import BoxTile, ConvTile
from fastres.kernels.tiles.boxes import Projection
from fastres.kernels.tiles.chain import ChainShape

CPU = torch.device("cpu")
HOPPER = Target.typical(90)
MACHINE = Machine("NVIDIA H200", 132, "3.6.0", "0123")
POINTWISE = ConvShape(2, 4, 4, 64, 64, 1, 1)
POINTERS = Problem("pointers", POINTWISE, "fp16")
BOXES = Problem("boxes", POINTWISE, "fp16", residual=True)
CHAIN = Problem("chain", ChainShape(2, 4, 4, 64, 256, 64), "fp16")
POOLED = Problem("stem and pool", stem_shape(2, 12, 20, 32), "fp16")
FOLDED = Problem("folded stem", stem_shape(2, 12, 20, 32), "fp16")
POOL = Problem("max pool", PoolShape(2, 12, 20, 32, (3, 3), (2, 2), (1, 1)), "fp16")
MERGED = Problem("boxes", POINTWISE, "fp16", Projection(64, (2, 2)))
GROUPS = Problem("pointers", ConvShape(2, 6, 6, 64, 32, 3, 3, (1, 1), (1, 1), (1, 1), 2), "fp16")
EIGHT_BITS = [
    Problem("pointers", POINTWISE, "int8", residual=True),
    Problem("boxes", POINTWISE, "int8"),
    Problem("boxes", POINTWISE, "int8", residual=True, floating=True),
    Problem("stem and pool", stem_shape(2, 12, 20, 32), "int8"),
    Problem("folded stem", stem_shape(2, 12, 20, 32), "int8"),
    replace(POOL, precision="int8"),
    Problem("chain", ChainShape(2, 4, 4, 64, 256, 64), "int8"),
    Problem("chain", ChainShape(1, 8, 8, 64, 128, 0, 64, 2, 2), "int8"),
]
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


class TestProblems:
    def test_keys_tell_problems_apart_and_read_well(self) -> None:
        problems = [POINTERS, BOXES, CHAIN, MERGED, replace(POINTERS, precision="bf16")]
        problems += [
            FOLDED,
            replace(FOLDED, kind="pointers"),
            POOL,
            GROUPS,
            replace(GROUPS, merged=2),
        ]
        problems.append(replace(POINTERS, shape=replace(POINTWISE, stride=(2, 2))))
        assert len({p.key for p in problems}) == len(problems)
        assert BOXES.key.startswith("boxes fp16 n=2 h=4 w=4 c=64") and "residual" in BOXES.key
        assert "projected=64/2x2" in MERGED.key and "stride=1x1" in MERGED.key

    @pytest.mark.parametrize(
        "problem", [POINTERS, BOXES, CHAIN, MERGED, POOLED], ids=lambda p: p.kind
    )
    def test_candidates_come_best_first_and_are_taken(self, problem: Problem) -> None:
        tiles = problem.candidates(HOPPER)
        times = [problem.seconds(tile, HOPPER) for tile in tiles]
        assert len(tiles) > 3 and times == sorted(times)
        assert all(problem.takes(tile, HOPPER) for tile in tiles)

    def test_a_tile_of_another_kernel_is_not_taken(self) -> None:
        assert not POINTERS.takes(BOXES.candidates(HOPPER)[0], HOPPER)
        assert not CHAIN.takes(POINTERS.candidates(HOPPER)[0], HOPPER)


class TestTables:
    def test_written_and_read(self, tmp_path: Path) -> None:
        table = Table(MACHINE, {POINTERS.key: Entry({"block_m": 64}, 12.5)})
        path = cache_path(MACHINE, str(tmp_path / "new"))
        assert path.name == "tiles_nvidia_h200_132sm.json"
        write_table(path, table)
        assert read_table(path, MACHINE) == table
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_none_is_an_empty_one(self, tmp_path: Path) -> None:
        assert read_table(tmp_path / "none.json", MACHINE) == Table(MACHINE)
        assert shipped(MACHINE.__class__("NVIDIA A0", 1, "", "")).entries == {}

    @pytest.mark.parametrize("field", ["gpu", "sm_count", "triton", "kernels"])
    def test_of_another_machine_counts_for_nothing(self, field: str, tmp_path: Path) -> None:
        other = {"gpu": "H100", "sm_count": 114, "triton": "3.9.0", "kernels": "4567"}
        path = tmp_path / "t.json"
        write_table(path, Table(MACHINE, {"a": Entry({}, 1.0)}))
        fields = {"gpu": "NVIDIA H200", "sm_count": 132, "triton": "3.6.0", "kernels": "0123"}
        machine = Machine(**{**fields, field: other[field]})  # type: ignore[arg-type]
        assert read_table(path, machine) == Table(machine)

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"machine": 1}'])
    def test_damaged(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "t.json"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"t\.json is no table of tiles: .* Remove it"):
            read_table(path, MACHINE)

    def test_unreadable_and_unwritable(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_table(tmp_path, MACHINE)
        (tmp_path / "file").touch()
        with pytest.raises(ArtifactError, match="cannot be written"):
            write_table(tmp_path / "file" / "t.json", Table(MACHINE))

    def test_the_users_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_path(MACHINE).parent == tmp_path / "fastres"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_path(MACHINE).parent == Path.home() / ".cache" / "fastres"

    def test_the_digest_is_of_the_kernels(self) -> None:
        assert len(kernels_digest()) == 16
        assert kernels_digest() == digest_of(Path(kernels.__file__).parent)

    def test_the_digest_is_of_a_whole_tree(self, tmp_path: Path) -> None:
        inner = tmp_path / "tiles"
        for name in ("conv.py", "notes.txt", "__pycache__/conv.pyc"):
            (inner / name).parent.mkdir(parents=True, exist_ok=True)
            (inner / name).write_text("a = 1")
        before = digest_of(tmp_path)
        (inner / "__pycache__" / "conv.pyc").write_text("b = 1")  # no source
        assert digest_of(tmp_path) == before
        (inner / "conv.py").write_text("a = 2")
        changed = digest_of(tmp_path)
        inner.rename(tmp_path / "boxes")
        assert len({before, changed, digest_of(tmp_path)}) == 3


class TestTiles:
    def test_measured_before_estimated(self) -> None:
        estimated = Tiles(HOPPER).best(POINTERS)
        other = POINTERS.candidates(HOPPER)[-1]
        table = Table(MACHINE, {POINTERS.key: Entry(dict(vars(other)), 7.0)})
        measured = Tiles(HOPPER, [Table(MACHINE), table]).best(POINTERS)
        assert not estimated.measured and estimated.tile == POINTERS.candidates(HOPPER)[0]
        assert measured.measured and measured.tile == other and measured.seconds == 7e-6
        assert measured.estimate == POINTERS.seconds(other, HOPPER)

    def test_estimates_of_a_table_are_made_anew(self) -> None:
        """An older model's, or a slip of the pen, would be compared with those of today."""
        tile = POINTERS.candidates(HOPPER)[3]
        table = Table(MACHINE, {POINTERS.key: Entry(dict(vars(tile)), 1e-6, measured=False)})
        best = Tiles(HOPPER, [table]).best(POINTERS)
        assert best.tile == tile and not best.measured
        assert best.seconds == best.estimate == POINTERS.seconds(tile, HOPPER)

    @pytest.mark.parametrize(
        "tile",
        [{"block_m": 64}, {"block": 1}, dict(vars(ConvTile(4096, 4096, 64, 4, 3)))],
        ids=["half a tile", "no tile", "too large"],
    )
    def test_what_cannot_run_is_passed_over(self, tile: dict[str, Any]) -> None:
        table = Table(MACHINE, {POINTERS.key: Entry(tile, 1.0)})
        assert not Tiles(HOPPER, [table]).best(POINTERS).measured

    def test_every_problem_asked_for_is_remembered(self) -> None:
        tiles = Tiles(HOPPER)
        for problem in (POINTERS, CHAIN, POINTERS):
            tiles.best(problem)
        assert tiles.asked() == [POINTERS, CHAIN]


class TestTuning:
    def stub(self, monkeypatch: pytest.MonkeyPatch, times: dict[Any, float | str]) -> list[Any]:
        """Replaces the device: each tile takes the time given, or is wrong for a reason."""
        ran: list[Any] = []

        class FakeTrial:
            def __init__(self, problem: Problem, device: torch.device) -> None:
                self.device = device

            def poison(self) -> None:
                pass

            def calls(self, tile: Any, target: Target) -> tuple[()]:
                ran.append(tile)
                self.tile = tile
                if times.get(tile) == "broken":
                    raise RuntimeError("ptxas died")
                return ()

            def difference(self) -> str | None:
                return "output 0 is wrong" if times.get(self.tile) == "wrong" else None

        monkeypatch.setattr(tuning, "make_trial", FakeTrial)
        monkeypatch.setattr(tuning, "milliseconds", lambda work, device: times.get(ran[-1], 9.0))
        return ran

    def test_the_fastest_right_tile_is_entered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tiles = POINTERS.candidates(Target(90, 1))
        self.stub(monkeypatch, {tiles[0]: "wrong", tiles[1]: "broken", tiles[3]: 0.5})
        table, kept = Table(MACHINE), []
        attempts = tune([POINTERS], table, CPU, keep=lambda t: kept.append(dict(t.entries)))
        assert table.entries[POINTERS.key] == Entry(dict(vars(tiles[3])), 500.0)
        assert len(kept) == 1
        first, second, *_ = attempts[POINTERS]
        assert first.milliseconds is None and first.reason == "output 0 is wrong"
        assert second.reason == "RuntimeError: ptxas died"

    def test_what_is_known_is_not_measured_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = self.stub(monkeypatch, {})
        table = Table(MACHINE, {POINTERS.key: Entry({}, 1.0)})
        seen: list[tuple[int, int]] = []
        tune(
            [POINTERS, BOXES],
            table,
            CPU,
            keep=lambda t: None,
            progress=lambda done, total: seen.append((done, total)),
            tried=2,
        )
        assert all(isinstance(tile, BoxTile) for tile in ran) and len(ran) == 2
        assert seen == [(0, 1), (1, 1)]

    def test_where_all_are_wrong_nothing_is_entered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stub(monkeypatch, dict.fromkeys(POINTERS.candidates(Target(90, 1)), "wrong"))
        table = Table(MACHINE)
        tune([POINTERS], table, CPU, keep=lambda t: pytest.fail("kept"))
        assert table.entries == {}


@pytest.mark.interpret
@interpreted
class TestTrials:
    @pytest.mark.parametrize(
        "problem",
        [
            POINTERS,
            BOXES,
            CHAIN,
            MERGED,
            POOLED,
            FOLDED,
            POOL,
            replace(FOLDED, precision="tf32"),
            replace(GROUPS, merged=4),
            replace(BOXES, precision="tf32"),
            Problem(
                "pointers", ConvShape(1, 5, 5, 32, 16, 3, 3, (2, 2), (1, 1), (1, 1), 2), "fp32"
            ),
            Problem("boxes", ConvShape(1, 8, 8, 32, 64, 3, 3, (2, 2), (1, 1)), "fp16"),
            Problem("chain", ChainShape(1, 8, 8, 64, 128, 0, 64, 2, 2), "fp16"),
            *EIGHT_BITS,
        ],
        ids=lambda p: p.key,
    )
    def test_kernels_agree_with_pytorch(self, problem: Problem) -> None:
        trial = make_trial(problem, CPU)
        trial.poison()
        assert "not written" in str(trial.difference())
        tile = problem.candidates(Target(90, 1))[0]
        for launch in trial.launches(tile, Target(90, 1)):
            launch.run()
        assert trial.difference() is None

    @pytest.mark.parametrize(
        ("problem", "argument", "value"),
        [(FOLDED, "FOLDED", True), (replace(GROUPS, merged=4), "MERGED", 4)],
        ids=lambda x: str(getattr(x, "kind", x)),
    )
    def test_stored_zeros_are_told_from_taps_as_in_a_plan(
        self, problem: Problem, argument: str, value: object
    ) -> None:
        """What is timed is the kernel that runs, with its test for NaN."""
        (launch,) = Trial(problem, CPU).launches(problem.candidates(HOPPER)[0], HOPPER)
        assert launch.constants[argument] == value

    def test_a_wrong_result_is_seen(self) -> None:
        trial = Trial(POINTERS, CPU)
        for launch in trial.launches(POINTERS.candidates(Target(90, 1))[0], Target(90, 1)):
            launch.run()
        trial._outputs[0][-1, -1, -1, 0] += 1
        assert "output 0 is wrong" in str(trial.difference())

    @pytest.mark.parametrize("problem", EIGHT_BITS, ids=lambda p: p.key)
    def test_one_wrong_bit_is_seen_in_int8(self, problem: Problem) -> None:
        trial = make_trial(problem, CPU)
        for launch in trial.launches(problem.candidates(Target(90, 1))[0], Target(90, 1)):
            launch.run()
        for i, out in enumerate(trial._outputs):
            assert out[out > 0].float().std() > 10  # values all over the range of int8
            out[-1, -1, -1, 0] += 1
            assert f"1 values of output {i} are not the reference's" == trial.difference()
            out[-1, -1, -1, 0] -= 1

    @pytest.mark.parametrize("problem", [POINTERS, FOLDED, BOXES, MERGED], ids=lambda p: p.kind)
    def test_in_tf32_all_is_rounded_as_in_a_plan(self, problem: Problem) -> None:
        """Tensor cores that cut operands off leave these as they are."""
        trial = Trial(replace(problem, precision="tf32"), CPU)
        for launch in trial.launches(trial.problem.candidates(HOPPER)[0], HOPPER):
            assert launch.constants["ROUND_TF32"] is True
            launch.run()
        operands = [*trial._outputs, trial._matrix, trial._x]
        assert all(torch.equal(x, round_tf32(x)) and x.any() for x in operands)
        assert trial._bias.ne(round_tf32(trial._bias)).any()
        assert trial.difference() is None
        trial._outputs[0] += trial._outputs[0] * 2**-8
        assert "output 0 is wrong" in str(trial.difference())


class TestFp8Trials:
    """Interpreted kernels round to fp8 wrongly: here the comparison itself is tried."""

    PROBLEM = Problem("boxes", POINTWISE, "fp8", residual=True)

    def test_a_step_is_forgiven_and_two_are_not(self) -> None:
        trial = make_trial(self.PROBLEM, CPU)
        (out,) = trial._outputs
        assert out.dtype == torch.float8_e4m3fn
        trial.poison()
        assert "not written" in str(trial.difference())
        (exact,) = trial._exact(torch.arange(len(out)))  # type: ignore[attr-defined]
        assert exact.std() > 10
        out.copy_(exact.to(out.dtype))
        assert trial.difference() is None
        out.copy_((exact * 1.3).to(out.dtype))
        assert "values of output 0 are not the reference's" in str(trial.difference())

    def test_a_chain_may_round_its_inner_values_otherwise(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trial = make_trial(replace(CHAIN, precision="fp8"), CPU)
        finished = eight_bits._finished

        def other_sums(acc: torch.Tensor, *more: Any) -> torch.Tensor:
            noise = torch.randn(acc.shape, generator=torch.Generator().manual_seed(1))
            return finished(acc + 2**-11 * acc.std() * noise, *more)

        exact = trial._exact(trial.chosen())  # type: ignore[attr-defined]
        with monkeypatch.context() as patched:
            patched.setattr(eight_bits, "_finished", other_sums)
            found = trial._exact(trial.chosen())  # type: ignore[attr-defined]
        for out, values in zip(trial._outputs, found, strict=True):
            out.copy_(values.to(out.dtype))
        assert trial.difference() is None
        for i, values in enumerate(exact):
            assert values.std() > 10 and not torch.equal(values, found[i])
            trial._outputs[i].copy_((values * 1.5).to(torch.float8_e4m3fn))
            assert f"of output {i} are not the reference's" in str(trial.difference())
            trial._outputs[i].copy_(values.to(torch.float8_e4m3fn))

    @pytest.mark.parametrize("sm", [89, 90])
    def test_launches_are_there_to_compile(self, sm: int) -> None:
        problem = self.PROBLEM if sm == 90 else replace(self.PROBLEM, kind="pointers")
        trial = make_trial(problem, torch.device("meta"))
        target = Target.typical(sm)
        assert trial.launches(problem.candidates(target)[0], target)
