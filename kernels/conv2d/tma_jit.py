"""The jit form of `fastres.kernels.conv2d.tma`: what each program does with its tiles."""

import triton
import triton.language as tl

from fastres.kernels.conv2d.last_block_jit import is_last, sum_in_order
from fastres.kernels.jit.dependent import await_predecessor, prefetch_weights
from fastres.kernels.jit.epilogue import apply_epilogue
from fastres.kernels.jit.pairs import in_order, load_box, store_box
from fastres.kernels.jit.product import add_product


@triton.jit
def _scaled(acc, scale_ptr, bias_ptr, k, K: tl.constexpr):
    """acc * scale + bias in fp32 for acc [BLOCK_N, BLOCK_M]; bias_ptr may be None."""
    v = acc.to(tl.float32) * tl.load(scale_ptr + k, mask=k < K, other=0.0)[:, None]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + k, mask=k < K, other=0.0)[:, None]
    return v


@triton.jit
def conv2d_tma_kernel(
    x,  # descriptors: [N, H, W, C], or [N, H/2, 2, W/2, 2C] for a stride of 2
    x2,  # [N, P, Q, C2]
    weight,  # [K, R*S*C + C2], rows of 8 bits interleaved
    weight_ptr,  # the same
    scale_ptr,
    scale2_ptr,
    bias_ptr,
    residual,  # [N, P, Q, K], of 8 bits as pairs
    y,  # [N, P, Q, K], of 8 bits as pairs, or [SPLIT_K, N, P, Q, K] of 32 bits
    parts_ptr,  # of a split depth whose parts are added here: `last_block_jit`
    counters_ptr,
    residual_scale,
    out_scale,
    TILES,
    BOXES_N,
    BOXES_P,
    BOXES_Q,
    C: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # operands to fp32 first: Triton's interpreter has no bf16 arithmetic
    BY_STEPS: tl.constexpr,  # of fp8: `tiles.depth.summed_by_steps`
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    FLATTEN: tl.constexpr,  # `boxes.BoxTile.flattens`
    ROUND_TF32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    prefetch_weights(weight_ptr, K * (R * S * C + C2), DEPENDENT)
    await_predecessor(DEPENDENT)
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    ACC: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    STEPS: tl.constexpr = R * S * C // BLOCK_K // SPLIT_K
    STEPS2: tl.constexpr = C2 // BLOCK_K // SPLIT_K

    # A fixed number of programs walks over the tiles. Channel tiles run fastest: programs side by
    # side share their pixels in L2, and with the next box the weights, which all fit there. Parts
    # of a split run slowest: programs side by side are at the same depth of the weights.
    # FLATTEN makes one loop of this and the one over a tile's steps, in which the boxes of the next
    # tile are on their way while this one's sums go through the epilogue.
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), flatten=FLATTEN):
        k0 = tile % TILES_N * BLOCK_N
        box = tile // TILES_N
        q0 = box % BOXES_Q * BOX_Q
        p0 = box // BOXES_Q % BOXES_P * BOX_P
        image = box // BOXES_Q // BOXES_P
        n0 = image % BOXES_N * BOX_N
        part = image // BOXES_N

        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        for i in range(STEPS):
            step = part * STEPS + i
            tap = step // (C // BLOCK_K)
            c = step % (C // BLOCK_K) * BLOCK_K
            h = tap // S * DILATION_H
            w = tap % S * DILATION_W
            if STRIDE == 1:
                a = x.load([n0, p0 + h - PAD_H, q0 + w - PAD_W, c])
            else:
                # row 2p + h - PAD = 2 (p + (h + PAD) // 2 - PAD) + (h + PAD) % 2
                ph = p0 + (h + PAD_H) // 2 - PAD_H
                qw = q0 + (w + PAD_W) // 2 - PAD_W
                a = x.load([n0, ph, (h + PAD_H) % 2, qw, (w + PAD_W) % 2 * C + c])
            b = weight.load([k0, step * BLOCK_K])
            pixels = a.reshape(BLOCK_M, BLOCK_K).T
            acc = add_product(acc, b, pixels, INPUT_PRECISION, WIDEN, BY_STEPS)
        acc = in_order(acc, x.dtype)
        k = k0 + tl.arange(0, BLOCK_N)
        if scale2_ptr is not None:  # a projection of 8 bits has scales, and so a sum, of its own
            first = _scaled(acc, scale_ptr, bias_ptr, k, K)
            acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        if x2 is not None:
            for i in range(STEPS2):
                c = (part * STEPS2 + i) * BLOCK_K
                a = x2.load([n0, p0, q0, c])
                b = weight.load([k0, R * S * C + c])
                pixels = a.reshape(BLOCK_M, BLOCK_K).T
                acc = add_product(acc, b, pixels, INPUT_PRECISION, WIDEN, BY_STEPS)

        SUMS = TILES // SPLIT_K
        if SPLIT_K > 1 and counters_ptr is None:  # the epilogue is the second kernel's
            y.store([part, n0, p0, q0, k0], acc.T.reshape(1, BOX_N, BOX_P, BOX_Q, BLOCK_N))
        elif SPLIT_K == 1 or is_last(acc.T, parts_ptr, counters_ptr, tile, SUMS, SPLIT_K):
            total = acc
            if SPLIT_K > 1:
                total = sum_in_order(parts_ptr, tile, SUMS, SPLIT_K, BLOCK_M, BLOCK_N).T
            scale = None
            bias = None
            if scale2_ptr is not None:
                total = first + _scaled(in_order(acc, x.dtype), scale2_ptr, None, k, K)
            else:
                if scale_ptr is not None:
                    scale = tl.load(scale_ptr + k, mask=k < K, other=0.0)
                if bias_ptr is not None:
                    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)
            r = None
            if residual is not None:
                r = load_box(residual, n0, p0, q0, k0, x.dtype, BLOCK_M, BLOCK_N)
            v = apply_epilogue(total.T, bias, r, ACTIVATION, scale, residual_scale, out_scale)
            store_box(y, n0, p0, q0, k0, v, x.dtype, ROUND_TF32)
