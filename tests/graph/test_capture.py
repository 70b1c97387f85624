"""fastres.graph.capture: what a model does is kept for every batch size, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  # registers its operators
from torch import Tensor, nn

from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Mul,
    Op,
    Pad,
    Slice,
    Softmax,
)
from fastres.options import Input

Agree = Callable[..., None]
PhotoBatch = Callable[[int, int], Tensor]
SMALL = Input((1, 3, 8, 8))
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 8), (4, 3, 40, 40)))


class Model(nn.Module):
    """A forward of (module, *inputs), and what it uses."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


def model_of(forward: Callable[..., Any], **parts: nn.Module | Tensor) -> Model:
    torch.manual_seed(0)
    return Model(forward, **parts).eval()


def graph_of(model: nn.Module, *inputs: Input) -> Graph:
    return capture(model, inputs or (SMALL,)).graph


def ops(graph: Graph) -> list[Op]:
    return [node.op for node in graph]


def kinds(graph: Graph) -> list[str]:
    return [n.op.overload if isinstance(n.op, Aten) else type(n.op).__name__ for n in graph]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def conv(c: int = 3, k: int = 4, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, **{"padding": size // 2, **options})


def norm(channels: int = 4) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    for tensor, low in ((layer.weight, 0.5), (layer.bias, -0.5), (layer.running_mean, -0.5)):
        nn.init.uniform_(tensor, low, low + 1)
    nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return layer


@dataclass(frozen=True)
class Case:
    """A forward, and the operations it must become; None where only its meaning matters."""

    forward: Callable[..., Any]
    ops: list[Op | str] | None = None
    parts: dict[str, Callable[[], nn.Module | Tensor]] = field(default_factory=dict)
    inputs: tuple[Input, ...] = (SMALL,)


def layer(make: Callable[[], nn.Module], op: Op | str) -> Case:
    return Case(lambda m, x: m.layer(x), [op], {"layer": make})


def call(forward: Callable[[Tensor], Tensor], *found: Op | str) -> Case:
    return Case(lambda m, x: forward(x), list(found))


ONES = (1, 1, 1, 1)
ZEROS = (0, 0, 0, 0)
OPEN = (None, None, None, None)

# one case an operator that the IR knows, and its limits
OPERATORS = {
    "conv": layer(lambda: conv(stride=2), Conv2d((2, 2), (1, 1))),
    "conv grouped": layer(
        lambda: conv(3, 6, groups=3, dilation=2), Conv2d(ONES[:2], (1, 1), (2, 2), 3)
    ),
    "conv padding valid": layer(lambda: conv(padding="valid"), Conv2d()),
    "conv padding same": layer(
        lambda: conv(padding="same", dilation=2), Conv2d((1, 1), (2, 2), (2, 2))
    ),
    "conv padding same, even": layer(lambda: conv(size=2, padding="same"), "aten.conv2d.padding"),
    "conv computed weight": Case(
        lambda m, x: F.conv2d(x, m.w * 2.0), None, {"w": lambda: nn.Parameter(draw(4, 3, 1, 1))}
    ),
    "conv transposed": layer(lambda: nn.ConvTranspose2d(3, 4, 2, 2), "aten.conv_transpose2d.input"),
    "batch norm": layer(lambda: norm(3), BatchNorm()),
    "batch norm eps": layer(lambda: nn.BatchNorm2d(3, eps=0.1), BatchNorm(0.1)),
    "batch norm not affine": layer(lambda: nn.BatchNorm2d(3, affine=False), BatchNorm()),
    "relu": call(F.relu, Activation("relu")),
    "silu": call(F.silu, Activation("silu")),
    "sigmoid": call(torch.sigmoid, Activation("sigmoid")),
    "gelu": call(F.gelu, Activation("gelu")),
    "gelu tanh": call(lambda x: F.gelu(x, approximate="tanh"), "aten.gelu.default"),
    "hardswish": call(F.hardswish, Activation("hardswish")),
    "relu6": call(F.relu6, "aten.relu6.default"),
    "add": call(lambda x: x + x, Add()),
    "add scaled": call(lambda x: torch.add(x, x, alpha=2), "aten.add.Tensor"),
    "add of two dtypes": call(
        lambda x: x + (4 * x.to(torch.int64)),
        *["aten.to.dtype", "aten.mul.Tensor", "aten.add.Tensor"],
    ),
    "mul": call(lambda x: x * x, Mul()),
    "scale": call(lambda x: x * 0.5, "aten.mul.Tensor"),
    "shift": call(lambda x: x + 1, "aten.add.Tensor"),
    "max pool": call(lambda x: F.max_pool2d(x, 3, 2, 1, 1), MaxPool((3, 3), (2, 2), (1, 1))),
    "max pool stride": call(lambda x: F.max_pool2d(x, (2, 3)), MaxPool((2, 3), (2, 3))),
    "max pool ceil": call(
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), MaxPool((3, 3), (2, 2), ceil_mode=True)
    ),
    "avg pool": call(
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        AvgPool((3, 3), (2, 2), (1, 1), count_include_pad=False),
    ),
    "avg pool divisor": call(
        lambda x: F.avg_pool2d(x, 2, divisor_override=3), "aten.avg_pool2d.default"
    ),
    "adaptive to 1": call(lambda x: F.adaptive_avg_pool2d(x, 1), GlobalAvgPool()),
    "adaptive to 4": call(lambda x: F.adaptive_avg_pool2d(x, 4), AvgPool((2, 2), (2, 2))),
    "adaptive to 3": call(
        lambda x: F.adaptive_avg_pool2d(x, 3), "aten.adaptive_avg_pool2d.default"
    ),
    "mean": call(lambda x: x.mean((-1, 2)), GlobalAvgPool(keepdim=False)),
    "mean of channels": call(lambda x: x.mean(1), "aten.mean.dim"),
    "linear": layer(lambda: nn.Linear(8, 5), Linear()),
    "flatten": call(lambda x: x.flatten(1), Flatten(1)),
    "flatten pixels": call(lambda x: x.flatten(2), Flatten(2)),
    "flatten the middle": call(lambda x: x.flatten(1, 2), "aten.flatten.using_ints"),
    "view": call(lambda x: x.view(x.size(0), -1), Flatten(1)),
    "reshape": call(lambda x: x.reshape(-1, 3, 64), Flatten(2)),
    "cat": call(lambda x: torch.cat((x, x * x), -3), Mul(), Concat(1)),
    "pad": call(
        lambda x: F.pad(x, (1, 2, 0, 3, 4, 0), value=0.5),
        Pad((0, 4, 0, 1), (0, 0, 3, 2), 0.5),
    ),
    "pad by reflection": call(lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), "aten.pad.default"),
    "cut": call(lambda x: F.pad(x, (-1, 0)), "aten.pad.default"),
    "slice": call(
        lambda x: x[:, 1:, ::2, -3:7],
        Slice((0, 1, 0, 0), OPEN, ONES),
        Slice(ZEROS, OPEN, (1, 1, 2, 1)),
        Slice((0, 0, 0, -3), (None, None, None, 7), ONES),
    ),
    "slice of all": call(lambda x: x[:, :, 0:99] + x, Add()),
    "chunk": call(lambda x: x.chunk(2, 2)[1], Slice((0, 0, 4, 0), (None, None, 8, None), ONES)),
    "split": call(
        lambda x: x.split([1, 2], 1)[1], Slice((0, 1, 0, 0), (None, 3, None, None), ONES)
    ),
    "softmax": call(lambda x: x.softmax(1), Softmax(1)),
    "dropout": call(lambda x: F.dropout(x, training=False) * x, Mul()),
    "dropout of maps": call(lambda x: F.dropout2d(x, training=False) * x, Mul()),
    "alpha dropout": call(lambda x: F.alpha_dropout(x, 0.5, False) * x, Mul()),
    "identities": call(
        lambda x: x.contiguous().clone().detach().to(x.device).type_as(x) * x,
        *["aten.type_as.default", Mul()],
    ),
    "channels last": call(lambda x: x.to(memory_format=torch.channels_last) * x, Mul()),
    "same dtype": Case(lambda m, x: x.to(m.w.dtype) * m.w, [Mul()], {"w": lambda: draw(8)}),
    "literal": call(
        lambda x: x * torch.tensor([1.0, 2.0]).repeat(4).to(x.dtype),
        *["aten.repeat.default", Mul()],
    ),
}


