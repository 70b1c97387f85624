"""The jit form of `fastres.kernels.bottleneck_chain`: what each block does with its box."""

import triton
import triton.language as tl

from fastres.kernels.jit.dependent import await_predecessor, prefetch_weights
from fastres.kernels.jit.epilogue import apply_activation, round_to
from fastres.kernels.jit.pairs import in_order, load_box, store_box
from fastres.kernels.jit.product import add_product


@triton.jit
def _scaled(acc, scale_ptr, bias_ptr, channels):
    """acc * scale + bias in fp32 on a tile [channels, pixels]; the pointers may be None."""
    v = acc.to(tl.float32)
    if scale_ptr is not None:
        v *= tl.load(scale_ptr + channels)[:, None]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + channels).to(tl.float32)[:, None]
    return v


@triton.jit
def _finish(v, out_scale, ACTIVATION: tl.constexpr):
    """act(v) * out_scale; out_scale may be None."""
    v = apply_activation(v, ACTIVATION)
    if out_scale is not None:
        v *= out_scale
    return v


@triton.jit
def bottleneck_chain_kernel(
    a_desc,  # box [BOX_N, BOX_P, BOX_Q, DEPTH]; of stride 2 [BOX_N, BOX_P, 1, BOX_Q, DEPTH]
    w2_desc,  # [MID, DEPTH] of [MID, 9 * MID]; rows of 8 bits are interleaved, of all weights
    b2_ptr,
    w3_desc,  # [CHUNK, MID] of [KO, MID]
    projection_desc,  # [CHUNK, PROJECTED] of [KO, PROJECTED], or None
    b3_ptr,
    shortcut_desc,  # box of CHUNK channels of the residual, or of all PROJECTED channels of x
    out_desc,  # box of CHUNK channels; of 8 bits pairs, as the residual and a_next are
    w1_desc,  # [NEXT_MID, CHUNK] of [NEXT_MID, KO], or None
    b1_ptr,
    next_desc,  # box of NEXT_MID channels, or None
    w2_ptr,  # the weights once more
    w3_ptr,  # [KO, MID + PROJECTED]
    w1_ptr,
    scale2_ptr,  # of 8 bits, one value a channel: for b, out, the projection and a_next
    scale3_ptr,
    projection_scale_ptr,
    scale1_ptr,
    b_scale,  # of 8 bits, one number
    residual_scale,
    out_scale,
    next_scale,
    TILES_P,
    TILES_Q,
    MID: tl.constexpr,
    KO: tl.constexpr,
    NEXT_MID: tl.constexpr,
    PROJECTED: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDEN: tl.constexpr,  # operands to fp32 first: Triton's interpreter has no bf16 arithmetic
    BY_STEPS: tl.constexpr,  # of fp8: `tiles.depth.summed_by_steps`, of the 3x3
    NEXT_BY_STEPS: tl.constexpr,  # and of a_next
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CONV_STAGES: tl.constexpr,
    CHUNK_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    prefetch_weights(w2_ptr, 9 * MID * MID, DEPENDENT)
    prefetch_weights(w3_ptr, KO * (MID + PROJECTED), DEPENDENT)
    prefetch_weights(w1_ptr, KO * NEXT_MID, DEPENDENT)
    await_predecessor(DEPENDENT)
    PIXELS: tl.constexpr = BOX_N * BOX_P * BOX_Q
    dtype: tl.constexpr = a_desc.dtype
    SUM: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    wide: tl.constexpr = tl.float32 if WIDEN else dtype
    tile = tl.program_id(0)
    q = tile % TILES_Q * BOX_Q
    p = tile // TILES_Q % TILES_P * BOX_P
    n = tile // TILES_Q // TILES_P * BOX_N

    acc = tl.zeros((MID, PIXELS), SUM)
    for step in tl.range(0, 9 * (MID // DEPTH), num_stages=CONV_STAGES):
        tap = step // (MID // DEPTH)
        c = step % (MID // DEPTH) * DEPTH
        r = tap // 3
        s = tap % 3
        if STRIDE == 1:
            box = a_desc.load([n, p + r - 1, q + s - 1, c])
        else:  # row 2p + r - 1 is row (r + 1) % 2 of pair p + (r + 1) // 2 - 1; columns alike
            pair = q + (s + 1) // 2 - 1
            column = (s + 1) % 2 * MID + c
            box = a_desc.load([n, p + (r + 1) // 2 - 1, (r + 1) % 2, pair, column])
        x = box.reshape(PIXELS, DEPTH).to(wide)
        w2 = w2_desc.load([0, tap * MID + c]).to(wide)
        acc = add_product(acc, w2, x.T, "ieee", False, BY_STEPS)
    # rounded here as a kernel of its own would store it
    sum_b = _scaled(in_order(acc, dtype), scale2_ptr, b2_ptr, tl.arange(0, MID))
    b = round_to(_finish(sum_b, b_scale, ACTIVATION), dtype).to(wide)

    if PROJECTED > 0:
        shortcut = shortcut_desc.load([n, p, q, 0]).reshape(PIXELS, PROJECTED).to(wide)
    if NEXT_MID > 0:
        acc_next = tl.zeros((NEXT_MID, PIXELS), SUM)
    for k in tl.range(0, KO, CHUNK, num_stages=CHUNK_STAGES):
        channels = k + tl.arange(0, CHUNK)
        acc_out = tl.dot(w3_desc.load([k, 0]).to(wide), b, out_dtype=SUM)
        if PROJECTED > 0 and projection_scale_ptr is None:
            acc_out = tl.dot(projection_desc.load([k, 0]).to(wide), shortcut.T, acc_out)
        v = _scaled(in_order(acc_out, dtype), scale3_ptr, b3_ptr, channels)
        if PROJECTED == 0:
            residual = load_box(shortcut_desc, n, p, q, k, dtype, PIXELS, CHUNK).T.to(tl.float32)
            if residual_scale is not None:
                residual *= residual_scale
            v += residual
        elif projection_scale_ptr is not None:  # of 8 bits a sum of its own, for its own scales
            acc_out = tl.dot(projection_desc.load([k, 0]), shortcut.T, out_dtype=SUM)
            v += _scaled(in_order(acc_out, dtype), projection_scale_ptr, None, channels)
        v = _finish(v, out_scale, ACTIVATION)
        out = store_box(out_desc, n, p, q, k, v.T, dtype).T
        if NEXT_MID > 0:
            w1 = w1_desc.load([0, k]).to(wide)
            acc_next = add_product(acc_next, w1, out.to(wide), "ieee", False, NEXT_BY_STEPS)
    if NEXT_MID > 0:
        acc_next = in_order(acc_next, dtype)
        sum_next = _scaled(acc_next, scale1_ptr, b1_ptr, tl.arange(0, NEXT_MID))
        store_box(next_desc, n, p, q, 0, _finish(sum_next, next_scale, ACTIVATION).T, dtype)
