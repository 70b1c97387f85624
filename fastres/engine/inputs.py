"""What an engine may be called with: dtype, sizes, device; and how the graph then sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx

from fastres.engine.tracing import refuse, refuse_tracers
from fastres.errors import InputError
from fastres.graph.ir import Graph, Value
from fastres.graph.specs import Sym, TensorSpec
from fastres.options import Input, Options, Sizes
from fastres.weights import oddity

_NHWC = (0, 2, 3, 1)
_NONE = type(None)
_NO_RULES = torch._C._disabled_torch_function_impl
_USUAL_RULES = getattr(torch.Tensor.__torch_function__, "__func__", None)
Layout = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]


class Taken(NamedTuple):
    """An input as the engine is called with it: its spec, and what its sizes range over."""

    name: str
    spec: TensorSpec
    smallest: Sizes
    largest: Sizes

    def __str__(self) -> str:
        return f"{self.name}: {self.spec}"

    def takes(self, sizes: Sequence[int]) -> bool:
        """Whether the sizes of an image, those behind the batch, are accepted."""
        dims = self.spec.shape[1:]
        return len(sizes) == len(dims) and all(
            size == dim if isinstance(dim, int) else low <= size <= high
            for size, dim, low, high in zip(
                sizes, dims, self.smallest[1:], self.largest[1:], strict=True
            )
        )

    @property
    def sizes(self) -> str:
        """What is accepted, in words."""
        parts = []
        for i, dim in enumerate(self.spec.shape):
            ranged = isinstance(dim, Sym) and i > 0
            parts.append(f"{self.smallest[i]}..{self.largest[i]}" if ranged else str(dim))
        return ", ".join(parts)


class EngineInputs:
    """Takes in what an engine is called with.

    Args:
        graph: whose inputs they are. Pictures that it normalises come as they are decoded,
            [N, H, W, 3].
        inputs: the sizes promised, and the names that the model has for them.
        options: settled.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Input], options: Options) -> None:
        self.pictures = graph.normalize is not None
        self.taken = tuple(map(self._taken, graph.inputs, inputs))
        self._options = options
        # the latest, and its span in memory: the usual call is like the one before
        self._accepted: tuple[Layout, int] | None = None

    def planar(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The same tensors as the graph takes them: pictures seen as [N, 3, H, W]."""
        return (inputs[0].permute(0, 3, 1, 2),) if self.pictures else inputs

    def in_order(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The inputs as the model's forward lists them, of which some were given by name.

        None is no input: so models are called that take labels, too.

        Raises:
            InputError: a name is unknown, missing, or that of one given by its place.
        """
        named = {name: given for name, given in named.items() if given is not None}
        names = [taken.name for taken in self.taken]
        rest = names[len(inputs) :]
        wrong = [
            f"{name!r} is {'given twice' if name in names else 'none of its inputs'}"
            for name in named
            if name not in rest
        ]
        wrong += [f"{name!r} is missing" for name in rest if name not in named]
        if wrong:
            takes = ", ".join(map(str, self.taken))
            raise InputError(f"{', '.join(wrong)}; this engine takes {takes}")
        return (*inputs, *(named[name] for name in rest))

    def take(
        self, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], int]:
        """Checks what an engine is called with.

        Returns:
            The inputs as the graph takes them, and the batch size.

        Raises:
            InputError: one does not fit; says what was expected and what came.
        """
        if named:
            inputs = self.in_order(inputs, named)
        elif len(inputs) > len(self.taken) and set(map(type, inputs[len(self.taken) :])) == {_NONE}:
            inputs = inputs[: len(self.taken)]
        refuse_tracers()
        if len(inputs) == 1 and self._is_as_before(inputs[0]):
            return self.planar(inputs), inputs[0].shape[0]
        inputs = tuple(map(_plain, inputs))
        size = self._checked(inputs)
        if len(inputs) == 1:
            (x,) = inputs
            self._accepted = _layout(x), _span(x)
        return self.planar(inputs), size

    def _is_as_before(self, x: Any) -> bool:
        """Whether all that is asked of an input has the answer that it had for the latest."""
        if self._accepted is None or type(x) is not torch.Tensor or x.is_nested or x.is_neg():
            return False
        layout, span = self._accepted
        try:
            # what is sparse, wrapped, or stands for others has no address
            return x.data_ptr() != 0 and _layout(x) == layout and _has(x, span)
        except RuntimeError:
            return False

    def _checked(self, inputs: Sequence[Any]) -> int:
        if len(inputs) != len(self.taken):
            names = ", ".join(taken.name for taken in self.taken)
            raise InputError(f"expected {len(self.taken)} inputs ({names}), got {len(inputs)}")
        sizes: dict[str, int] = {}  # of each symbol
        for given, taken in zip(inputs, self.taken, strict=True):
            if not isinstance(given, torch.Tensor):
                help = "; give what it holds by name: engine(**batch)" * isinstance(given, Mapping)
                raise InputError(
                    f"{taken.name}: expected a torch.Tensor {taken.spec}, got "
                    f"{type(given).__module__}.{type(given).__qualname__}{help}"
                )
            self._check_tensor(given, taken)
            for dim, size in zip(taken.spec.shape, given.shape, strict=True):
                if isinstance(dim, Sym) and sizes.setdefault(dim.symbol, size) != size:
                    raise InputError(
                        f"{taken.name}: expected {taken.spec} with the {dim.symbol} of the inputs "
                        f"before it, {sizes[dim.symbol]}; got {list(given.shape)}"
                    )
        size = max(int(given.shape[0]) for given in inputs)
        limit = self._options.max_batch_size
        if limit is not None and size > limit and self._options.oversize == "error":
            raise InputError(
                f"the batch is {size}, max_batch_size is {limit}; see oversize='split'"
            )
        return size

    def _check_tensor(self, given: torch.Tensor, taken: Taken) -> None:
        spec = taken.spec
        if given.dtype != spec.torch_dtype:
            help = (
                f"convert it with x.to({spec.torch_dtype})"
                if not self.pictures
                else f"this engine normalises pictures itself, give them as decoded: {spec} in RGB"
            )
            raise InputError(
                f"{taken.name}: expected dtype {spec.torch_dtype}, got {given.dtype}; {help}"
            )
        device = self._options.device
        if (odd := oddity(given)) or given.device != device:
            raise InputError(
                f"{taken.name}: expected a dense tensor on {device}, got {odd or given.device}"
            )
        if not _has(given, _span(given)):
            raise InputError(
                f"{taken.name}: its storage has {given.untyped_storage().nbytes()} bytes, and its "
                f"shape {list(given.shape)} takes more: something has resized it. Give a tensor "
                "that is whole"
            )
        batch = spec.shape[0]
        right = given.dim() > 0 and (isinstance(batch, Sym) or batch == given.shape[0])
        if not (right and taken.takes(given.shape[1:])):
            help = "; a fastres.Input with three shapes, compiled with, lets H and W vary"
            other = given.dim() == len(spec.shape) == 4 and given.shape[1] == spec.shape[1]
            raise InputError(
                f"{taken.name}: expected [{taken.sizes}], got {list(given.shape)}{help * other}"
            )

    def _taken(self, value: Value, allowed: Input) -> Taken:
        order = _NHWC if self.pictures else range(len(value.spec.shape))
        spec = TensorSpec(tuple(value.spec.shape[i] for i in order), value.spec.dtype)
        ends = (tuple(sizes[i] for i in order) for sizes in (allowed.smallest, allowed.largest))
        return Taken(allowed.name or value.name, spec, *ends)


