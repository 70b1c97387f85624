"""conv2d_tma: y = act(conv(x, w) + proj(x2, w2) + b + r) through the copy engine, from sm_90 on.

Implicit GEMM over boxes of pixels, as the transposed product acc[K, pixels] = w[K, depth] . a.T:
a box brought to shared memory feeds the tensor cores from there as the second operand; as the first
it would pass through registers. Padding is the copy engine's zero fill. Floats, int8 and fp8.
Source: the mapping is CUTLASS's implicit GEMM (docs/implicit_gemm_convolution.md), with tiled
tensor maps where CUTLASS has im2col ones.
"""

import torch
import triton

from fastres.kernels.conv2d.descriptors import descriptor, input_boxes, pixel_boxes
from fastres.kernels.conv2d.parts import new_parts, room_in, sum_dtype
from fastres.kernels.conv2d.split_k import sum_parts_launch
from fastres.kernels.conv2d.tma_jit import conv2d_tma_kernel
from fastres.kernels.cost import Cost, Target, target_of
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import ConvShape, Pair
from fastres.kernels.launch import Launch, check_like, check_nhwc, is_interpreted
from fastres.kernels.pairs import in_pairs, interleaved
from fastres.kernels.quantised import (
    ANY_DTYPES,
    bias_dtypes,
    by_steps,
    check_product,
    epilogue_arguments,
    is_bytes,
    result_dtypes,
)
from fastres.kernels.tiles.box_choice import choose_box_tile
from fastres.kernels.tiles.boxes import (
    BoxTile,
    Projection,
    counter_bytes,
    refusal,
    tile_refusal,
    walk_shape,
    workspace_bytes,
)


def conv2d_tma_cost(
    shape: ConvShape,
    itemsize: int,
    projection: Projection | None = None,
    *,
    residual: bool = False,
) -> Cost:
    """FLOPs and compulsory bytes of one call; a strided 1x1 reads only the pixels it needs.

    Args:
        itemsize: bytes of an element of x, x2, weight, residual and y; the bias is left out, and
            so are the parts of a split depth, which stay in L2.
    """
    walk = walk_shape(shape, projection)
    channels2 = 0 if projection is None else projection.channels
    m, depth = shape.n * shape.p * shape.q, shape.r * shape.s * shape.c + channels2
    x = walk.n * walk.h * walk.w * shape.c + m * channels2
    y = m * shape.k * (2 if residual else 1)
    return Cost(2 * m * shape.k * depth, itemsize * (x + shape.k * depth + y))


