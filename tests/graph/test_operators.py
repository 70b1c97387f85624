"""The rule over PyTorch's registry: what a saved engine may call, and nothing new unseen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.graph.operators import draws, refusal, takes_tensors

LIST = Path(__file__).with_name("operators.txt")


def registry() -> Iterator[Any]:
    """Every operator in PyTorch's namespace `aten` that has an overload to be called."""
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::"):
            packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None)
            found = getattr(packet, schema.overload_name or "default", None)
            if isinstance(found, torch._ops.OpOverload):
                yield found


def test_what_is_allowed_is_listed_operator_by_operator() -> None:
    """Fails where a PyTorch has an operator that the rule would allow and nobody has looked at.

    Look at it: does it write, draw, read files or memory, loop by a number, or give what nobody has
    set? Then add it to operators.txt, or its kind to the rule.
    """
    allowed = {str(each).removeprefix("aten.") for each in registry() if refusal(each) is None}
    listed = LIST.read_text().split()
    assert listed == sorted(set(listed))
    assert allowed <= set(listed), sorted(allowed - set(listed))
    assert 550 < len(allowed)


def test_nothing_that_is_allowed_has_a_side_effect() -> None:
    for each in registry():
        if refusal(each) is None:
            schema = each._schema
            assert not schema.is_mutable and schema.returns, each
            assert not any(a.is_out for a in schema.arguments), each
            assert not any("Generator" in str(a.type) for a in schema.arguments), each
            words = set(each._opname.split("_"))
            assert not {"foreach", "backward", "empty", "resize", "from", "print"} & words, each


@pytest.mark.parametrize(
    ("overload", "why"),
    [
        ("add_.Tensor", "writes"),
        ("add.out", "writes"),
        ("_foreach_add.List", "training"),
        ("rand_like.default", "random"),
        ("bernoulli.p", "Generator"),
        ("empty_like.default", "nobody has set"),
        ("new_empty.default", "nobody has set"),
        ("resize.default", "nobody has set"),
        ("from_file.default", "core"),
        ("convolution_backward.default", "derivative"),
        ("nonzero.default", "depends on values"),
        ("_local_scalar_dense.default", "something else than tensors"),
        ("_print.default", "something else than tensors"),
        ("manual_seed.default", "something else than tensors"),
        ("fbgemm_linear_int8_weight.default", "vendor"),
        ("to_sparse.default", "another kind"),
        ("quantize_per_tensor.default", "another kind"),
        ("linalg_svd.default", "solver"),
        ("stft.center", "spectrum"),
        ("set.source_Storage", "Storage"),
        ("_add_batch_dim.default", "core"),
        ("special_chebyshev_polynomial_t.default", "core"),
    ],
)
def test_kinds_that_are_not_allowed(overload: str, why: str) -> None:
    name, variant = overload.split(".")
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or variant not in packet.overloads():
        pytest.skip(f"PyTorch {torch.__version__} has no {overload}")
    assert why in (refusal(getattr(packet, variant)) or "")


@pytest.mark.parametrize(
    "overload",
    [
        *("leaky_relu.default", "conv1d.default", "expand_as.default", "view.default"),
        *("softmax.int", "layer_norm.default", "scaled_dot_product_attention.default"),
        *("topk.default", "adaptive_max_pool2d.default", "max.dim", "std_mean.correction"),
        *("group_norm.default", "roll.default", "einsum.default", "chunk.default"),
        *("upsample_bilinear2d.vec", "pixel_shuffle.default", "as_strided.default", "lstm.input"),
        *("native_batch_norm.default", "to.dtype", "cat.default", "fft_rfft2.default"),
        *("fake_quantize_per_tensor_affine.default", "constant_pad_nd.default"),
        "batch_norm.default",
    ],
)
def test_what_networks_are_made_of_is_allowed(overload: str) -> None:
    name, variant = overload.split(".")
    assert refusal(getattr(getattr(torch.ops.aten, name), variant)) is None


def test_a_switch_tells_whether_a_call_is_random() -> None:
    dropout = torch.ops.aten.dropout.default
    assert draws(dropout, (None, 0.5, True), {}) and not draws(dropout, (None, 0.5, False), {})
    assert not draws(dropout, (None, 0.0), {"train": True})
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert not draws(attention, (None, None, None), {})
    assert draws(attention, (None, None, None), {"dropout_p": 0.1})
    assert draws(torch.ops.aten.rand_like.default, (None,), {})
    assert not draws(torch.ops.aten.relu.default, (None,), {})


def test_some_make_a_tensor_of_sizes_alone() -> None:
    assert not takes_tensors(torch.ops.aten.full.default)
    assert takes_tensors(torch.ops.aten.full_like.default)
