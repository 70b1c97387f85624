"""The outcome of a cross-check as data, as a table, and as an error."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastres.errors import ParityError
from fastres.text import empty_table, json_text, render
from fastres.tolerances import Distance, allowed

if TYPE_CHECKING:
    from rich.table import Table

WEAK_SPREAD = 0.05  # below this share, an output says more about the network than the images


@dataclass(frozen=True)
class Comparison:
    """One tensor of the candidate against the oracle.

    `largest` and `rms` are relative to the oracle's RMS, as are the baseline's (PyTorch in the
    candidate's precision) and what is allowed; `allowed_*` are nan where atol and rtol decide.
    `spread`, `sqnr_db` and `top1` are those of `fastres.tolerances.Distance`.
    """

    name: str
    op: str
    passed: bool
    reason: str
    largest: float
    rms: float
    allowed_largest: float
    allowed_rms: float
    baseline_largest: float
    baseline_rms: float
    max_abs: float
    max_relative: float
    cosine: float
    sqnr_db: float
    spread: float
    top1: float


@dataclass(frozen=True)
class Policy:
    """Decides what passes: the tolerance policy in `dtype`, or atol and rtol in its place."""

    dtype: torch.dtype
    atol: float | None = None
    rtol: float | None = None
    quantised: bool = False  # the baseline is the quantised graph

    @property
    def custom(self) -> bool:
        return self.atol is not None or self.rtol is not None

    def __str__(self) -> str:
        if self.custom:
            return f"|candidate - oracle| <= {self.atol or 0:g} + {self.rtol or 0:g} * |oracle|"
        name = "8 bits" if self.quantised else str(self.dtype).removeprefix("torch.")
        return f"error <= max(2 * error of PyTorch in {name}, floor), largest and RMS"

    def distance(self) -> Distance:
        return Distance(self.atol, self.rtol)

    def judge(self, name: str, op: str, candidate: Distance, baseline: Distance) -> Comparison:
        """Compares a candidate's distance from the oracle with what its baseline allows it."""
        found, base = candidate.errors, baseline.errors
        bound = allowed(base, self.dtype)
        reason = found.reason
        if self.custom and not reason and candidate.outside:
            reason = f"{candidate.outside} of {candidate.count} values differ by more than allowed"
        if not self.custom and not reason:
            reason = _beyond("largest", found.largest, bound.largest)
            reason = reason or _beyond("RMS", found.rms, bound.rms)
        return Comparison(
            name=name,
            op=op,
            passed=not reason,
            reason=reason,
            largest=found.largest,
            rms=found.rms,
            allowed_largest=math.nan if self.custom else bound.largest,
            allowed_rms=math.nan if self.custom else bound.rms,
            baseline_largest=base.largest,
            baseline_rms=base.rms,
            max_abs=candidate.max_abs,
            max_relative=candidate.max_relative,
            cosine=candidate.cosine,
            sqnr_db=candidate.sqnr_db,
            spread=candidate.spread,
            top1=candidate.top1,
        )


def _beyond(kind: str, error: float, bound: float) -> str:
    return "" if error <= bound else f"{kind} error {error:.1e} of the RMS, allowed {bound:.1e}"


@dataclass(frozen=True)
class Bisection:
    """The first node whose value is beyond its bound while all that it reads is within.

    Args:
        node: its value in an engine cut after it.
        isolated: the value of that node alone, fed with the oracle's inputs, against the same
            bound: past it, the node itself is wrong; within it, rounding has added up to there.
        lowerings: how many engines were lowered to find it.
    """

    node: Comparison
    isolated: Comparison
    lowerings: int

    @property
    def wrong_node(self) -> bool:
        return not self.isolated.passed

    def __str__(self) -> str:
        verdict = (
            f"fed with the oracle's inputs it is still wrong: {self.isolated.reason}"
            if self.wrong_node
            else f"alone it is within bounds (RMS {self.isolated.rms:.1e}): rounding has added up"
        )
        where = f"{self.node.name} ({self.node.op})"
        return f"first beyond its bound: {where}: {self.node.reason}; {verdict}"


@dataclass(frozen=True)
class ParityReport:
    """What `verify` found; `str()` is a table.

    Args:
        outputs: one comparison per tensor that the model returns.
        layers: one per node of the candidate's graph, if asked for.
        bisection: the first node that went wrong, if asked for and something did.
        notes: what to bear in mind when reading the figures.
        quantised: whether the candidate is in int8; the table then shows the worst layers first.
    """

    reference: str
    candidate: str
    policy: str
    images: int
    outputs: tuple[Comparison, ...]
    layers: tuple[Comparison, ...] = ()
    bisection: Bisection | None = None
    notes: tuple[str, ...] = ()
    quantised: bool = False

    @property
    def passed(self) -> bool:
        return all(row.passed for row in (*self.outputs, *self.layers))

    @property
    def first_failing_layer(self) -> Comparison | None:
        """The first layer past its bound, in the order of execution."""
        return next((row for row in self.layers if not row.passed), None)

    def raise_if_failed(self) -> None:
        """Does nothing if the check passed.

        Raises:
            ParityError: names the outputs, and the first layer, that are past their bounds.
        """
        if not self.passed:
            raise ParityError(
                f"{self.candidate} does not match {self.reference}: {self.why_failed}"
            )

    @property
    def why_failed(self) -> str:
        """The outputs and the first layer past their bounds, and where it began if known."""
        wrong = [f"{row.name}: {row.reason}" for row in self.outputs if not row.passed]
        wrong += self._first_layer()
        wrong += [str(self.bisection)] if self.bisection else []
        return "; ".join(wrong)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def to_json(self) -> str:
        return json_text(self.to_dict())

    def __str__(self) -> str:
        verdict = "PASSED" if self.passed else "FAILED"
        lines = [
            f"{verdict}: {self.candidate} against {self.reference}, {self.images} images",
            f"policy: {self.policy}",
            render(_output_table(self.outputs)),
        ]
        if self.layers:
            worst = self.layers
            if self.quantised:  # a network's SQNR is made by its worst layers
                worst = tuple(sorted(self.layers, key=lambda row: row.sqnr_db))
            lines += [render(_layer_table(worst)), *self._first_layer()]
        if self.bisection:
            lines.append(str(self.bisection))
        failures = [f"FAILED {row.name}: {row.reason}" for row in self.outputs if not row.passed]
        return "\n".join([*lines, *failures, *(f"note: {note}" for note in self.notes)])

    def _first_layer(self) -> list[str]:
        row = self.first_failing_layer
        return [f"first layer beyond its bound: {row.name}: {row.reason}"] if row else []


def notes_on(outputs: tuple[Comparison, ...], images: int) -> tuple[str, ...]:
    """Warnings that the figures themselves give rise to."""
    notes = []
    if images < 2:
        notes.append("with one image SQNR is not centred; give several to see the spread")
    for row in outputs:
        if row.spread < WEAK_SPREAD:
            notes.append(
                f"{row.name} hardly depends on the image (spread {row.spread:.1%}): a weak check. "
                "Are the weights trained, or settled with fastres.models.settle?"
            )
    return tuple(notes)


def _output_table(rows: tuple[Comparison, ...]) -> Table:
    table = empty_table(title="outputs")
    for column in ("output", "max abs", "max rel", *_ERRORS, "cosine", "top-1", "spread", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        figures = (f"{row.cosine:.6f}", _percent(row.top1), _percent(row.spread))
        absolute = (f"{row.max_abs:.2e}", f"{row.max_relative:.2e}")
        table.add_row(row.name, *absolute, *_errors(row), *figures, _verdict(row))
    return table


def _layer_table(rows: tuple[Comparison, ...]) -> Table:
    table = empty_table(title="layers")
    for column in ("layer", "op", *_ERRORS, ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.op, *_errors(row), _verdict(row))
    return table


_ERRORS = ("largest", "allowed", "rms", "allowed", "SQNR dB")


def _errors(row: Comparison) -> tuple[str, ...]:
    pairs = (row.largest, row.allowed_largest, row.rms, row.allowed_rms)
    return (*("-" if math.isnan(v) else f"{v:.1e}" for v in pairs), f"{row.sqnr_db:.1f}")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _verdict(row: Comparison) -> str:
    return "PASSED" if row.passed else "FAILED"
