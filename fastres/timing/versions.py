"""ResNet v1 against v1.5: how much faster, how much less work, and in which layers.

v1 has the stride of a stage's first bottleneck in its 1x1 convolution, v1.5 in the 3x3, so that
v1.5 computes more. Beside the speeds stand the ratio of multiply-adds and that of the least times,
which the roofline gives: the sum over nodes of max(flop / rate, bytes / bandwidth). Where the
difference is, profiles tell that both versions made in turns; where turns disagree it is noise.

Source: NVIDIA's DeepLearningExamples, ResNet50 v1.5: "about 5 % fewer images per second".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastres.text import empty_table, render_whole
from fastres.timing.rates import Rates
from fastres.timing.report import Measurement, paired
from fastres.timing.statistics import Ratio, estimate

RELEVANT = 0.01  # of the whole time, from which a stage's difference is told


@dataclass(frozen=True)
class Difference:
    """Milliseconds that v1.5 takes longer: the median over turns, the least and the most."""

    median: float
    low: float
    high: float

    def matters(self, whole: float) -> bool:
        """Whether several turns agree that there is one, and it is no trifle of so many ms."""
        agreed = self.low < self.high and (self.low > 0 or self.high < 0)
        return agreed and abs(self.median) >= RELEVANT * whole

    def __str__(self) -> str:
        return f"{self.median:+.3g} [{self.low:.3g}, {self.high:.3g}] ms"


@dataclass(frozen=True)
class Group:
    """A stage of the network in both versions."""

    group: str
    v1_ms: float
    v15_ms: float
    v1_macs: int
    v15_macs: int
    difference: Difference


@dataclass(frozen=True)
class Versions:
    """One network at one batch size in one precision.

    Args:
        ratio: speed of v1.5 over that of v1.
        macs_ratio: multiply-adds of v1.5 over those of v1.
        roofline_ratio: least time of v1.5 over that of v1; None where rates are unknown.
    """

    net: str
    precision: str
    batch_size: int
    v1_img_s: float
    v15_img_s: float
    ratio: Ratio
    macs_ratio: float
    roofline_ratio: float | None
    groups: tuple[Group, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Profile = Mapping[str, Any]  # of `Profile.to_dict`
Profiles = Sequence[Profile]  # of one target, turn by turn


def typical(profiles: Profiles) -> Profile:
    """That of the median total."""
    ordered = sorted(profiles, key=lambda profile: float(profile["total"]["milliseconds"]))
    return ordered[len(ordered) // 2]


def versions(
    net: str,
    v1: tuple[Measurement, Profiles],
    v15: tuple[Measurement, Profiles],
    rates: Rates | None,
    seed: int = 0,
) -> Versions:
    """Sets the two versions of a network side by side.

    Args:
        v1: what was timed, and profiles at the same batch size; `v15` was profiled in turns with
            it.
        rates: of this machine in that precision.
    """
    (old, old_profiles), (new, new_profiles) = v1, v15
    old_profile, new_profile = typical(old_profiles), typical(new_profiles)
    names = dict.fromkeys(
        row["name"] for profile in (old_profile, new_profile) for row in profile["groups"]
    )
    return Versions(
        net,
        old.precision,
        old.batch_size,
        old.throughput,
        new.throughput,
        estimate(paired(old, new), seed),
        new_profile["total"]["flop"] / old_profile["total"]["flop"],
        _least(new_profile, rates) / _least(old_profile, rates) if rates else None,
        tuple(_group(name, old_profiles, new_profiles) for name in names),
    )


def table(found: Sequence[Versions]) -> str:
    """The table of `fastres bench`, with what explains it: the stages that differ most."""
    caption = (
        "ratios: v1.5 over v1; speed with its 95 % interval; differences: what v1.5 takes longer, "
        "the median of profiles made in turns, least and most"
    )
    shown = empty_table(title="v1.5 beside v1", caption=caption)
    left = ("net", "precision")
    columns = ("net", "precision", "batch", "v1 img/s", "v1.5 img/s", "speed", "multiply-adds")
    for column in (*columns, "least time", "where the difference is"):
        shown.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for v in found:
        shown.add_row(
            v.net,
            v.precision,
            str(v.batch_size),
            f"{v.v1_img_s:.1f}",
            f"{v.v15_img_s:.1f}",
            str(v.ratio),
            f"{v.macs_ratio:.3f}",
            "" if v.roofline_ratio is None else f"{v.roofline_ratio:.3f}",
            _explanation(v),
        )
    return render_whole(shown)


def _explanation(v: Versions) -> str:
    """The stages by what v1.5 takes longer in them, the largest first; no noise, and no trifles."""
    whole = sum(group.v1_ms for group in v.groups)
    shown = [group for group in v.groups if group.difference.matters(whole)]
    ordered = sorted(shown, key=lambda g: abs(g.difference.median), reverse=True)
    return ", ".join(f"{g.group} {g.difference}" for g in ordered[:3]) or "in no stage for certain"


def _group(name: str, old: Profiles, new: Profiles) -> Group:
    before, after = ([_of(profile, name, "milliseconds") for profile in ps] for ps in (old, new))
    longer = [b - a for a, b in zip(before, after, strict=True)]
    old_macs, new_macs = (int(_of(typical(ps), name, "flop")) // 2 for ps in (old, new))
    return Group(
        name,
        statistics.median(before),
        statistics.median(after),
        old_macs,
        new_macs,
        Difference(statistics.median(longer), min(longer), max(longer)),
    )


def _of(profile: Profile, name: str, what: str) -> float:
    return next((float(row[what]) for row in profile["groups"] if row["name"] == name), 0.0)


def _least(profile: Profile, rates: Rates) -> float:
    return sum(rates.least_seconds(row["flop"], row["bytes"]) for row in profile["rows"])
