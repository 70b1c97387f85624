"""bottleneck_chain: a bottleneck's 3x3 and last 1x1, and the next one's first 1x1, in one kernel.

b = act(conv3x3(a, w2) + b2);  out = act(b . w3 + shortcut + b3);  a_next = act(out . w1 + b1)

NHWC activations, KRSC weights, fp32 or, of int8, int32 accumulate. b never leaves the SM, and out
is written once and multiplied by w1 before it is forgotten. Everything moves in boxes through the
copy engine (TMA), whose zeros beyond the edges are the padding.
Source: the boxes are those of TMA's implicit GEMM; products are transposed, [channels, pixels],
because a box that was reshaped feeds the tensor cores from shared memory only as the right operand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.bottleneck_chain_jit import bottleneck_chain_kernel
from fastres.kernels.cost import Target, target_of
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.launch import Argument, Launch, check_like, check_nhwc, is_interpreted
from fastres.kernels.pairs import in_pairs, interleaved
from fastres.kernels.quantised import ANY_DTYPES, bias_dtypes, by_steps, factor, is_bytes
from fastres.kernels.tiles.chain import (
    DEPTH,
    ChainShape,
    ChainTile,
    chain_cost,
    choose_chain_tile,
    is_valid,
    refusal,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class ChainScales:
    """What a chain of 8 bits is scaled by; see `fastres.kernels.quantised`.

    Args:
        w2, w3, w1: [MID], [KO] and [NEXT_MID] fp32, contiguous: of the sums of b, out and a_next.
        projection: [KO] fp32, contiguous: of the projection's own sum.
        residual: of the shortcut where it is a residual.
        b, out, a_next: 1 / the scale of each.
    """

    w2: torch.Tensor
    w3: torch.Tensor
    w1: torch.Tensor | None = None
    projection: torch.Tensor | None = None
    residual: float = 1.0
    b: float = 1.0
    out: float = 1.0
    a_next: float = 1.0


def bottleneck_chain(
    a: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    shortcut: torch.Tensor,
    w1: torch.Tensor | None = None,
    *,
    b2: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    b1: torch.Tensor | None = None,
    stride: int = 1,
    shortcut_stride: int = 1,
    activation: ActivationKind | None = "relu",
    scales: ChainScales | None = None,
    out: torch.Tensor | None = None,
    a_next: torch.Tensor | None = None,
    tile: ChainTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One bottleneck boundary.

    b = act(conv3x3(a, w2, stride, padding 1) + b2)
    out = act(b . w3 + b3 + shortcut)  or, projected,  act([b; x] . w3 + b3)
    a_next = act(out . w1 + b1)

    with x the shortcut at every `shortcut_stride`-th pixel. b and out are rounded to a's dtype
    before they are multiplied, as separate kernels round them; a projection is not rounded by
    itself.

    Args:
        a: [N, H, W, MID] fp16, bf16, int8 or fp8 e4m3, what the block's first 1x1 gave. All tensors
            are contiguous and, biases and scales apart, of a's dtype and 16-byte aligned.
        w2: [MID, 3, 3, MID].
        w3: [KO, 1, 1, MID], or [KO, 1, 1, MID + CX]: the projection's columns come last.
        shortcut: [N, P, Q, KO], or with such columns the block's input [N, ., ., CX].
        w1: [NEXT_MID, 1, 1, KO] of the next block, at stride 1; None ends the chain with out.
        b2, b3, b1: [MID], [KO] and [NEXT_MID] fp32 or of a's dtype; b3 holds the projection's too.
            fp32 for 8 bits.
        stride: of the 3x3, 1 or 2.
        shortcut_stride: of the projection, 1 or 2.
        activation: applied to all three.
        scales: of 8 bits.
        out, a_next: [N, P, Q, KO] and [N, P, Q, NEXT_MID]; allocated when None.
        tile: how to cut the work; chosen from shape and device when None.

    Returns:
        out, and a_next or None.

    Raises:
        ValueError: operands that do not fit together, or a boundary that cannot be chained.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    shape = chain_shape(a, w2, w3, w1, stride=stride, shortcut_stride=shortcut_stride)
    pixels = (shape.n, shape.p, shape.q)
    if out is None:
        out = torch.empty((*pixels, shape.ko), dtype=a.dtype, device=a.device)
    if a_next is None and w1 is not None:
        a_next = torch.empty((*pixels, shape.next_mid), dtype=a.dtype, device=a.device)
    rows = (interleaved(w2), interleaved(w3), None if w1 is None else interleaved(w1))
    operands = (a, *rows[:2], shortcut, rows[2], b2, b3, b1, out, a_next)
    target = target_of(a.device)
    if shape.n == 0:  # no descriptor may be empty
        _check(shape, *operands, target=target)
        _scale_arguments(shape, a, scales)
        return out, a_next
    chain_launch(
        *operands, shape=shape, target=target, activation=activation, scales=scales, tile=tile
    ).run()
    return out, a_next


def chain_shape(
    a: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    w1: torch.Tensor | None,
    *,
    stride: int = 1,
    shortcut_stride: int = 1,
) -> ChainShape:
    """The sizes of a chain, as its operands have them.

    Raises:
        ValueError: operands of the wrong rank, or sizes that no chain has.
    """
    check_nhwc("a", a, ANY_DTYPES)
    n, h, w, mid = a.shape
    for name, weight in (("w2", w2), ("w3", w3), ("w1", w1)):
        if weight is not None and weight.ndim != 4:
            raise ValueError(f"{name} has shape {list(weight.shape)}, expected [K, R, S, C]")
    ko, projected = w3.shape[0], w3.shape[3] - mid
    if projected < 0:
        raise ValueError(f"w3 has shape {list(w3.shape)}, expected at least a's {mid} channels")
    next_mid = 0 if w1 is None else w1.shape[0]
    return ChainShape(n, h, w, mid, ko, next_mid, projected, stride, shortcut_stride)


def chain_launch(
    a: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    shortcut: torch.Tensor,
    w1: torch.Tensor | None,
    b2: torch.Tensor | None,
    b3: torch.Tensor | None,
    b1: torch.Tensor | None,
    out: torch.Tensor,
    a_next: torch.Tensor | None,
    *,
    shape: ChainShape,
    target: Target,
    activation: ActivationKind | None = "relu",
    scales: ChainScales | None = None,
    tile: ChainTile | None = None,
) -> Launch:
    """The call `bottleneck_chain` makes, not yet made; tensors may be on the meta device.

    Args:
        w2, w3, w1: of 8 bits with their rows interleaved, see `fastres.kernels.pairs`.
        shape: sizes of the chain, from `chain_shape`.
        target: the GPU it is meant for.

    Raises:
        ValueError: operands that do not fit together, a boundary that cannot be chained, a tile
            that does not fit it, or an empty batch.
    """
    _check(shape, a, w2, w3, shortcut, w1, b2, b3, b1, out, a_next, target=target)
    if shape.n == 0:
        raise ValueError("the batch is 0, expected at least 1: descriptors have no empty form")
    scale_arguments = _scale_arguments(shape, a, scales)
    itemsize = a.element_size()
    if tile is None:
        tile = choose_chain_tile(shape, itemsize, target)
    elif not is_valid(tile, shape, itemsize, target):
        raise ValueError(
            f"tile {tile} does not fit {shape}: {tile.shared_bytes(shape, itemsize)} bytes of "
            f"shared memory of {target.shared_bytes}, {tile.accumulators(shape, itemsize)} "
            f"accumulators of 128, chunks of {tile.chunk} of {shape.ko} channels"
        )
    box = tile.box
    step = shape.shortcut_stride
    conv3, projection = w3.view(shape.ko, -1).split([shape.mid, shape.projected], dim=1)
    return Launch(
        kernel=bottleneck_chain_kernel,
        programs=tile.programs(shape),
        arguments={
            "a_desc": _input_boxes(a, shape.stride, box),
            "w2_desc": _boxes(w2.view(shape.mid, -1), (shape.mid, DEPTH)),
            "b2_ptr": b2,
            "w3_desc": _boxes(conv3, (tile.chunk, shape.mid)),
            "projection_desc": _boxes(projection, (tile.chunk, shape.projected))
            if shape.projected
            else None,
            "b3_ptr": b3,
            "shortcut_desc": _boxes(shortcut[:, ::step, ::step], (*box, shape.projected))
            if shape.projected
            else _boxes(*in_pairs(shortcut, (*box, tile.chunk))),
            "out_desc": _boxes(*in_pairs(out, (*box, tile.chunk))),
            "w1_desc": None
            if w1 is None
            else _boxes(w1.view(shape.next_mid, -1), (shape.next_mid, tile.chunk)),
            "b1_ptr": b1,
            "next_desc": None
            if a_next is None
            else _boxes(*in_pairs(a_next, (*box, shape.next_mid))),
            "w2_ptr": w2,
            "w3_ptr": w3,
            "w1_ptr": w1,
            "TILES_P": -(-shape.p // box[1]),
            "TILES_Q": -(-shape.q // box[2]),
            **scale_arguments,
        },
        constants={
            "MID": shape.mid,
            "KO": shape.ko,
            "NEXT_MID": shape.next_mid,
            "PROJECTED": shape.projected,
            "STRIDE": shape.stride,
            "ACTIVATION": activation,
            "WIDEN": a.dtype == torch.bfloat16 and is_interpreted(bottleneck_chain_kernel),
            "BY_STEPS": by_steps(a.dtype, 9 * shape.mid, target),
            "NEXT_BY_STEPS": by_steps(a.dtype, shape.ko, target),
            "BOX_N": box[0],
            "BOX_P": box[1],
            "BOX_Q": box[2],
            "DEPTH": DEPTH,
            "CHUNK": tile.chunk,
            "CONV_STAGES": tile.num_stages,
            "CHUNK_STAGES": tile.chunk_stages,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=scales is None,
        cost=chain_cost(shape, a.element_size()),
    )


def _scale_arguments(
    shape: ChainShape, a: torch.Tensor, scales: ChainScales | None
) -> dict[str, Argument]:
    """The kernel's scales, checked; None where absent."""
    if (scales is not None) != is_bytes(a.dtype):
        raise ValueError(
            f"scales are {scales}, expected ChainScales for 8 bits only: a is {a.dtype}"
        )
    if scales is None:
        tensors = ("scale2_ptr", "scale3_ptr", "projection_scale_ptr", "scale1_ptr")
        return dict.fromkeys((*tensors, "b_scale", "residual_scale", "out_scale", "next_scale"))
    for name, scale, size in (
        ("w2", scales.w2, shape.mid),
        ("w3", scales.w3, shape.ko),
        ("projection", scales.projection, shape.ko if shape.projected else 0),
        ("w1", scales.w1, shape.next_mid),
    ):
        if (scale is not None) != (size > 0):
            found = "missing" if scale is None else "given"
            raise ValueError(f"the scale of {name} is {found}, expected one where {name} is given")
        if scale is not None:
            check_like(f"the scale of {name}", scale, (size,), a, [torch.float32])
    if shape.projected and scales.residual != 1.0:
        raise ValueError(f"the residual's scale is {scales.residual} with a projection, expected 1")
    return {
        "scale2_ptr": scales.w2,
        "scale3_ptr": scales.w3,
        "projection_scale_ptr": scales.projection,
        "scale1_ptr": scales.w1,
        "b_scale": factor("the scale of b", scales.b),
        "residual_scale": factor("the residual's scale", scales.residual),
        "out_scale": factor("the scale of out", scales.out),
        "next_scale": factor("the scale of a_next", scales.a_next),
    }


