"""How charts of targets are laid out: a lane for each target, one batch size below the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANE, _GAP, _FRAME = 17, 0.8, 62  # units for a target, lanes between batches, units for the axis


@dataclass(frozen=True)
class Panel:
    """One model in one precision: what a chart shows together.

    Args:
        title: says which, and which document if there are several.
        batches: sizes, from the top.
        series: target → index of its colour, the same in every panel of the page.
    """

    title: str
    batches: tuple[int, ...]
    series: dict[str, int]

    @property
    def height(self) -> float:
        """In units of a chart."""
        lanes = len(self.batches) * (len(self.series) + _GAP)
        return _FRAME + _LANE * max(lanes, 2)

    def lane(self, target: str, batch_size: int) -> float:
        """Where it is drawn, from the top."""
        first = self.batches.index(batch_size) * (len(self.series) + _GAP)
        return first + list(self.series).index(target)

    def frame(self, axes: Axes) -> None:
        """Batches from the top, each with its name at the middle of its lanes."""
        step, middle = len(self.series) + _GAP, (len(self.series) - 1) / 2
        names = [f"batch {size}" for size in self.batches]
        axes.set_yticks([i * step + middle for i in range(len(names))], names)
        axes.set_ylim(len(names) * step - _GAP / 2 - 0.5, -0.5 - _GAP / 2)
        axes.grid(visible=False, axis="y")


def panel(title: str, shown: Iterable[tuple[str, int]], colours: Mapping[str, int]) -> Panel:
    """Lays out a chart.

    Args:
        shown: target and batch size of all that it will show.
        colours: of every target that it shows, and maybe of others.
    """
    shown = list(shown)
    targets = {target for target, _ in shown}
    series = {target: i for target, i in colours.items() if target in targets}
    return Panel(title, tuple(sorted({size for _, size in shown})), series)


def numbered(names: Iterable[str]) -> dict[str, int]:
    """An index for each distinct name, in order."""
    return {name: i for i, name in enumerate(dict.fromkeys(names))}
