"""fastres bench, profile and summary: figures of small networks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from fastres.errors import BackendUnavailable
from fastres.timing import peers

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]
BRIEF = ("--duration", "0.02", "--device", "cpu")  # a device, unlike a backend, fits an engine too


def test_ours_and_peers_take_turns(run_json: RunJson, small: str) -> None:
    flags = (
        "--peers",
        "eager,onnxruntime",
        "--batch-size",
        "1,2",
        "--percentile",
        "50,99.9",
        "--threads",
        "1",
    )
    document = run_json("bench", small, *BRIEF, *flags)
    rows = document["measurements"]
    assert document["baseline"] == "eager" and document["left_out"] == {}
    assert [(row["target"], row["batch_size"]) for row in rows] == [
        (name, size) for size in (1, 2) for name in ("fastres cpu", "eager", "onnxruntime")
    ]
    assert all(row["precision"] == "fp32" and row["throughput"] > 0 for row in rows)
    assert all(list(row["latency_ms"]) == ["p50", "p99.9"] for row in rows)


def test_a_saved_engine_beside_its_model(run: Run, small: str, engine: Path) -> None:
    result = run("bench", engine, small, *BRIEF)
    assert f"{engine.name} fastres cpu" in result.stdout and f"{small} fastres cpu" in result.stdout
    assert "timed without a check" in result.stderr


def test_a_saved_engine_has_its_precision(run: Run, engine: Path) -> None:
    result = run("bench", engine, *BRIEF, "--precision", "fp32,bf16", status=2)
    assert "is a saved engine" in result.stderr and "--precision cannot be given" in result.stderr


def test_a_peer_that_is_missing_is_left_out_and_named(
    run_json: RunJson, run: Run, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> Any:
        raise BackendUnavailable(f"{package} cannot be imported; pip install {package}")

    monkeypatch.setattr(peers, "_import", missing)
    document = run_json("bench", small, *BRIEF, "--peers", "onnxruntime")
    assert "pip install onnxruntime" in document["left_out"]["onnxruntime"]
    assert document["baseline"] == "fastres cpu"


def test_the_speed_of_wrong_results_is_not_shown(
    run: Run, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastres.engine import Engine

    honest = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, *x: honest(self, *x) * 1.01)
    result = run("bench", small, *BRIEF, status=1)
    assert result.stdout == "" and "fastres cpu in fp32" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a model"),
        (("SMALL", "--peers", "eager,abacus"), "there is no peer abacus; there are eager"),
        (("SMALL", "--percentile", "50,x"), "--percentile"),
        (("SMALL", "--percentile", "0"), "above 0"),
        (("SMALL", "--batch-size", "1,"), "not an integer"),
        (("SMALL", "--precision", "fp12"), "supported are"),
        (("ENGINE", "--peers", "eager"), "peers need the model's code"),
        (("ENGINE", "--threads", "2"), "--threads cannot"),
        (("SMALL", "fastres:resnet18"), "must take the same images"),
        (("SMALL", "fastres:cifar_resnet14", "--weights", "WEIGHTS"), "goes with one model"),
    ],
)
def test_bench_refuses(
    arguments: tuple[str, ...], said: str, run: Run, small: str, engine: Path, trained: Path
) -> None:
    meant = {"SMALL": small, "ENGINE": engine, "WEIGHTS": trained}
    result = run("bench", *(meant.get(a, a) for a in arguments), status=2)
    assert result.stdout == "" and said in result.stderr


def test_profile_lists_every_node(run: Run, run_json: RunJson, engine: Path) -> None:
    document = run_json("profile", engine, "--batch-size", "2")
    assert document["batch_size"] == 2 and document["precision_ran"] == "fp32"
    assert document["total"]["milliseconds"] > 0
    assert {"conv1", "layer2.0.conv1", "fc"} <= {row["name"] for row in document["rows"]}
    text = run("profile", engine).stdout
    assert f"{engine} on cpu in fp32, batch 1" in text and "GFLOP/s" in text


def test_profile_writes_a_trace(run: Run, engine: Path, tmp_path: Path) -> None:
    run("profile", engine, "--trace", tmp_path / "trace.json")
    assert "traceEvents" in (tmp_path / "trace.json").read_text()
    assert "cannot be written" in run("profile", engine, "--trace", tmp_path, status=2).stderr


def test_profile_refuses(run: Run, engine: Path) -> None:
    assert "one batch size" in run("profile", engine, "--batch-size", "1,2", status=2).stderr
    wrong = run("profile", engine, "--image-size", "40", status=2)
    assert "expected [N, 3, 32, 32]" in wrong.stderr


@pytest.mark.parametrize("what", ["SMALL", "ENGINE"])
def test_summary_counts(what: str, run: Run, run_json: RunJson, small: str, engine: Path) -> None:
    model = small if what == "SMALL" else engine
    document = run_json("summary", model)
    assert document["parameters"] == 75_290 and document["input_shapes"] == [[1, 3, 32, 32]]
    assert "75,290 parameters" in run("summary", model).stdout


def test_summary_of_weights_alone_at_another_size(run_json: RunJson, trained: Path) -> None:
    small, large = (
        run_json("summary", "--weights", trained, "--image-size", size)["macs"]
        for size in ("32", "64")
    )
    assert large > 3.9 * small


def test_summary_refuses(run: Run) -> None:
    assert "error: " in run("summary", "fastres:resnet51", status=2).stderr
    assert "No such option" in run("summary", "--precision", "fp32", status=2).output
