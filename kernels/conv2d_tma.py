"""conv2d_tma: y = act(conv(x, w) + proj(x2, w2) + b + r) through the copy engine, for sm_90 and newer.

Implicit GEMM over boxes of pixels, as the transposed product acc[K, pixels] = w[K, depth] . a.T:
a box that has been brought to shared memory feeds the tensor cores from there only as the second
operand; as the first it passes through registers. Padding is the copy engine's zero fill.
Source: the mapping is CUTLASS's implicit GEMM (docs/implicit_gemm_convolution.md), with tiled tensor
maps where CUTLASS has im2col ones.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.boxes import BoxTile, Projection, choose_box_tile, tile_refusal, walk_shape
from fastres.kernels.cost import Cost, Target
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.epilogue_jit import apply_epilogue
from fastres.kernels.geometry import ConvShape, Pair
from fastres.kernels.launch import Launch, check_like, check_nhwc, is_interpreted, target_of
from fastres.kernels.split_k import sum_parts_launch


@triton.jit
def _add_product(acc, weight, pixels, INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + weight . pixels.T for weight [BLOCK_N, BLOCK_K] and pixels [BLOCK_M, BLOCK_K]."""
    if WIDEN:
        weight = weight.to(tl.float32)
        pixels = pixels.to(tl.float32)
    return tl.dot(weight, pixels.T, acc, input_precision=INPUT_PRECISION)


@triton.jit
def _conv2d_tma_kernel(
    x,  # descriptors: [N, H, W, C], or [N, H/2, 2, W/2, 2C] for a stride of 2
    x2,  # [N, P, Q, C2]
    weight,  # [K, R*S*C + C2]
    bias_ptr,
    residual,  # [N, P, Q, K]
    y,  # [N, P, Q, K], or [SPLIT_K, N, P, Q, K] of fp32
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
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = R * S * C // BLOCK_K // SPLIT_K
    STEPS2: tl.constexpr = C2 // BLOCK_K // SPLIT_K

    # A fixed number of programs walks over the tiles. Channel tiles run fastest: programs side by
    # side share their pixels in L2, and with the next box the weights, which all fit there. Parts
    # of a split run slowest: programs side by side are at the same depth of the weights.
    tile = tl.program_id(0)
    while tile < TILES:
        k0 = tile % TILES_N * BLOCK_N
        box = tile // TILES_N
        q0 = box % BOXES_Q * BOX_Q
        p0 = box // BOXES_Q % BOXES_P * BOX_P
        image = box // BOXES_Q // BOXES_P
        n0 = image % BOXES_N * BOX_N
        part = image // BOXES_N

        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
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
            acc = _add_product(acc, b, a.reshape(BLOCK_M, BLOCK_K), INPUT_PRECISION, WIDEN)
        if x2 is not None:
            for i in range(STEPS2):
                c = (part * STEPS2 + i) * BLOCK_K
                a = x2.load([n0, p0, q0, c])
                b = weight.load([k0, R * S * C + c])
                acc = _add_product(acc, b, a.reshape(BLOCK_M, BLOCK_K), INPUT_PRECISION, WIDEN)

        if SPLIT_K > 1:  # the epilogue is the second kernel's
            y.store([part, n0, p0, q0, k0], acc.T.reshape(1, BOX_N, BOX_P, BOX_Q, BLOCK_N))
        else:
            bias = None
            if bias_ptr is not None:
                k = k0 + tl.arange(0, BLOCK_N)
                bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)
            r = None
            if residual is not None:
                r = residual.load([n0, p0, q0, k0]).reshape(BLOCK_M, BLOCK_N)
            v = apply_epilogue(acc.T, bias, r, ACTIVATION).to(y.dtype)
            y.store([n0, p0, q0, k0], v.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))
        tile += tl.num_programs(0)


