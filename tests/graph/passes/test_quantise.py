"""quantise: where int8 begins and ends, by whose scale, and what the numbers then are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.backends.reference import ReferenceExecutable
from fastres.calib.images import Preprocess
from fastres.calib.table import CalibrationTable
from fastres.errors import InputError
from fastres.graph.capture import capture
from fastres.graph.ir import Conv2d, Dequantize, Graph, Linear, Quantize
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.quantise import Placement, quantise
from fastres.options import Input
from fastres.quantization.calibrate import collect
from fastres.source import source_of, taking_pictures

Forward = Callable[..., Any]


def network(s: Any, x: Tensor) -> Any:
    """A residual block behind a pool, and a head."""
    y = F.max_pool2d(F.relu(s.n(s.a(x))), 2)
    y = F.relu(s.m(s.b(y)) + y)
    return s.fc(y.mean((2, 3)))


def calibrated(graph: Graph, *, keep: tuple[str, ...] = ()) -> CalibrationTable:
    torch.manual_seed(1)
    batches = [(torch.randn(4, 4, 8, 8),) for _ in range(3)]
    table = collect(graph, [Input((1, 4, 8, 8))], batches, "mse")
    return msgspec.structs.replace(table, keep=keep)


@pytest.fixture
def graph(block: Callable[[Forward], nn.Module]) -> Graph:
    return optimise(capture(block(network), [Input((1, 4, 8, 8))]).graph)


def quantised_values(graph: Graph) -> dict[str, float]:
    """Value → its scale; every Quantize is followed by a Dequantize of the same."""
    scales = {}
    for node in graph.nodes:
        if isinstance(node.op, Quantize):
            (value,) = node.inputs
            assert graph[f"{value}.dequantized"].op == Dequantize(node.op.scale)
            scales[value] = node.op.scale
    return scales


def test_skip_quantises_what_meets_the_accumulator(graph: Graph) -> None:
    table = calibrated(graph)
    after = quantise(graph, table, "skip")
    scales = quantised_values(after)
    assert list(scales) == ["x", "a", "max_pool2d", "mean"]
    assert scales["max_pool2d"] == scales["a"] == table.scale("a")
    assert after["b"].inputs == ("max_pool2d.dequantized", "max_pool2d.dequantized")
    assert after["max_pool2d"].inputs == ("a.dequantized",)
    assert after["fc"].inputs == ("mean.dequantized",)
    assert after["mean"].inputs == ("b",)  # no layer reads it in int8
    assert after.outputs == ("fc",)


def test_both_quantises_the_main_branch_too(graph: Graph) -> None:
    table = calibrated(graph)
    after = quantise(graph, table, "both")
    scales = quantised_values(after)
    assert list(scales) == ["x", "a", "max_pool2d", "b.main", "mean"]
    assert scales["b.main"] == table.scale("b.main") != table.scale("mean")
    assert after["b"].inputs == ("b.main.dequantized", "max_pool2d.dequantized")
    for name in ("x", "a", "mean"):
        assert scales[name] == quantised_values(quantise(graph, table, "skip"))[name]


@pytest.mark.parametrize("placement", ["skip", "both"])
@pytest.mark.parametrize("steps", [127, 63])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_numbers_are_those_worked_out_by_hand(
    graph: Graph, placement: Placement, steps: int, unsigned: bool
) -> None:
    table = calibrated(graph)
    after = quantise(graph, table, placement, weight_steps=steps, unsigned=unsigned)

    def fake(x: Tensor, name: str) -> Tensor:
        if unsigned and name == "a":  # what a ReLU gave
            return torch.fake_quantize_per_tensor_affine(x, table.scale(name, 255), 0, 0, 255)
        return torch.fake_quantize_per_tensor_affine(x, table.scale(name), 0, -128, 127)

    def weight(name: str) -> tuple[Tensor, Tensor]:
        params = graph[name].params
        w = graph.constants[params["weight"]]
        scale = w.flatten(1).abs().amax(1) / steps
        zero = torch.zeros(len(w), dtype=torch.int32)
        q = torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -steps, steps)
        read = {"a": "x", "b": "max_pool2d", "fc": "mean"}[name]
        mean = torch.tensor(table.tensors[read].means)
        # what the rounding of the weights adds to a picture that is everywhere the mean
        moved = (q - w).flatten(2).sum(2) @ mean if w.ndim == 4 else (q - w) @ mean
        return q, graph.constants[params["bias"]] - moved

    torch.manual_seed(2)
    x = torch.randn(3, 4, 8, 8)
    y = fake(F.conv2d(fake(x, "x"), *weight("a"), padding=1).relu(), "a")
    y = F.max_pool2d(y, 2)
    main = F.conv2d(y, *weight("b"), padding=1)
    y = ((fake(main, "b.main") if placement == "both" else main) + y).relu()
    y = F.linear(fake(y.mean((2, 3)), "mean"), *weight("fc"))
    found = ReferenceExecutable(after, torch.float32).run([x])[0]
    # a value at the edge between two steps may round either way: one step of 127, now and then
    torch.testing.assert_close(found, y, rtol=0, atol=2e-3 * float(y.abs().max()))
    assert (found - ReferenceExecutable(graph, torch.float32).run([x])[0]).abs().max() > 1e-3


def test_only_what_a_relu_gave_is_unsigned(graph: Graph) -> None:
    after = quantise(graph, calibrated(graph), "both", unsigned=True)
    kinds = {n.inputs[0]: n.spec.dtype for n in after.nodes if isinstance(n.op, Quantize)}
    assert kinds == {
        "x": "int8",
        "a": "uint8",
        "max_pool2d": "uint8",
        "b.main": "int8",
        "mean": "int8",
    }


def test_weights_are_int8_with_a_scale_for_each_channel(graph: Graph) -> None:
    after = quantise(graph, calibrated(graph), "skip")
    for node in after.nodes:
        if isinstance(node.op, Conv2d | Linear):
            whole = after.constants[node.params["weight"]]
            scale = after.constants[node.params["scale"]]
            assert whole.dtype == torch.int8 and scale.dtype == torch.float32
            assert whole.flatten(1).abs().amax(1).eq(127).all()
            exact = graph.constants[graph[node.name].params["weight"]]
            by_row = scale.view(-1, *[1] * (whole.ndim - 1))
            assert ((whole * by_row - exact).abs() <= by_row * 0.5001).all()
    names = set(after.constants)
    assert not {n for n in names if n + ".int8" in names}  # the float weights are gone


def test_a_channel_of_zeros_stays_zero(block: Callable[[Forward], nn.Module]) -> None:
    model = block(lambda s, x: s.a(x))
    with torch.no_grad():
        model.a.weight[1] = 0  # type: ignore[index]
    graph = optimise(capture(model, [Input((1, 4, 8, 8))]).graph)
    after = quantise(graph, calibrated(graph), "skip")
    assert after.constants[after["a"].params["scale"]][1] == 1
    y = ReferenceExecutable(after, torch.float32).run([torch.randn(1, 4, 8, 8)])[0]
    assert y[:, 1].allclose(model.a.bias[1])  # type: ignore[index]


def test_kept_layers_stay_in_floating_point(graph: Graph) -> None:
    after = quantise(graph, calibrated(graph, keep=("b",)), "both")
    assert "scale" not in after["b.main"].params and "scale" in after["a"].params
    assert list(quantised_values(after)) == ["x", "mean"]
    everything = calibrated(graph, keep=("a", "b", "fc"))
    untouched = quantise(graph, everything, "skip")
    assert untouched.equals(graph)


def test_groups_correct_their_own_means(block: Callable[[Forward], nn.Module]) -> None:
    model = block(lambda s, x: s.a(x))
    model.a = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False).eval()
    graph = optimise(capture(model, [Input((1, 4, 8, 8))]).graph)
    table = calibrated(graph)
    after = quantise(graph, table, "skip")
    mean = torch.tensor(table.tensors["x"].means).view(1, 4, 1, 1).expand(1, 4, 5, 5)
    exact = F.conv2d(mean, model.a.weight, groups=2)[0, :, 1, 1]  # a picture that is the mean
    node = after["a"]
    weight = after.constants[node.params["weight"]] * after.constants[node.params["scale"]].view(
        -1, 1, 1, 1
    )
    whole = F.conv2d(mean, weight, after.constants[node.params["bias"]], groups=2)[0, :, 1, 1]
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=1e-6)


def test_tables_of_other_networks_are_refused(
    graph: Graph, block: Callable[[Forward], nn.Module]
) -> None:
    table = calibrated(graph)
    model = block(network)
    with torch.no_grad():
        model.fc.weight[0, 0] += 1e-3  # type: ignore[index]
    other = optimise(capture(model, [Input((1, 4, 8, 8))]).graph)
    with pytest.raises(InputError, match="other weights"):
        quantise(other, table, "skip")
    one = optimise(
        capture(block(lambda s, x: s.fc(s.a(x).mean((2, 3)))), [Input((1, 4, 8, 8))]).graph
    )
    with pytest.raises(InputError, match="another network"):
        quantise(one, table, "skip")
    some = {name: entry for name, entry in table.tensors.items() if name != "a"}
    with pytest.raises(InputError, match="no range of a, which b reads"):
        quantise(graph, msgspec.structs.replace(table, tensors=some), "skip")
    with pytest.raises(InputError, match="keeps conv9 in floating point"):
        quantise(graph, msgspec.structs.replace(table, keep=("conv9",)), "skip")


def test_sizes_do_not_matter(graph: Graph, block: Callable[[Forward], nn.Module]) -> None:
    larger = optimise(capture(block(network), [Input((1, 4, 16, 16))]).graph)
    assert quantised_values(quantise(larger, calibrated(graph), "skip"))


def test_a_network_fed_pictures_has_the_same_table() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    source = source_of(model, Input((1, 3, 8, 8)))
    plain = optimise(source.graph)
    table = collect(plain, source.inputs, [(torch.randn(4, 3, 8, 8),)], "minmax")
    pictures = optimise(taking_pictures(source, Preprocess()).graph)
    after = quantise(pictures, table, "both")
    (value,) = source.graph.inputs
    assert quantised_values(after) == {f"{value.name}.normalize": table.scale(value.name)}


def test_nan_is_not_lost(graph: Graph) -> None:
    after = quantise(graph, calibrated(graph), "both")
    x = torch.zeros(2, 4, 8, 8)
    x[1, 0, 3, 3] = float("nan")
    y = ReferenceExecutable(after, torch.float32).run([x])[0]
    assert y[0].isfinite().all() and y[1].isnan().all()
    x[1, 0, 3, 3] = float("inf")  # saturates
    assert ReferenceExecutable(after, torch.float32).run([x])[0].isfinite().all()
