"""fastres bench, profile and summary: figures of small networks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]
# a device, unlike a backend, fits an engine too
BRIEF = ("--duration=0.02", "--launches=1", "--device=cpu")


def test_ours_and_peers_take_turns(run: Run, small: str, tmp_path: Path) -> None:
    flags = ("--peers", "eager,onnxruntime", "--batch-size", "1,2", "--percentile", "50,99.9")
    base = tmp_path / "base.json"
    result = run("bench", small, *BRIEF, "--launches=2", *flags, "--threads", "1", "-o", base)
    document = json.loads(base.read_text())
    rows = document["measurements"]
    assert document["baseline"] == "eager" and document["left_out"] == {}
    assert [(row["target"], row["batch_size"]) for row in rows] == [
        (name, size) for size in (1, 2) for name in ("fastres", "eager", "onnxruntime")
    ]
    assert all(row["precision"] == "fp32" and row["throughput"] > 0 for row in rows)
    assert all(row["model"] == small and len(row["quantiles_ms"]) == 101 for row in rows)
    assert all(list(row["latency_ms"]) == ["p50", "p99.9"] for row in rows)
    assert [v["target"] for v in document["parity"]] == ["fastres", "eager", "onnxruntime"] * 2
    assert all(0 < v["rms"] < v["allowed_rms"] for v in document["parity"])
    assert document["lanes"] == {"fastres": ["eager", "onnxruntime"]}
    assert document["backends"] == {"fastres": "cpu"} and document["run"]["finished"]
    assert document["run"]["input"] == [3, 32, 32]
    found = [(r["ours"], r["peer"], r["batch_size"]) for r in document["ratios"]]
    assert found == [("fastres", peer, n) for n in (1, 2) for peer in ("eager", "onnxruntime")]
    speeds = [r["speed"] for r in document["ratios"]]
    assert all(s["low"] <= s["median"] <= s["high"] for s in speeds)
    assert document["run"]["argv"][:3] == ["fastres", "bench", small]
    assert document["machine"]["threads"] == 1 and document["machine"]["state"]["pinned to"]
    assert "batch 2: fastres is" in result.stdout and "as fast as onnxruntime" in result.stdout
    assert "random weights: they are settled" in result.stderr and "takes about" in result.stderr

    _compared(run, small, base, tmp_path)


def _compared(run: Run, small: str, base: Path, folder: Path) -> None:
    """The guard: the same run passes; with a base in which ours was faster, it fails."""
    same = ("bench", small, *BRIEF, "--peers", "onnxruntime", "--threads", "1", "--compare")
    result = run(*same, base, "--fail-if-slower", "95%")
    assert "not timed now: fastres at batch 2" in result.stdout
    assert "speed now over speed in" in result.stdout and "measured by" in result.stdout
    document = json.loads(base.read_text())
    for row in document["measurements"]:
        if row["target"] == "fastres":
            row["round_ms"] = [ms / 100 for ms in row["round_ms"]]
    faster = folder / "faster.json"
    faster.write_text(json.dumps(document))
    result = run(*same, faster, "--launches=2", "--fail-if-slower", "50%", status=1)
    assert "slower" in result.stdout


def test_a_model_that_prints_and_draws_its_weights_anew(
    run_json: RunJson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stdout holds the document alone; the processes that are timed have our weights."""
    (tmp_path / "moody.py").write_text(
        "import random, torch\n"
        "from fastres import models\n"
        "class Net(torch.nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        print('well, well')\n"
        "        return super().forward(x)\n"
        "def net():\n"
        "    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))\n"
        "    net = models.cifar_resnet(8, seed=random.SystemRandom().randrange(2**31))\n"
        "    return Net(models.settle(net, x))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ("--image-size", "16", "--peers", "eager")
    document = run_json("bench", "moody:net", *BRIEF, *flags)
    assert document["left_out"] == {} and len(document["parity"]) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--image-size", "1000000"), "this machine has"),
        (("--batch-size", "99999999999"), "this machine has"),
        (("--batch-size", "9" * 5000), "at most 18 digits"),
    ],
)
def test_more_than_a_machine_can_hold(
    run: Run, small: str, flags: tuple[str, ...], said: str
) -> None:
    assert said in run("bench", small, *flags, *BRIEF, status=2).stderr


