"""Tensors that are not the numbers in their memory: refused at any batch size, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor

import fastres
from fastres.errors import InputError

X, SHIFT = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 6)


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For every test of this file."""


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


class Two(One):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.head((self.conv(x) + shift).relu().mean((2, 3)))


Call = Callable[[Tensor, int], Tensor]  # with a batch of how many


@pytest.fixture(scope="module", params=["cpu", "reference", "onnxruntime"])
def calls(request: pytest.FixtureRequest) -> Iterator[tuple[Call, Call]]:
    """Of one input, which is compared with the one before, and of two, which are not."""
    one = fastres.compile(One().eval(), X, backend=request.param)
    two = fastres.compile(Two().eval(), [X, SHIFT], backend=request.param)
    with one, two:
        yield lambda x, _: one(x), lambda x, batch: two(x, torch.ones(batch, 4, 6, 6))


def escaped(transform: Callable[..., Any], x: Tensor) -> Tensor:
    """What a transform of torch.func wrapped, kept beyond its end."""
    kept: list[Tensor] = []

    def keeping(y: Tensor) -> Tensor:
        kept.append(y)
        return y.sum()

    if transform is torch.func.jvp:
        transform(keeping, (x,), (x,))
    else:
        transform(keeping)(x.expand(3, *x.shape) if transform is torch.vmap else x)
    return kept[0]


class Forbidding(Tensor):
    """Every operation is refused by its class."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("not here")


class Doubled(Tensor):
    """Its class means twice the numbers in its memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            return found * 2 if isinstance(found, Tensor) else found


class Noting(Tensor):
    """Its class looks on, and changes nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def cut(x: Tensor, size: int) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "escaped from vmap": lambda x: escaped(torch.vmap, x),
    "escaped from grad": lambda x: escaped(torch.func.grad, x),
    "escaped from jvp": lambda x: escaped(torch.func.jvp, x),
    "escaped from functionalize": lambda x: escaped(torch.func.functionalize, x),
    "functional": torch._to_functional_tensor,
    "zeros nowhere": lambda x: torch._efficientzerotensor(x.shape),
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([*x, X[0]]),
    "jagged": lambda x: torch.nested.nested_tensor([*x, X[0]], layout=torch.jagged),
    "masked": lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "meta": lambda x: x.to("meta"),
    "never made": lambda x: nn.UninitializedParameter(),
    "forbidding": lambda x: x.as_subclass(Forbidding),
    "doubled": lambda x: x.as_subclass(Doubled) if len(x) else x.as_subclass(Forbidding),
    "without memory": lambda x: cut(x, 0) if len(x) else X[:, :1],
    "with less memory": lambda x: cut(x, 4 * x.numel() - 4) if len(x) else X[:, :1],
}


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("name", ODD)
def test_is_refused(calls: tuple[Call, Call], name: str, batch: int) -> None:
    odd = ODD[name](X[:batch].clone())
    for call in calls:
        good = X[:batch].clone()
        want = call(good, batch)  # the call that the odd one looks like
        with pytest.raises(InputError) as caught:
            call(odd, batch)
        assert "\n" not in str(caught.value)
        assert torch.equal(call(good, batch), want)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_class_that_changes_nothing(calls: tuple[Call, Call], batch: int) -> None:
    for call in calls:
        found = call(X[:batch].clone().as_subclass(Noting), batch)
        assert type(found) is Tensor and torch.equal(found, call(X[:batch].clone(), batch))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "at the end of its storage": lambda x: torch.cat([x, x])[2:],
    "overlapping": lambda x: torch.randn(500).as_strided(x.shape, (10, 8, 2, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_larger_and_smaller_memory(calls: tuple[Call, Call], name: str) -> None:
    view = VIEWS[name](X)
    for call in calls:
        for _ in range(2):
            torch.testing.assert_close(call(view, 2), call(view.contiguous(), 2))
