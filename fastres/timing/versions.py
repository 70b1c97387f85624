"""ResNet v1 against v1.5: how much faster, how much less work, and in which layers.

v1 has the stride of a stage's first bottleneck in its 1x1 convolution, v1.5 in the 3x3, so that
v1.5 computes more. Beside the speeds stand the ratio of multiply-adds and that of the least times,
which the roofline gives: the sum over nodes of max(flop / rate, bytes / bandwidth).

Source: NVIDIA's DeepLearningExamples, ResNet50 v1.5: "about 5 % fewer images per second".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fastres.text import render
from fastres.timing.rates import Rates
from fastres.timing.report import Measurement, paired
from fastres.timing.statistics import Ratio, estimate


@dataclass(frozen=True)
class Group:
    """A stage of the network in both versions."""

    group: str
    v1_ms: float
    v15_ms: float
    v1_macs: int
    v15_macs: int


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


def versions(
    net: str,
    v1: tuple[Measurement, Profile],
    v15: tuple[Measurement, Profile],
    rates: Rates | None,
    seed: int = 0,
) -> Versions:
    """Sets the two versions of a network side by side.

    Args:
        v1: what was timed, and a profile at the same batch size; likewise `v15`.
        rates: of this machine in that precision.
    """
    (old, old_profile), (new, new_profile) = v1, v15
    groups = {
        row["name"]: row for row in (*old_profile["groups"], *new_profile["groups"])
    }  # every name of either, in order
    return Versions(
        net,
        old.precision,
        old.batch_size,
        old.throughput,
        new.throughput,
        estimate(paired(old, new), seed),
        new_profile["total"]["flop"] / old_profile["total"]["flop"],
        _least(new_profile, rates) / _least(old_profile, rates) if rates else None,
        tuple(
            Group(name, *_of(old_profile, new_profile, name, "milliseconds"), *_macs)
            for name in groups
            for _macs in [[flop // 2 for flop in _of(old_profile, new_profile, name, "flop")]]
        ),
    )


def table(found: Sequence[Versions]) -> str:
    """The table of `fastres bench`, with what explains it: the stages that differ most."""
    shown = Table(title="v1.5 beside v1", caption="ratios: v1.5 over v1")
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
    return render(shown, width=180)


def _explanation(v: Versions) -> str:
    """The stages by what v1.5 takes longer in them, the largest first: "layer2 +1.2 ms"."""
    ordered = sorted(v.groups, key=lambda g: abs(g.v15_ms - g.v1_ms), reverse=True)
    return ", ".join(f"{g.group} {g.v15_ms - g.v1_ms:+.2f} ms" for g in ordered[:3])


def _of(old: Profile, new: Profile, name: str, what: str) -> list[Any]:
    return [
        next((row[what] for row in profile["groups"] if row["name"] == name), 0)
        for profile in (old, new)
    ]


def _least(profile: Profile, rates: Rates) -> float:
    return sum(rates.least_seconds(row["flop"], row["bytes"]) for row in profile["rows"])
