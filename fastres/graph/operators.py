"""Which operators of PyTorch a saved engine may call: one rule over the whole of its registry.

An operator is allowed if all of this holds:

1. It is an aten operator that writes to none of its arguments.
2. It takes tensors, numbers, truth values, texts, dtypes, devices, and lists of these, and gives
   tensors: no generators, storages, streams, packed weights of other libraries or dicts.
3. It gives the same for the same: it draws no random numbers, or has an argument that says so; its
   result has no values that nobody has set, and sizes that depend on no values.
4. It is of the networks that are run: PyTorch counts it to the core of its operators, decomposes
   it into these, or it is a layer (`_LAYERS`). So there is a kernel for every size, and its shape
   is known without running it.
5. It is none of the kinds that `_KINDS` names.

`tests/graph/operators.txt` lists what that allows, in every PyTorch that is supported.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._decomp import core_aten_decompositions

Operator = torch._ops.OpOverload[..., Any]

_TENSORS = ("Tensor", "List[Tensor]")
_PLAIN = ("int", "bool", "float", "number", "complex", "str", "Device")
_TAKEN = frozenset(
    [
        *("Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]"),
        *_PLAIN,
        *(f"Optional[{kind}]" for kind in _PLAIN),
        *(f"List[{kind}]" for kind in ("int", "bool", "float", "number")),
        *(f"Optional[List[{kind}]]" for kind in ("int", "float")),
    ]
)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_SWITCHES = ("p", "dropout_p", "train", "training")  # which say that nothing is random
_KINDS = {
    "a derivative": r".*backward.*|.*_jvp",
    "a step of training": r"_foreach_.*|_fused_.*|_amp_.*|.*_loss|kl_div|binary_cross_entropy.*",
    "a tensor whose values nobody has set": r"(new_|_)?empty.*|_?resize.*",
    "a tensor of another kind": r".*quantize.*|.*qparams.*|.*sparse.*|.*mkldnn.*|_?nested.*|"
    r"coalesce|to_dense|smm|sspaddmm|pin_memory|chalf|(un)?flatten_dense_tensors",
    "a call of one vendor's library": r"fbgemm_.*|_?cudnn_.*|miopen_.*|mps_.*|xpu_.*|thnn_.*",
    "a solver or a decomposition": r"_?linalg_.*|.*svd.*|.*lu_solve|(s?log)?det|p?inverse|"
    r"matrix_(exp|power)|orgqr|qr|nuclear_norm|chain_matmul",
    "a spectrum or a series": r"i?stft|.*_window|mvlgamma|special_(gamma.*|polygamma|digamma)|"
    r"special_(psi|i[01].*|multigam.*)",
    "a call by names of dimensions": r".*\.(.*[Dd]imname.*|names.*|named_.*|using_names)|align_.*",
    "a call that looks up what its values say": r"_?embedding_bag.*|histogramdd|nonzero.*|data|"
    r"combinations|cartesian_prod|(lstm|gru|rnn_.*)\.data|repeat_interleave\.self_Tensor|"
    r"tensor_split\.tensor_indices_or_sections|narrow\.Tensor",
}
_FAKE = re.compile(r"fake_quantize_per_(tensor|channel)_affine")
_PATTERNS = {what: re.compile(pattern) for what, pattern in _KINDS.items()}
_SMALL = re.compile(r"linalg_(vector_norm|cross|norm|vecdot)")
# layers, and what stands between them, that PyTorch keeps as kernels of their own
_LAYERS = frozenset(
    [
        *("adaptive_max_pool2d.default", "adaptive_max_pool3d.default", "upsample_trilinear3d.vec"),
        *("upsample_bilinear2d.default", "upsample_bicubic2d.default", "upsample_bicubic2d.vec"),
        *("upsample_trilinear3d.default", "_upsample_bilinear2d_aa.default"),
        *("_upsample_bicubic2d_aa.default", "grid_sampler_3d.default", "unfold.default"),
        *("max.default", "min.default", "cummax.default", "cummin.default", "cumprod.default"),
        *("sort.stable", "kthvalue.default", "median.default", "median.dim", "var_mean.correction"),
        *("round.decimals", "erfc.default", "exp2.default", "fmax.default", "fmin.default"),
        *("hypot.default", "copysign.Tensor", "copysign.Scalar", "logcumsumexp.default"),
        *("addmv.default", "addbmm.default", "signbit.default", "diagonal_scatter.default"),
        *("as_strided_scatter.default", "scatter.reduce", "scatter.value_reduce"),
        *("index_reduce.default", "erfinv.default", "lgamma.default", "_convolution.default"),
        *("lift_fresh.default", "view_as_real.default", "view_as_complex.default"),
        *("complex.default", "polar.default", "_fft_c2c.default", "angle.default"),
        *("fake_quantize_per_tensor_affine.default", "fake_quantize_per_channel_affine.default"),
        *("fake_quantize_per_tensor_affine.tensor_qparams", "linalg_vector_norm.default"),
        *("_weight_norm.default", "view.dtype"),
    ]
)


@functools.cache
def refusal(operator: Operator) -> str | None:
    """Why a saved engine may not call an operator; None if it may."""
    schema = operator._schema
    name, short = operator._opname, f"{operator._opname}.{operator._overloadname}"
    if operator.namespace != "aten" or schema.is_mutable:
        return "it writes to its arguments"
    if not gives_tensors(operator):
        return "it gives something else than tensors"
    for argument in schema.arguments:
        if str(argument.type) not in _TAKEN:
            return f"it takes a {argument.type}"
    if not torch._C._dispatch_has_kernel(
        f"{operator.namespace}::{name}" + f".{operator._schema.overload_name}".rstrip(".")
    ):
        return "it is of TorchScript alone"
    tags = operator.tags
    if torch.Tag.nondeterministic_seeded in tags and not any(
        argument.name in _SWITCHES for argument in schema.arguments
    ):
        return "it draws random numbers"
    if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
        return "the size of its result depends on values"
    if not (_FAKE.fullmatch(name) or _SMALL.fullmatch(name)):
        for what, pattern in _PATTERNS.items():
            if pattern.fullmatch(name) or pattern.fullmatch(short):
                return f"it is {what}"
    made = operator.has_kernel_for_dispatch_key(_COMPOSITE)  # of others, whatever the backend
    core = torch.Tag.core in tags or (operator in core_aten_decompositions() and not made)
    if core or short in _LAYERS or (made and not name.startswith("_")):
        return None
    return "it is none of PyTorch's core operators, nor made of them"


def gives_tensors(operator: Operator) -> bool:
    """Whether it gives any, and nothing else; others compute with numbers alone."""
    returns = [str(each.type) for each in operator._schema.returns]
    return bool(returns) and all(kind in _TENSORS for kind in returns)


def draws(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers: such an operator, and no argument that says not to."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    arguments = operator._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments}
    given |= dict(zip(given, args, strict=False)) | dict(kwargs)
    return all(given[name] for name in _SWITCHES if name in given)


def same_as_first(operator: Operator) -> bool:
    """Whether its result is as its first operand, which PyTorch cannot tell without running it."""
    return _FAKE.fullmatch(operator._opname) is not None


def takes_tensors(operator: Operator) -> bool:
    """Whether it takes any; others, such as `full`, make a tensor from sizes and numbers."""
    return any("Tensor" in str(argument.type) for argument in operator._schema.arguments)
