"""fastres verify --backends: one model on every backend that runs here, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import TYPE_CHECKING, Any

from fastres.cli.flags import Request
from fastres.cli.output import working
from fastres.cli.targets import Target, precision_ran, to_engine
from fastres.errors import BackendUnavailable, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from fastres.parity.report import ParityReport


@dataclass(frozen=True)
class Outcome:
    """What came of one backend: a report, or why there is none."""

    backend: str
    precision: str
    report: ParityReport | None
    reason: str

    @property
    def verdict(self) -> str:
        if self.report is None:
            return "not run"
        return "PASSED" if self.report.passed else "FAILED"

    def to_dict(self) -> dict[str, Any]:
        report = None if self.report is None else self.report.to_dict()
        return {
            "backend": self.backend,
            "precision": self.precision,
            "verdict": self.verdict,
            "reason": self.reason,
            "report": report,
        }


def across(
    target: Target,
    request: Request,
    names: Sequence[str],
    batches: Sequence[Tensor],
    how: Mapping[str, Any],
) -> tuple[Outcome, ...]:
    """Compiles and verifies the model for each backend in turn.

    Args:
        how: further arguments of `fastres.verify`.

    Raises:
        InputError: a name is that of no backend, or a flag does not fit.
    """
    import fastres
    from fastres.backends.select import check_names

    check_names(names)
    found = []
    for name in dict.fromkeys(names):
        try:
            engine = to_engine(target, replace(request, backend=name))
        except (BackendUnavailable, UnsupportedError) as error:
            found.append(Outcome(name, request.precision or "", None, _reason(error, name)))
            continue
        with engine, working(f"verifying {target.name} on {name}"):
            report = fastres.verify(target.model, engine, batches, **how)
            reason = report.why_failed
            found.append(Outcome(engine.backend.name, precision_ran(engine), report, reason))
    return tuple(found)


def status_of(outcomes: Sequence[Outcome]) -> int:
    """1 if a check failed, 3 if none could be made."""
    if any(outcome.verdict == "FAILED" for outcome in outcomes):
        return 1
    return 0 if any(outcome.report is not None for outcome in outcomes) else 3


def table_of(outcomes: Sequence[Outcome], title: str) -> str:
    """The worst output of each."""
    from rich.table import Table

    from fastres.text import render

    table = Table(title=f"{title}, against the model in float64")
    table.add_column("backend")
    table.add_column("ran in")
    table.add_column("parity")
    for column in ("RMS error", "allowed", "SQNR dB", "cosine", "top-1 same"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        if outcome.report is None:
            table.add_row(outcome.backend, outcome.precision, outcome.verdict)
            continue
        worst = max(outcome.report.outputs, key=lambda row: row.rms)
        table.add_row(
            outcome.backend,
            outcome.precision,
            outcome.verdict,
            f"{worst.rms:.1e}",
            "" if isnan(worst.allowed_rms) else f"{worst.allowed_rms:.1e}",  # atol and rtol decide
            f"{worst.sqnr_db:.1f}",
            f"{worst.cosine:.6f}",
            f"{worst.top1:.1%}",
        )
    reasons = [f"{o.backend}: {o.reason}" for o in outcomes if o.reason]
    return "\n".join([render(table), *reasons])


def _reason(error: Exception, name: str) -> str:
    """Without what stands there anyway: which backend it is about, and to choose another."""
    skipped = ("no backend of", "Choose another backend")
    lines = [line for line in str(error).splitlines() if not line.startswith(skipped)]
    text = " ".join(line.strip() for line in lines) or str(error)
    return text.removeprefix(f"{name} cannot run here: ").removeprefix(f"{name} ")
