"""fastres.wording: what strangers named is shown, and neither steers nor fills a screen."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import fastres
from fastres import errors
from fastres.wording import LINE, LINES, listed, message, named, printable


def test_names_on_one_line() -> None:
    assert named("layer1.0.conv1") == "layer1.0.conv1" and named(5) == "5"
    assert named("\x1b[31mred\n\u202e") == "\\x1b[31mred\\n\\u202e"
    cut = named("a" * 1000 + "z" * 1000)
    assert len(cut) < 130 and cut.startswith("aaa") and cut.endswith("zzz")
    assert "2000 letters" in cut
    assert len(named("\x1b" * 10**6)) < 600


def test_lists_of_names() -> None:
    assert listed([]) == "" and listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(7))) == "0, 1, 2, 3, 4 and 2 more"
    assert listed(["a\nb"], 1) == "a\\nb"


def test_graphs_and_accounts_of_them() -> None:
    model = nn.Sequential()
    model.add_module("a\x1b[31mb\nc: forged", nn.Conv2d(3, 4, 3))
    with fastres.compile(model.eval(), torch.zeros(1, 3, 8, 8), backend="reference") as engine:
        lines = str(engine.graph).split("\n")
        assert lines[1].startswith("a\\x1b[31mb\\nc: forged: f32") and len(lines) == 3
        assert "\x1b" not in str(engine.info)


def test_messages() -> None:
    usual = "Conv2d is refused:\n  its groups (3) do not divide 8 \u2192 choose others"
    assert message(usual) == printable(usual) == usual
    long = message("the weight " + "x" * 10**6 + " is missing")
    assert len(long) < LINE and long.endswith("is missing") and message(long) == long
    assert len(message("a " * 10**6)) <= LINE + 30
    assert message("a\n" * 10**5).count("\n") == LINES
    assert message("a\r\x1b[2Jb") == "a\\r\\x1b[2Jb"


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
)
def test_every_error_is_fit_to_be_shown(kind: type[Exception]) -> None:
    error = kind("no \x1b[31mred\x07 " + "n" * 10**5)
    assert str(error).isprintable() and len(str(error)) < LINE
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert kind().args == () and kind(1, None).args == (1, None)
