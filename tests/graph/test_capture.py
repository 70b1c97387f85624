"""fastres.graph.capture: programs, inputs, outputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.graph.ir import Aten, Graph
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
SMALL = Input((1, 3, 8, 8))
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 8), (4, 3, 40, 40)))


def graph_of(model: nn.Module, *inputs: Input) -> Graph:
    return capture(model, inputs or (SMALL,)).graph


def kinds(graph: Graph) -> list[str]:
    return [n.op.overload if isinstance(n.op, Aten) else type(n.op).__name__ for n in graph]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def conv(c: int = 3, k: int = 4, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, **{"padding": size // 2, **options})


def exported(model: nn.Module, **options: Any) -> torch.export.ExportedProgram:
    batch = torch.export.Dim.AUTO
    x = torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: batch},), **options)


class TestPrograms:
    @pytest.mark.parametrize("strict", [False, True])
    def test_an_exported_program(self, strict: bool, agree: Agree, model_of: ModelOf) -> None:
        model = nn.Sequential(
            conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)
        ).eval()
        program = exported(model, strict=strict)
        found = capture(program, ())
        assert found.program is program
        assert kinds(found.graph) == ["Conv2d", "BatchNorm", "Activation", "Conv2d"]
        agree(model, found.graph, [draw(3, 3, 8, 8)])

    def test_a_fixed_batch_stays_fixed(self) -> None:
        with torch.no_grad():
            program = torch.export.export(conv().eval(), (torch.zeros(2, 3, 8, 8),))
        assert str(capture(program, ()).graph.inputs[0].spec) == "f32[2, 3, 8, 8]"

    def test_sizes_that_are_multiples(self, agree: Agree, model_of: ModelOf) -> None:
        model = nn.Sequential(conv(stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        height = torch.export.Dim("h", min=1, max=64) * 8
        with torch.no_grad():
            program = torch.export.export(
                model,
                (torch.zeros(2, 3, 16, 8),),
                dynamic_shapes=({0: torch.export.Dim.AUTO, 2: height},),
            )
        graph = capture(program, ()).graph
        assert str(graph.inputs[0].spec) == "f32[N, 3, H, 8]"
        agree(model, graph, [draw(3, 3, 24, 8)])

    def test_exported_in_training_mode(self) -> None:
        for part in (nn.BatchNorm2d(3), nn.Dropout()):
            program = exported(part.train())
            with pytest.raises(CaptureError, match="export it after model.eval|random numbers"):
                capture(program, ())

    def test_the_values_of_the_program(self, model_of: ModelOf) -> None:
        found = capture(model_of(lambda m, x: m.conv(x).relu_() * 2, conv=conv()), [SMALL])
        calls = [n.name for n in found.program.graph.nodes if n.op == "call_function"]
        assert list(found.values) == calls
        assert list(found.values.values()) == ["conv", "relu", "mul"]


class TestInputs:
    def test_every_size_that_varies_is_a_symbol(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: m.conv(x), conv=conv(stride=2))
        graph = graph_of(model, RANGED)
        assert str(graph.inputs[0].spec) == "f32[N, 3, H, W]"
        assert str(graph["conv"].spec) == "f32[N, 4, (H+1)//2, (W+1)//2]"
        for height, width in ((6, 7), (40, 39)):
            agree(model, graph, [draw(2, 3, height, width)])

    def test_one_of_height_and_width(self, model_of: ModelOf) -> None:
        image = Input(((1, 3, 8, 8), (1, 3, 8, 16), (1, 3, 8, 32)))
        assert str(graph_of(model_of(lambda m, x: x * x), image)) == (
            "inputs_0: f32[N, 3, 8, W] = input\nmul: f32[N, 3, 8, W] = mul(inputs_0, inputs_0)\n"
            "return mul"
        )

    def test_a_model_for_squares(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: x + x.transpose(2, 3))
        graph = graph_of(model, RANGED)
        assert str(graph.inputs[0].spec) == "f32[N, 3, H, H]"
        agree(model, graph, [draw(2, 3, 11, 11)])

    def test_several(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x, y, z: m.fc(x.mean((2, 3))) + y * z, fc=nn.Linear(3, 2))
        graph = graph_of(model, SMALL, Input((1, 2)), Input((1, 2)))
        assert [str(v.spec) for v in graph.inputs] == ["f32[N, 3, 8, 8]", "f32[N, 2]", "f32[N, 2]"]
        agree(model, graph, [draw(5, 3, 8, 8), draw(5, 2), draw(5, 2) + 1])

    def test_batches_of_their_own(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x, y: (x * 2, y * 3))
        graph = graph_of(model, Input((1, 2)), Input((1, 2)))
        assert [str(v.spec) for v in graph.inputs] == ["f32[N, 2]", "f32[N_inputs_1, 2]"]
        agree(model, graph, [draw(5, 2), draw(3, 2)])

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_forward_that_takes_some_and_the_rest(
        self, count: int, agree: Agree, model_of: ModelOf
    ) -> None:
        class Rest(nn.Module):
            def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
                return sum(rest, x * 2.0)

        graph = graph_of(Rest().eval(), *[Input((1, 2))] * (1 + count))
        agree(Rest(), graph, [draw(4, 2)] * (1 + count))

    def test_names_are_the_arguments(self) -> None:
        class Named(nn.Module):
            def forward(self, picture: Tensor, gain: Tensor) -> Tensor:
                return picture * gain

        graph = graph_of(Named().eval(), Input((1, 2)), Input((1, 2)))
        assert [v.name for v in graph.inputs] == ["picture", "gain"]

    def test_integers(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: x.to(torch.float64) / 255)
        graph = graph_of(model, Input((1, 3, 8, 8), dtype=torch.uint8))
        assert str(graph.inputs[0].spec) == "u8[N, 3, 8, 8]"
        agree(model, graph, [torch.arange(2 * 192, dtype=torch.uint8).view(2, 3, 8, 8)])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4)).to(
            dtype
        )
        graph = graph_of(model)  # the input takes the dtype of the parameters
        assert {v.spec.torch_dtype for v in (*graph.inputs, *graph.nodes)} == {dtype}
        assert {t.dtype for t in graph.constants.values()} == {dtype}
        agree(model, graph, [draw(2, 3, 8, 8)])


class TestOutputs:
    def test_trees(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: {"a": (x * 2, [x * 3]), "b": x * x})
        graph = graph_of(model)
        assert len(graph.outputs) == 3
        agree(model, graph, [draw(2, 3, 8, 8)])

    def test_one_twice_and_an_input(self, agree: Agree, model_of: ModelOf) -> None:
        def forward(m: Any, x: Tensor) -> Any:
            y = x * x
            return y, y, x

        graph = graph_of(model_of(forward))
        assert graph.outputs == ("mul", "mul", "inputs_0")
        agree(model_of(forward), graph, [draw(2, 3, 8, 8)])

    def test_what_is_not_returned_is_kept_for_the_passes(self, model_of: ModelOf) -> None:
        graph = graph_of(model_of(lambda m, x: (x * x, x + x)[0]))
        assert graph.outputs == ("mul",)


class TestWeights:
    def test_are_shared_with_the_model(self, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: m.conv(x), conv=conv())
        graph = graph_of(model)
        assert graph.constants["conv.weight"].data_ptr() == model.conv.weight.data_ptr()
        assert not graph.constants["conv.weight"].requires_grad

    def test_a_module_used_twice(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: m.conv(m.conv(x)), conv=conv(3, 3))
        graph = graph_of(model)
        assert [n.name for n in graph] == ["conv", "conv_1"]
        assert set(graph.constants) == {"conv.weight", "conv.bias"}
        agree(model, graph, [draw(2, 3, 8, 8)])

    def test_a_weight_of_two_modules(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: m.a(x) * m.b(x), a=conv(3, 3), b=conv(3, 3))
        model.b.weight = model.a.weight
        graph = graph_of(model)
        assert graph["a"].params["weight"] == graph["b"].params["weight"]
        assert graph["a"].params["bias"] != graph["b"].params["bias"]
        agree(model, graph, [draw(2, 3, 8, 8)])

    def test_only_those_that_are_read(self, model_of: ModelOf) -> None:
        graph = graph_of(model_of(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(3), spare=conv()))
        assert set(graph.constants) == {
            "norm.weight",
            "norm.bias",
            "norm.running_mean",
            "norm.running_var",
        }

    def test_buffers_that_are_not_saved(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: x * m.gain)
        model.register_buffer("gain", draw(8), persistent=False)
        agree(model, graph_of(model), [draw(2, 3, 8, 8)])

    def test_a_layer_and_a_weight_of_one_name(self, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(lambda m, x: x.mean((2, 3)) + m.mean, mean=draw(3))
        graph = graph_of(model)
        assert [n.name for n in graph] == ["mean_1", "add"]
        agree(model, graph, [draw(2, 3, 8, 8)])


def test_names_follow_the_modules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = conv(3, 3), nn.ReLU()
            self.tail = nn.Sequential(conv(3, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.tail(self.relu(self.conv(x))) + x)
            return F.relu(y * y)

    model = nn.Sequential(Block(), Block()).eval()
    inside = ["conv", "relu", "tail.0", "tail.1", "add", "relu_1", "mul", "relu_2"]
    assert [n.name for n in graph_of(model)] == [f"{i}.{name}" for i in (0, 1) for name in inside]
