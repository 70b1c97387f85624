"""What a run of `fastres bench` found, as text and as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastres.errors import FastresError
from fastres.timing.checks import Verdict
from fastres.timing.guard import SCHEMA, Base, Comparison, compare
from fastres.timing.rates import Rates
from fastres.timing.report import BenchReport
from fastres.timing.versions import Versions, table


@dataclass(frozen=True)
class Lane:
    """One of ours, and the peers that run the same model in the same precision."""

    ours: str
    model: str
    precision: str
    peers: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """Everything that one run measured; `str()` is for people, `to_dict` for programs.

    Args:
        backends: where ours run, by target.
        left_out: why, by target.
        profiles: of ours, one for each target and batch size: `Profile.to_dict` and whose it is.
        rates: the machine's, by precision; empty where nothing was profiled.
        finished: whether it was not interrupted.
        run: when, how long, with which settings.
        failure: what ended it early, if it was no interrupt.
    """

    report: BenchReport
    models: Sequence[str]
    backends: Mapping[str, str]
    left_out: Mapping[str, str]
    lanes: Sequence[Lane]
    verdicts: Sequence[Verdict]
    profiles: Sequence[Mapping[str, Any]]
    rates: Mapping[str, Rates]
    versions: Sequence[Versions]
    finished: bool
    run: Mapping[str, Any]
    failure: FastresError | None = None

    def against(self, base: Base, name: str, limit: float) -> Comparison:
        """Ours beside an earlier run.

        Raises:
            InputError: nothing of ours can be judged.
        """
        return compare(
            self.report.measurements,
            {lane.ours: lane.peers for lane in self.lanes},
            base,
            name,
            limit,
            self.report.seed,
            self.backends,
            self.report.machine.versions,
        )

    def ratios(self) -> Iterator[dict[str, Any]]:
        """How many times as fast each of ours is as each of its peers."""
        for m in self.report.measurements:
            for lane in self.lanes:
                if m.target in lane.peers:
                    own = self.report.against(m.target).of(lane.ours, m.batch_size)
                    yield {
                        "ours": lane.ours,
                        "peer": m.target,
                        "model": lane.model,
                        "precision": lane.precision,
                        "batch_size": m.batch_size,
                        "speed": own.speedup,
                    }

    def to_dict(self, comparison: Comparison | None = None) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "run": {**self.run, "finished": self.finished},
            "models": list(self.models),
            "backends": dict(self.backends),
            "left_out": dict(self.left_out),
            "lanes": {lane.ours: lane.peers for lane in self.lanes},
            **self.report.to_dict(),
            "ratios": [{**found, "speed": asdict(found["speed"])} for found in self.ratios()],
            "parity": [asdict(verdict) for verdict in self.verdicts],
            "profiles": list(self.profiles),
            "rates": {precision: rates.to_dict() for precision, rates in self.rates.items()},
            "versions": [found.to_dict() for found in self.versions],
            "comparison": None if comparison is None else comparison.to_dict(),
        }

    def __str__(self) -> str:
        where = [f"{target} on {backend}" for target, backend in self.backends.items()]
        parts = [f"{', '.join(self.models)}: {', '.join(where)}"]
        if self.report.measurements:
            parts += [str(self.report), *self._sentences()]
        if self.versions:
            parts.append(table(self.versions))
        if not self.finished:
            word = "interrupted" if self.failure is None else "broken off"
            kept = "what was measured until then"
            parts.append(f"{word}: {kept if self.report.measurements else 'nothing was measured'}")
        return "\n".join(parts)

    def _sentences(self) -> list[str]:
        """How fast each of ours is beside each of its peers."""
        return [
            f"batch {found['batch_size']}: {found['ours']} is {found['speed']} as fast as "
            f"{found['peer']}"
            for found in self.ratios()
        ]