def pack_weight(weight: torch.Tensor, weight2: torch.Tensor | None = None) -> torch.Tensor:
    """One matrix [K, R*S*C + C2] of weight [K, R, S, C] and the projection's weight2 [K, C2].

    Rows of 8 bits are interleaved: see `fastres.kernels.pairs`.

    Raises:
        ValueError: weights that do not fit together.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [K, R, S, C]")
    matrix = weight.flatten(1)
    if weight2 is not None:
        check_like("weight2", weight2, (len(weight), weight2.shape[-1]), weight, [weight.dtype])
        matrix = torch.cat([matrix, weight2], 1)
    return interleaved(matrix)


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
    scale: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: BoxTile | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """Convolution with a merged projection, bias, residual and activation in its epilogue.

    y[n, p, q, k] = act(sum_rsc x[n, p*u + r*d - h0, q*v + s*e - w0, c] * weight[k, r, s, c]
                        + sum_c x2[n, p*u2, q*v2, c] * weight2[k, c]
                        + bias[k] + residual[n, p, q, k])

    with (u, v) the stride, (u2, v2) stride2, (d, e) the dilation, (h0, w0) the padding, and zero
    outside x. Every tensor starts at a multiple of 16 bytes. Of int8 and fp8 the first sum is
    scaled by scale[k], and gets the bias before the second, scaled by scale2[k], is added; the
    residual is scaled by residual_scale and what the activation gives by out_scale.

    Args:
        x: [N, H, W, C] int8, fp8 e4m3, fp16, bf16 or, with allow_tf32, fp32, contiguous; C a
            multiple of 16, of 8 bits 32. For a filter of several taps at stride 1 only channels
            must be packed: the other strides are free multiples of 16 bytes.
        weight: [K, R, S, C] of x's dtype; K a multiple of 8, of 8 bits 16.
        bias: [K] fp32 or of x's dtype, contiguous; fp32 for 8 bits.
        stride: (1, 1), or (2, 2) where H and W are even; any for a 1x1 without padding.
        x2: [N, H2, W2, C2] of x's dtype, contiguous, with P = ceil(H2/u2) and Q = ceil(W2/v2).
        weight2: [K, C2] of x's dtype, contiguous; goes with x2.
        residual: [N, P, Q, K] of x's dtype, or a float for 8 bits, contiguous.
        scale, scale2: [K] fp32, contiguous, for 8 bits; scale2 goes with x2.
        residual_scale, out_scale: for 8 bits; 1 / the output's scale where it is 8 bits as well.
        out: [N, P, Q, K] of x's dtype, or a float for 8 bits, contiguous; allocated when None.
        tile: how to cut the work; chosen from shape and device when None.
        allow_tf32: for fp32, tensor cores, which cut off what `reference.round_tf32` rounds.

    Returns:
        [N, P, Q, K], of x's dtype unless out is given.

    Raises:
        ValueError: operands that do not fit together, or that `boxes.refusal` refuses.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_nhwc("x", x, ANY_DTYPES)
    if (x2 is None) != (weight2 is None):
        raise ValueError("x2 and weight2 go together, found one of them alone")
    matrix = pack_weight(weight, weight2)
    n, h, w, c = x.shape
    k, r, s, _ = weight.shape
    shape = ConvShape(n, h, w, c, k, r, s, stride, padding, dilation)
    projection = None if x2 is None else Projection(x2.shape[-1], stride2)
    target = target_of(x.device)
    if out is None:
        out = torch.empty((n, shape.p, shape.q, k), dtype=x.dtype, device=x.device)
    if tile is None:
        size = _result_itemsize(out, residual)
        fp8 = x.dtype == torch.float8_e4m3fn
        added = residual is not None
        tile = choose_box_tile(shape, x.element_size(), target, projection, size, fp8, added)
    for launch in conv2d_tma_launches(
        x,
        matrix,
        bias,
        residual,
        out,
        shape=shape,
        target=target,
        x2=x2,
        stride2=stride2,
        activation=activation,
        scale=scale,
        scale2=scale2,
        residual_scale=residual_scale,
        out_scale=out_scale,
        tile=tile,
        allow_tf32=allow_tf32,
        **new_parts(shape, tile, x, projection),
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
    scale: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    tile: BoxTile | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    allow_tf32: bool = False,
) -> tuple[Launch, ...]:
    """The calls `conv2d_tma` makes, not yet made; tensors may be on the meta device.

    Args:
        weight: [K, R*S*C + C2], as `pack_weight` gives it.
        shape: sizes of the convolution, as x and weight have them.
        target: the GPU it is meant for.
        workspace: fp32, for int8 int32, contiguous, of at least `workspace_bytes` bytes.
        counters: int32, contiguous, of at least `counter_bytes` bytes, all 0, as the launch leaves
            them; no two launches may use the same at a time.

    Returns:
        One launch; two where a second kernel adds the parts of a split depth; none for an empty
        batch.

    Raises:
        ValueError: operands that do not fit together, or that `boxes.refusal` refuses.
    """
    check_nhwc("x", x, ANY_DTYPES)
    strided = shape.stride == (1, 1) and walk_shape(shape) == shape  # x is seen as it is
    sizes = (shape.n, shape.h, shape.w, shape.c)
    check_like("x", x, sizes, x, [x.dtype], contiguous=not strided)
    projection = None
    if x2 is not None:
        projection = _projection(x2, stride2, x, shape)
    elif stride2 != (1, 1):
        raise ValueError(f"stride2 is {stride2} with no x2")
    reason = refusal(shape, x.dtype, target, projection, allow_tf32=allow_tf32)
    if reason is not None:
        raise ValueError(f"the descriptor kernel cannot take this convolution: {reason}")
    channels2 = 0 if projection is None else projection.channels
    depth = shape.r * shape.s * shape.c + channels2
    check_product(x.dtype, depth, target)
    y_shape = (shape.n, shape.p, shape.q, shape.k)
    check_like("weight", weight, (shape.k, depth), x, [x.dtype])
    check_like("out", out, y_shape, x, result_dtypes(x.dtype))
    if bias is not None:
        check_like("bias", bias, (shape.k,), x, bias_dtypes(x.dtype))
    if residual is not None:
        check_like("residual", residual, y_shape, x, result_dtypes(x.dtype))
    if (scale2 is not None) != (is_bytes(x.dtype) and x2 is not None):
        raise ValueError("scale2 goes with an x2 of 8 bits, found one of them alone")
    if scale2 is not None:
        check_like("scale2", scale2, (shape.k,), x, [torch.float32])
    scales = (scale, residual, residual_scale, out_scale)
    epilogue = epilogue_arguments(x.dtype, x, shape.k, *scales)
    itemsize, size = x.element_size(), _result_itemsize(out, residual)
    fp8 = x.dtype == torch.float8_e4m3fn
    if tile is None:
        added = residual is not None
        tile = choose_box_tile(shape, itemsize, target, projection, size, fp8, added)
    reason = tile_refusal(tile, shape, itemsize, target, projection, size, fp8)
    if reason is not None:
        raise ValueError(f"tile {tile} cannot run this convolution: {reason}")
    if shape.n == 0:
        return ()

    walk = walk_shape(shape, projection)
    grid, box = (walk.n, walk.p, walk.q), (tile.tn, tile.th, tile.tw)
    second: tuple[Launch, ...] = ()
    y = descriptor("out", *in_pairs(out.view(*grid, shape.k), (*box, tile.block_n)))
    memory: dict[str, torch.Tensor] = {}  # of a sum that the last part's program takes
    if tile.split_k > 1:
        size = workspace_bytes(shape, tile, projection)
        parts = room_in("workspace", workspace, size, sum_dtype(x.dtype), tile, x)
    if tile.last_adds:
        size = counter_bytes(shape, tile, projection)
        counted = room_in("counters", counters, size, torch.int32, tile, x)
        memory = {"parts_ptr": parts, "counters_ptr": counted}
    elif tile.split_k > 1:
        view = parts.view(tile.split_k, *grid, shape.k)
        y = descriptor("workspace", view, (1, *box, tile.block_n))
        flat = None if residual is None else residual.view(-1, shape.k)
        second = (
            sum_parts_launch(
                parts.view(tile.split_k, -1, shape.k),
                bias,
                flat,
                out.view(-1, shape.k),
                activation=activation,
                scale=scale,
                residual_scale=residual_scale,
                out_scale=out_scale,
            ),
        )
        bias = residual = activation = None  # they are the second kernel's
        epilogue = dict.fromkeys(epilogue)
    boxes = tile.boxes(walk)
    flatten = tile.flattens(
        walk, target, itemsize, projection, residual=residual is not None, result_itemsize=size
    )
    product = Launch(
        kernel=conv2d_tma_kernel,
        programs=tile.programs(walk, target),
        arguments={
            "x": input_boxes(x, shape, walk, tile),
            "x2": None if x2 is None else pixel_boxes("x2", x2, stride2, walk, tile),
            "weight": descriptor("weight", weight, (tile.block_n, tile.block_k)),
            "weight_ptr": weight,
            "scale2_ptr": scale2,
            "bias_ptr": bias,
            "residual": None
            if residual is None
            else descriptor(
                "residual", *in_pairs(residual.view(*grid, shape.k), (*box, tile.block_n))
            ),
            "y": y,
            "parts_ptr": None,
            "counters_ptr": None,
            "TILES": tile.tiles(walk),
            "BOXES_N": boxes[0],
            "BOXES_P": boxes[1],
            "BOXES_Q": boxes[2],
            **epilogue,
            **memory,
        },
        constants={
            "C": shape.c,
            "C2": channels2,
            "K": shape.k,
            "R": shape.r,
            "S": shape.s,
            "STRIDE": walk.stride[0],
            "PAD_H": walk.padding[0],
            "PAD_W": walk.padding[1],
            "DILATION_H": walk.dilation[0],
            "DILATION_W": walk.dilation[1],
            "ACTIVATION": activation,
            "INPUT_PRECISION": "tf32" if x.dtype == torch.float32 else "ieee",
            "WIDEN": x.dtype == torch.bfloat16 and is_interpreted(conv2d_tma_kernel),
            "BY_STEPS": by_steps(x.dtype, tile.depth(shape, projection), target),
            "BOX_N": tile.tn,
            "BOX_P": tile.th,
            "BOX_Q": tile.tw,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "SPLIT_K": tile.split_k,
            "FLATTEN": flatten,
            "ROUND_TF32": False,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=not is_bytes(x.dtype),
        cost=conv2d_tma_cost(shape, x.element_size(), projection, residual=residual is not None),
    )
    return (product, *second)


def _projection(x2: torch.Tensor, stride: Pair, x: torch.Tensor, shape: ConvShape) -> Projection:
    check_nhwc("x2", x2, [x.dtype])
    check_like("x2", x2, (shape.n, *x2.shape[1:]), x, [x.dtype])
    if min(stride) < 1:
        raise ValueError(f"stride2 is {stride}, expected at least 1")
    pixels = (triton.cdiv(x2.shape[1], stride[0]), triton.cdiv(x2.shape[2], stride[1]))
    if pixels != (shape.p, shape.q):
        raise ValueError(
            f"x2 has {x2.shape[1]}x{x2.shape[2]} pixels, {pixels[0]}x{pixels[1]} at stride2 "
            f"{stride}; expected {shape.p}x{shape.q}, as the output has"
        )
    return Projection(x2.shape[3], stride)


def _result_itemsize(out: torch.Tensor, residual: torch.Tensor | None) -> int:
    return max(v.element_size() for v in (out, residual) if v is not None)
