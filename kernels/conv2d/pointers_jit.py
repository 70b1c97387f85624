"""The jit form of `fastres.kernels.conv2d.pointers`: what each block does with its tile."""

import triton
import triton.language as tl

from fastres.kernels.jit.dependent import await_predecessor, prefetch_weights
from fastres.kernels.jit.epilogue import apply_epilogue, round_to
from fastres.kernels.jit.product import add_product
from fastres.kernels.jit.taps import without_zeros


@triton.jit
def conv2d_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    residual_scale,
    out_scale,
    M,
    H,
    W,
    P,
    Q,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_rn,
    stride_rh,
    stride_rw,
    C: tl.constexpr,  # input channels of one group
    K: tl.constexpr,  # output channels of one group
    GROUPS: tl.constexpr,
    MERGED: tl.constexpr,  # groups within each of these, with zeros for each other's channels
    FOLDED: tl.constexpr,  # the filter is a stem's, folded, with zeros that are no taps
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RESIDUAL_CHANNELS: tl.constexpr,
    RESIDUAL_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # operands to fp32 first: Triton's interpreter has no bf16 arithmetic
    BY_STEPS: tl.constexpr,  # of fp8: `tiles.depth.summed_by_steps`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    prefetch_weights(weight_ptr, GROUPS * K * R * S * C, DEPENDENT)
    await_predecessor(DEPENDENT)
    # Channel tiles run fastest, then groups: neighbouring blocks share their pixels in L2.
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = (pid // TILES_N) % GROUPS
    rows = pid // (TILES_N * GROUPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)

    row_ok = rows < M
    col_ok = cols < K
    q = rows % Q
    p = rows // Q % P
    n = rows // Q // P
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    x_rows = x_ptr + group * C + (n.to(tl.int64) * stride_xn + h0.to(tl.int64) * stride_xh)
    x_rows += w0.to(tl.int64) * stride_xw
    weight_cols = weight_ptr + (group * K + cols).to(tl.int64) * (R * S * C)

    ACC: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range((R * S * C + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + depth
        if C % BLOCK_K == 0:  # the whole step lies in one tap: its loads are contiguous
            tap = step // (C // BLOCK_K)
            h = tap // S * DILATION_H
            w = tap % S * DILATION_W
            c = step % (C // BLOCK_K) * BLOCK_K + depth
            x_offset = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            x_tile = x_rows[:, None] + x_offset + c[None, :]
            inside = row_ok
            if PAD_H > 0 or PAD_W > 0:
                inside &= (h0 + h >= 0) & (h0 + h < H) & (w0 + w >= 0) & (w0 + w < W)
            a = tl.load(x_tile, mask=inside[:, None], other=0.0)
            b_ok = col_ok[None, :]
        else:
            tap = k // C
            h = tap // S * DILATION_H
            w = tap % S * DILATION_W
            x_offset = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw + k % C
            x_tile = x_rows[:, None] + x_offset[None, :]
            inside = row_ok[:, None] & (k < R * S * C)[None, :]
            if PAD_H > 0 or PAD_W > 0:
                inside &= (h0[:, None] + h[None, :] >= 0) & (h0[:, None] + h[None, :] < H)
                inside &= (w0[:, None] + w[None, :] >= 0) & (w0[:, None] + w[None, :] < W)
            a = tl.load(x_tile, mask=inside, other=0.0)
            b_ok = col_ok[None, :] & (k < R * S * C)[:, None]
        b = tl.load(weight_cols[None, :] + k[:, None], mask=b_ok, other=0.0)
        acc = add_product(acc, a, b, INPUT_PRECISION, WIDEN, BY_STEPS)

    if (FOLDED or MERGED > 1) and ACC == tl.float32:
        acc = without_zeros(
            acc,
            x_rows,
            weight_ptr + (group * K).to(tl.int64) * (R * S * C),
            pid % TILES_N * BLOCK_N,
            row_ok,
            h0,
            w0,
            H,
            W,
            stride_xh,
            stride_xw,
            C,
            K,
            R,
            S,
            DILATION_H,
            DILATION_W,
            PAD_H > 0 or PAD_W > 0,
            MERGED,
            FOLDED,
        )

    channels = group * K + cols
    y_ok = row_ok[:, None] & col_ok[None, :]
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channels, mask=col_ok, other=0.0)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=col_ok, other=0.0)
    residual = None
    if residual_ptr is not None:
        r_rows = residual_ptr + n.to(tl.int64) * stride_rn + p.to(tl.int64) * stride_rh
        r_rows += q.to(tl.int64) * stride_rw
        r_channels = channels - RESIDUAL_OFFSET
        r_ok = y_ok
        if RESIDUAL_CHANNELS != GROUPS * K:  # shortcut A: the other channels get nothing added
            r_ok &= ((r_channels >= 0) & (r_channels < RESIDUAL_CHANNELS))[None, :]
        residual = tl.load(r_rows[:, None] + r_channels[None, :], mask=r_ok, other=0.0)
    y = apply_epilogue(acc, bias, residual, ACTIVATION, scale, residual_scale, out_scale)
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * (GROUPS * K) + channels[None, :]
    tl.store(y_tile, round_to(y, y_ptr.dtype.element_ty, ROUND_TF32), mask=y_ok)
