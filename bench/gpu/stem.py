"""The section `stem`: the 7x7 stem in its three forms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.answers import answer
from bench.gpu.run import Row, Run
from fastres.backends.triton.running.timing import milliseconds
from fastres.kernels.conv2d import conv2d_launch, conv2d_tma_launches
from fastres.kernels.cost import target_of
from fastres.kernels.folding import ROW, TAPS, pack_stem_weight, stem_shape
from fastres.kernels.geometry import ConvShape
from fastres.kernels.layout import to_nhwc
from fastres.kernels.space_to_depth import space_to_depth
from fastres.kernels.stem import stem_launch
from fastres.kernels.tiles.box_choice import box_candidates, box_seconds
from fastres.tolerances import errors


def stem(run: Run) -> Iterator[Row]:
    """The 7x7 stem: over pixels, over folded pixels, and folded through overlapping boxes.

    Whether the driver takes a tensor map whose pixels overlap is one of the first questions. That
    form is no engine's: it multiplies the folding's zeros by NaN and infinities (`jit.taps`).
    """
    generator = torch.Generator(run.device).manual_seed(0)
    for batch in run.batch_sizes:
        size = (batch, 3, run.image_size, run.image_size)
        x = torch.randn(size, generator=generator, device=run.device).half()
        weight = torch.randn(64, 3, 7, 7, generator=generator, device=run.device).half() / 12
        bias = torch.randn(64, generator=generator, device=run.device)
        with torch.backends.cudnn.flags(enabled=False):
            exact = F.conv2d(x[:2].double(), weight.double(), bias.double(), 2, 3).relu()
        for form in ("pixels", "folded", "overlapping boxes"):
            name = f"stem batch {batch}, {form}"
            if (yield {"name": name, "asked": True}):
                continue
            work = partial(_stem, form, x, weight, bias, exact, run)
            yield from answer(name, run.device, work)


def _stem(form: str, x: Tensor, weight: Tensor, bias: Tensor, exact: Tensor, run: Run) -> Row:
    n, p, q, k = len(x), x.shape[2] // 2, x.shape[3] // 2, len(weight)
    out = torch.full((n, p, q, k), float("nan"), dtype=x.dtype, device=x.device)
    target = target_of(x.device)
    if form == "pixels":
        pixels, filters = to_nhwc(x), weight.permute(0, 2, 3, 1).contiguous()
        shape = ConvShape(n, *x.shape[2:], 3, k, 7, 7, (2, 2), (3, 3))
        launch = conv2d_launch(
            pixels, filters, bias, None, out, shape=shape, target=target, activation="relu"
        )
    elif form == "folded":
        folded, filters = space_to_depth(x), pack_stem_weight(weight)
        launch = stem_launch(folded, filters, bias, out, target=target)
    else:
        folded, filters, shape = space_to_depth(x), pack_stem_weight(weight), stem_shape(n, p, q, k)
        rows = folded.as_strided((n, p + TAPS - 1, q, ROW), folded.stride())
        boxes = [box for box in box_candidates(shape, 2, target) if box.split_k == 1]
        tile = min(boxes, key=lambda box: box_seconds(box, shape, 2, target))
        (launch,) = conv2d_tma_launches(
            rows, filters, bias, None, out, shape=shape, target=target, activation="relu", tile=tile
        )
    launch.run()
    found = errors(out[:2].permute(0, 3, 1, 2), exact)
    if found.rms > 1e-3 or bool(torch.isnan(out).any()):
        return {"right": False, "error": str(found)}
    return {"right": True, "rms": found.rms, "us": 1e3 * milliseconds(launch.run, run.device)}