def refusal(
    shape: ConvShape,
    dtype: torch.dtype,
    target: Target,
    projection: Projection | None = None,
    *,
    allow_tf32: bool = False,
) -> str | None:
    """Why this kernel cannot take a convolution, for a planner to fall back; None when it can."""
    if target.sm < 90:
        return f"sm_{target.sm} has no copy engine for boxes, expected sm_90 or newer"
    if dtype == torch.float32 and not allow_tf32:
        return "fp32 in full precision does not run on tensor cores, expected allow_tf32"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype is {dtype}, expected fp16, bf16 or fp32"
    if shape.groups != 1:
        return f"groups is {shape.groups}, expected 1"
    if shape.c % 16 or (projection is not None and projection.channels % 16):
        channels = shape.c if projection is None else (shape.c, projection.channels)
        return f"input channels are {channels}, expected multiples of 16, a step of the K-loop"
    if shape.k % 8:
        return f"output channels are {shape.k}, expected a multiple of 8 for aligned strides"
    walk = walk_shape(shape, projection)
    if walk.stride not in ((1, 1), (2, 2)):
        return f"stride is {shape.stride}, expected (1, 1) or (2, 2)"
    if walk.stride == (2, 2) and (shape.h % 2 or shape.w % 2):
        return f"stride is 2 over {shape.h}x{shape.w} pixels, expected even numbers"
    return None


def conv2d_tma_cost(
    shape: ConvShape,
    itemsize: int,
    projection: Projection | None = None,
    *,
    residual: bool = False,
) -> Cost:
    """FLOPs and compulsory bytes of one call; a strided 1x1 reads only the pixels it needs.

    Args:
        itemsize: bytes of an element of x, x2, weight, residual and y; the bias is left out.
    """
    walk = walk_shape(shape, projection)
    channels2 = 0 if projection is None else projection.channels
    m, depth = shape.n * shape.p * shape.q, shape.r * shape.s * shape.c + channels2
    x = walk.n * walk.h * walk.w * shape.c + m * channels2
    y = m * shape.k * (2 if residual else 1)
    return Cost(2 * m * shape.k * depth, itemsize * (x + shape.k * depth + y))


def conv2d_tma_workspace(shape: ConvShape, tile: BoxTile) -> int:
    """Bytes of workspace a call needs: the fp32 parts of a split depth, or nothing."""
    parts = tile.split_k if tile.split_k > 1 else 0
    return 4 * parts * shape.n * shape.p * shape.q * shape.k


def pack_weight(weight: torch.Tensor, weight2: torch.Tensor | None = None) -> torch.Tensor:
    """One matrix [K, R*S*C + C2] of weight [K, R, S, C] and the projection's weight2 [K, C2]."""
    matrix = weight.flatten(1)
    return matrix if weight2 is None else torch.cat([matrix, weight2], 1)


