"""Data of the wrong kind, told from what it looks like: what was found, and what to do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fastres.graph.copies import copied
from fastres.options import Input, Sizes

Fits = Callable[[Sizes], bool]
_FEW = (1, 3, 4)  # channels that a picture may have
_WHOLE = "give batches, such as torch.stack(images) or DataLoader(dataset, batch_size=8)"


def wrong_kind(x: torch.Tensor, fits: Fits) -> str:
    """What is wrong with a batch of inputs and what to do about it; empty if nothing is known.

    Args:
        fits: whether the model takes a batch of this shape.
    """
    shape = tuple(x.shape)
    if x.is_floating_point():
        return "" if fits(shape) else _advice(shape, fits)
    last = len(shape) > 2 and shape[-1] in _FEW and shape[-3] not in _FEW
    name = "x"
    if last:
        name = "x.permute(0, 3, 1, 2)" if len(shape) == 4 else "x.permute(2, 0, 1)"
    what = "decoded pictures" if x.dtype == torch.uint8 and len(shape) > 2 else "no floating point"
    text = (
        f"{what}{', channels last' if last else ''}; give what the model is fed, normalised as in "
        f"training: ({name}.float() / 255 - mean) / std, or a folder of pictures with preprocess="
    )
    return f"{text}; {_WHOLE}" if len(shape) == 3 else text


def _advice(shape: Sizes, fits: Fits) -> str:
    """The first way to make it fit."""
    return next((text for changed, text in _changes(shape) if fits(changed)), "")


def _changes(shape: Sizes) -> Iterator[tuple[Sizes, str]]:
    """What a batch may have been meant to be, and how it becomes that."""
    if len(shape) == 5:
        yield shape[1:], "it is several batches in one: give x.flatten(0, 1)"
    if len(shape) == 4:
        n, c, h, w = shape
        yield (n, w, c, h), "its channels are last: give x.permute(0, 3, 1, 2)"
        for channels, size, first in ((c, (h, w), "x"), (w, (c, h), "x.permute(0, 3, 1, 2)")):
            many = "pictures are gray, and the model takes colours: give "
            if channels == 1:
                yield (n, 3, *size), f"{many}{first}.expand(-1, 3, -1, -1)"
            if channels == 3:
                yield (n, 1, *size), f"pictures are in colour: give {first}.mean(1, keepdim=True)"
            if channels == 4:
                yield (n, 3, *size), f"pictures have an alpha channel: give {first}[:, :3]"
    if len(shape) == 3:
        a, b, c = shape
        yield (1, a, b, c), f"it is a single image: {_WHOLE}"
        yield (1, c, a, b), f"it is a single image, channels last: x.permute(2, 0, 1), and {_WHOLE}"
        yield (a, 1, b, c), "the dimension of channels is missing: give x.unsqueeze(1)"
    if len(shape) == 2:
        yield (1, 1, *shape), f"it is a single image without channels: x[None], and {_WHOLE}"


def taken_by(entry: Input) -> Fits:
    """Whether a shape lies within what an input may be; its batch may be anything."""

    def fits(shape: Sizes) -> bool:
        bounds = zip(entry.smallest[1:], shape[1:], entry.largest[1:], strict=False)
        return len(shape) == len(entry.usual) and all(low <= s <= high for low, s, high in bounds)

    return fits


def runs_in(model: torch.nn.Module) -> Fits:
    """Whether a model runs on a batch of some shape, found out without any values.

    Only shapes that its first convolution would not take as they are, are tried; what the model
    does in front of it may make them fit. A shape of rank 3 is tried with another batch size, as a
    convolution would take it for a single image.
    """
    first = next((m for m in model.modules() if isinstance(m, torch.nn.Conv2d)), None)

    def fits(shape: Sizes) -> bool:
        if first is None or (len(shape) == 4 and shape[1] == first.in_channels):
            return True
        return _runs(model, (shape[0] + 1, *shape[1:]) if len(shape) == 3 else shape)

    return fits


def _runs(model: torch.nn.Module, shape: Sizes) -> bool:
    x = torch.empty(shape, dtype=floating_dtype(model, torch.float32), device="meta")
    try:
        with torch.no_grad():
            copied(model, device="meta")(x)
    except Exception:  # a model may raise anything
        return False
    return True


def floating_dtype(model: torch.nn.Module, given: torch.dtype) -> torch.dtype:
    """What a model computes in: the dtype that is given where some parameter has it."""
    found = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return given if given in found or not found else found[0]


def listed(tensors: Sequence[torch.Tensor]) -> str:
    """Dtypes and shapes as messages show them."""
    return ", ".join(f"{x.dtype}".removeprefix("torch.") + str(list(x.shape)) for x in tensors)
