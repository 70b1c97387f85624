"""fastres.quantize: which algorithm wins, which layers stay out of int8, and int8 engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.calib.thresholds import ALGORITHMS
from fastres.errors import InputError
from fastres.graph.ir import Conv2d, Linear, Quantize
from fastres.options import Input

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(24, 3, 32, 32)


@pytest.fixture(scope="module")
def small(data: Tensor) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0), data)


@pytest.fixture(scope="module")
def table(small: nn.Module, data: Tensor) -> fastres.CalibrationTable:
    return fastres.quantize(small, data, algorithm="mse")


def test_auto_takes_what_validates_best(small: nn.Module, data: Tensor) -> None:
    wins = "percentile-99.9"
    asked: list[str] = []

    def validate(engine: fastres.Engine) -> float:
        asked.append(engine.options.precision or "")
        return 0.9 if len(asked) == 1 + list(ALGORITHMS).index(wins) + 1 else 0.5

    table = fastres.quantize(small, data, validate=validate)
    assert table.algorithm == wins
    assert asked == ["fp32", *["int8"] * len(ALGORITHMS)]
    assert [p.algorithm for p in table.curve] == ["", *ALGORITHMS]
    assert table.backend == "cpu"


def test_auto_without_a_validation_takes_the_least_noise(small: nn.Module, data: Tensor) -> None:
    table = fastres.quantize(small, data)
    assert table.curve == ()
    reports = {}
    for name in ALGORITHMS:
        engine = fastres.compile(
            small, data[:1], calibration=table.using(name), backend="reference"
        )
        reports[name] = fastres.verify(small, engine, data).outputs[0].sqnr_db
    assert reports[table.algorithm] > max(reports.values()) - 0.5  # measured on graph and engine


def test_max_drop_is_kept_by_leaving_layers_out(small: nn.Module, data: Tensor) -> None:
    """Accuracy here falls with every layer in int8 that is not the first."""

    def validate(engine: fastres.Engine) -> float:
        whole = [
            node.name
            for node in engine.graph.nodes
            if isinstance(node.op, Conv2d | Linear) and "scale" in node.params
        ]
        return 1.0 - 0.01 * len([name for name in whole if name != "conv1"])

    table = fastres.quantize(small, data, algorithm="minmax", validate=validate, max_drop=0.0321)
    layers = 8
    assert len(table.keep) == layers - 1 - 3 or (
        "conv1" in table.keep and len(table.keep) == layers - 3
    )
    with fastres.compile(small, data[:1], calibration=table) as engine:
        assert validate(engine) >= 1.0 - 0.0321
    assert table.curve[0].accuracy == 1.0
    assert min(p.accuracy for p in table.curve) < 1.0 - 0.0321
    tried = {p.kept: p.accuracy for p in table.curve if p.algorithm}
    assert tried[table.keep] >= 1.0 - 0.0321
    fewer = [a for kept, a in tried.items() if len(kept) == len(table.keep) - 1]
    assert not fewer or max(fewer) < 1.0 - 0.0321
    order = sorted(table.sensitivity, key=lambda name: table.sensitivity[name])
    assert set(table.keep) == set(order[: len(table.keep)])


def test_a_promise_that_holds_leaves_nothing_out(small: nn.Module, data: Tensor) -> None:
    table = fastres.quantize(
        small, data, algorithm="minmax", validate=lambda engine: 0.75, max_drop=0.0
    )
    assert table.keep == () and table.sensitivity == {}
    assert [p.accuracy for p in table.curve] == [0.75, 0.75]


def test_with_everything_left_out_the_network_is_what_it_was(
    small: nn.Module, data: Tensor
) -> None:
    def validate(engine: fastres.Engine) -> float:
        return float(not any(isinstance(node.op, Quantize) for node in engine.graph.nodes))

    table = fastres.quantize(small, data, algorithm="mse", validate=validate, max_drop=0.5)
    assert len(table.keep) == 8
    with fastres.compile(small, data[:1], calibration=table) as engine:
        torch.testing.assert_close(engine(data[:4]), small(data[:4]), rtol=1e-4, atol=1e-4)


def test_ignored_takes_patterns(small: nn.Module, data: Tensor) -> None:
    table = fastres.quantize(small, data, algorithm="mse", ignored=["layer1.*", "fc"])
    assert table.keep == ("layer1.0.conv1", "layer1.0.conv2", "fc")
    with fastres.compile(small, data[:1], calibration=table) as engine:
        left = {node.name.removesuffix(".main") for node in engine.info.not_quantised}
    assert left == set(table.keep)
    with pytest.raises(InputError, match="'stem' in ignored|ignored has 'stem'"):
        fastres.quantize(small, data, ignored=["stem"])


@pytest.mark.parametrize("ignored", [3, None, [3], [None]])
def test_ignored_takes_names_alone(small: nn.Module, data: Tensor, ignored: Any) -> None:
    with pytest.raises(InputError, match="give names or patterns of layers"):
        fastres.quantize(small, data, ignored=ignored)


class Unpooled(nn.Module):
    """A classifier that reads every pixel, as VGG's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.fc = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


