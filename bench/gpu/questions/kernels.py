"""The kernels with which a GPU is asked: each as small as its question allows."""

import triton
import triton.language as tl


@triton.jit
def l2_loads(
    x,  # descriptor: [BOXES * ROWS, 64]
    w,  # descriptor: [64, 64]
    y_ptr,  # [programs, 64, ROWS] fp32
    STEPS,
    BOXES,
    SKEW,
    ROWS: tl.constexpr,
):
    """y[p] = sum_i w . box((SKEW p + i) mod BOXES).T over STEPS boxes of ROWS rows.

    A loaded element costs 128 FLOP: few enough that the loads stay the limit, where something must
    use what was loaded.
    """
    program = tl.program_id(0)
    weight = w.load([0, 0])
    acc = tl.zeros((64, ROWS), tl.float32)
    for i in range(STEPS):
        acc = tl.dot(weight, x.load([(program * SKEW + i) % BOXES * ROWS, 0]).T, acc)
    out = tl.arange(0, 64)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(y_ptr + program * 64 * ROWS + out, acc)


@triton.jit
def shifted_gemm(
    x,  # descriptor: [M, C]; [M, 1, C] for the layout "registers"
    w,  # descriptor: [K, TAPS * C]
    y,  # descriptor: [M, K]
    SCALE,
    C: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    ROW: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = SCALE sum_tc x[m + t // 3 * ROW + t % 3, c] w[k, t C + c], zero beyond x.

    With one tap a 1x1 convolution; with nine a 3x3 over pictures of ROW columns that bring their
    padding. LAYOUT: "transposed" (pixels on the N side, both operands from shared memory),
    "pixels first" (likewise, the other way round), "registers" (pixels first, through registers).
    """
    STEPS: tl.constexpr = C // BLOCK_K
    tile = tl.program_id(0)  # channels run fastest: neighbours share their pixels in L2
    m0 = tile // (K // BLOCK_N) * BLOCK_M
    k0 = tile % (K // BLOCK_N) * BLOCK_N
    kind: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    if LAYOUT == "transposed":
        acc = tl.zeros((BLOCK_N, BLOCK_M), kind)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), kind)
    for step in range(TAPS * STEPS):
        tap = step // STEPS
        m = m0 + tap // 3 * ROW + tap % 3
        c = step % STEPS * BLOCK_K
        b = w.load([k0, step * BLOCK_K])
        if LAYOUT == "registers":
            acc = tl.dot(x.load([m, 0, c]).reshape(BLOCK_M, BLOCK_K), b.T, acc, out_dtype=kind)
        elif LAYOUT == "transposed":
            acc = tl.dot(b, x.load([m, c]).T, acc, out_dtype=kind)
        else:
            acc = tl.dot(x.load([m, c]), b.T, acc, out_dtype=kind)
    if LAYOUT == "transposed":
        acc = acc.T
    y.store([m0, k0], (acc.to(tl.float32) * SCALE).to(y.dtype))


@triton.jit
def small_step(
    x_ptr,  # [programs * BLOCK] fp32
    w_ptr,  # [programs, CHUNKS, BLOCK] fp16
    y_ptr,  # [programs * BLOCK] fp32
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x + 1 + the sum of this program's chunks of weights.

    DEPENDENT: it may start while the kernel in front still runs, and waits for that one's end:
    before it reads the weights, which no kernel writes, or with EARLY after.
    """
    first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weights = w_ptr + tl.program_id(0) * CHUNKS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        if not EARLY:
            tl.extra.cuda.gdc_wait()
    for chunk in tl.static_range(CHUNKS):
        total += tl.load(weights + chunk * BLOCK).to(tl.float32)
    if DEPENDENT and EARLY:
        tl.extra.cuda.gdc_wait()
    tl.store(y_ptr + first, tl.load(x_ptr + first) + 1.0 + total)
