"""bench.cpu.channels_last runs; what it measures here means nothing."""

import pytest

from bench.cpu import channels_last


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "fastres:cifar_resnet8", "--rounds", "1", "--calls", "2"]
    assert channels_last.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cifar_resnet8" in printed and "same bits" in printed
