"""What the documents show, in words and in one small table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fastres.report.accuracy import ALL, points
from fastres.report.documents import (
    Accuracy,
    Bench,
    Document,
    Interval,
    Measurement,
    Paired,
    Parities,
    Scaling,
)
from fastres.report.html import Column, Html, items, join, table, tag
from fastres.report.numbers import number, percent, short, times, times_cell
from fastres.report.speed import called, rated

LINEAR = 0.99  # R² from which time is said to grow linearly


def findings(documents: Mapping[str, Document]) -> Html:
    """The main findings; first of all what makes them doubtful."""
    unfinished = [name for name, document in documents.items() if not document.run.finished]
    notices = [
        tag("p", f"{name} was interrupted: what it had not measured is missing.", class_="notice")
        for name in unfinished
    ]
    benches = {name: d for name, d in documents.items() if isinstance(d, Bench)}
    said = [line for name, d in documents.items() for line in _said(called(name, benches), d)]
    return join([*notices, items(said), *(_fastest(name, b) for name, b in benches.items())])


def _said(head: str, document: Document) -> Iterator[str]:
    if isinstance(document, Bench):
        yield from _speed(head, document)
        yield from _versions(document)
        yield from _parity(document)
        yield from _change(document)
    elif isinstance(document, Scaling):
        yield from _growth(document)
    elif isinstance(document, Accuracy):
        yield from _answers(document)
    else:
        yield from _settled(document)


def _speed(head: str, bench: Bench) -> Iterator[str]:
    if not bench.measurements:
        yield f"{head}nothing was measured." if not bench.profiles else f"{head}profiles only."
    if bench.ratios:
        yield from _beside_peers(head, bench.ratios)
        return
    ours = bench.is_ours(bench.baseline)
    whose = "other runtimes" if ours else "fastres"
    compared = [
        m
        for m in bench.measurements
        if rated(m) and m.target != bench.baseline and bench.is_ours(m.target) != ours
    ]
    if not compared:
        return
    count = Counter(_side(m.speedup) for m in compared)
    verdicts = ", ".join(f"{n} {side}" for side, n in count.most_common())
    best = max(compared, key=lambda m: m.speedup.median if m.speedup and m.speedup.median else 0)
    where = ", ".join(filter(None, (bench.model_of(best), best.precision)))
    yield (
        f"{head}{whose} against {bench.baseline}, by 95 % intervals: {verdicts}. The most is "
        f"{times(best.speedup)}, by {best.target} ({where}, batch {best.batch_size}: "
        f"{short(best.throughput, 'img/s')})."
    )


def _beside_peers(head: str, ratios: Sequence[Paired]) -> Iterator[str]:
    """Each of ours beside the peers of its own model and precision, and who is ahead of it."""
    sides = [(_side(found.speed), found) for found in ratios]
    verdicts = ", ".join(f"{n} {side}" for side, n in Counter(s for s, _ in sides).most_common())
    yield (
        f"{head}fastres beside each peer with the same model and precision, by 95 % intervals: "
        f"{verdicts}."
    )
    ahead = [
        f"{found.peer} at batch {found.batch_size} ({times(found.speed)})"
        for side, found in sides
        if side == "slower"
    ]
    if ahead:
        yield f"{head}ahead of fastres, whose speed over theirs is: {', '.join(ahead)}."


def _side(ratio: Interval | None) -> str:
    if ratio is None or ratio.low is None or ratio.high is None:
        return "no difference shown"
    if ratio.low > 1:
        return "faster"
    return "slower" if ratio.high < 1 else "no difference shown"


def _versions(bench: Bench) -> Iterator[str]:
    known = [
        pair.ratio.median
        for pair in bench.versions
        if pair.ratio is not None and pair.ratio.median is not None
    ]
    if known:
        low, high = (f"{ratio:.3g}" for ratio in (min(known), max(known)))
        span = low if low == high else f"{low} to {high}"
        yield f"v1.5 runs at {span} times the speed of v1 ({len(known)} comparisons)."


def _parity(bench: Bench) -> Iterator[str]:
    outside = [row for row in bench.parity if not row.passed]
    if outside:
        names = ", ".join(f"{row.target} at batch {row.batch_size}" for row in outside)
        yield f"{len(outside)} of {len(bench.parity)} results are outside their bounds: {names}."
    elif bench.parity:
        yield f"All {len(bench.parity)} results are within their bounds of parity."


def _change(bench: Bench) -> Iterator[str]:
    if bench.comparison is not None and bench.comparison.rows:
        count = Counter(row.verdict for row in bench.comparison.rows)
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in count.most_common())
        yield f"Against {bench.comparison.base}: {verdicts}."


def _growth(document: Scaling) -> Iterator[str]:
    fits = [series.fit.r2 for series in document.series if series.fit and series.fit.r2 is not None]
    if fits:
        straight = sum(r2 >= LINEAR for r2 in fits)
        yield f"Time grows linearly (R² of at least {LINEAR}) in {straight} of {len(fits)} series."


def _answers(document: Accuracy) -> Iterator[str]:
    for trial in document.sections:
        for row in trial.rows:
            found = row.parts.get(ALL) or next(iter(row.parts.values()), None)
            if row.name == "int8 auto" and found is not None:
                yield (
                    f"INT8 changes top-1 of {trial.network} on {trial.backend} by "
                    f"{points(found.difference).text} points and gives the answer of fp32 in "
                    f"{percent(found.agreement, '.2f').text} of {trial.pictures:,} pictures."
                )


def _settled(document: Parities) -> Iterator[str]:
    failed = [f"{row.network} in {row.precision}" for row in document.rows if row.failure]
    passed = len(document.rows) - len(failed)
    beyond = f"; not: {', '.join(failed)}" if failed else ""
    yield f"{passed} of {len(document.rows)} settled networks keep to the tolerance policy{beyond}."


def _fastest(name: str, bench: Bench) -> Html:
    """For each model, precision and batch size who is fastest, and how fast fastres is."""
    groups: dict[tuple[str, str, int], list[Measurement]] = {}
    for m in bench.measurements:
        if m.throughput is not None:
            groups.setdefault((bench.model_of(m), m.precision, m.batch_size), []).append(m)
    if not groups:
        return Html("")
    columns = [Column("model"), Column("precision"), Column("batch", True), Column("fastest")]
    over = "the fastest peer" if bench.ratios else bench.baseline or "the baseline"
    headings = ("img/s", "fastres img/s", f"fastres over {over}")
    columns += [Column(heading, numeric=True) for heading in headings]
    rows = []
    for (model, precision, size), group in groups.items():
        best = max(group, key=_rate)
        own = max((m for m in group if bench.is_ours(m.target)), key=_rate, default=None)
        rows.append(
            (
                model,
                precision,
                number(size),
                best.target,
                number(best.throughput, ",.1f"),
                number(own.throughput if own else None, ",.1f"),
                times_cell(_shown(bench, group, own)),
            )
        )
    return table(f"{name}: the fastest of each comparison", columns, rows)


def _shown(bench: Bench, group: Sequence[Measurement], own: Measurement | None) -> Interval | None:
    """Ours over the fastest peer of the group, or, in older documents, over the baseline."""
    if own is None or not bench.ratios:
        return own.speedup if own and own.target != bench.baseline else None
    peers = [m for m in group if not bench.is_ours(m.target)]
    fastest = max(peers, key=_rate, default=None)
    wanted = (own.target, fastest.target if fastest else None, own.batch_size)
    for found in bench.ratios:
        if (found.ours, found.peer, found.batch_size) == wanted:
            return found.speed
    return None


def _rate(measurement: Measurement) -> float:
    return measurement.throughput or 0.0
