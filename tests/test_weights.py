"""fastres.weights: values that can be computed with are told from those that cannot."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastres.weights import is_finite, oddity


class TestIsFinite:
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    @given(
        size=st.integers(1, 300),
        place=st.floats(0, 1, exclude_max=True),
        value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    )
    def test_finds_one_value_anywhere(
        self, dtype: torch.dtype, size: int, place: float, value: float
    ) -> None:
        tensor = torch.linspace(-3, 3, size).to(dtype)
        assert is_finite(tensor)
        tensor[int(place * size)] = value
        assert not is_finite(tensor)

    def test_other_layouts(self) -> None:
        assert is_finite(torch.zeros(0, 3))
        assert is_finite(torch.zeros(()).expand(3, 4))
        spoilt = torch.zeros(4, 6)
        spoilt[1, 2] = float("nan")
        assert not is_finite(spoilt.t()) and not is_finite(spoilt[:, 2])
        assert is_finite(spoilt[:, 3:]) and is_finite(spoilt[2:])
        assert not is_finite(nn.Parameter(spoilt))


def test_oddities() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that the last two are no lasting features
        odd = {
            "list": [1.0],
            "a tensor of torch.sparse_coo": torch.zeros(2, 3).to_sparse(),
            "a tensor of torch.complex64": torch.zeros(3, dtype=torch.complex64),
            "a tensor of torch.int16": torch.zeros(3, dtype=torch.int16),
            "a tensor of torch.quint8": torch._empty_affine_quantized(
                (2,), scale=1.0, zero_point=0, dtype=torch.quint8
            ),
            "a nested tensor": torch.nested.as_nested_tensor([torch.zeros(3)]),
        }
    assert [oddity(value) for value in odd.values()] == list(odd)
    assert not oddity(torch.zeros(2, 3).t()) and not oddity(nn.Parameter(torch.zeros(2).bfloat16()))
