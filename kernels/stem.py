"""The ImageNet stem, 7x7 stride 2 padding 3, as a dense 4x4 stride 1 product over folded pixels.

Space-to-depth folds 2x2 pixels of up to 4 channels into 16, so that a row of 4 filter taps is 64
contiguous elements: the convolution reads the overlapping view [N, H/2+3, W/2, 64] of the folded
picture with a 4x1 filter, 16 bytes at a time and without a test for the padding, which is stored.

Source: space-to-depth is the stem of the TPU entries to MLPerf Training's ResNet-50.
"""

from dataclasses import replace

import torch

from fastres.kernels.conv2d import conv2d_launch
from fastres.kernels.cost import Cost, Target, target_of
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.folding import FOLDED, ROW, TAPS, stem_shape
from fastres.kernels.launch import Launch, check_like
from fastres.kernels.quantised import ANY_DTYPES
from fastres.kernels.tiles.conv import ConvTile


def stem_cost(n: int, p: int, q: int, k: int, itemsize: int) -> Cost:
    """FLOPs, those with the zeros of the folding included, and compulsory bytes of one call."""
    depth = TAPS * ROW
    x = n * (p + TAPS - 1) * (q + TAPS - 1) * FOLDED
    return Cost(2 * n * p * q * k * depth, itemsize * (x + k * depth + n * p * q * k))


def stem(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: ActivationKind | None = "relu",
    scale: torch.Tensor | None = None,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """A 7x7 stride 2 padding 3 convolution of a folded picture, with bias and activation.

    y[n, p, q, k] = act(sum_rsc packed[n, p + r, q + s, c] * weight[k, 64r + 16s + c] + bias[k])

    The folded filter has an eighth row and column of zeros. A pixel that is NaN or infinite does
    not meet them: it reaches the outputs that see it through the 7x7 taps, as in PyTorch.

    Args:
        packed: [N, P + 3, Q + 3, 16] fp16, bf16, fp32, int8 or fp8 e4m3, contiguous, from
            `space_to_depth`.
        weight: [K, 256] of that dtype, contiguous, from `pack_stem_weight`.
        bias: [K] fp32 or of that dtype, contiguous; fp32 for 8 bits.
        scale, out_scale: of 8 bits, as for `conv2d`.
        out: [N, P, Q, K] of that dtype, or a float for 8 bits, contiguous; allocated when None.
        tile: how to cut the work; chosen from shape and device when None.
        allow_tf32: for fp32, tensor cores, which cut off what `reference.round_tf32` rounds.

    Returns:
        [N, P, Q, K], of packed's dtype unless out is given.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    if out is None:
        n, p, q = output_pixels(packed)
        out = torch.empty((n, p, q, len(weight)), dtype=packed.dtype, device=packed.device)
    launch = stem_launch(
        packed,
        weight,
        bias,
        out,
        activation=activation,
        scale=scale,
        out_scale=out_scale,
        tile=tile,
        allow_tf32=allow_tf32,
        target=target_of(packed.device),
    )
    if out.numel() > 0:
        launch.run()
    return out


def stem_launch(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    target: Target,
    activation: ActivationKind | None = "relu",
    scale: torch.Tensor | None = None,
    out_scale: float = 1.0,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> Launch:
    """The call `stem` makes, not yet made; tensors may be on the meta device.

    Args:
        target: the GPU it is meant for.

    Raises:
        ValueError: operands that do not fit together.
    """
    n, p, q = output_pixels(packed)
    depth = TAPS * ROW
    check_like("weight", weight, (weight.shape[0], depth), packed, [packed.dtype])
    k = len(weight)
    # a row of 4 folded pixels at every folded pixel: neighbours share 3 of them
    rows = packed.as_strided((n, p + TAPS - 1, q, ROW), packed.stride())
    launch = conv2d_launch(
        rows,
        weight.view(k, TAPS, 1, ROW),
        bias,
        None,
        out,
        shape=stem_shape(n, p, q, k),
        folded=True,
        target=target,
        activation=activation,
        scale=scale,
        out_scale=out_scale,
        tile=tile,
        allow_tf32=allow_tf32,
    )
    return replace(launch, cost=stem_cost(n, p, q, k, packed.element_size()))


def output_pixels(packed: torch.Tensor) -> tuple[int, int, int]:
    """N, P and Q of a folded picture."""
    if packed.ndim != 4 or packed.shape[3] != FOLDED or min(packed.shape[1:3]) < TAPS:
        raise ValueError(
            f"packed has shape {list(packed.shape)}, expected [N, P + 3, Q + 3, {FOLDED}]"
        )
    check_like("packed", packed, packed.shape, packed, ANY_DTYPES)
    n, h, w, _ = packed.shape
    return n, h - TAPS + 1, w - TAPS + 1
