"""Notes on calibration images that are unlike the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastres.calib.oddities import FAR, Oddities, far_from_the_rest


@pytest.fixture
def largest() -> dict[str, Tensor]:
    """Of 20 ordinary images: magnitudes that vary by a factor of two or so in each tensor."""
    torch.manual_seed(0)
    return {f"t{i}": 10.0**i * (0.7 + 0.6 * torch.rand(20)) for i in range(7)}


def named(image: int) -> str:
    return f"picture{image}.png"


def test_ordinary_images_are_not_noted(largest: dict[str, Tensor]) -> None:
    assert far_from_the_rest(largest) == []


@pytest.mark.parametrize("times", [5.0, 100.0])
def test_an_image_that_is_larger_throughout_is_found(
    largest: dict[str, Tensor], times: float
) -> None:
    for values in largest.values():
        values[13] = times * values.median()
    ((image, far),) = far_from_the_rest(largest)
    assert image == 13 and far == pytest.approx(times, rel=0.05)
    (note,) = Oddities().notes(largest, named)
    assert note.startswith("picture13.png (") and "is far from the rest" in note


def test_neither_one_tensor_nor_a_few_images_hide_it(largest: dict[str, Tensor]) -> None:
    largest["t3"][:] = 0.0
    largest["t3"][2] = 1e9  # an ordinary image, but for one tensor
    for image in (4, 9, 10, 17, 19):
        for values in largest.values():
            values[image] *= 50
    assert sorted(i for i, _ in far_from_the_rest(largest)) == [4, 9, 10, 17, 19]
    (note,) = Oddities().notes(largest, named)
    assert "and 2 more are far" in note


def test_how_far_is_far(largest: dict[str, Tensor]) -> None:
    even = {name: torch.ones(5) for name in largest}
    for values in even.values():
        values[1] = FAR
    assert far_from_the_rest(even) == []
    for values in even.values():
        values[1] = 1.01 * FAR
    assert [i for i, _ in far_from_the_rest(even)] == [1]


def test_two_images_are_no_rest() -> None:
    assert far_from_the_rest({"x": torch.tensor([1.0, 900.0])}) == []
    assert far_from_the_rest({"x": torch.zeros(4)}) == []


def test_blank_images_and_pictures_that_were_not_normalised() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4)
    x[3] = 0.25
    oddities = Oddities()
    oddities.add(x[:2])
    oddities.add(x[2:])
    assert oddities.notes({"x": torch.ones(6)}, named) == (
        "picture3.png is blank: all its values are the same",
    )
    raw = Oddities()
    raw.add(255 * torch.rand(4, 3, 8, 8))
    (note,) = raw.notes({"x": torch.ones(4)}, named)
    assert "never below 0" in note and "normalised pictures" in note
    for sound in (torch.rand(4, 3, 8, 8), 100 * torch.randn(4, 3, 8, 8)):
        quiet = Oddities()
        quiet.add(sound)
        assert quiet.notes({"x": torch.ones(4)}, named) == ()
    constant = Oddities()
    constant.add(torch.ones(2, 3))
    assert constant.notes({"x": torch.ones(2)}, named) == ()  # a choice, and no oversight
