"""One run of `fastres bench`: who takes part, the contest, and what else is asked of ours."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.cli import pictures
from fastres.cli.bench_entrants import Invited, lanes_of, pairs
from fastres.cli.bench_networks import Network, open_networks
from fastres.cli.bench_results import Lane, Results
from fastres.cli.flags import Request
from fastres.cli.output import (
    command_line,
    interrupted,
    no_more_interrupts,
    note,
    progress,
    working,
)
from fastres.errors import FastresError, ParityError
from fastres.options import Options, as_device
from fastres.timing.checks import Reference
from fastres.timing.contest import Contest, Entrant
from fastres.timing.guard import Base, Conditions, check_conditions
from fastres.timing.machine import Machine, cores, machine, record
from fastres.timing.machine import state as machine_state
from fastres.timing.processes import Process
from fastres.timing.rates import Rates
from fastres.timing.report import BenchReport
from fastres.timing.versions import Versions, typical, versions

EXAMPLE = "example.pt"
VERSIONS_TURNS = 3  # in which v1 and v1.5 are profiled, so that noise is seen


@dataclass
class Bench:
    """What is to be timed and how.

    Args:
        models: names and paths, as given.
        peers: their names; None: those that are usual on the device.
        layers: whether ours are profiled as well.
        launches: how many times every process is started.
        base: an earlier run, which this one is to be compared with, and its name.
    """

    models: Sequence[str]
    asked: Request
    peers: list[str] | None
    duration_s: float
    percentiles: tuple[float, ...]
    transfers: bool
    layers: bool
    launches: int
    seed: int
    base: tuple[Base, str] | None = None

    def __post_init__(self) -> None:
        self.threads = Options(threads=self.asked.threads).num_threads
        self.cores = cores(self.threads)
        text = self.asked.precision
        self.precisions: list[str | None] = [*dict.fromkeys(text.split(","))] if text else [None]
        self.device = _device(self.asked)
        if self.threads > len(self.cores):
            note(f"{self.threads} threads share {len(self.cores)} cores, and will be slower for it")
        if self.launches == 2:
            note("an interval from 2 launches is very wide: 3 or more tell something")

    def run(self) -> Results:
        """Prepares, checks and times.

        Raises:
            FastresError: a flag does not fit, or one of ours cannot be made.
            ParityError: one of ours is wrong.
        """
        started, load = time.time(), machine_state()["load"]
        with tempfile.TemporaryDirectory(prefix="fastres-bench-") as name:
            folder = Path(name)
            networks = open_networks(self.models, self.asked, self.precisions, folder)
            image = tuple(networks[0].target.shape)
            if self.base is not None:
                self._check_base(*self.base, image)
            batches = {n: pictures.synthetic(n, networks[0].target) for n in self.asked.batch_sizes}
            torch.save(next(iter(batches.values())), folder / EXAMPLE)
            invited = Invited(networks, self.precisions, self.peers, self.device, self.transfers)
            entrants, refused = invited.entrants(folder / EXAMPLE), invited.refused()
            lanes = lanes_of(entrants)
            with Contest(
                entrants,
                batch_sizes=list(batches),
                cores=self.cores,
                folder=folder,
                launches=self.launches,
            ) as contest:
                finished, failure = self._time(contest, networks, lanes, batches)
                here: Machine | None = None
                profiles: dict[tuple[str, int], list[dict[str, Any]]] = {}
                rates: dict[str, Rates] = {}
                turns = self._profiles_wanted(lanes)
                try:
                    here = self._machine(load)
                    if finished and turns:
                        profiles = self._profiles(contest, batches, turns)
                        rates = self._rates(lanes, folder)
                except FastresError as error:
                    note(f"the layers were not all timed: {error}")
                except KeyboardInterrupt:
                    interrupted()
                    contest.kill()
                    finished = False
                no_more_interrupts()
        contest.left_out = refused | contest.left_out
        for target, why in contest.left_out.items():
            note(f"{target} is left out: {why}")
        report = self._report(contest, lanes, here or self._machine(load))
        return Results(
            report,
            [network.name for network in networks],
            contest.backends,
            contest.left_out,
            lanes,
            contest.verdicts,
            [typical(told) for told in profiles.values()],
            rates,
            self._versions(report, lanes, profiles, rates),
            finished,
            {
                **record(command_line(), started),
                "duration_s": self.duration_s,
                "launches": self.launches,
                "transfers": self._transfers,
                "input": image,
            },
            failure,
        )

    @property
    def _transfers(self) -> str:
        return "included" if self.transfers else "not included"

    def _check_base(self, base: Base, name: str, image: tuple[int, ...]) -> None:
        here = replace(machine(), threads=self.threads)
        check_conditions(base, name, here, Conditions(True, self._transfers, image))

    def _time(
        self,
        contest: Contest,
        networks: Sequence[Network],
        lanes: Sequence[Lane],
        batches: dict[int, Tensor],
    ) -> tuple[bool, FastresError | None]:
        """Whether it came to its end, and what it failed of; what was timed until then is kept.

        Raises:
            FastresError: before anything was timed; ParityError at any time.
        """
        by_name = {network.name: network for network in networks}
        ours = {name: lane.ours for lane in lanes for name in (lane.ours, *lane.peers)}

        def expected(entrant: Entrant, batch: Tensor, rows: Sequence[int]) -> Reference | None:
            network = by_name[entrant.model]
            return network.expected(entrant, ours[entrant.name], contest, batch, rows)

        shuffler = random.Random(self.seed)
        try:
            for launch in range(self.launches):
                with progress(f"preparing, launch {launch + 1} of {self.launches}") as advance:
                    contest.prepare(advance)
                for size, batch in batches.items():
                    with working(f"checking at batch {size}"):
                        contest.check(batch, expected)
                    if launch == 0 and size == next(iter(batches)):
                        turns = self._profiles_wanted(lanes)
                        seconds = contest.forecast(self.duration_s, size, turns)
                        count = len(contest.entrants)
                        note(f"timing {count} targets takes about {_time(seconds)}")
                    with progress(f"timing at batch {size}") as advance:
                        contest.time(size, self.duration_s, shuffler, advance)
        except KeyboardInterrupt:
            interrupted()
            contest.kill()
            return False, None
        except ParityError:
            raise
        except FastresError as error:
            if not contest.measurements(self.percentiles):
                raise
            return False, error
        return True, None

    def _profiles_wanted(self, lanes: Sequence[Lane]) -> int:
        """How often each of ours is profiled at each batch size."""
        return VERSIONS_TURNS if pairs(lanes) else int(self.layers)

    def _profiles(
        self, contest: Contest, batches: dict[int, Tensor], turns: int
    ) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """Ours, by name and batch size; in turns, since a machine changes its speed meanwhile."""
        ours = [entrant for entrant in contest.entrants if entrant.ours]
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for size, batch in batches.items():
            for turn in range(turns):
                for entrant in ours if turn % 2 == 0 else reversed(ours):
                    process = contest.processes[entrant.name]
                    with working(f"profiling {entrant.name} at batch {size}"):
                        if turn == 0:
                            process.feed(batch, rows=[0])
                        told = process.ask("profile")
                    head = {"target": entrant.name, "model": entrant.model, "batch_size": size}
                    ran = {"precision": entrant.precision, "backend": process.facts["backend"]}
                    found.setdefault((entrant.name, size), []).append(head | ran | told)
        return found

    def _rates(self, lanes: Sequence[Lane], folder: Path) -> dict[str, Rates]:
        """This machine's, in a process that is pinned like the targets."""
        precisions = list(dict.fromkeys(lane.precision for lane in lanes))
        given = {"precisions": precisions, "device": str(self.device), "threads": self.threads}
        maker = "fastres.timing.rates:maker"
        with working("measuring the machine's rates"):
            process = Process("rates", maker, given, cores=self.cores, folder=folder)
            try:
                told = process.wait()
            except BaseException:  # nobody waits for what it is still doing
                process.kill()
                raise
            finally:
                process.close()
        return {precision: Rates(**found) for precision, found in told.items()}

    def _machine(self, load: str) -> Machine:
        """Read while it is still warm; `load` is that before the run, when it should be idle."""
        here = replace(
            machine(self.device if self.device.type == "cuda" else None), threads=self.threads
        )
        here.state["load before"] = load
        here.state["pinned to"] = ", ".join(map(str, self.cores))
        return here

    def _report(self, contest: Contest, lanes: Sequence[Lane], here: Machine) -> BenchReport:
        """The first peer that was timed is the baseline; without peers, the first of ours."""
        report = BenchReport(here, "", self.seed, contest.measurements(self.percentiles))
        timed = [m.target for m in report.measurements]
        peers = [peer for lane in lanes for peer in lane.peers if peer in timed]
        everywhere = [  # a peer may have been left out at a larger batch size
            name for name in (*peers, *timed) if timed.count(name) == len(report.batch_sizes)
        ]
        return report.against(everywhere[0]) if everywhere else report

    def _versions(
        self,
        report: BenchReport,
        lanes: Sequence[Lane],
        profiles: dict[tuple[str, int], list[dict[str, Any]]],
        rates: dict[str, Rates],
    ) -> list[Versions]:
        found = []
        for net, v1, v15 in pairs(lanes) if profiles else ():
            for size in report.batch_sizes:
                old, new = (
                    (report.of(lane.ours, size), profiles[lane.ours, size]) for lane in (v1, v15)
                )
                found.append(versions(net, old, new, rates.get(v1.precision), self.seed))
        return found


def _device(request: Request) -> torch.device:
    """Where ours will run, and so where peers are to.

    Raises:
        InputError: there is no such device.
    """
    device = as_device(request.device)
    if device is not None:
        return device
    first = (request.backend or "auto").split(",")[0]
    on_gpu = torch.cuda.is_available() and first in ("auto", "triton", "tensorrt")
    return torch.device("cuda" if on_gpu else "cpu")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
