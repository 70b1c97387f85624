"""fastres.graph.capture: what an engine could not keep is refused, by name and with advice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  # registers its operators
from torch import Tensor, nn

from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.options import Input

ModelOf = Callable[..., nn.Module]
SMALL = Input((1, 3, 8, 8))
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 8), (4, 3, 40, 40)))


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, padding=1)


def partly_training() -> nn.Module:
    model = nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()
    model[1][0].train()
    return model


def broken(value: float) -> nn.Module:
    model = nn.Sequential(conv()).eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, :2] = value
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(conv()).eval()


def odd(dtype: torch.dtype) -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.ones(8, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            w = torch.view_as_real(self.w)[..., 0] if dtype.is_complex else self.w.float()
            return x * w

    return nn.Sequential(OrderedDict(layer=Odd())).eval()


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.w * 2


def counting(m: Any, x: Tensor) -> Any:
    m.count.add_(1)
    return x * m.count


def counting_through_a_view(m: Any, x: Tensor) -> Any:
    m.count.view(1, 1).add_(1)
    return x * m.count


Case = tuple[Callable[[ModelOf], nn.Module], tuple[Input, ...]]


def forwards(forward: Callable[..., Any], *inputs: Input) -> Case:
    def make(model_of: ModelOf) -> nn.Module:
        parts = {"conv": conv(), "count": torch.zeros(1), "w": nn.Parameter(torch.ones(3))}
        return model_of(forward, **parts)

    return make, inputs or (SMALL,)


def modules(make: Callable[[], nn.Module]) -> Case:
    return lambda model_of: make(), (SMALL,)


REFUSED: dict[str, tuple[Case, str]] = {
    "training mode": (modules(lambda: conv()), "'Conv2d' is in training mode.*eval()"),
    "one part in training mode": (modules(partly_training), "'1.0' is in training mode"),
    "NaN": (modules(lambda: broken(float("nan"))), r"0.weight \[4, 3, 3, 3\] holds 2 values"),
    "infinity": (modules(lambda: broken(float("inf"))), "holds 2 values that are NaN or infinite"),
    "meta weights": (modules(on_meta), "0.weight is on the meta device"),
    "batch statistics": (
        modules(lambda: nn.BatchNorm2d(3, track_running_stats=False).eval()),
        "batch's own statistics",
    ),
    "control flow": (
        forwards(lambda m, x: x * 2 if x.sum() > 0 else x),
        "control flow does not depend on values",
    ),
    "gibibytes of ones": (
        forwards(lambda m, x: m.conv(x) + torch.ones(2**30).sum()),
        "ones: aten.ones.default makes 4294967296 bytes of numbers alone.* as a buffer",
    ),
    "wrong sizes": (forwards(lambda m, x: m.conv(x), Input((1, 4, 8, 8))), "cannot export Model"),
    "too few inputs": (forwards(lambda m, x, y: x * y), "cannot export Model"),
    "complex values": (forwards(lambda m, x: torch.fft.fft2(x).abs()), "fft_fft2 is torch.complex"),
    "complex inputs": (
        forwards(lambda m, x: x.abs(), Input((1, 3), dtype=torch.complex64)),
        "input inputs_0 is torch.complex64; supported are float64, float32",
    ),
    "complex weights": (
        modules(lambda: odd(torch.complex64)),
        "layer.w is torch.complex64; supported are float64",
    ),
    "weights of 8 bits": (
        modules(lambda: odd(torch.float8_e4m3fn)),
        "layer.w is torch.float8_e4m3fn; supported are float64",
    ),
    "random numbers": (forwards(lambda m, x: x + torch.rand_like(x)), "rand_like.*draws random"),
    "random dropout": (
        forwards(lambda m, x: F.dropout(x, 0.5, training=True)),
        "aten.dropout.default in .* draws random numbers",
    ),
    "state": (forwards(counting), "the model changes count when it runs"),
    "state through a view": (
        forwards(counting_through_a_view),
        "the model changes count when it runs",
    ),
    "the last of three pieces": (
        forwards(lambda m, x: x.chunk(3, 2)[2], RANGED),
        r"has a size of H - .*, which is not of the form",
    ),
    "memory of a part": (
        forwards(lambda m, x: (x * 2)[:, 1:].as_strided((x.size(0), 2, 8, 4), (192, 64, 8, 2))),
        "aten.as_strided.default in the model itself reads the memory of slice, a part of another",
    ),
    "bits of floating-point numbers": (
        forwards(lambda m, x: (x * 2).view(torch.int32)),
        "reads the bits of torch.float32 as torch.int32; an engine may compute in another prec",
    ),
    "sizes that depend on values": (
        forwards(lambda m, x: x[x > 0]),
        "has a size that depends on the numbers in a tensor.*torch.where",
    ),
    "a slice from the middle": (
        forwards(lambda m, x: x[:, :, x.shape[2] // 2 - 2 : x.shape[2] // 2 + 2], RANGED),
        "or on where a slice ends.*fix H and W",
    ),
    "a number out of a tensor": (
        forwards(lambda m, x: x * m.conv.bias[0].item()),
        r"cannot be written down.* in place of its item\(\)",
    ),
    "a batch joined with a height": (
        forwards(lambda m, x: x.transpose(1, 2).flatten(0, 1), RANGED),
        r"has a size of N\*H,.*compile torch.export.export\(model",
    ),
    "a number that is no size": (
        forwards(lambda m, x: x * x.size(2) ** -0.5, RANGED),
        "aten.mul.Tensor is called with .*cannot be written down",
    ),
    "a batch checked": (
        forwards(lambda m, x: x + torch.ones(2, 1, 1, 1)),
        "only takes batches of 2",
    ),
    "a height written out": (
        forwards(lambda m, x: x.reshape(-1, 3, 8, 8) * 2, RANGED),
        r"has a size of \(\(N\*[HW]\*[HW]\)//64\), which is not of the form",
    ),
    "a Linear on pixels": (
        forwards(lambda m, x: F.linear(x.flatten(1), torch.ones(2, 192)), RANGED),
        r"flattening needs fixed sizes: pass a fixed Input",
    ),
    "a height added": (
        forwards(lambda m, x: x + torch.ones(8, 1), RANGED),
        r"inputs_0 \[2, 3, 8, \d\], fixes dimension 2 at 8.*, but the Input ranges over it",
    ),
    "ceil_mode with padding": (
        forwards(lambda m, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), RANGED),
        "needs fixed H and W: pass a fixed Input",
    ),
    "two pictures above each other": (
        forwards(lambda m, x: torch.cat((x, x[:, :, ::2]), 2), RANGED),
        r"H and \(H\+1\)//2 cannot be joined: pass a fixed Input",
    ),
    "a size returned": (forwards(lambda m, x: (x * 2, x.size(0))), "returns sym_size.* no tensor"),
    "a number returned": (
        forwards(lambda m, x: (x * 2, 7)),
        "returns 7, which is no tensor .*Wrap the model in a module whose forward leaves it out",
    ),
    "a weight returned": (
        forwards(lambda m, x: (x * 2, m.conv.bias)),
        "the model returns conv.bias, which is no tensor",
    ),
    "a picture of another dtype": (
        forwards(lambda m, x: F.conv2d(x, m.conv.weight), Input((1, 3, 8, 8), torch.float16)),
        r"takes float16, and its weights are float32.*Give one of float32, or call model.to\(",
    ),
    "no inputs": ((lambda model_of: Constant().eval(), ()), "the model takes no tensor"),
    "a size divided by less than nothing": (
        forwards(lambda m, x: x * ((x.shape[0] // 3) // -2)),
        "cannot be written down",
    ),
    "an operator of another library": (
        forwards(lambda m, x: torch.ops.torchvision.nms(x[:, 0, 0, :4], x[:, 0, 0, 0], 0.5)),
        "torchvision.nms.* is not of the form aten",
    ),
}


def test_an_interrupt_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes errors of its own of one that comes while its operators run."""

    def stopped(*given: object, **more: object) -> None:
        raise TypeError('new_empty(): failed to unpack "KeyboardInterrupt: <EMPTY MESSAGE>"')

    monkeypatch.setattr(torch.export, "export", stopped)
    with pytest.raises(KeyboardInterrupt):
        capture(conv().eval(), [SMALL])


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, model_of: ModelOf) -> None:
    (make, inputs), message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(make(model_of), inputs)
