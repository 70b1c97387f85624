"""One run of `fastres bench`: who takes part, the contest, and what else is asked of ours."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.cli import pictures
from fastres.cli.bench_networks import Network, open_networks
from fastres.cli.bench_results import Lane, Results
from fastres.cli.flags import Request
from fastres.cli.output import command_line, note, progress, working
from fastres.errors import FastresError, InputError, ParityError
from fastres.options import Options, as_device
from fastres.timing.checks import Reference
from fastres.timing.contest import Contest, Entrant
from fastres.timing.guard import Base, Conditions, check_conditions
from fastres.timing.machine import commit, cores, machine
from fastres.timing.peers import refusal, usual_peers
from fastres.timing.processes import Process
from fastres.timing.rates import Rates
from fastres.timing.report import BenchReport
from fastres.timing.versions import Versions, versions

MAKERS = "fastres.cli.bench_targets"


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
        self.precisions: list[str | None] = list(text.split(",")) if text else [None]
        self.device = _device(self.asked)

    def run(self) -> Results:
        """Prepares, checks and times.

        Raises:
            FastresError: a flag does not fit, or one of ours cannot be made.
            ParityError: one of ours is wrong.
        """
        started = time.time()
        with tempfile.TemporaryDirectory(prefix="fastres-bench-") as name:
            folder = Path(name)
            networks = open_networks(self.models, self.asked, self.precisions, folder)
            image = tuple(networks[0].target.shape)
            if self.base is not None:
                self._check_base(*self.base, image)
            refused = self._refused(networks)
            batches = {n: pictures.synthetic(n, networks[0].target) for n in self.asked.batch_sizes}
            entrants = self._entrants(networks, batches, folder)
            lanes = _lanes(entrants)
            launches = self.launches
            with Contest(entrants, cores=self.cores, folder=folder, launches=launches) as contest:
                finished, failure = self._time(contest, networks, lanes, batches)
                profiles: list[dict[str, Any]] = []
                rates: dict[str, Rates] = {}
                if finished and (self.layers or _pairs(lanes)):
                    try:
                        profiles = self._profiles(contest, batches)
                        rates = self._rates(lanes, folder)
                    except FastresError as error:
                        note(f"the layers were not all timed: {error}")
                    except KeyboardInterrupt:
                        finished = False
        contest.left_out = refused | contest.left_out
        for target, why in contest.left_out.items():
            note(f"{target} is left out: {why}")
        report = self._report(contest, lanes)
        return Results(
            report,
            [network.name for network in networks],
            contest.backends,
            contest.left_out,
            lanes,
            contest.verdicts,
            profiles,
            rates,
            self._versions(report, lanes, profiles, rates),
            finished,
            {
                "argv": command_line(),
                "commit": commit(),
                "date": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - started, 1),
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

    def _entrants(
        self, networks: Sequence[Network], batches: dict[int, Tensor], folder: Path
    ) -> list[Entrant]:
        example = folder / "example.pt"
        torch.save(next(iter(batches.values())), example)
        found = []
        for network in networks:
            for asked in self.precisions:
                tag = network.tag + f"{asked} " * (len(self.precisions) > 1)
                precision = network.precision(asked)
                given = {
                    "request": network.in_precision(asked),
                    "state": network.state,
                    "transfers": self.transfers,
                }
                own = Entrant(
                    f"{tag}fastres", network.name, precision, f"{MAKERS}:ours", given, ours=True
                )
                found.append(own)
                for peer in self._peers_of(network):
                    if refusal(peer, precision, self.device) is not None:
                        continue
                    more = {"name": peer, "example": example, "images": network.images}
                    more |= {"precision": precision, "device": str(self.device)}
                    found.append(
                        Entrant(
                            f"{tag}{peer}", network.name, precision, f"{MAKERS}:peer", given | more
                        )
                    )
        return found

    def _refused(self, networks: Sequence[Network]) -> dict[str, str]:
        """Why peers that were asked for by name run in none of the precisions."""
        found: dict[str, str] = {}
        for name in self.peers or ():
            whys = [
                refusal(name, network.precision(asked), self.device)
                for network in networks
                for asked in self.precisions
            ]
            if whys and None not in whys:
                found[name] = str(whys[0])
        return found

    def _peers_of(self, network: Network) -> Sequence[str]:
        if network.module is not None:
            return usual_peers(self.device) if self.peers is None else self.peers
        if self.peers:
            raise InputError(f"peers need the model's code, which {network.name} does not have")
        note(f"{network.name} is timed without a check: only a model can be checked against")
        return ()

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
                        self._announce(contest, list(batches))
                    with progress(f"timing at batch {size}") as advance:
                        contest.time(size, self.duration_s, shuffler, advance)
        except KeyboardInterrupt:
            return False, None
        except ParityError:
            raise
        except FastresError as error:
            if not contest.measurements(self.percentiles):
                raise
            return False, error
        return True, None

    def _announce(self, contest: Contest, sizes: list[int]) -> None:
        seconds = contest.forecast(self.duration_s, sizes, sizes[0])
        note(f"timing {len(contest.entrants)} targets takes about {_time(seconds)}")

    def _profiles(self, contest: Contest, batches: dict[int, Tensor]) -> list[dict[str, Any]]:
        found = []
        for entrant in (entrant for entrant in contest.entrants if entrant.ours):
            process = contest.processes[entrant.name]
            for size, batch in batches.items():
                with working(f"profiling {entrant.name} at batch {size}"):
                    process.feed(batch, rows=[0])
                    told = process.ask("profile")
                head = {"target": entrant.name, "model": entrant.model, "batch_size": size}
                ran = {"precision": entrant.precision, "backend": process.facts["backend"]}
                found.append(head | ran | told)
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
            finally:
                process.close()
        return {precision: Rates(**found) for precision, found in told.items()}

    def _report(self, contest: Contest, lanes: Sequence[Lane]) -> BenchReport:
        """The first peer that was timed is the baseline; without peers, the first of ours."""
        here = replace(machine(), threads=self.threads)
        here.state["pinned to"] = ", ".join(map(str, self.cores))
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
        profiles: Sequence[dict[str, Any]],
        rates: dict[str, Rates],
    ) -> list[Versions]:
        by_target = {(p["target"], p["batch_size"]): p for p in profiles}
        found = []
        for net, v1, v15 in _pairs(lanes) if profiles else ():
            for size in report.batch_sizes:
                old, new = (
                    (report.of(lane.ours, size), by_target[lane.ours, size]) for lane in (v1, v15)
                )
                found.append(versions(net, old, new, rates.get(v1.precision), self.seed))
        return found


def _lanes(entrants: Sequence[Entrant]) -> list[Lane]:
    return [
        Lane(
            own.name,
            own.model,
            own.precision,
            tuple(
                e.name
                for e in entrants
                if not e.ours and (e.model, e.precision) == (own.model, own.precision)
            ),
        )
        for own in entrants
        if own.ours
    ]


def _pairs(lanes: Sequence[Lane]) -> list[tuple[str, Lane, Lane]]:
    """Nets of fastres that are there as v1 and as v1.5, in one precision: (net, v1, v1.5)."""
    by_version = {}
    for lane in lanes:
        source, _, name = lane.model.partition(":")
        net, _, version = name.partition("@")
        if source == "fastres":
            by_version[net, version or "v1.5", lane.precision] = lane
    return [
        (net, lane, by_version[net, "v1.5", precision])
        for (net, version, precision), lane in by_version.items()
        if version == "v1" and (net, "v1.5", precision) in by_version
    ]


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
