"""Networks that nobody here wrote: one of each kind among timm's residual ones, by bench/zoo.py.

The whole family takes an hour at most: `make zoo`. What it printed is bench/results/zoo.txt.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm

from bench import zoo

KINDS = (  # what is particular about each, and what of it the CPU backend does not take
    ("resnet10t", ""),  # deep stem, average pools in shortcuts
    ("seresnet18", ""),
    ("resnetblur18", "pad"),  # reflecting
    ("ecaresnet26t", "conv1d"),
    ("resnetv2_18", ""),  # pre-activation
    ("resnetv2_50d_gn", "group_norm"),
    ("resnetv2_50d_evos", "var"),
    ("resnetv2_50d_frn", ""),
    ("resnetv2_50x1_bit", "group_norm"),  # standardised weights
    ("nf_resnet26", ""),  # standardised by batch_norm, scaled
    ("skresnet18", "stack"),
    ("resnest14d", "sum"),
    ("gcresnext26ts", "matmul"),
    ("lambda_resnet26t", "conv3d"),
    ("legacy_seresnet18", ""),  # pools that round up
    ("test_resnet", ""),
)


def test_the_family_is_complete() -> None:
    names = zoo.residual_names()
    modules = ("resnet", "resnetv2", "res2net", "resnest", "sknet", "senet", "tresnet")
    wanted = {name for module in modules for name in timm.list_models(module=module)}
    assert len(wanted) > 130 and wanted <= set(names)
    assert not {"densenet121", "resmlp_12_224"} & set(names)


@pytest.mark.parametrize(("name", "aside"), KINDS, ids=[name for name, _ in KINDS])
def test_compiles_and_agrees(name: str, aside: str, one_thread: None) -> None:
    row = zoo.examine(name, "fp32", channels_last=False)
    assert row.outcome == "passed", row
    assert aside in str(row.fallback)


@pytest.mark.parametrize("name", ["resnet10t", "resnetv2_18", "skresnet18"])
def test_in_channels_last(name: str, one_thread: None) -> None:
    row = zoo.examine(name, "fp32", channels_last=True)
    assert row.outcome == "passed", row


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zoo.json"
    assert zoo.main(["test_resnet", "-o", str(path)]) == 0
    printed = capsys.readouterr()
    assert "test_resnet" in printed.out and "1 passed" in printed.out
    found = json.loads(path.read_text())
    assert found["command"] == "zoo" and found["networks"][0]["outcome"] == "passed"


def test_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def examined(name: str, precision: str, channels_last: bool) -> zoo.Row:
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return zoo.Row(name, "refused", 5, 96, reason="so")

    monkeypatch.setattr(zoo, "examine", examined)
    arguments = ["resnet10t", "resnet18", "resnet34", "-o", str(tmp_path / "zoo.json")]
    with pytest.raises(KeyboardInterrupt):
        zoo.main(arguments)
    assert zoo.main([*arguments, "--continue"]) == 0
    assert seen == ["resnet10t", "resnet18", "resnet34", "resnet34"]
    assert "3 refused" in capsys.readouterr().out
    assert zoo.main([*arguments, "--continue", "--channels-last"]) == 0  # of other options
    assert len(seen) == 7


def test_what_goes_wrong_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: object, **more: object) -> None:
        raise ValueError("nothing works")

    monkeypatch.setattr(zoo.fastres, "compile", broken)
    assert zoo.main(["test_resnet"]) == 1
    assert "crashed" in (printed := capsys.readouterr().out) and "nothing works" in printed
    with pytest.raises(SystemExit):
        zoo.main(["resnet18", "no_such_network"])
    assert "timm has no no_such_network" in capsys.readouterr().err