def conv2d_tma(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    x2: torch.Tensor | None = None,
    weight2: torch.Tensor | None = None,
    stride2: Pair = (1, 1),
    residual: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
    out: torch.Tensor | None = None,
    tile: BoxTile | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """Convolution with a merged projection, bias, residual and activation in its epilogue.

    y[n, p, q, k] = act(sum_rsc x[n, p*u + r*d - h0, q*v + s*e - w0, c] * weight[k, r, s, c]
                        + sum_c x2[n, p*u2, q*v2, c] * weight2[k, c]
                        + bias[k] + residual[n, p, q, k])

    with (u, v) the stride, (u2, v2) stride2, (d, e) the dilation, (h0, w0) the padding, and zero
    outside x. Tensors start at a multiple of 16 bytes.

    Args:
        x: [N, H, W, C] fp16, bf16 or, with allow_tf32, fp32, contiguous; C a multiple of 16.
        weight: [K, R, S, C] of x's dtype, contiguous; K a multiple of 8.
        bias: [K] fp32 or of x's dtype, contiguous.
        stride: (1, 1), (2, 2) over an even height and width, or any for a 1x1 without padding.
        x2: [N, H2, W2, C2] of x's dtype, contiguous, with P = ceil(H2/u2) and Q = ceil(W2/v2).
        weight2: [K, C2] of x's dtype, contiguous; goes with x2.
        residual: [N, P, Q, K] of x's dtype, contiguous.
        out: [N, P, Q, K] of x's dtype, contiguous; allocated when None.
        tile: how to cut the work; chosen from shape and device when None.
        allow_tf32: tensor cores at reduced precision for fp32 inputs.

    Returns:
        [N, P, Q, K] of x's dtype.

    Raises:
        ValueError: operands that do not fit together, or that this kernel cannot take (`refusal`).
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_nhwc("x", x)
    if weight.ndim != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [K, R, S, C]")
    if (x2 is None) != (weight2 is None):
        raise ValueError("x2 and weight2 go together, found one of them alone")
    n, h, w, c = x.shape
    k, r, s, _ = weight.shape
    shape = ConvShape(n, h, w, c, k, r, s, stride, padding, dilation)
    check_like("weight", weight, (k, r, s, c), x, [x.dtype])
    projection = None
    if x2 is not None and weight2 is not None:
        projection = Projection(x2.shape[-1], stride2)
        check_like("weight2", weight2, (k, projection.channels), x, [x.dtype])
    target = target_of(x.device)
    _accept(shape, x.dtype, target, projection, allow_tf32)
    if out is None:
        out = torch.empty((n, shape.p, shape.q, k), dtype=x.dtype, device=x.device)
    if tile is None:
        tile = choose_box_tile(shape, x.element_size(), target, projection)
    size = conv2d_tma_workspace(shape, tile) // 4
    for launch in conv2d_tma_launches(
        x,
        pack_weight(weight, weight2),
        bias,
        residual,
        out,
        shape=shape,
        target=target,
        x2=x2,
        stride2=stride2,
        activation=activation,
        tile=tile,
        workspace=torch.empty(size, dtype=torch.float32, device=x.device) if size else None,
        allow_tf32=allow_tf32,
    ):
        launch.run()
    return out


def conv2d_tma_launches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    shape: ConvShape,
    target: Target,
    x2: torch.Tensor | None = None,
    stride2: Pair = (1, 1),
    activation: ActivationKind | None = None,
    tile: BoxTile | None = None,
    workspace: torch.Tensor | None = None,
    allow_tf32: bool = False,
) -> tuple[Launch, ...]:
    """The calls `conv2d_tma` makes, not yet made; tensors may be on the meta device.

    Args:
        weight: [K, R*S*C + C2], as `pack_weight` packs it.
        shape: sizes of the convolution, as x and weight have them.
        target: the GPU it is meant for.
        workspace: of at least `conv2d_tma_workspace(shape, tile)` bytes: fp32, contiguous.

    Returns:
        None for an empty batch, two where the tile splits the depth, otherwise one.

    Raises:
        ValueError: operands that do not fit together, or that this kernel cannot take (`refusal`).
    """
    y_shape = (shape.n, shape.p, shape.q, shape.k)
    check_nhwc("x", x)
    check_like("x", x, (shape.n, shape.h, shape.w, shape.c), x, [x.dtype])
    projection = None
    if x2 is not None:
        projection = _projection(x2, stride2, x, shape)
    elif stride2 != (1, 1):
        raise ValueError(f"stride2 is {stride2} with no x2")
    _accept(shape, x.dtype, target, projection, allow_tf32)
    channels2 = 0 if projection is None else projection.channels
    depth = shape.r * shape.s * shape.c + channels2
    check_like("weight", weight, (shape.k, depth), x, [x.dtype])
    check_like("out", out, y_shape, x, [x.dtype])
    if bias is not None:
        check_like("bias", bias, (shape.k,), x, [torch.float32, x.dtype])
    if residual is not None:
        check_like("residual", residual, y_shape, x, [x.dtype])
    named = {"x": x, "x2": x2, "weight": weight, "residual": residual, "out": out}
    for name, tensor in {**named, "workspace": workspace}.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(f"{name} is {tensor.data_ptr() % 16} bytes past a multiple of 16")
    if tile is None:
        tile = choose_box_tile(shape, x.element_size(), target, projection)
    reason = tile_refusal(tile, shape, x.element_size(), target, projection)
    if reason is not None:
        raise ValueError(f"tile {tile} cannot run this convolution: {reason}")
    parts = None
    if tile.split_k > 1:
        parts = _parts(workspace, shape, tile, x)
    if shape.n == 0:
        return ()

    walk = walk_shape(shape, projection)
    grid = (walk.n, walk.p, walk.q)
    boxes = tile.boxes(walk)
    box = (tile.tn, tile.th, tile.tw)

    def pixels(tensor: torch.Tensor, channels: int) -> TensorDescriptor:
        """Boxes of a tensor with one pixel for each output pixel."""
        view = tensor if tensor.shape[:3] == grid else tensor.view(*grid, tensor.shape[3])
        return TensorDescriptor.from_tensor(view, [*box, channels])

    if walk.stride == (2, 2):
        view = x.view(shape.n, shape.h // 2, 2, shape.w // 2, 2 * shape.c)
        sides = [tile.tn, tile.th, 1, tile.tw, tile.block_k]
        source = TensorDescriptor.from_tensor(view, sides)
    elif walk == shape:
        source = TensorDescriptor.from_tensor(x, [*box, tile.block_k])
    else:
        source = pixels(_every(x, shape.stride), tile.block_k)
    if parts is None:
        sink = pixels(out, tile.block_n)
    else:
        view = parts.view(tile.split_k, *grid, shape.k)
        sink = TensorDescriptor.from_tensor(view, [1, *box, tile.block_n])
    whole = parts is None  # whether this kernel finishes, or the second one does
    product = Launch(
        kernel=_conv2d_tma_kernel,
        programs=tile.programs(walk, target),
        arguments={
            "x": source,
            "x2": None if x2 is None else pixels(_every(x2, stride2), tile.block_k),
            "weight": TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
            "bias_ptr": bias if whole else None,
            "residual": pixels(residual, tile.block_n) if whole and residual is not None else None,
            "y": sink,
            "TILES": tile.tiles(walk),
            "BOXES_N": boxes[0],
            "BOXES_P": boxes[1],
            "BOXES_Q": boxes[2],
        },
        constants={
            "C": shape.c,
            "C2": channels2,
            "K": shape.k,
            "R": walk.r,
            "S": walk.s,
            "STRIDE": walk.stride[0],
            "PAD_H": walk.padding[0],
            "PAD_W": walk.padding[1],
            "DILATION_H": walk.dilation[0],
            "DILATION_W": walk.dilation[1],
            "ACTIVATION": activation if whole else None,
            "INPUT_PRECISION": "tf32" if x.dtype == torch.float32 else "ieee",
            "WIDEN": x.dtype == torch.bfloat16 and is_interpreted(_conv2d_tma_kernel),
            "BOX_N": tile.tn,
            "BOX_P": tile.th,
            "BOX_Q": tile.tw,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "SPLIT_K": tile.split_k,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if parts is None:
        return (product,)
    flat = None if residual is None else residual.view(-1, shape.k)
    y = out.view(-1, shape.k)
    return product, sum_parts_launch(parts, bias, flat, y, activation=activation)


def _every(x: torch.Tensor, stride: Pair) -> torch.Tensor:
    """Every pixel that a 1x1 convolution of this stride reads: a view."""
    return x[:, :: stride[0], :: stride[1]]


def _accept(
    shape: ConvShape,
    dtype: torch.dtype,
    target: Target,
    projection: Projection | None,
    allow_tf32: bool,
) -> None:
    reason = refusal(shape, dtype, target, projection, allow_tf32=allow_tf32)
    if reason is not None:
        raise ValueError(f"the descriptor kernel cannot take this convolution: {reason}")


def _projection(x2: torch.Tensor, stride: Pair, x: torch.Tensor, shape: ConvShape) -> Projection:
    check_nhwc("x2", x2)
    check_like("x2", x2, (shape.n, *x2.shape[1:]), x, [x.dtype])
    if min(stride) < 1:
        raise ValueError(f"stride2 is {stride}, expected at least 1")
    pixels = tuple(_every(x2, stride).shape[1:3])
    if pixels != (shape.p, shape.q):
        raise ValueError(
            f"x2 has {x2.shape[1]}x{x2.shape[2]} pixels, {pixels[0]}x{pixels[1]} at stride2 "
            f"{stride}; expected {shape.p}x{shape.q}, as the output has"
        )
    return Projection(x2.shape[3], stride)


def _parts(
    workspace: torch.Tensor | None, shape: ConvShape, tile: BoxTile, x: torch.Tensor
) -> torch.Tensor:
    """The workspace as [SPLIT_K, N*P*Q, K]."""
    size = conv2d_tma_workspace(shape, tile) // 4
    if workspace is None:
        raise ValueError(f"tile {tile} splits the depth, expected a workspace of {size} fp32")
    found = workspace.numel()
    if found < size:
        raise ValueError(f"workspace has {found} elements, expected at least {size}")
    check_like("workspace", workspace, workspace.shape, x, [torch.float32])
    return workspace.view(-1)[:size].view(tile.split_k, -1, shape.k)
