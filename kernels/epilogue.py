"""What a kernel does to its fp32 accumulator before the result is rounded and stored, as data."""

from __future__ import annotations

from typing import Literal

import msgspec

ActivationKind = Literal["relu", "silu", "sigmoid", "gelu", "hardswish"]
# Finite numbers from here on, and NaN and infinities, are left as they are by rounding to TF32,
# which would make them infinite; what the tensor cores see of them is the largest TF32 number.
TF32_LIMIT = (2 - 2.0**-11) * 2.0**127


class Epilogue(msgspec.Struct, frozen=True):
    """y = activation(accumulator + bias + residual), each part optional.

    Args:
        residual: whether a second operand of the output's shape is added.
        activation: elementwise function applied last; None leaves the sum as it is.
    """

    residual: bool = False
    activation: ActivationKind | None = None

    def __str__(self) -> str:
        parts = ["residual"] if self.residual else []
        parts += [self.activation] if self.activation else []
        return "".join(f"+{part}" for part in parts)
