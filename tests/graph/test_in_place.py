"""fastres.graph.capture on models that change tensors in place: every alias sees the change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.backends.reference import ReferenceExecutable
from fastres.graph.capture import capture
from fastres.graph.ir import Add
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
SMALL = Input((1, 3, 8, 8))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def conv(c: int = 3, k: int = 4, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, **{"padding": size // 2, **options})


def relu_read_again(m: Any, x: Tensor) -> Any:
    y = x - 1.0
    z = y  # the residual of a block whose ReLU works in place
    F.relu(y, inplace=True)
    return z * 2.0 + y


def through_view(m: Any, x: Tensor) -> Any:
    y = m.norm(m.conv(x))
    y.view(y.size(0), -1).relu_()
    return m.fc(y.mean((2, 3)))


def through_reshape(m: Any, x: Tensor) -> Any:
    y, z = x * 1.0, x * 1.0
    y.reshape(y.size(0), -1).relu_()
    z.flatten(1).relu_()
    return y, z


def through_slice(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    y[:, 1:, ::2].mul_(3.0)
    y[:, 0] = 5.0
    return y


def through_slices_in_turn(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    y[:, :, ::2] *= 3.0
    y[..., 0] += 1.0
    y[:, 1:3].clamp_(max=0.2)
    y[:, 0] = y[:, 1]
    y[:] = y + 1.0
    return y


def into_whole_slices(m: Any, x: Tensor) -> Any:
    y = torch.slice_scatter(x, x * 2.0, 1, 0, 3)
    z = torch.slice_scatter(x, x * 2.0, 0)
    part = torch.slice_scatter(x, x[:, :2] * 2.0, 1, 1)
    steps = torch.slice_scatter(x, x[:, :, ::2] * 2.0, 2, 0, 8, 2)
    z.mul_(3.0)  # in memory of its own
    return y, z, part, steps, torch.slice_scatter(x, (x * 9.0).int(), 1)


def through_chunk(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    y.chunk(3, 1)[1].relu_()
    return y


def through_dropout(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    F.dropout(y, training=False).relu_()  # at inference dropout returns its very argument
    return y


def through_detach(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    y.detach().relu_()
    return y


def through_contiguous(m: Any, x: Tensor) -> Any:
    y, z = x * 1.0, (x * 1.0).transpose(2, 3)
    y.contiguous().relu_()  # y itself
    z.contiguous().relu_()  # a copy
    return y + z


def add_chain(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    y += m.conv(x)
    z = y
    y += x
    y.add_(z).mul_(0.5)
    return z, y


def clone_then_change(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    z = y.clone()
    z.relu_()
    return y, z


def change_of_the_input(m: Any, x: Tensor) -> Any:
    x.add_(1.0)
    return x * 2.0


def change_of_the_inputs_view(m: Any, x: Tensor) -> Any:
    x.view(x.size(0), -1).relu_()
    return x * 2.0


def other_dtype(m: Any, x: Tensor) -> Any:
    y = (x * 100).to(torch.int64)
    y.add_(m.step)
    return y


def other_precision(m: Any, x: Tensor) -> Any:
    y = torch.full_like(x, 0.3, dtype=torch.float16)
    y.add_(x)  # computed in x's dtype, rounded to y's
    return y


def other_layout(m: Any, x: Tensor) -> Any:
    y = x.to(memory_format=torch.channels_last) * 1.0
    y.contiguous().relu_()  # a copy, though y is nobody's view
    return y


def shape_of_an_alias(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    z = y.detach()
    y.unsqueeze_(1).relu_()
    return y.flatten(1, 2) + z


def unsqueezed(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    y.unsqueeze_(1).relu_()
    return y.flatten(1)


def literal(m: Any, x: Tensor) -> Any:
    t = torch.tensor([1.0, 2.0, 3.0]).to(x.dtype)
    t.mul_(2.0)
    return x.mean((2, 3)) * t


def returned_before(m: Any, x: Tensor) -> Any:
    y = x * 1.0
    seen = [y]
    y.sigmoid_()
    return seen[0], y


IN_PLACE = [
    relu_read_again,
    through_view,
    through_reshape,
    through_slice,
    through_slices_in_turn,
    into_whole_slices,
    through_chunk,
    through_dropout,
    through_detach,
    through_contiguous,
    add_chain,
    clone_then_change,
    change_of_the_input,
    change_of_the_inputs_view,
    other_dtype,
    other_layout,
    shape_of_an_alias,
    unsqueezed,
    literal,
    returned_before,
]


class TestInPlace:
    @pytest.mark.parametrize("forward", IN_PLACE, ids=lambda f: f.__name__)
    def test_keeps_its_meaning(
        self, forward: Callable[..., Any], agree: Agree, model_of: ModelOf
    ) -> None:
        parts = {"conv": conv(3, 3), "norm": nn.BatchNorm2d(3), "fc": nn.Linear(3, 2)}
        model = model_of(forward, **parts, step=torch.tensor(2, dtype=torch.int32))
        graph = capture(model, [SMALL]).graph
        for n in (1, 2, 5):
            agree(model, graph, [draw(n, 3, 8, 8)])

    def test_a_result_rounded_to_its_targets_dtype(self, model_of: ModelOf) -> None:
        x = draw(2, 3, 8, 8)
        model = model_of(other_precision)
        graph = capture(model, [SMALL]).graph
        (got,) = ReferenceExecutable(graph, torch.float32).run([x])
        assert got.dtype == torch.float16 and torch.equal(got, model(x))

    def test_the_first_reading_suffices_for_the_usual_network(self, model_of: ModelOf) -> None:
        """Functionalisation costs seconds: relu_ and add_ on whole tensors must do without."""
        batch = ({0: torch.export.Dim.AUTO},)
        model = model_of(add_chain, conv=conv(3, 3))
        with torch.no_grad():
            program = torch.export.export(
                model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=(batch,)
            )

        def decompose(*args: object) -> None:
            raise AssertionError("functionalised")

        program.run_decompositions = decompose  # type: ignore[method-assign]
        added = [node for node in capture(program, ()).graph if isinstance(node.op, Add)]
        assert len(added) == 3

    def test_every_name_of_a_changed_tensor_sees_the_change(
        self, agree: Agree, model_of: ModelOf
    ) -> None:
        """The exporter reads on from the in-place call; a program may as well read its target."""
        model = model_of(through_dropout).double()
        with torch.no_grad():
            program = torch.export.export(model, (torch.zeros(2, 3, 8, 8).double(),))
        calls = {n.name: n for n in program.graph.nodes if n.op == "call_function"}
        assert list(calls) == ["mul", "dropout", "relu_"]
        calls["relu_"].replace_all_uses_with(calls["mul"])
        agree(model, capture(program, ()).graph, [draw(2, 3, 8, 8)])
