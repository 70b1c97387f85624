"""bench/scaling.py and bench/depth.py run; what they measure here means nothing."""

import json
from pathlib import Path

import depth
import pytest
import scaling
from fits import linear_fit


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "cifar_resnet:8", "--precision", "fp32", "--duration", "0.02"]
    arguments += ["--series", "batch,depth_cifar,threads", "--batch-sizes", "1,2,3"]
    arguments += ["--cifar-depths", "8,14,20", "-o", str(tmp_path / "out.json")]
    assert scaling.main(arguments) == 0
    assert "straight line" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    by_name = {series["name"]: series for series in found["series"]}
    assert [p["x"] for p in by_name["batch"]["points"]] == [1, 2, 3]
    deep = by_name["depth of CIFAR nets"]
    assert [p["x"] for p in deep["points"]] == [8, 14, 20]
    assert deep["points"][2]["median"] > deep["points"][0]["median"] > 0
    assert deep["fit"]["slope"] > 0 and by_name["threads"]["fit"] is None
    assert all(p["low"] <= p["median"] <= p["high"] for s in by_name.values() for p in s["points"])


def test_scaling_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--series", "colour"])
    assert "there is no colour; there are batch," in capsys.readouterr().err


def test_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert depth.main(["--depths", "8,14", "-o", str(tmp_path / "out.json")]) == 0
    assert "ms a layer" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["depth"] for row in found["rows"]] == [8, 14]


def test_linear_fit() -> None:
    line = linear_fit([1, 2, 3], [3, 5, 7])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2, 1, 1))
    assert linear_fit([1, 2, 3, 4], [1, -1, 1, -1]).r2 < 0.3