def _layout(x: torch.Tensor) -> Layout:
    return x.dtype, x.device, x.shape, x.stride()


def _plain(given: Any) -> Any:
    """A tensor without its subclass, or a minus sign that is pending on a view.

    Raises:
        InputError: it stands for something else than the numbers in its memory.
    """
    if isinstance(given, torch.fx.Proxy):
        refuse("torch.fx.symbolic_trace")
    if not isinstance(given, torch.Tensor):
        return given  # for `_checked` to refuse
    kind = type(given)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        if kind.__module__.startswith("torch._subclasses"):
            refuse(f"a tracer of PyTorch's (its tensor is a {kind.__name__})")
        raise _own_rules(kind)
    with torch._C.DisableTorchFunctionSubclass():
        if torch._C._functorch.is_functorch_wrapped_tensor(given):  # also one that has escaped
            refuse("a transform of torch.func, such as vmap or grad")
        if torch._is_functional_tensor(given):
            refuse("a tracer of PyTorch's (its tensor is a functional one)")
    if kind is not torch.Tensor:
        given = _without_subclass(given)
    return given.resolve_neg()


def _without_subclass(given: torch.Tensor) -> torch.Tensor:
    """
    Raises:
        InputError: its class changes what operations mean, or forbids them.
    """
    kind = type(given)
    rules: Any = kind.__torch_function__
    with torch._C.DisableTorchFunctionSubclass():
        plain = given.as_subclass(torch.Tensor)
    if rules is _NO_RULES or getattr(rules, "__func__", rules) is _USUAL_RULES:
        return plain
    try:
        seen = given.view_as(given)  # by its rules; images of torchvision, for one, let it pass
        with torch._C.DisableTorchFunctionSubclass():
            same = seen.data_ptr() == plain.data_ptr() and _layout(seen) == _layout(plain)
    except Exception as error:  # somebody's code
        raise _own_rules(kind) from error
    if not same:
        raise _own_rules(kind)
    return plain


def _own_rules(kind: type) -> InputError:
    return InputError(
        f"an input is a {kind.__module__}.{kind.__qualname__}, a tensor that computes by rules "
        "of its own; give a plain torch.Tensor"
    )


def _span(x: torch.Tensor) -> int:
    """The bytes from its first number to the end of its last one."""
    if x.numel() == 0:
        return 0
    steps = zip(x.shape, x.stride(), strict=True)
    return int(1 + sum((size - 1) * stride for size, stride in steps)) * x.itemsize


def _has(x: torch.Tensor, span: int) -> bool:
    """Whether its memory is there, which may have been taken from under it by `resize_`."""
    return bool(x.storage_offset() * x.itemsize + span <= x.untyped_storage().nbytes())
