"""Why torch.export failed, in words to act on: where in the model, and what to give instead."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.errors import is_interrupt

_OURS = tuple(str(Path(package).parent) for package in (torch.__file__, __file__))
# PyTorch has no public names for errors that say "this depends on values"
_BY_VALUES = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "UserError",
    "Unsupported",
)
_AMBIGUOUS = "Boolean value of Tensor"
_HIDDEN = "fake tensor in the exported program"  # made where the exporter does not look
_OUTSIDE = (".numpy()", "data pointer")  # of a RuntimeError where a model leaves PyTorch
_UNKNOWN_TYPE = "not a known type"
_LONGEST = 160  # characters of somebody else's message
_MOST = 4  # parameters of a forward that are listed
_IMAGE = 4  # dimensions


def explained(
    model: nn.Module, examples: Sequence[torch.Tensor], error: Exception, after: str = ""
) -> str:
    """
    Args:
        model: as it was exported, with `examples`.
        error: what torch.export raised: its own, or whatever the model's code raises.
        after: the line of the model that was traced last, if nothing else says where.
    """
    name = type(model).__name__
    start = f"torch.export cannot export {name} for inputs {[list(e.shape) for e in examples]}"
    takes = f"{name}.forward takes {_signature(model)}"
    if not _binds(model, examples):
        return (
            f"{start}: {takes}. Give one example for each input that it needs, in order; a model "
            "that is called by names alone is exported first, by torch.export.export"
        )
    where = _place(error) or after
    said = next(iter(str(error).strip().splitlines()), "")
    if where and type(error).__name__ in _BY_VALUES:
        said = ""  # it would name symbols that stand nowhere else
    short = f"{said[:_LONGEST]}..." if len(said) > _LONGEST else said.rstrip(". ")
    kind = type(error).__name__ + (f": {short}" if short else "")
    advice = _advice(model, examples, error) or (
        f"{takes}. If model(x) fails as well, give an example of the size, channels and dtype that "
        "the model was made for, and of nothing but tensors"
    )
    return f"{start}: {kind}{f' (at {where})' if where else ''}. {advice}"


def _place(error: BaseException | None) -> str:
    """The innermost line of code that is neither PyTorch's nor ours, as "FILE:LINE `code`"."""
    found = ""
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            if not frame.filename.startswith((*_OURS, "<")):
                found = f"{frame.filename}:{frame.lineno} `{(frame.line or '').strip()}`"
        error = error.__cause__ or error.__context__
    return found


def _advice(model: nn.Module, examples: Sequence[torch.Tensor], error: Exception) -> str:
    """What to do about an error of a known kind; empty for the others."""
    said = str(error)
    if type(error).__name__ in _BY_VALUES or _AMBIGUOUS in said:
        parts = _parts(model, examples) or (
            "Rewrite that line (a number that a buffer holds can be an attribute, as a float), or "
            "compile the part before it"
        )
        return f"It decides by values; an engine's control flow does not depend on values. {parts}"
    if _UNKNOWN_TYPE in said:
        return (
            "Return tensors in tuples, lists, dicts or namedtuples, or register the class, such as "
            "by torch.export.register_dataclass"
        )
    if _HIDDEN in said:
        return "It takes a tensor out of PyTorch's sight, as x.data does: write x.detach()"
    if any(sign in said for sign in _OUTSIDE):
        return "There the model leaves PyTorch: write that part with operations of PyTorch"
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    other = [e.dtype for e in examples if e.is_floating_point() and e.dtype != dtype]
    if other and dtype is not None:
        return f"The example is {other[0]}, the weights are {dtype}: give an example in theirs"
    if any(e.dim() == _IMAGE - 1 for e in examples) and _takes_pictures(model):
        return "The example has no batch dimension: give x[None]"
    size = _made_for(model)
    if size and examples[0].dim() == _IMAGE and tuple(examples[0].shape[2:]) != size:
        shape = (1, examples[0].shape[1], *size)
        return (
            f"The model says that it was made for pictures of {size[0]}x{size[1]}: give an example "
            f"of that size, torch.randn{shape}"
        )
    return _parts(model, examples) if isinstance(error, TypeError) else ""


def _takes_pictures(model: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in model.modules())


def _signature(model: nn.Module) -> str:
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # it is not written in Python
        return "(...)"
    shown = [str(p) for p in parameters[:_MOST]] + ["..."] * (len(parameters) > _MOST)
    return f"({', '.join(shown)})"


def _binds(model: nn.Module, examples: Sequence[torch.Tensor]) -> bool:
    """Whether a forward can be called with so many inputs."""
    try:
        inspect.signature(model.forward).bind(*examples)
    except TypeError:
        return False
    except ValueError:  # not written in Python: unknown
        pass
    return True


def _made_for(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that a model was made for, by its own account."""
    for name in ("pretrained_cfg", "default_cfg"):  # timm's
        config: Any = getattr(model, name, None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        if size:
            return int(size[-2]), int(size[-1])
    for owner in (model, getattr(model, "config", None)):  # torchvision's, transformers'
        for name in ("image_size", "img_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int):
                return size, size
            if isinstance(size, tuple | list) and len(size) == 2:
                return int(size[0]), int(size[1])
    return None


def _parts(model: nn.Module, examples: Sequence[torch.Tensor]) -> str:
    """The submodules that take one picture, as a detection network's backbone does.

    The model runs once more, on stand-ins for tensors, until it fails; hooks of its own run, too.
    """
    names = {part: name for name, part in model.named_modules() if name and any(part.children())}
    found: dict[str, None] = {}

    def note(part: nn.Module, given: Any) -> None:
        image: Any = given[0] if len(given) == 1 else None
        fits = isinstance(image, torch.Tensor) and image.dim() == _IMAGE
        if fits and part in names and image.shape[1] == examples[0].shape[1]:
            found[names[part]] = None

    if examples[0].dim() != _IMAGE:
        return ""
    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            model(*(mode.from_tensor(example) for example in examples))
    except Exception as error:  # as it did before: the model's code may raise anything
        if is_interrupt(error):
            raise KeyboardInterrupt from error
    finally:
        handle.remove()
    if not found:
        return ""
    first, *rest = found
    others = f", or {', '.join(repr(name) for name in rest[:2])}" if rest else ""
    return f"Its part {first!r} takes one picture: compile that, model.{first}{others}"