def test_behind_a_flatten_pixels_share_their_channel_s_mean(data: Tensor) -> None:
    model = Unpooled().eval()
    engine = fastres.compile(model, data[:1], calibration=[data], backend="reference")
    assert fastres.verify(model, engine, data).passed
    torch.testing.assert_close(engine(data).mean(0), model(data).mean(0), atol=0.02, rtol=0)


def test_means_of_another_number_of_channels_are_refused(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable
) -> None:
    first = next(iter(table.tensors))
    short = msgspec.structs.replace(table.tensors[first], means=(0.5, 0.5))
    wrong = msgspec.structs.replace(table, tensors={**table.tensors, first: short})
    with pytest.raises(InputError, match="2 channel means of what conv1 reads, which has 3"):
        fastres.compile(small, data[:1], calibration=wrong)


def test_the_same_seed_gives_the_same_bytes(small: nn.Module, data: Tensor) -> None:
    one, two, other = (
        fastres.quantize(small, data, num_samples=8, seed=seed).to_json() for seed in (3, 3, 4)
    )
    assert one == two != other


def test_sensitivity_finds_the_layer_with_one_huge_channel(data: Tensor) -> None:
    """In int8 of one scale a tensor's other channels are lost beside such a channel."""
    model = fastres.models.cifar_resnet(8, seed=0)
    fastres.models.settle(model, data)
    with torch.no_grad():
        model.layer2[0].bn1.weight[3] *= 1000  # type: ignore[operator, index, union-attr]
        model.layer2[0].conv2.weight[:, 3] /= 1000  # type: ignore[operator, index, union-attr]
    wanted = model(data).detach()

    def validate(engine: fastres.Engine) -> float:
        return -float((engine(data) - wanted).square().mean() / wanted.square().mean())

    table = fastres.quantize(model, data, algorithm="minmax", validate=validate, max_drop=0.01)
    assert min(table.sensitivity, key=lambda n: table.sensitivity[n]) == "layer2.0.conv2"
    assert "layer2.0.conv2" in table.keep


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"algorithm": "best"}, "algorithm is 'best'; supported are 'auto', 'minmax'"),
        ({"max_drop": 0.1}, "max_drop needs validate"),
        ({"max_drop": -1, "validate": len}, "max_drop is -1"),
        ({"max_drop": float("nan"), "validate": len}, "max_drop is nan"),
        ({"validate": 5}, "validate is int"),
        ({"validate": lambda engine: None}, "validate returned None"),
        ({"validate": lambda engine: float("nan")}, "validate returned nan"),
        ({"num_samples": 0}, "num_samples"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_out_of_range(
    small: nn.Module, data: Tensor, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        fastres.quantize(small, data[:2], **changes)


def test_models_take_what_the_data_have(small: nn.Module) -> None:
    assert fastres.quantize(small, torch.randn(2, 3, 48, 48), algorithm="mse").samples == 2
    with pytest.raises(InputError, match="the calibration data has"):
        fastres.quantize(small, torch.randn(2, 3, 48, 48), inputs=Input((1, 3, 32, 32)))
    with pytest.raises(InputError, match="empty"):
        fastres.quantize(small, torch.zeros(0, 3, 32, 32))


# --- int8 engines ---


def test_every_layer_runs_in_int8(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable
) -> None:
    with fastres.compile(small, data[:4], calibration=table, backend="cpu") as engine:
        info = engine.info
    ran = {node.name: node.precision for node in info.nodes if node.op in ("conv2d", "linear")}
    assert len(ran) == 8
    assert set(ran.values()) == {"int8"}
    assert info.not_quantised == ()
    assert "layers not in int8: none" in str(info)
    assert next(node for node in info.nodes if node.name == "conv1").output.startswith("u8[")
    assert "int8 products by" in str(info)


def test_where_v1_strides_it_runs_in_int8_too(data: Tensor) -> None:
    """OpenVINO by itself runs both convolutions of 1x1 that begin a stage there in float32."""
    net = models.ResNet(models.Bottleneck, (1, 1, 1, 1), planes=16, version="v1", seed=0)
    models.settle(net, data)
    table = fastres.quantize(net, data, algorithm="minmax")
    with fastres.compile(net, data[:4], calibration=table, backend="cpu") as engine:
        assert engine.info.not_quantised == ()
        report = fastres.verify(net, engine, [data[:4]], layerwise=True)
        assert report.passed, str(report)
        assert engine.profile(data[:1]).rows


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_engines_do_what_their_graph_means(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable, backend: str
) -> None:
    with fastres.compile(small, data[:4], calibration=table, backend=backend) as engine:
        report = fastres.verify(small, engine, [data[:8], data[8:9]], layerwise=True)
        assert report.passed, str(report)
        (row,) = report.outputs
        assert 15 < row.sqnr_db < 60  # fp32 would have 100
        assert row.top1 > 0.85
        assert len(report.layers) == len([n for n in engine.info.nodes if ".main" not in n.name])
        lines = str(report).splitlines()
    shown = [row.sqnr_db for row in sorted(report.layers, key=lambda row: row.sqnr_db)]
    order = [float(line.split("│")[-3]) for line in lines if "│ conv2d" in line or "│ add" in line]
    assert order == sorted(order) and len(order) < len(shown)


def test_a_wrong_scale_turns_the_check_red(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable
) -> None:
    """The bound is what the graph means: a runtime that computed with other scales is caught."""
    engine = fastres.compile(small, data[:4], calibration=table, backend="cpu")
    entry = table.tensors["layer1.0.conv1"]
    halved = {name: value / 4 for name, value in entry.thresholds.items()}
    wrong = {**table.tensors, "layer1.0.conv1": msgspec.structs.replace(entry, thresholds=halved)}
    other = fastres.compile(
        small, data[:4], calibration=msgspec.structs.replace(table, tensors=wrong), backend="cpu"
    )
    engine._lowered = type(engine._lowered)(engine.graph, other._lowered.executable)
    assert not fastres.verify(small, engine, data[:8]).passed


def test_calibration_on_the_spot_and_from_a_file(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable, tmp_path: Path
) -> None:
    table.save(tmp_path / "t.json")
    x = data[:5]
    with fastres.compile(small, x, calibration=table) as engine:
        wanted = engine(x)
    for given in (tmp_path / "t.json", str(tmp_path / "t.json"), [data], data):
        with fastres.compile(small, x, calibration=given, precision="int8") as engine:
            assert engine.options.precision == "int8"
            torch.testing.assert_close(engine(x), wanted, rtol=0, atol=1e-5)


def test_a_network_built_from_the_same_weights_takes_the_table(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable
) -> None:
    graph = fastres.build(small.state_dict(), inputs=Input((1, 3, 32, 32)))
    with (
        fastres.compile(graph, calibration=table, backend="cpu") as built,
        fastres.compile(small, data[:1], calibration=table, backend="cpu") as compiled,
    ):
        torch.testing.assert_close(built(data[:3]), compiled(data[:3]), rtol=0, atol=1e-5)


def test_saved_engines_need_no_table(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable, tmp_path: Path
) -> None:
    with fastres.compile(small, data[:4], calibration=table, backend="cpu") as engine:
        engine.save(tmp_path / "e.fastres")
        wanted = engine(data)
    with fastres.load(tmp_path / "e.fastres") as again:
        assert torch.equal(again(data), wanted)
        assert again.options.precision == "int8"
        assert again.info.not_quantised == ()


def test_nan_and_infinities_on_the_cpu(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable
) -> None:
    x = data[:2].clone()
    with fastres.compile(small, x, calibration=table, backend="cpu") as engine:
        clean = engine(x)
        x[1, 0, 3, 3] = float("nan")
        y = engine(x)
        assert y[1].isnan().all()
        torch.testing.assert_close(y[0], clean[0], rtol=0, atol=0.1 * float(clean.abs().max()))
        x[1, 0, 3, 3] = float("inf")
        assert engine(x).isfinite().all()  # int8 saturates


def test_pictures_in_int8(small: nn.Module, data: Tensor) -> None:
    preprocess = fastres.Preprocess(resize=None, crop=None)
    pictures = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    floats = torch.stack([preprocess(p.numpy()) for p in pictures])
    table = fastres.quantize(small, floats, algorithm="mse")
    plain = fastres.compile(small, floats[:1], calibration=table, backend="cpu")
    fused = fastres.compile(
        small,
        floats[:1],
        calibration=table,
        backend="cpu",
        preprocess=preprocess,
        io_dtype=torch.uint8,
    )
    y = plain(floats)
    torch.testing.assert_close(fused(pictures), y, rtol=0, atol=0.05 * float(y.abs().max()))
    assert fastres.verify(small, fused, pictures).passed
    on_the_spot = fastres.compile(
        small,
        floats[:1],
        calibration=[floats],  # what the model is fed, not the engine: it is normalised once
        backend="cpu",
        preprocess=preprocess,
        io_dtype=torch.uint8,
    )
    assert torch.equal(on_the_spot(pictures), fused(pictures))


def test_half_precision_models_in_int8(small: nn.Module, data: Tensor) -> None:
    import copy

    model = copy.deepcopy(small).half()
    table = fastres.quantize(model, data.half(), algorithm="mse")
    with fastres.compile(model, data[:4].half(), calibration=table, backend="cpu") as engine:
        y = engine(data[:4].half())
    assert y.dtype == torch.float16
    exact = small(data[:4])
    assert (y.float() - exact).square().mean() < 0.05 * exact.square().mean()


def test_precision_and_calibration_go_together(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable
) -> None:
    with pytest.raises(InputError, match="precision='int8' needs calibration="):
        fastres.compile(small, data[:1], precision="int8")
    with pytest.raises(
        InputError, match="calibration= is for precision='int8' and 'fp8', not 'bf16'"
    ):
        fastres.compile(small, data[:1], precision="bf16", calibration=table)
    with pytest.raises(InputError, match="data is int"):
        fastres.compile(small, data[:1], calibration=5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be read"):
        fastres.compile(small, data[:1], calibration="/no/table.json")


def test_int8_engines_keep_their_weights(
    small: nn.Module, data: Tensor, table: fastres.CalibrationTable
) -> None:
    with fastres.compile(small, data[:1], calibration=table, backend="cpu") as engine:
        with pytest.raises(InputError, match="an int8 engine keeps its weights"):
            engine.update_weights(small.state_dict())
        with pytest.raises(InputError, match="bisect is for floating-point engines"):
            fastres.verify(small, engine, data[:2], bisect=True)


def test_without_vnni_weights_take_fewer_steps(
    small: nn.Module,
    data: Tensor,
    table: fastres.CalibrationTable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastres.backends import cpu

    monkeypatch.setattr(cpu, "sums_in_32_bits", lambda: False)
    monkeypatch.setattr(cpu, "int8_instructions", lambda: "no VNNI")
    with fastres.compile(small, data[:1], calibration=table, backend="cpu") as engine:
        weights = [t for n, t in engine.graph.constants.items() if n.endswith(".int8")]
        assert weights and all(int(w.abs().max()) == 63 for w in weights)
        assert "weights take 63 steps" in str(engine.info)
        assert fastres.verify(small, engine, data[:4]).passed