def test_versions_are_explained(run: Run, tmp_path: Path) -> None:
    names = ("fastres:resnet50@v1", "fastres:resnet50")
    flags = ("--image-size", "64", "--peers", "none", "-o", tmp_path / "out.json")
    assert "v1.5 beside v1" in run("bench", *names, *BRIEF, *flags).stdout
    document = json.loads((tmp_path / "out.json").read_text())
    (found,) = document["versions"]
    assert (found["net"], found["precision"], found["batch_size"]) == ("resnet50", "fp32", 1)
    assert 1.03 < found["macs_ratio"] < 1.1 and 1.0 < found["roofline_ratio"] < 1.1
    macs = {group["group"]: (group["v1_macs"], group["v15_macs"]) for group in found["groups"]}
    assert macs["layer1"][0] == macs["layer1"][1] and macs["layer2"][0] < macs["layer2"][1]
    assert {p["target"] for p in document["profiles"]} == {f"{name} fastres" for name in names}
    assert document["rates"]["fp32"]["gflop_per_s"] > document["rates"]["fp32"]["gb_per_s"] > 0


def test_a_report_is_written(run: Run, small: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("bench", small, *BRIEF, "--peers", "none", "--html", page)
    assert f"the report is {page}" in result.stderr
    html = page.read_text()
    assert small in html and "Roofline" in html and "--html" in html  # the command, too


def test_int8_is_calibrated_where_no_table_is_given(run_json: RunJson, small: str) -> None:
    flags = ("--precision", "fp32,int8", "--peers", "onnxruntime")
    document = run_json("bench", small, *BRIEF, *flags)
    names = [row["target"] for row in document["measurements"]]
    assert names == [f"{p} {who}" for p in ("fp32", "int8") for who in ("fastres", "onnxruntime")]
    assert document["measurements"][2]["precision"] == "int8"
    assert document["measurements"][2]["ran"].startswith("int8")
    errors = {v["target"]: v["rms"] for v in document["parity"]}
    assert errors["int8 fastres"] > 100 * errors["fp32 fastres"] > 0


def test_a_saved_engine_beside_its_model(run: Run, small: str, engine: Path) -> None:
    result = run("bench", engine, small, *BRIEF, "--peers", "none")
    assert f"{engine.name} fastres" in result.stdout and f"{small} fastres" in result.stdout
    assert "timed without a check" in result.stderr


def test_a_saved_engine_has_its_precision(run: Run, engine: Path) -> None:
    result = run("bench", engine, *BRIEF, "--precision", "fp32,bf16", status=2)
    assert "is a saved engine" in result.stderr and "--precision cannot be given" in result.stderr


def test_a_peer_that_cannot_run_is_left_out_and_named(run_json: RunJson, small: str) -> None:
    peers = "torch_tensorrt,torch_compile_reduce_overhead"
    document = run_json("bench", small, *BRIEF, "--peers", peers)
    assert "on cuda only" in document["left_out"]["torch_tensorrt"]
    assert "means CUDA graphs" in document["left_out"]["torch_compile_reduce_overhead"]
    assert document["baseline"] == "fastres"


def test_a_peer_that_lacks_a_precision_is_named_with_it(run_json: RunJson, small: str) -> None:
    flags = ("--precision", "fp32,int8", "--peers", "eager")
    document = run_json("bench", small, *BRIEF, *flags)
    assert document["left_out"].keys() == {"eager in int8"}
    assert "eager runs fp32, fp16, bf16 here, not int8" in document["left_out"]["eager in int8"]


def test_the_speed_of_wrong_results_is_not_shown(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is another one in the processes that run it than in the one that checks."""
    (tmp_path / "two_faced.py").write_text(
        "import multiprocessing, torch\n"
        "from fastres import models\n"
        "def net():\n"
        "    there = multiprocessing.parent_process() is not None\n"
        "    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))\n"
        "    net = models.settle(models.cifar_resnet(8, seed=0), x)\n"
        "    return torch.nn.Sequential(net, torch.nn.ReLU() if there else torch.nn.Identity())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("bench", "two_faced:net", *BRIEF, "--peers", "none", status=1)
    assert result.stdout == "" and "fastres in fp32 at batch size 1: largest error" in result.stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("x, y):\n        return self.a(x + y)", "it raised TypeError"),
        ("x):\n        return self.a(x.double())", "it raised RuntimeError"),
    ],
)
def test_a_model_that_does_not_run_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str
) -> None:
    (tmp_path / "odd.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        f"    def forward(self, {model}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    result = run("bench", "odd:Net", "--image-size", "32", *BRIEF, status=2)
    assert "odd:Net cannot be run with torch.float32 [8, 3, 32, 32]" in result.stderr
    assert said in result.stderr


def test_layers_that_cannot_be_timed_cost_no_results(run: Run) -> None:
    flags = ("--backend", "onnxruntime", "--peers", "none", "--layers")
    result = run("bench", "fastres:cifar_resnet8", *BRIEF[:2], *flags)
    assert "the layers were not all timed: onnxruntime is here" in result.stderr
    assert "fastres on onnxruntime" in result.stdout


def test_a_table_for_int8_serves_peers_too(
    run: Run, run_json: RunJson, small: str, trained: Path, photos_folder: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.json"
    given = (small, "--weights", trained)
    run("calibrate", *given, photos_folder, "-o", table)
    flags = (*BRIEF, "--calibration", table, "--peers", "onnxruntime")
    document = run_json("bench", *given, *flags)
    assert document["left_out"] == {}
    assert {m["precision"] for m in document["measurements"]} == {"int8"}


def test_what_is_read_is_not_written_over(run: Run, small: str, tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    base.write_text("{}")
    for command in (("bench", small, "--compare", base, "-o", base), ("report", base, "-o", base)):
        assert "is what is read here" in run(*command, status=2).stderr
    for flag in ("-o", "--html"):
        given = ("--weights", base, flag, base)
        assert "is what is read here" in run("bench", small, *given, status=2).stderr
        assert "is what is read here" in run("profile", small, *given, status=2).stderr
        assert "is what is read here" in run("profile", base, flag, base, status=2).stderr
    page = tmp_path / "page"
    assert "give two files" in run("profile", small, "-o", page, "--html", page, status=2).stderr
    assert "give two files" in run("bench", small, "-o", page, "--html", page, status=2).stderr
    assert base.read_text() == "{}" and not page.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a model"),
        (("SMALL", "--device", "gpu"), "device 'gpu' is not one"),
        (("SMALL", "--duration", "inf"), "--duration is inf"),
        (("SMALL", "--duration", "nan"), "--duration"),
        (("SMALL", "--peers", "eager,abacus"), "there is no peer abacus; there are eager"),
        (("SMALL", "-o", "nowhere/b.json"), "there is no folder nowhere"),
        (("SMALL", "--html", "."), ". is a folder"),
        (("SMALL", "--launches", "0"), "--launches"),
        (("SMALL", "--fail-if-slower", "5%"), "--compare BASE.json, to what"),
        (("SMALL", "--compare", "no.json"), "no.json cannot be read"),
        (("SMALL", "--compare", "WEIGHTS"), "holds no results of fastres bench"),
        (("SMALL", "--compare", "no.json", "--fail-if-slower", "x"), "'x': give a percentage"),
        (("SMALL", "--compare", "no.json", "--fail-if-slower", "100"), "below 100"),
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
    assert "is a folder" in run("profile", engine, "--trace", tmp_path, status=2).stderr


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
