"""sum_parts: y = act(sum_i parts[i] + b + r), the second half of a product split along its depth.

The parts are summed in their order by one thread for each element: the same result every time.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.cost import Cost
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.jit.dependent import await_predecessor
from fastres.kernels.jit.epilogue import apply_epilogue, round_to
from fastres.kernels.launch import FLOAT_DTYPES, Launch, check_like
from fastres.kernels.quantised import bias_dtypes, epilogue_arguments, result_dtypes

_BLOCK_M, _BLOCK_N = 8, 128  # small, as the results of split products are


@triton.jit
def _sum_parts_kernel(
    parts_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    residual_scale,
    out_scale,
    M,
    stride_part,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_predecessor(DEPENDENT)
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    rows = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    offsets = rows.to(tl.int64)[:, None] * K + cols[None, :]

    part = parts_ptr + offsets
    acc = tl.load(part, mask=inside, other=0)
    for _ in tl.static_range(PARTS - 1):
        part += stride_part
        acc += tl.load(part, mask=inside, other=0)
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + cols, mask=cols < K, other=0.0)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < K, other=0.0)
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0)
    y = apply_epilogue(acc, bias, residual, ACTIVATION, scale, residual_scale, out_scale)
    tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty, ROUND_TF32), mask=inside)


def sum_parts_cost(parts: int, m: int, k: int, itemsize: int, *, residual: bool = False) -> Cost:
    """Additions and compulsory bytes of one call.

    Args:
        itemsize: bytes of an element of residual and y; parts have 4, the bias is left out.
    """
    return Cost(parts * m * k, m * k * (4 * parts + itemsize * (2 if residual else 1)))


def sum_parts(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    activation: ActivationKind | None = None,
    scale: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
) -> torch.Tensor:
    """y[m, k] = act(sum_i parts[i, m, k] + bias[k] + residual[m, k]), summed in parts' type.

    Args:
        parts: [PARTS, M, K] fp32, or of int8 products int32, contiguous.
        bias: [K] fp32 or of out's dtype, contiguous; fp32 with scale.
        residual: [M, K] of out's dtype, contiguous; with scale int8, fp8 or a float.
        out: [M, K] fp16, bf16 or fp32, contiguous; with scale also the products' int8 or fp8.
        scale, residual_scale, out_scale: of products of 8 bits, see `fastres.kernels.quantised`.

    Returns:
        out.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    launch = sum_parts_launch(
        parts,
        bias,
        residual,
        out,
        activation=activation,
        scale=scale,
        residual_scale=residual_scale,
        out_scale=out_scale,
    )
    if out.numel() > 0:
        launch.run()
    return out


def sum_parts_launch(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    activation: ActivationKind | None = None,
    scale: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
) -> Launch:
    """The call `sum_parts` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    if parts.ndim != 3 or min(parts.shape[0], parts.shape[2]) < 1:
        raise ValueError(f"parts has shape {list(parts.shape)}, expected [PARTS, M, K]")
    count, m, k = parts.shape
    check_like("parts", parts, (count, m, k), parts, [torch.float32, torch.int32])
    if parts.dtype == torch.int32:
        dtype = torch.int8
    else:
        dtype = out.dtype if scale is None else torch.float8_e4m3fn
    check_like("out", out, (m, k), parts, FLOAT_DTYPES if scale is None else result_dtypes(dtype))
    if bias is not None:
        check_like("bias", bias, (k,), parts, bias_dtypes(dtype))
    if residual is not None:
        check_like("residual", residual, (m, k), parts, result_dtypes(dtype))
    epilogue = epilogue_arguments(dtype, parts, k, scale, residual, residual_scale, out_scale)
    return Launch(
        kernel=_sum_parts_kernel,
        programs=triton.cdiv(m, _BLOCK_M) * triton.cdiv(k, _BLOCK_N),
        arguments={
            "parts_ptr": parts,
            "bias_ptr": bias,
            "residual_ptr": residual,
            "y_ptr": out,
            "M": m,
            "stride_part": m * k,
            **epilogue,
        },
        constants={
            "K": k,
            "PARTS": count,
            "ACTIVATION": activation,
            "BLOCK_M": _BLOCK_M,
            "BLOCK_N": _BLOCK_N,
            "ROUND_TF32": False,
            "DEPENDENT": False,
        },
        num_warps=4,
        num_stages=2,
        fp_fusion=scale is None,
        cost=sum_parts_cost(count, m, k, out.element_size(), residual=residual is not None),
    )