class TestOperators:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_keeps_its_meaning(self, name: str, agree: Agree) -> None:
        case = OPERATORS[name]
        model = model_of(case.forward, **{k: make() for k, make in case.parts.items()})
        graph = graph_of(model)
        if case.ops is not None:
            found = [op.overload if isinstance(op, Aten) else op for op in ops(graph)]
            assert found == case.ops
        for n in (1, 2, 5):
            agree(model, graph, [draw(n, 3, 8, 8)])


# operations outside the IR, run by PyTorch: every batch size, not only the example's
KEPT = {
    "roll": lambda m, x: torch.roll(x, 1, 1),
    "squeeze and excitation": lambda m, x: (
        x * m.fc(x.mean((2, 3))).sigmoid().view(x.size(0), 3, 1, 1)
    ),
    "expand": lambda m, x: x + x.mean((2, 3), True).expand(-1, -1, x.size(2), x.size(3)),
    "expand as": lambda m, x: x + x.amax((2, 3), True).expand_as(x),
    "shuffle of channels": lambda m, x: (
        torch.cat((x, -x), 1).view(x.size(0), 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    ),
    "zeros of the batch": lambda m, x: torch.cat((x, x.new_zeros(x.size(0), 2, 8, 8)), 1),
    "ones like": lambda m, x: torch.cat((x, torch.ones_like(x)), 1),
    "infinity": lambda m, x: x.masked_fill(x < 0, -torch.inf).amax((2, 3)),
    "clamp": lambda m, x: x.clamp(min=-0.5),
    "indices": lambda m, x: x.gather(1, x.argmax(1, keepdim=True)),
    "group norm": lambda m, x: F.group_norm(x, 3),
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2.0),
    "interpolate to": lambda m, x: F.interpolate(x[:, :, ::2, ::2], x.shape[2:], mode="bilinear"),
    "transpose and copy": lambda m, x: x.transpose(1, 3).contiguous() * 2,
    "unbatched pool": lambda m, x: F.max_pool2d(x.mean(1), 2),
    "arange": lambda m, x: x * torch.arange(8, dtype=x.dtype, device=x.device),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "mean of the batch": lambda m, x: x + x.mean(0, keepdim=True),
}


