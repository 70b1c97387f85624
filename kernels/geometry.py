"""Sizes of convolutions and pools: checked once, output sizes and the implicit matrix product."""

from __future__ import annotations

from dataclasses import dataclass

from fastres.kernels.cost import Cost

Pair = tuple[int, int]
_MERGED = 64


@dataclass(frozen=True)
class GemmShape:
    """The matrix product behind one call.

    Args:
        m: rows: output pixels.
        n: columns: output channels of one group.
        k: depth: taps times input channels of one group.
        channels: input channels of one group; a depth block that divides it stays in one tap.
        groups: independent products.
        x: elements of the input in memory; None where each row's channels are read once.
    """

    m: int
    n: int
    k: int
    channels: int
    groups: int = 1
    x: int | None = None


@dataclass(frozen=True)
class ConvShape:
    """Sizes of a convolution: x [n, h, w, c] with weight [k, r, s, c/groups] gives [n, p, q, k].

    Raises:
        ValueError: sizes that no convolution has.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.stride) < 1 or min(self.dilation) < 1 or min(self.padding) < 0:
            raise ValueError(
                f"stride is {self.stride}, dilation {self.dilation}, padding {self.padding}; "
                "expected stride and dilation of at least 1 and padding of at least 0"
            )
        if self.groups < 1 or self.c % self.groups or self.k % self.groups:
            raise ValueError(
                f"groups is {self.groups}, expected a divisor of {self.c} and {self.k} channels"
            )
        if min(self.c, self.k, self.r, self.s) < 1:
            raise ValueError(f"a size is zero in {self}, only the batch may be")
        if min(self.p, self.q) < 1:
            raise ValueError(
                f"a {self.r}x{self.s} filter with dilation {self.dilation} does not fit into "
                f"{self.h}x{self.w} with padding {self.padding}"
            )
        if self.n * self.p * self.q >= 2**31:
            raise ValueError(f"{self.n * self.p * self.q} output pixels, expected under 2**31")

    @property
    def p(self) -> int:
        """Output height."""
        return self._out(self.h, self.r, 0)

    @property
    def q(self) -> int:
        """Output width."""
        return self._out(self.w, self.s, 1)

    @property
    def gemm(self) -> GemmShape:
        """The matrix product of one call."""
        c = self.c // self.groups
        m = self.n * self.p * self.q
        taps = self.r * self.s
        x = self.c * min(self.n * self.h * self.w, m * taps)  # a strided 1x1 reads no more
        return GemmShape(m, self.k // self.groups, taps * c, c, self.groups, x)

    def _out(self, size: int, taps: int, axis: int) -> int:
        reach = self.dilation[axis] * (taps - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1


def mergeable(groups: int, channels: int) -> list[int]:
    """How many groups may be one product, with zeros for each other's channels.

    A product of a few channels leaves most of a matrix instruction empty; above 64 input channels
    it would be mostly zeros.

    Args:
        channels: input channels of a group.
    """
    most = max(1, _MERGED // channels)
    return [count for count in range(1, most + 1) if groups % count == 0]


@dataclass(frozen=True)
class PoolShape:
    """Sizes of a pooling: x [n, h, w, c] gives [n, p, q, c].

    Raises:
        ValueError: sizes that no pooling has.
    """

    n: int
    h: int
    w: int
    c: int
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if min(self.kernel) < 1 or min(self.stride) < 1 or min(self.dilation) < 1:
            raise ValueError(
                f"kernel is {self.kernel}, stride {self.stride}, dilation {self.dilation}; "
                "expected each to be at least 1"
            )
        pads = zip(self.padding, self.kernel, strict=True)
        if any(not 0 <= pad <= size // 2 for pad, size in pads):
            raise ValueError(
                f"padding is {self.padding}, expected 0 to half of the kernel {self.kernel}"
            )
        if self.c < 1 or min(self.p, self.q) < 1:
            raise ValueError(f"the window gives no output in {self}")
        if self.n * self.p * self.q >= 2**31:
            raise ValueError(f"{self.n * self.p * self.q} output pixels, expected under 2**31")

    @property
    def p(self) -> int:
        """Output height."""
        return self._out(self.h, 0)

    @property
    def q(self) -> int:
        """Output width."""
        return self._out(self.w, 1)

    def _out(self, size: int, axis: int) -> int:
        stride, pad = self.stride[axis], self.padding[axis]
        free = size + 2 * pad - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        if not self.ceil_mode:
            return free // stride + 1
        out = -(-free // stride) + 1
        # PyTorch's rule: the last window starts inside the input or the padding before it
        return out - 1 if (out - 1) * stride >= size + pad else out


def max_pool_cost(shape: PoolShape, itemsize: int) -> Cost:
    """Comparisons, counted as FLOPs, and compulsory bytes of one call."""
    y = shape.n * shape.p * shape.q * shape.c
    x = shape.n * shape.h * shape.w * shape.c
    return Cost(y * shape.kernel[0] * shape.kernel[1], itemsize * (x + y))
