"""ATen calls that multiply by weights → Conv2d and Linear."""

from __future__ import annotations

from collections.abc import Callable

import torch.fx

from fastres.graph.calls import Call, Emit
from fastres.graph.ir import Conv2d, Linear
from fastres.kernels.geometry import Pair


def conv2d(call: Call) -> Emit | None:
    params = call.params(weight="weight", bias="bias")
    padding = _conv_padding(call)
    if params is None or padding is None or call.rank("input") != 4:
        return None
    op = Conv2d(call.pair("stride"), padding, call.pair("dilation"), call.args["groups"])
    return Emit(op, (call.value("input"),), params)


def _conv_padding(call: Call) -> Pair | None:
    """Numbers, or "same" and "valid" as numbers; None where "same" pads one side more."""
    if call.args["padding"] == "valid":
        return (0, 0)
    if call.args["padding"] != "same":
        return call.pair("padding")
    kernel, dilation = call.shape("weight")[2:], call.pair("dilation")
    total = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
    return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)


def convolution(call: Call) -> Emit | None:
    return None if call.args["transposed"] else conv2d(call)


def linear(call: Call) -> Emit | None:
    params = call.params(weight="weight", bias="bias")
    return None if params is None else Emit(Linear(), (call.value("input"),), params)


def product(call: Call) -> Emit | None:
    """x @ w.t() by a transposed constant, with a bias or without: what a Linear decomposes into."""
    bias = None
    if call.short_name == "addmm":
        x, w, bias = "mat1", "mat2", call.args["self"]
        if call.args["alpha"] != 1 or call.args["beta"] != 1 or not call.is_fixed(bias):
            return None
    else:
        x, w = [argument.name for argument in call.schema.arguments][:2]
    weight = _transposed(call.args[w])
    if weight is None or not call.is_fixed(weight) or call.rank(x) < 2:
        return None
    params = {"weight": call.value_of(weight)}
    if bias is not None:
        if bias.meta["val"].shape != weight.meta["val"].shape[:1]:
            return None
        params["bias"] = call.value_of(bias)
    return Emit(Linear(), (call.value(x),), params)


_SWAPS: dict[str, Callable[..., bool]] = {  # of a matrix, by its arguments
    "aten.t.default": lambda: True,
    "aten.numpy_T.default": lambda: True,
    "aten.permute.default": lambda dims: [d % 2 for d in dims] == [1, 0],
    "aten.transpose.int": lambda a, b: a % 2 != b % 2,
}


def _transposed(node: torch.fx.Node) -> torch.fx.Node | None:
    """What a matrix is the transpose of, if a call says so."""
    swaps = _SWAPS.get(str(node.target))
    if swaps is None or node.meta["val"].dim() != 2 or not swaps(*node.args[1:]):
        return None
    (source, *_) = node.all_input_nodes
    return source