class TestKept:
    @pytest.mark.parametrize("name", KEPT)
    def test_for_every_batch(self, name: str, agree: Agree) -> None:
        model = model_of(KEPT[name], fc=nn.Linear(3, 3))
        graph = graph_of(model)
        assert any(isinstance(op, Aten) for op in ops(graph))
        for n in (1, 2, 5):
            agree(model, graph, [draw(n, 3, 8, 8)])

    @pytest.mark.parametrize(
        "name",
        ["roll", "squeeze and excitation", "expand", "shuffle of channels", "interpolate to"],
    )
    def test_for_every_picture(self, name: str, agree: Agree) -> None:
        model = model_of(KEPT[name], fc=nn.Linear(3, 3))
        graph = graph_of(model, RANGED)
        for n, height, width in ((1, 8, 8), (3, 11, 7)):
            agree(model, graph, [draw(n, 3, height, width)])


def relu_read_again(m: Model, x: Tensor) -> Any:
    y = x - 1.0
    z = y  # the residual of a block whose ReLU works in place
    F.relu(y, inplace=True)
    return z * 2.0 + y


def through_view(m: Model, x: Tensor) -> Any:
    y = m.norm(m.conv(x))
    y.view(y.size(0), -1).relu_()
    return m.fc(y.mean((2, 3)))


