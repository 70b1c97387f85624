"""Intervals cover what they should, between rounds and between launches."""

import numpy as np
import pytest

from fastres.timing.statistics import Ratio, bootstrap, change, estimate, spread


class TestBootstrap:
    def test_interval_covers_the_true_ratio(self) -> None:
        draw = np.random.default_rng(0)
        intervals = [bootstrap(1.5 * np.exp(draw.normal(0, 0.1, 20)), i) for i in range(200)]
        covered = np.mean([r.low <= 1.5 <= r.high for r in intervals])
        assert covered > 0.9

    def test_one_outlier_moves_nothing(self) -> None:
        calm = bootstrap([2.0] * 20)
        assert bootstrap([2.0] * 19 + [200.0]).median == calm.median == 2.0
        assert (calm.low, calm.high) == (2.0, 2.0)

    def test_same_seed_same_interval(self) -> None:
        ratios = list(np.random.default_rng(1).uniform(1, 2, 15))
        assert bootstrap(ratios, 3) == bootstrap(ratios, 3)
        assert str(bootstrap([2.0, 2.0, 2.0])) == "2x [2, 2]"
        assert str(bootstrap([2.0])) == "2x [too few rounds]"  # and not an interval of no width


def launches(
    draw: np.random.Generator, ratio: float, between: float, within: float = 0.02, count: int = 3
) -> list[list[float]]:
    centres = draw.normal(np.log(ratio), between, (count, 1))
    return list(np.exp(centres + draw.normal(0, within, (count, 7))))


class TestLaunches:
    def test_interval_covers_the_true_ratio(self) -> None:
        draw = np.random.default_rng(0)
        for between in (0.0, 0.02, 0.1):
            found = [estimate(launches(draw, 1.5, between), i) for i in range(200)]
            assert np.mean([r.low <= 1.5 <= r.high for r in found]) > 0.9

    def test_rounds_alone_would_not(self) -> None:
        draw = np.random.default_rng(0)
        one = [estimate(launches(draw, 1.5, 0.1, count=1), i) for i in range(200)]
        assert np.mean([r.low <= 1.5 <= r.high for r in one]) < 0.5

    def test_more_launches_tell_more(self) -> None:
        draw = np.random.default_rng(0)
        width = {}
        for count in (2, 5, 30):
            found = [estimate(launches(draw, 1.0, 0.05, count=count)) for _ in range(50)]
            width[count] = np.mean([r.high - r.low for r in found])
        assert width[2] > 2 * width[5] > 4 * width[30] > 0.05

    def test_change_between_runs_is_covered(self) -> None:
        draw = np.random.default_rng(0)
        found = [
            change(launches(draw, 1.8, 0.03), launches(draw, 2.0, 0.01), i) for i in range(200)
        ]
        assert np.mean([r.low <= 0.9 <= r.high for r in found]) > 0.9

    def test_spread_is_of_launches_and_else_of_rounds(self) -> None:
        steady, wild = [[1.0] * 5, [1.0] * 5], [[1.0] * 5, [1.2] * 5]
        assert spread(steady) == 0 < spread(wild)
        assert spread([[1.0, 1.2, 1.1]]) > spread([[1.0, 1.02, 1.01]]) > 0
        assert spread([[1.0]]) == np.inf

    def test_intervals_overlap(self) -> None:
        assert Ratio(1.0, 0.9, 1.1).overlaps(Ratio(1.2, 1.1, 1.3))
        assert not Ratio(1.0, 0.9, 1.05).overlaps(Ratio(1.2, 1.1, 1.3))

    def test_the_middle_is_the_mean_of_the_launches(self) -> None:
        found = estimate([[1.0, 1.0, 5.0], [4.0, 4.0, 4.0]])
        assert found.median == pytest.approx(2.0)
