"""What the documents show, in words and in one small table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fastres.report.accuracy import ALL, points
from fastres.report.documents import Accuracy, Bench, Document, GuardTrials, Parities, Scaling
from fastres.report.html import NOTHING, Cell, Column, Html, items, join, table, tag
from fastres.report.numbers import number, percent, short, times, times_cell
from fastres.report.records import Interval, Measurement
from fastres.report.speed import called, rated

LINEAR = 0.1  # of a point, by which it may be off where time is said to grow linearly


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
        yield from (head + said for said in _versions(document))
        yield from (head + said for said in _parity(document))
        yield from (head + said for said in _change(document))
    elif isinstance(document, Scaling):
        yield from _growth(document)
    elif isinstance(document, Accuracy):
        yield from _answers(document)
    elif isinstance(document, GuardTrials):
        yield from _guarded(document)
    else:
        yield from _settled(document)


def _speed(head: str, bench: Bench) -> Iterator[str]:
    if not bench.measurements:
        yield f"{head}nothing was measured." if not bench.profiles else f"{head}profiles only."
    if bench.ratios:
        yield from _beside_peers(head, bench)
        return
    ours = bench.is_ours(bench.baseline)
    whose = "other runtimes" if ours else "fastres"
    compared = [
        m
        for m in bench.measurements
        if rated(m)
        and m.target != bench.baseline
        and bench.is_ours(m.target) != ours
        and bench.beside_baseline(m.target)
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


def _beside_peers(head: str, bench: Bench) -> Iterator[str]:
    """Each of ours beside the fastest peer of its lane, and every peer that is ahead of it."""
    places = dict.fromkeys((found.ours, found.batch_size) for found in bench.ratios)
    closest = [found for place in places if (found := bench.fastest_peer(*place))]
    count = Counter(_side(found.speed) for found in closest)
    verdicts = ", ".join(f"{n} {side}" for side, n in count.most_common())
    yield (
        f"{head}fastres over the fastest peer of each model, precision and batch size, by 95 % "
        f"intervals: {verdicts}."
    )
    ahead = [
        f"{found.peer} at batch {found.batch_size} (fastres over it: {times(found.speed)})"
        for found in bench.ratios
        if _side(found.speed) == "slower"
    ]
    if ahead:
        yield f"{head}peers that are ahead of fastres: {', '.join(ahead)}."
    else:
        yield f"{head}no peer is shown to be ahead of fastres."


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
    off = [series.fit.worst for series in document.series if series.fit]
    known = [worst for worst in off if worst is not None]
    if known:
        straight = sum(worst <= LINEAR for worst in known)
        yield (
            f"Time grows linearly (no point is off by more than {100 * LINEAR:g} %) in {straight} "
            f"of {len(known)} series."
        )


def _guarded(document: GuardTrials) -> Iterator[str]:
    if count := len(document.trials):
        yield (
            f"The regression guard called equal runs slower {document.false_alarms} times out of "
            f"{count}, and caught a planted slowdown {document.caught} times out of {count}."
        )


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
    if bench.lanes and not any(bench.lanes.values()):
        return _alone(name, groups)
    columns = [Column("model"), Column("precision"), Column("batch", True), Column("fastest")]
    columns += [Column("img/s", numeric=True), Column("fastres img/s", numeric=True)]
    if bench.ratios:
        columns += [Column("fastest peer"), Column("fastres over that peer", numeric=True)]
    else:
        columns += [Column(f"fastres over {bench.baseline or 'the baseline'}", numeric=True)]
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
                *_over(bench, own),
            )
        )
    return table(f"{name}: the fastest of each comparison", columns, rows)


def _alone(name: str, groups: Mapping[tuple[str, str, int], Sequence[Measurement]]) -> Html:
    """Where nothing else was timed beside ours."""
    columns = [Column("model"), Column("precision"), Column("batch", True), Column("img/s", True)]
    rows = [
        (model, precision, number(size), number(max(map(_rate, group)), ",.1f"))
        for (model, precision, size), group in groups.items()
    ]
    return table(f"{name}: images per second", columns, rows)


def _over(bench: Bench, own: Measurement | None) -> Sequence[Cell]:
    """The fastest peer, and how fast ours is beside it; in older documents, beside the baseline."""
    if bench.ratios:
        found = bench.fastest_peer(own.target, own.batch_size) if own else None
        return (found.runtime, times_cell(found.speed)) if found else (NOTHING, times_cell(None))
    if own is None or own.target == bench.baseline or not bench.beside_baseline(own.target):
        return (times_cell(None),)  # the baseline ran another model, or in another precision
    return (times_cell(own.speedup),)


def _rate(measurement: Measurement) -> float:
    return measurement.throughput or 0.0