def through_slice(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    y[:, 1:, ::2].mul_(3.0)
    y[:, 0] = 5.0
    return y


def through_chunk(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    y.chunk(3, 1)[1].relu_()
    return y


def through_dropout(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    F.dropout(y, training=False).relu_()  # at inference dropout returns its very argument
    return y


def through_detach(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    y.detach().relu_()
    return y


def through_contiguous(m: Model, x: Tensor) -> Any:
    y, z = x * 1.0, (x * 1.0).transpose(2, 3)
    y.contiguous().relu_()  # y itself
    z.contiguous().relu_()  # a copy
    return y + z


def add_chain(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    y += m.conv(x)
    z = y
    y += x
    y.add_(z).mul_(0.5)
    return z, y


def clone_then_change(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    z = y.clone()
    z.relu_()
    return y, z


def change_of_the_input(m: Model, x: Tensor) -> Any:
    x.add_(1.0)
    return x * 2.0


def change_of_the_inputs_view(m: Model, x: Tensor) -> Any:
    x.view(x.size(0), -1).relu_()
    return x * 2.0


def other_dtype(m: Model, x: Tensor) -> Any:
    y = (x * 100).to(torch.int64)
    y.add_(m.step)
    return y


def unsqueezed(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    y.unsqueeze_(1).relu_()
    return y.flatten(1)


def literal(m: Model, x: Tensor) -> Any:
    t = torch.tensor([1.0, 2.0, 3.0]).to(x.dtype)
    t.mul_(2.0)
    return x.mean((2, 3)) * t


def returned_before(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    seen = [y]
    y.sigmoid_()
    return seen[0], y


IN_PLACE = [
    relu_read_again,
    through_view,
    through_slice,
    through_chunk,
    through_dropout,
    through_detach,
    through_contiguous,
    add_chain,
    clone_then_change,
    change_of_the_input,
    change_of_the_inputs_view,
    other_dtype,
    unsqueezed,
    literal,
    returned_before,
]


class TestInPlace:
    @pytest.mark.parametrize("forward", IN_PLACE, ids=lambda f: f.__name__)
    def test_keeps_its_meaning(self, forward: Callable[..., Any], agree: Agree) -> None:
        parts = {"conv": conv(3, 3), "norm": norm(3), "fc": nn.Linear(3, 2)}
        model = model_of(forward, **parts, step=torch.tensor(2, dtype=torch.int32))
        graph = graph_of(model)
        for n in (1, 2, 5):
            agree(model, graph, [draw(n, 3, 8, 8)])

    def test_the_first_reading_suffices_for_the_usual_network(self) -> None:
        """Functionalisation costs seconds: relu_ and add_ on whole tensors must do without."""
        program = exported(model_of(add_chain, conv=conv(3, 3)))
        refuse = CaptureError("functionalised")

        def decompose(*args: object) -> None:
            raise refuse

        program.run_decompositions = decompose  # type: ignore[method-assign]
        assert kinds(capture(program, ()).graph).count("Add") == 3


def exported(model: nn.Module, **options: Any) -> torch.export.ExportedProgram:
    batch = torch.export.Dim.AUTO
    x = torch.zeros(2, 3, 8, 8)
    shapes = (({0: batch},),) if isinstance(model, Model) else ({0: batch},)
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=shapes, **options)


class TestPrograms:
    @pytest.mark.parametrize("strict", [False, True])
    def test_an_exported_program(self, strict: bool, agree: Agree) -> None:
        model = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).eval()
        program = exported(model, strict=strict)
        found = capture(program, ())
        assert found.program is program
        assert kinds(found.graph) == ["Conv2d", "BatchNorm", "Activation", "Conv2d"]
        agree(model, found.graph, [draw(3, 3, 8, 8)])

    def test_a_fixed_batch_stays_fixed(self) -> None:
        with torch.no_grad():
            program = torch.export.export(conv().eval(), (torch.zeros(2, 3, 8, 8),))
        assert str(capture(program, ()).graph.inputs[0].spec) == "f32[2, 3, 8, 8]"

    def test_sizes_that_are_multiples(self, agree: Agree) -> None:
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
        for part in (norm(3), nn.Dropout()):
            program = exported(part.train())
            with pytest.raises(CaptureError, match="export it after model.eval|random numbers"):
                capture(program, ())

    def test_the_values_of_the_program(self) -> None:
        found = capture(model_of(lambda m, x: m.conv(x).relu_() * 2, conv=conv()), [SMALL])
        calls = [n.name for n in found.program.graph.nodes if n.op == "call_function"]
        assert list(found.values) == calls
        assert list(found.values.values()) == ["conv", "relu", "mul"]


class TestInputs:
    def test_every_size_that_varies_is_a_symbol(self, agree: Agree) -> None:
        model = model_of(lambda m, x: m.conv(x), conv=conv(stride=2))
        graph = graph_of(model, RANGED)
        assert str(graph.inputs[0].spec) == "f32[N, 3, H, W]"
        assert str(graph["conv"].spec) == "f32[N, 4, (H+1)//2, (W+1)//2]"
        for height, width in ((6, 7), (40, 39)):
            agree(model, graph, [draw(2, 3, height, width)])

    def test_one_of_height_and_width(self) -> None:
        image = Input(((1, 3, 8, 8), (1, 3, 8, 16), (1, 3, 8, 32)))
        assert str(graph_of(model_of(lambda m, x: x * x), image)) == (
            "inputs_0: f32[N, 3, 8, W] = input\nmul: f32[N, 3, 8, W] = mul(inputs_0, inputs_0)\n"
            "return mul"
        )

    def test_a_model_for_squares(self, agree: Agree) -> None:
        model = model_of(lambda m, x: x + x.transpose(2, 3))
        graph = graph_of(model, RANGED)
        assert str(graph.inputs[0].spec) == "f32[N, 3, H, H]"
        agree(model, graph, [draw(2, 3, 11, 11)])

    def test_several(self, agree: Agree) -> None:
        model = model_of(lambda m, x, y, z: m.fc(x.mean((2, 3))) + y * z, fc=nn.Linear(3, 2))
        graph = graph_of(model, SMALL, Input((1, 2)), Input((1, 2)))
        assert [str(v.spec) for v in graph.inputs] == ["f32[N, 3, 8, 8]", "f32[N, 2]", "f32[N, 2]"]
        agree(model, graph, [draw(5, 3, 8, 8), draw(5, 2), draw(5, 2) + 1])

    def test_batches_of_their_own(self, agree: Agree) -> None:
        model = model_of(lambda m, x, y: (x * 2, y * 3))
        graph = graph_of(model, Input((1, 2)), Input((1, 2)))
        assert [str(v.spec) for v in graph.inputs] == ["f32[N, 2]", "f32[N_inputs_1, 2]"]
        agree(model, graph, [draw(5, 2), draw(3, 2)])

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_forward_that_takes_some_and_the_rest(self, count: int, agree: Agree) -> None:
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

    def test_integers(self, agree: Agree) -> None:
        model = model_of(lambda m, x: x.to(torch.float64) / 255)
        graph = graph_of(model, Input((1, 3, 8, 8), dtype=torch.uint8))
        assert str(graph.inputs[0].spec) == "u8[N, 3, 8, 8]"
        agree(model, graph, [torch.arange(2 * 192, dtype=torch.uint8).view(2, 3, 8, 8)])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype, agree: Agree) -> None:
        model = model_of(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=norm()).to(dtype)
        graph = graph_of(model)  # the input takes the dtype of the parameters
        assert {v.spec.torch_dtype for v in (*graph.inputs, *graph.nodes)} == {dtype}
        assert {t.dtype for t in graph.constants.values()} == {dtype}
        agree(model, graph, [draw(2, 3, 8, 8)])


class TestOutputs:
    def test_trees(self, agree: Agree) -> None:
        model = model_of(lambda m, x: {"a": (x * 2, [x * 3]), "b": x * x})
        graph = graph_of(model)
        assert len(graph.outputs) == 3
        agree(model, graph, [draw(2, 3, 8, 8)])

    def test_one_twice_and_an_input(self, agree: Agree) -> None:
        def forward(m: Model, x: Tensor) -> Any:
            y = x * x
            return y, y, x

        graph = graph_of(model_of(forward))
        assert graph.outputs == ("mul", "mul", "inputs_0")
        agree(model_of(forward), graph, [draw(2, 3, 8, 8)])

    def test_what_is_not_returned_is_kept_for_the_passes(self) -> None:
        graph = graph_of(model_of(lambda m, x: (x * x, x + x)[0]))
        assert graph.outputs == ("mul",)


class TestWeights:
    def test_are_shared_with_the_model(self) -> None:
        model = model_of(lambda m, x: m.conv(x), conv=conv())
        graph = graph_of(model)
        assert graph.constants["conv.weight"].data_ptr() == model.conv.weight.data_ptr()
        assert not graph.constants["conv.weight"].requires_grad

    def test_a_module_used_twice(self, agree: Agree) -> None:
        model = model_of(lambda m, x: m.conv(m.conv(x)), conv=conv(3, 3))
        graph = graph_of(model)
        assert [n.name for n in graph] == ["conv", "conv_1"]
        assert set(graph.constants) == {"conv.weight", "conv.bias"}
        agree(model, graph, [draw(2, 3, 8, 8)])

    def test_a_weight_of_two_modules(self, agree: Agree) -> None:
        model = model_of(lambda m, x: m.a(x) * m.b(x), a=conv(3, 3), b=conv(3, 3))
        model.b.weight = model.a.weight
        graph = graph_of(model)
        assert graph["a"].params["weight"] == graph["b"].params["weight"]
        assert graph["a"].params["bias"] != graph["b"].params["bias"]
        agree(model, graph, [draw(2, 3, 8, 8)])

    def test_only_those_that_are_read(self) -> None:
        graph = graph_of(model_of(lambda m, x: m.norm(x), norm=norm(3), spare=conv()))
        assert set(graph.constants) == {
            "norm.weight",
            "norm.bias",
            "norm.running_mean",
            "norm.running_var",
        }

    def test_buffers_that_are_not_saved(self, agree: Agree) -> None:
        model = model_of(lambda m, x: x * m.gain)
        model.register_buffer("gain", draw(8), persistent=False)
        agree(model, graph_of(model), [draw(2, 3, 8, 8)])

    def test_a_layer_and_a_weight_of_one_name(self, agree: Agree) -> None:
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


def partly_training() -> nn.Module:
    model = nn.Sequential(conv(), nn.Sequential(norm(), nn.ReLU())).eval()
    model[1][0].train()
    return model


def broken(value: float) -> nn.Module:
    model = nn.Sequential(conv()).eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, :2] = value
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(conv()).eval()


def mixed(m: Model, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.conv(x)
    return y


def changed_list(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    torch._foreach_add_([y], 1.0)
    return y


def changed_by_out(m: Model, x: Tensor) -> Any:
    y = x * 1.0
    torch.add(x, x, out=y)
    return y


def counting(m: Model, x: Tensor) -> Any:
    m.count.add_(1)
    return x * m.count


def counting_through_a_view(m: Model, x: Tensor) -> Any:
    m.count.view(1, 1).add_(1)
    return x * m.count


def forwards(forward: Callable[..., Any], *inputs: Input) -> tuple[Callable[[], nn.Module], Any]:
    parts = {"conv": conv(), "count": torch.zeros(1), "w": nn.Parameter(torch.ones(3))}
    return lambda: model_of(forward, **parts), inputs


def modules(make: Callable[[], nn.Module]) -> tuple[Callable[[], nn.Module], Any]:
    return make, ()


REFUSED: dict[str, tuple[tuple[Callable[[], nn.Module], Any], str]] = {
    "training mode": (modules(lambda: conv()), "'Conv2d' is in training mode.*eval()"),
    "one part in training mode": (modules(partly_training), "'1.0' is in training mode"),
    "NaN": (modules(lambda: broken(float("nan"))), r"0.weight \[4, 3, 3, 3\] holds 2 values"),
    "infinity": (modules(lambda: broken(float("inf"))), "holds 2 values that are NaN or infinite"),
    "meta weights": (modules(on_meta), "0.weight is on the meta device"),
    "batch statistics": (
        modules(lambda: nn.BatchNorm2d(3, track_running_stats=False).eval()),
        "batch's own statistics",
    ),
    "control flow": (
        forwards(lambda m, x: x * 2 if x.sum() > 0 else x),
        "control flow does not depend on values",
    ),
    "wrong sizes": (forwards(lambda m, x: m.conv(x), Input((1, 4, 8, 8))), "cannot export Model"),
    "too few inputs": (forwards(lambda m, x, y: x * y), "cannot export Model"),
    "complex values": (forwards(lambda m, x: torch.fft.fft2(x).abs()), "fft_fft2 is torch.complex"),
    "complex inputs": (
        forwards(lambda m, x: x.abs(), Input((1, 3), dtype=torch.complex64)),
        "input inputs_0 is torch.complex64; supported are float64, float32",
    ),
    "random numbers": (forwards(lambda m, x: x + torch.rand_like(x)), "rand_like.*draws random"),
    "random dropout": (
        forwards(lambda m, x: F.dropout(x, 0.5, training=True)),
        "aten.dropout.default in .* draws random numbers",
    ),
    "state": (forwards(counting), "the model changes count when it runs"),
    "state through a view": (
        forwards(counting_through_a_view),
        "the model changes count when it runs",
    ),
    "a list changed in place": (forwards(changed_list), "_foreach_add_.* returns NoneType"),
    "out=": (forwards(changed_by_out), "aten.add.out' is no pure operator"),
    "several results": (forwards(lambda m, x: x.max(1)[0]), "aten.max.dim in .* returns tuple"),
    "statistics of a split": (
        forwards(lambda m, x: x.chunk(2, 2)[1], RANGED),
        "result 1 of aten.chunk.default in .* is used",
    ),
    "autocast": (forwards(mixed), "wrap_with_autocast in .* returns tuple"),
    "sizes that depend on values": (forwards(lambda m, x: x[x > 0]), "has a size of u0"),
    "a batch inside another size": (forwards(lambda m, x: x.flatten(0, 1)), r"has a size of 3\*s"),
    "a number that is no size": (
        forwards(lambda m, x: x * x.size(2) ** -0.5, RANGED),
        "aten.mul.Tensor is called with .*cannot be written down",
    ),
    "a batch written out": (forwards(lambda m, x: x.view(2, -1)), "only takes batches of 2"),
    "a height written out": (
        forwards(lambda m, x: x.reshape(-1, 3, 8, 8) * 2, RANGED),
        "fixes dimension 2 of inputs_0 at 8, but the Input ranges over it",
    ),
    "a Linear on pixels": (
        forwards(lambda m, x: F.linear(x.flatten(1), torch.ones(2, 192)), RANGED),
        "flattening needs fixed sizes: pass a fixed Input",
    ),
    "ceil_mode with padding": (
        forwards(lambda m, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), RANGED),
        "needs fixed H and W: pass a fixed Input",
    ),
    "two pictures above each other": (
        forwards(lambda m, x: torch.cat((x, x), 2), RANGED),
        "two variable sizes cannot be joined",
    ),
    "None returned": (forwards(lambda m, x: (x * 2, None)), "returns None, which is no tensor"),
    "a size returned": (forwards(lambda m, x: (x * 2, x.size(0))), "returns sym_size.* no tensor"),
    "a number returned": (forwards(lambda m, x: (x * 2, 7)), "returns 7, which is no tensor"),
    "a weight returned": (forwards(lambda m, x: (x * 2, m.w)), "returns p_w, which is no tensor"),
    "an operator of another library": (
        forwards(lambda m, x: torch.ops.torchvision.nms(x[:, 0, 0, :4], x[:, 0, 0, 0], 0.5)),
        "torchvision.nms.* is not of the form aten",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    (make, inputs), message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(make(), inputs or (SMALL,))
