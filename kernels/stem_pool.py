"""stem_pool: y = max_pool3x3(act(conv7x7(x, w) + b)) of a folded picture, the map between unseen.

A block computes 16x16 pixels of the stem, of which 15x15 are the windows of 7x7 pooled pixels: each
16x16 shares its last two rows and columns with the next, so (16/14)^2 = 1.31 times the stem's work
is done, and the stem's map is neither written nor read. See `stem.py` for the folding.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.cost import Cost
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.folding import FOLDED, ROW, TAPS
from fastres.kernels.jit.dependent import await_predecessor, prefetch_weights
from fastres.kernels.jit.epilogue import apply_epilogue, lowest, round_to
from fastres.kernels.jit.taps import without_zeros
from fastres.kernels.launch import Launch, check_like, is_interpreted
from fastres.kernels.quantised import bias_dtypes, epilogue_arguments, is_bytes
from fastres.kernels.stem import output_pixels, stem_cost
from fastres.kernels.tiles.stem_pool import (
    StemPoolTile,
    choose_stem_pool_tile,
    pooled,
    stem_pool_refusal,
)


@triton.jit
def _larger(a, b):
    return tl.where((a > b) | (a != a), a, b)  # NaN wins


@triton.jit
def _three(v, NEXT_OF: tl.constexpr, BLOCKS: tl.constexpr):
    """[A, B, C, 2] to [A, B, C]: the larger of both, and of the first one a step on along NEXT_OF.

    A pooled pixel i sees rows 2i - 1, 2i and 2i + 1: the pair i, and the first of pair i + 1. The
    last pair has no next one: what it gives is not to be stored.
    """
    first, second = tl.split(v)
    step = tl.minimum(tl.arange(0, BLOCKS) + 1, BLOCKS - 1)
    if NEXT_OF == 0:
        following = tl.gather(first, tl.broadcast_to(step[:, None, None], first.shape), 0)
    else:
        following = tl.gather(first, tl.broadcast_to(step[None, :, None], first.shape), 1)
    return _larger(_larger(first, second), following)


@triton.jit
def _stem_pool_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    out_scale,
    P,  # of the stem
    Q,
    PP,  # of the pool
    PQ,
    C: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDEN: tl.constexpr,  # operands to fp32 first: Triton's interpreter has no bf16 arithmetic
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    ROW: tl.constexpr = TAPS * C
    prefetch_weights(weight_ptr, K * TAPS * ROW, DEPENDENT)
    await_predecessor(DEPENDENT)
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    tiles_q = tl.cdiv(PQ, BLOCK_Q - 1)
    tiles_p = tl.cdiv(PP, BLOCK_P - 1)
    tile = pid // TILES_K
    k = pid % TILES_K * BLOCK_K + tl.arange(0, BLOCK_K)
    pq0 = tile % tiles_q * (BLOCK_Q - 1)
    pp0 = tile // tiles_q % tiles_p * (BLOCK_P - 1)
    n = (tile // tiles_q // tiles_p).to(tl.int64)

    pixel = tl.arange(0, 4 * BLOCK_P * BLOCK_Q)
    p = 2 * pp0 - 1 + pixel // (2 * BLOCK_Q)
    q = 2 * pq0 - 1 + pixel % (2 * BLOCK_Q)
    inside = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
    k_ok = k < K
    x_stride = (Q + TAPS - 1) * C  # of rows of the folded picture
    x_rows = x_ptr + n * (P + TAPS - 1) * x_stride + (p * x_stride + q * C)
    depth = tl.arange(0, ROW)  # a row of 4 folded pixels lies in one piece
    x_tile = x_rows[:, None] + depth[None, :]
    weight_tile = weight_ptr + k[None, :] * (TAPS * ROW) + depth[:, None]
    ACC: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((4 * BLOCK_P * BLOCK_Q, BLOCK_K), ACC)
    for tap in range(TAPS):
        a = tl.load(x_tile + tap * x_stride, mask=inside[:, None], other=0.0)
        b = tl.load(weight_tile + tap * ROW, mask=k_ok[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, out_dtype=ACC)

    if ACC == tl.float32:
        acc = without_zeros(
            acc,
            x_rows,
            weight_ptr,
            pid % TILES_K * BLOCK_K,
            inside,
            p,
            q,
            P,
            Q,
            x_stride,
            C,
            ROW,
            K,
            TAPS,
            1,
            1,
            1,
            False,
            1,
            True,
        )

    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + k, mask=k_ok, other=0.0)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=k_ok, other=0.0)
    v = apply_epilogue(acc, bias, None, ACTIVATION, scale, None, out_scale)
    # rounding keeps the order, so it may come first: half as much is moved
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    BYTES: tl.constexpr = OUT.primitive_bitwidth == 8
    if OUT == tl.int8:
        v = round_to(v, OUT).to(tl.int16)  # of which one instruction compares two
    elif BYTES:  # all that fp8 holds, fp16 holds too
        v = round_to(v, OUT).to(tl.float16)
    v = tl.where(inside[:, None], v, lowest(OUT))  # the pool's padding
    if not WIDEN and not BYTES:
        v = v.to(OUT)
    v = tl.reshape(v, (BLOCK_P, 2, 2 * BLOCK_Q, BLOCK_K))
    v = _three(tl.permute(v, (0, 2, 3, 1)), 0, BLOCK_P)
    v = tl.reshape(v, (BLOCK_P, BLOCK_Q, 2, BLOCK_K))
    v = _three(tl.permute(v, (0, 1, 3, 2)), 1, BLOCK_Q)
    v = tl.reshape(v, (BLOCK_P * BLOCK_Q, BLOCK_K))

    out = tl.arange(0, BLOCK_P * BLOCK_Q)
    i = out // BLOCK_Q
    j = out % BLOCK_Q
    y_ok = (i < BLOCK_P - 1) & (j < BLOCK_Q - 1) & (pp0 + i < PP) & (pq0 + j < PQ)
    y_rows = y_ptr + ((n * PP + pp0 + i) * PQ + pq0 + j) * K
    y_ok = y_ok[:, None] & k_ok[None, :]
    tl.store(y_rows[:, None] + k[None, :], v.to(y_ptr.dtype.element_ty), mask=y_ok)


def stem_pool_cost(n: int, p: int, q: int, k: int, itemsize: int) -> Cost:
    """The stem's FLOPs with the pool's comparisons, and compulsory bytes of one call.

    What neighbouring blocks compute twice is left out, as everywhere.

    Args:
        p, q: pixels of the stem, before the pool.
    """
    y = n * pooled(p) * pooled(q) * k
    stem = stem_cost(n, p, q, k, itemsize)
    return Cost(stem.flops + 9 * y, stem.bytes + itemsize * (y - n * p * q * k))


def stem_pool(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: ActivationKind | None = "relu",
    scale: torch.Tensor | None = None,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: StemPoolTile | None = None,
) -> torch.Tensor:
    """ImageNet's stem with its pool: a 7x7 stride 2 padding 3, then the largest of 3x3, stride 2.

    y[n, i, j, k] = max over p in 2i-1..2i+1, q in 2j-1..2j+1 of stem[n, p, q, k]

    with the stem of `fastres.kernels.stem`, rounded once; NaN wins.

    Args:
        packed: [N, P + 3, Q + 3, 16] fp16, bf16, int8 or fp8 e4m3, contiguous, from
            `space_to_depth`.
        weight: [K, 256] of that dtype, contiguous, from `pack_stem_weight`.
        bias: [K] fp32 or of that dtype, contiguous; fp32 for 8 bits.
        scale, out_scale: of 8 bits, as for `conv2d`.
        out: [N, (P+1)//2, (Q+1)//2, K] of that dtype, or fp16 for 8 bits, contiguous; allocated
            when None.
        tile: how to cut the work; `choose_stem_pool_tile`'s when None.

    Returns:
        [N, (P+1)//2, (Q+1)//2, K], of packed's dtype unless out is given.

    Raises:
        ValueError: operands that do not fit together, or that `stem_pool_refusal` refuses.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    n, p, q = output_pixels(packed)
    if out is None:
        sizes = (n, pooled(p), pooled(q), len(weight))
        out = torch.empty(sizes, dtype=packed.dtype, device=packed.device)
    launch = stem_pool_launch(
        packed,
        weight,
        bias,
        out,
        activation=activation,
        scale=scale,
        out_scale=out_scale,
        tile=tile,
    )
    if out.numel() > 0:
        launch.run()
    return out


def stem_pool_launch(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    activation: ActivationKind | None = "relu",
    scale: torch.Tensor | None = None,
    out_scale: float = 1.0,
    tile: StemPoolTile | None = None,
) -> Launch:
    """The call `stem_pool` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together, or that `stem_pool_refusal` refuses.
    """
    n, p, q = output_pixels(packed)
    reason = stem_pool_refusal(p, q, packed.element_size())
    if reason is not None:
        raise ValueError(f"the stem cannot be pooled at once: {reason}")
    check_like("weight", weight, (weight.shape[0], TAPS * ROW), packed, [packed.dtype])
    k = len(weight)
    if k < 1:
        raise ValueError("weight has 0 output channels, expected at least 1")
    if bias is not None:
        check_like("bias", bias, (k,), packed, bias_dtypes(packed.dtype))
    results = [packed.dtype, torch.float16] if is_bytes(packed.dtype) else [packed.dtype]
    check_like("out", out, (n, pooled(p), pooled(q), k), packed, results)
    epilogue = epilogue_arguments(packed.dtype, packed, k, scale, None, 1.0, out_scale)
    del epilogue["residual_scale"]
    if tile is None:
        tile = choose_stem_pool_tile(k)
    return Launch(
        kernel=_stem_pool_kernel,
        programs=tile.programs(n, p, q, k),
        arguments={
            "x_ptr": packed,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "y_ptr": out,
            "P": p,
            "Q": q,
            "PP": pooled(p),
            "PQ": pooled(q),
            **epilogue,
        },
        constants={
            "C": FOLDED,
            "K": k,
            "TAPS": TAPS,
            "ACTIVATION": activation,
            "WIDEN": packed.dtype == torch.bfloat16 and is_interpreted(_stem_pool_kernel),
            "BLOCK_P": tile.block_p,
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=not is_bytes(packed.dtype),
        cost=stem_pool_cost(n, p, q, k, packed.element_size()),
    )
