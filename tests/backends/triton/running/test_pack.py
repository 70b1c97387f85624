"""Packed weights: layout, one rounding, and what does not fit into fp16."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.backends.triton.planning.plan import Norm
from fastres.backends.triton.running.linked import Key
from fastres.backends.triton.running.pack import Packed
from fastres.errors import UnsupportedError
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.options import Input

CPU = torch.device("cpu")


def network(scale: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(1), nn.Linear(24, 5))
    with torch.no_grad():
        model[0].weight *= scale
    return model.eval()


def test_layout_and_dtypes() -> None:
    model = network(1.0)
    packed = Packed(capture(model, [Input((1, 4, 4, 4))]).graph, torch.bfloat16, CPU)
    weight = model.state_dict()["0.weight"]
    filters, rows = packed.filters("0.weight"), packed.rows("2.weight")
    assert filters.shape == (6, 3, 3, 2) and filters.is_contiguous()
    assert torch.equal(filters.permute(0, 3, 1, 2), weight.bfloat16())
    assert torch.equal(packed.matrix("0.weight"), filters.flatten(1))
    assert rows.dtype == torch.bfloat16 and rows.shape == (5, 24)
    bias = packed.bias(["0.bias"])
    assert bias is not None and bias.dtype == torch.float32


def test_made_once_and_only_what_is_asked_for() -> None:
    packed = Packed(capture(network(1.0), [Input((1, 4, 4, 4))]).graph, torch.float16, CPU)
    assert packed.nbytes == 0
    assert packed.filters("0.weight") is packed.filters("0.weight")
    assert packed.matrix("0.weight").data_ptr() == packed.filters("0.weight").data_ptr()
    assert packed.nbytes == 2 * 6 * 2 * 9


def test_a_projection_stands_behind_the_filters_and_biases_are_summed() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(4, 6, 3), "b": nn.Conv2d(8, 6, 1)})
    constants = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    graph = Graph((), (), (), constants, "")
    packed = Packed(graph, torch.float16, CPU)
    matrix = packed.matrix("a.weight", "b.weight")
    assert matrix.shape == (6, 36 + 8)
    assert torch.equal(matrix[:, :36], packed.matrix("a.weight"))
    assert torch.equal(matrix[:, 36:], constants["b.weight"].half().flatten(1))
    total = packed.bias(["a.bias", "b.bias"])
    assert torch.equal(total, (constants["a.bias"].double() + constants["b.bias"].double()).float())
    assert packed.bias([]) is None and packed.bias([None]) is None
    assert torch.equal(packed.bias(["a.bias", None]), constants["a.bias"])


def test_rows_of_8_bits_are_interleaved_and_wider_ones_are_not() -> None:
    weight = torch.randint(-127, 128, (32, 4, 3, 3), dtype=torch.int8)
    constants = {"w": weight, "p": weight[:, :, :1, :1], "f": weight.float()}
    packed = Packed(Graph((), (), (), constants, ""), torch.float16, CPU)
    rows = [start + i for start in (0, 16) for i in (*range(0, 16, 2), *range(1, 16, 2))]
    assert torch.equal(packed.interleaved("w"), packed.matrix("w")[rows])
    assert torch.equal(packed.interleaved("w", "p"), packed.matrix("w", "p")[rows])
    assert packed.interleaved("f").data_ptr() == packed.filters("f").data_ptr()
    assert packed.interleaved("f", "f") is packed.matrix("f", "f")


def test_factors_of_scales_and_biases() -> None:
    constants = {"b": torch.tensor([1.0, -3.0]), "c": torch.tensor([0.5, 2.0])}
    packed = Packed(Graph((), (), (), constants, ""), torch.float16, CPU)
    wanted = ((constants["b"].double() + constants["c"].double()) * 0.3).float()
    assert torch.equal(packed.bias(["b", None, "c"], 0.3), wanted)
    assert packed.bias(["b"], 1.0) is packed.bias(["b"])
    step, result = torch.tensor(0.07), torch.tensor(0.3)
    assert torch.equal(packed.products("b", 0.07, 0.3), constants["b"] * step * result)
    assert packed.products("b", 0.07, 1.0) is packed.products("b", 0.07)
    assert packed.bias([None], 0.3) is None


@pytest.mark.parametrize("merged", [1, 2, 3, 6])
def test_groups_in_one_product_have_zeros_for_each_others_channels(merged: int) -> None:
    conv = nn.Conv2d(24, 12, 3, groups=6, bias=False)
    weight = conv.weight.detach()
    packed = Packed(Graph((), (), (), {"w": weight}, ""), torch.float32, CPU)
    filters = packed.grouped("w", 6, merged)
    assert filters.shape == (12, 3, 3, 4 * merged) and filters.is_contiguous()
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    y = F.conv2d(x, filters.permute(0, 3, 1, 2).double(), groups=6 // merged)
    assert torch.allclose(y, F.conv2d(x, weight.double(), groups=6))


@pytest.mark.parametrize(
    ("groups", "merged"), [(6, 0), (6, 4), (6, 12), (5, 1), (0, 1), (6, -2)], ids=str
)
def test_groups_that_cannot_be_one_product(groups: int, merged: int) -> None:
    packed = Packed(Graph((), (), (), {"w": torch.zeros(12, 4, 3, 3)}, ""), torch.float32, CPU)
    with pytest.raises(ValueError, match="cannot be one product"):
        packed.grouped("w", groups, merged)
    with pytest.raises(ValueError, match="cannot be one product"):
        packed.get(("grouped", "w", groups, merged))


def test_weights_to_compile_for_take_no_memory() -> None:
    packed = Packed(
        capture(network(1.0), [Input((1, 4, 4, 4))]).graph, torch.float16, torch.device("meta")
    )
    assert packed.filters("0.weight").is_meta


def test_everything_made_is_found_by_its_key() -> None:
    model = nn.ModuleDict(
        {"a": nn.Conv2d(4, 6, 3), "b": nn.Conv2d(8, 6, 1), "n": nn.BatchNorm2d(6)}
    )
    model["c"], model["stem"] = nn.Linear(6, 5), nn.Conv2d(3, 8, 7)
    constants = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    constants["q"] = torch.randint(-127, 128, (16, 4, 3, 3), dtype=torch.int8)
    constants["p"] = constants["q"][:, :, :1, :1]
    packed, again = (Packed(Graph((), (), (), constants, ""), torch.float16, CPU) for _ in range(2))
    packed.filters("a.weight"), packed.matrix("a.weight", "b.weight"), packed.rows("c.weight")
    packed.bias(["a.bias", "b.bias"]), packed.stem("stem.weight")
    packed.scale_and_shift(Norm("n.running_mean", "n.running_var", None, "n.bias", 1e-5))
    packed.grouped("a.weight", 2, 2)
    packed.interleaved("q"), packed.interleaved("q", "p"), packed.bias(["a.bias", "b.bias"], 0.3)
    packed.products("a.bias", 0.07), packed.products("a.bias", 0.07, 0.3)
    assert len(packed.made()) == 13
    for key, made in packed.made().items():
        text = msgspec.json.encode(key)
        assert torch.equal(again.get(msgspec.json.decode(text, type=Key)), made)


@pytest.mark.parametrize(
    "key",
    [
        (),
        ("filters",),
        ("filters", "b"),
        ("filters", "a.bias"),
        ("odd", "a.weight"),
        (None, "a.x"),
        ("products", "a.bias"),
        ("products", "a.bias", 0.1, 0.2, 0.3),
        ("products", "a.bias", 0.1, "a.bias"),
    ],
    ids=str,
)
def test_other_keys_are_refused(key: Key) -> None:
    constants = {"a.weight": torch.ones(1, 1, 1, 1), "a.bias": torch.ones(1)}
    with pytest.raises(ValueError, match="stands for no constants of this graph"):
        Packed(Graph((), (), (), constants, ""), torch.float16, CPU).get(key)


def test_weights_beyond_fp16_are_refused() -> None:
    graph = capture(network(1e7), [Input((1, 4, 4, 4))]).graph
    Packed(graph, torch.bfloat16, CPU)
    with pytest.raises(UnsupportedError, match="exceed fp16's 65504; use precision='bf16'"):
        Packed(graph, torch.float16, CPU)