def _boxes(x: torch.Tensor, box: Sequence[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box))


def _input_boxes(a: torch.Tensor, stride: int, box: tuple[int, int, int]) -> TensorDescriptor:
    """a's boxes of DEPTH channels; at stride 2 by pairs of rows and of columns.

    A tap of a stride-2 filter meets every second row and column: one row of each pair, and one
    half of the two neighbouring pixels' channels. So [N, H/2, 2, W/2, 2C] has it as a plain box.
    """
    if stride == 1:
        return _boxes(a, (*box, DEPTH))
    n, h, w, c = a.shape
    images, rows, columns = box
    return _boxes(a.view(n, h // 2, 2, w // 2, 2 * c), (images, rows, 1, columns, DEPTH))


def _check(
    shape: ChainShape,
    a: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    shortcut: torch.Tensor,
    w1: torch.Tensor | None,
    b2: torch.Tensor | None,
    b3: torch.Tensor | None,
    b1: torch.Tensor | None,
    out: torch.Tensor,
    a_next: torch.Tensor | None,
    *,
    target: Target,
) -> None:
    if a.dtype not in _DTYPES:
        raise ValueError(f"a has dtype {a.dtype}, expected one of {_DTYPES}")
    reason = refusal(shape, a.element_size(), target)
    if reason:
        raise ValueError(f"this boundary cannot be chained: {reason}")
    if (w1 is None) != (a_next is None):
        raise ValueError("w1 and a_next go together, expected both or neither")
    if w1 is None and b1 is not None:
        raise ValueError("b1 is given without w1")
    pixels = (shape.n, shape.p, shape.q)
    if shape.projected:
        # every height and width that the stride takes to P and Q
        sides = [
            size if -(-size // shape.shortcut_stride) == side else shape.shortcut_stride * side
            for size, side in zip(shortcut.shape[1:3], pixels[1:], strict=False)
        ]
        shortcut_sizes = [shape.n, *sides, shape.projected]
    else:
        shortcut_sizes = [*pixels, shape.ko]
    operands: list[tuple[str, torch.Tensor | None, Sequence[int]]] = [
        ("a", a, (shape.n, shape.h, shape.w, shape.mid)),
        ("w2", w2, (shape.mid, 3, 3, shape.mid)),
        ("w3", w3, (shape.ko, 1, 1, shape.mid + shape.projected)),
        ("shortcut", shortcut, shortcut_sizes),
        ("w1", w1, (shape.next_mid, 1, 1, shape.ko)),
        ("out", out, (*pixels, shape.ko)),
        ("a_next", a_next, (*pixels, shape.next_mid)),
    ]
    for name, tensor, sizes in operands:
        if tensor is not None:
            check_like(name, tensor, sizes, a, [a.dtype])
            if tensor.data_ptr() % 16:
                raise ValueError(
                    f"{name} starts at {tensor.data_ptr():#x}, expected a 16-byte step"
                )
    for name, bias, size in (
        ("b2", b2, shape.mid),
        ("b3", b3, shape.ko),
        ("b1", b1, shape.next_mid),
    ):
        if bias is not None:
            check_like(name, bias, (size,), a, bias_dtypes(a.dtype))
