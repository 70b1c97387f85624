"""ATen calls of pools → MaxPool, AvgPool and GlobalAvgPool."""

from __future__ import annotations

from fastres.graph.calls import Call, Emit
from fastres.graph.ir import AvgPool, GlobalAvgPool, MaxPool
from fastres.graph.shapes import pool_size
from fastres.graph.symbols import known
from fastres.kernels.geometry import Pair


def _window(call: Call) -> tuple[Pair, Pair, Pair]:
    """Kernel, stride and padding of a pool; the stride is the kernel where none is said.

    With ceil_mode a kernel may be larger than the image, as Hugging Face's EfficientNet has it, and
    means no more than the image then.
    """
    kernel, padding = call.pair("kernel_size"), call.pair("padding")
    stride = call.pair("stride") if call.args["stride"] else kernel
    if call.args["ceil_mode"] and padding == (0, 0) and _is_dense(call):
        height, width = (known(size) for size in call.shape("self")[2:])
        kernel = min(kernel[0], height or kernel[0]), min(kernel[1], width or kernel[1])
    return kernel, stride, padding


def _is_dense(call: Call) -> bool:
    return "dilation" not in call.args or call.pair("dilation") == (1, 1)


def _rounds_up(call: Call, dilation: Pair = (1, 1)) -> bool:
    """Whether ceil_mode gives another window than there is without it."""
    kernel, stride, padding = _window(call)
    if not call.args["ceil_mode"] or stride == (1, 1):
        return False
    for i, size in enumerate(map(known, call.shape("self")[2:])):
        if size is None:
            return True
        window = size, kernel[i], stride[i], padding[i], dilation[i]
        if pool_size(*window, ceil_mode=True) != pool_size(*window, ceil_mode=False):
            return True
    return False


def max_pool(call: Call) -> Emit | None:
    if call.rank("self") != 4:
        return None
    dilation = call.pair("dilation")
    op = MaxPool(*_window(call), dilation, _rounds_up(call, dilation))
    return Emit(op, (call.value("self"),))


def max_pool_part(call: Call, index: int) -> Emit | None:
    """The form that returns where each maximum was as well."""
    return max_pool(call) if index == 0 else None


def avg_pool(call: Call) -> Emit | None:
    if call.args["divisor_override"] is not None or call.rank("self") != 4:
        return None
    op = AvgPool(*_window(call), _rounds_up(call), call.args["count_include_pad"])
    return Emit(op, (call.value("self"),))


def adaptive_avg_pool(call: Call) -> Emit | None:
    if call.rank("self") != 4:
        return None
    if call.pair("output_size") == (1, 1):
        return Emit(GlobalAvgPool(keepdim=True), (call.value("self"),))
    window = _adaptive_window(call)
    return None if window is None else Emit(AvgPool(window, window), (call.value("self"),))


def _adaptive_window(call: Call) -> Pair | None:
    """The one window of an adaptive pool; None where it has windows of several sizes."""
    out, sizes = call.pair("output_size"), call.shape("self")[2:]
    if not all(isinstance(size, int) for size in (*out, *sizes)):
        return None
    if sizes[0] % out[0] or sizes[1] % out[1]:
        return None
    return (sizes[0] // out[0], sizes[1] // out[1])


def adaptive_max_pool_part(call: Call, index: int) -> Emit | None:
    window = _adaptive_window(call) if call.rank("self") == 4 and index == 0 else None
    return None if window is None else Emit(MaxPool(window, window), (call.value("self"),))
