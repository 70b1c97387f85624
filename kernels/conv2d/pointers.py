"""conv2d: y = act(conv(x, w) + b + r), NHWC activations, KRSC weights, fp32 accumulate; int8, fp8.

Implicit GEMM over pointers: M = N*P*Q output pixels, N = output channels of a group, K = R*S*C.
Source: the mapping is CUTLASS's implicit GEMM (docs/implicit_gemm_convolution.md).
"""

import torch

from fastres.kernels.conv2d.pointers_jit import conv2d_kernel
from fastres.kernels.cost import Cost, Target, target_of
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import ConvShape, Pair
from fastres.kernels.launch import (
    Launch,
    check_inner_stride,
    check_like,
    check_nhwc,
    is_interpreted,
)
from fastres.kernels.quantised import (
    ANY_DTYPES,
    bias_dtypes,
    by_steps,
    check_product,
    epilogue_arguments,
    is_bytes,
    result_dtypes,
)
from fastres.kernels.tiles.conv import ConvTile, choose_conv_tile
from fastres.kernels.tiles.depth import least_depth


def conv2d_cost(
    shape: ConvShape, itemsize: int, residual_channels: int = 0, out_itemsize: int | None = None
) -> Cost:
    """FLOPs and compulsory bytes of one call.

    Args:
        itemsize: bytes of an element of x, weight and residual; bias and scales are left out.
        residual_channels: channels of the residual, 0 without one.
        out_itemsize: of y; as x when None.
    """
    gemm = shape.gemm
    x = shape.n * shape.h * shape.w * shape.c
    read = itemsize * (x + shape.k * gemm.k + gemm.m * residual_channels)
    y = gemm.m * shape.k * (out_itemsize or itemsize)
    return Cost(2 * gemm.m * shape.k * gemm.k, read + y)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    residual: torch.Tensor | None = None,
    residual_channel_offset: int = 0,
    activation: ActivationKind | None = None,
    scale: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """Convolution with bias, residual and activation in its epilogue.

    y[n, p, q, k] = act(sum_rsc x[n, p*u + r*d - h0, q*v + s*e - w0, c] * weight[k, r, s, c]
                        + bias[k] + residual[n, p, q, k - residual_channel_offset])

    with (u, v) the stride, (d, e) the dilation, (h0, w0) the padding, zero outside x, and a
    residual that is zero outside its own channels. Of int8 and fp8 the sum is scaled by scale[k],
    the residual by residual_scale and what the activation gives by out_scale: see `quantised`.

    Args:
        x: [N, H, W, C] fp16, bf16, fp32, int8 or fp8 e4m3; channels packed, other strides free.
        weight: [K, R, S, C/groups] of x's dtype, contiguous.
        bias: [K] fp32 or of x's dtype, contiguous; fp32 for 8 bits.
        residual: [N, P, Q, Cr] of x's dtype, or a float for 8 bits, with Cr <= K; channels packed,
            other strides free.
        residual_channel_offset: output channel that the residual's first channel meets.
        scale: [K] fp32, contiguous, for 8 bits.
        residual_scale, out_scale: for 8 bits; 1 / the output's scale where it is 8 bits as well.
        out: [N, P, Q, K] of x's dtype, or a float for 8 bits, contiguous; allocated when None.
        tile: how to cut the work; chosen from shape and device when None.
        allow_tf32: for fp32, tensor cores, which cut off what `reference.round_tf32` rounds.

    Returns:
        [N, P, Q, K], of x's dtype unless out is given.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_nhwc("x", x, ANY_DTYPES)
    if weight.ndim != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [K, R, S, C/groups]")
    n, h, w, c = x.shape
    k, r, s, _ = weight.shape
    shape = ConvShape(n, h, w, c, k, r, s, stride, padding, dilation, groups)
    if out is None:
        out = torch.empty((n, shape.p, shape.q, k), dtype=x.dtype, device=x.device)
    launch = conv2d_launch(
        x,
        weight,
        bias,
        residual,
        out,
        shape=shape,
        residual_channel_offset=residual_channel_offset,
        activation=activation,
        scale=scale,
        residual_scale=residual_scale,
        out_scale=out_scale,
        tile=tile,
        allow_tf32=allow_tf32,
        target=target_of(x.device),
    )
    if out.numel() > 0:
        launch.run()
    return out


def conv2d_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    shape: ConvShape,
    target: Target,
    merged: int = 1,
    folded: bool = False,
    residual_channel_offset: int = 0,
    activation: ActivationKind | None = None,
    scale: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> Launch:
    """The call `conv2d` makes, not yet made; tensors may be on the meta device.

    Args:
        shape: sizes of the convolution, as x and weight have them.
        target: the GPU it is meant for.
        merged: groups within each of the shape's: weight holds zeros for each other's channels.
        folded: weight is a stem's (`fastres.kernels.folding`), with zeros for its eighth row and
            column. Neither kind of zero is multiplied by NaN or infinities in x.

    Raises:
        ValueError: operands that do not fit together.
    """
    x_shape = (shape.n, shape.h, shape.w, shape.c)
    weight_shape = (shape.k, shape.r, shape.s, shape.c // shape.groups)
    y_shape = (shape.n, shape.p, shape.q, shape.k)
    check_nhwc("x", x, ANY_DTYPES)
    check_product(x.dtype, shape.gemm.k, target)
    if merged < 1 or weight_shape[3] % merged or shape.gemm.n % merged:
        raise ValueError(
            f"merged is {merged}, expected a divisor of {weight_shape[3]} input and "
            f"{shape.gemm.n} output channels a group"
        )
    check_like("x", x, x_shape, x, [x.dtype], contiguous=False)
    check_like("weight", weight, weight_shape, x, [x.dtype])
    check_like("out", out, y_shape, x, result_dtypes(x.dtype))
    if bias is not None:
        check_like("bias", bias, (shape.k,), x, bias_dtypes(x.dtype))
    residual_channels = 0
    if residual is not None:
        residual_channels = _residual_channels(residual, residual_channel_offset, y_shape, x)
    elif residual_channel_offset:
        raise ValueError(f"residual_channel_offset is {residual_channel_offset} with no residual")
    tf32 = allow_tf32 and x.dtype == torch.float32
    if tile is None:
        tensor_cores = tf32 or x.dtype != torch.float32
        tile = choose_conv_tile(shape.gemm, x.element_size(), target, tensor_cores=tensor_cores)
    elif tile.block_k < least_depth(x.element_size()):
        raise ValueError(f"tile {tile} has a depth of {tile.block_k}, expected 32 for {x.dtype}")
    epilogue = epilogue_arguments(x.dtype, x, shape.k, scale, residual, residual_scale, out_scale)
    return Launch(
        kernel=conv2d_kernel,
        programs=tile.programs(shape.gemm),
        arguments={
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "residual_ptr": residual,
            "y_ptr": out,
            "M": shape.n * shape.p * shape.q,
            "H": shape.h,
            "W": shape.w,
            "P": shape.p,
            "Q": shape.q,
            "stride_xn": x.stride(0),
            "stride_xh": x.stride(1),
            "stride_xw": x.stride(2),
            "stride_rn": 0 if residual is None else residual.stride(0),
            "stride_rh": 0 if residual is None else residual.stride(1),
            "stride_rw": 0 if residual is None else residual.stride(2),
            **epilogue,
        },
        constants={
            "C": shape.c // shape.groups,
            "K": shape.k // shape.groups,
            "GROUPS": shape.groups,
            "MERGED": merged,
            "FOLDED": folded,
            "R": shape.r,
            "S": shape.s,
            "STRIDE_H": shape.stride[0],
            "STRIDE_W": shape.stride[1],
            "PAD_H": shape.padding[0],
            "PAD_W": shape.padding[1],
            "DILATION_H": shape.dilation[0],
            "DILATION_W": shape.dilation[1],
            "RESIDUAL_CHANNELS": residual_channels,
            "RESIDUAL_OFFSET": residual_channel_offset,
            "ACTIVATION": activation,
            "INPUT_PRECISION": "tf32" if tf32 else "ieee",
            "WIDEN": x.dtype == torch.bfloat16 and is_interpreted(conv2d_kernel),
            "BY_STEPS": by_steps(x.dtype, shape.gemm.k, target),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "ROUND_TF32": False,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=not is_bytes(x.dtype),
        cost=conv2d_cost(shape, x.element_size(), residual_channels, out.element_size()),
    )


def _residual_channels(
    residual: torch.Tensor, offset: int, y_shape: tuple[int, int, int, int], x: torch.Tensor
) -> int:
    channels = residual.shape[-1]
    sizes = (*y_shape[:3], channels)
    check_like("residual", residual, sizes, x, result_dtypes(x.dtype), contiguous=False)
    check_inner_stride("residual", residual)
    if offset < 0 or offset + channels > y_shape[3]:
        raise ValueError(
            f"residual has {channels} channels from output channel {offset} on, expected them "
            f"within 0 to {y_shape[3]}"
        )
    return channels
