"""Pairs of bytes: the order of rows, what a kernel makes of it, and one rounding for both."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels import reference
from fastres.kernels.jit.epilogue import round_to
from fastres.kernels.jit.pairs import in_order, load_box, store_box
from fastres.kernels.pairs import in_pairs, interleaved

INT8, INT16, FP8 = torch.int8, torch.int16, torch.float8_e4m3fn


def test_rows_of_a_thread_are_neighbours():
    """Rows r and r + 8 of each 16 are channels 2r and 2r + 1."""
    weight = torch.arange(48).to(INT8)[:, None, None].expand(48, 2, 3)
    rows = interleaved(weight)
    assert rows.shape == weight.shape and rows.is_contiguous()
    for start in (0, 16, 32):
        for r in range(8):
            found = rows[[start + r, start + r + 8], 1, 2].tolist()
            assert found == [start + 2 * r, start + 2 * r + 1]
    assert interleaved(weight[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wider_types_stay_as_they_are(dtype):
    x = torch.zeros(5, 4, dtype=dtype)
    assert interleaved(x) is x
    assert in_pairs(x, (2, 4)) == (x, (2, 4))


def test_rows_that_make_no_pairs_are_refused():
    with pytest.raises(ValueError, match="weight has 24 rows of 8 bits, expected a multiple of 16"):
        interleaved(torch.zeros(24, 3, dtype=FP8))


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_box_of_bytes_is_half_as_wide_in_pairs(dtype):
    x = torch.zeros(2, 3, 5, 32, dtype=dtype)
    pairs, box = in_pairs(x, [1, 2, 4, 16])
    assert pairs.dtype == INT16 and pairs.shape == (2, 3, 5, 16) and box == (1, 2, 4, 8)
    assert pairs.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@triton.jit
def _round_kernel(v_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, round_to(tl.load(v_ptr + at), tl.int8))


@triton.jit
def _pairs_kernel(sums_ptr, residual, y, N: tl.constexpr, M: tl.constexpr):
    """y = sums in the order of channels + residual, for sums [N, M] with interleaved rows."""
    n = tl.arange(0, N)[:, None]
    m = tl.arange(0, M)[None, :]
    v = in_order(tl.load(sums_ptr + n * M + m), tl.int8).T
    v += load_box(residual, 0, 0, 0, 0, tl.int8, M, N).to(tl.float32)
    store_box(y, 0, 0, 0, 0, v, tl.int8)


def hard_values() -> torch.Tensor:
    """Ties, both ends and what lies beside them, more than an int32 holds, infinities and NaN."""
    halves = torch.arange(-600, 600) / 2
    inf = float("inf")
    ends = [127.5, -128.5, 127.49999, -128.49999, 3e9, -3e9, 1e30, inf, -inf, -0.0, 0.49999997]
    return torch.cat([halves, torch.nextafter(halves, halves + 1), torch.tensor(ends)])


def descriptor(x: torch.Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    view, sizes = in_pairs(x, box)
    return TensorDescriptor.from_tensor(view, list(sizes))


def test_int8_is_the_references(device, guarded, poisoned, assert_exact):
    v = hard_values()
    padded = torch.nn.functional.pad(v, (0, 4096 - len(v)))
    out = poisoned((4096,), INT8, device)
    _round_kernel[(1,)](guarded(padded.to(device)), out, SIZE=4096)
    assert_exact(out, reference.requantise(padded))


def test_nan_becomes_zero(device):
    v = torch.full((256,), float("nan"), device=device)
    y = torch.full((256,), 9, dtype=INT8, device=device)
    _round_kernel[(1,)](v, y, SIZE=256)
    assert (y == 0).all() and (reference.requantise(v) == 0).all()


def test_pairs_have_the_bits_of_single_bytes(device, guarded, poisoned, assert_exact):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90 or newer")
    n, m = 64, 64
    random = torch.Generator().manual_seed(0)
    v = hard_values().repeat(2)[: n * m].view(n, m)
    v = torch.where(v.abs() < 1e9, v, 77.0)
    residual = torch.randint(-128, 128, (1, 1, m, n), generator=random).to(INT8)
    rows = interleaved(torch.arange(n).to(INT8)).long()
    out = poisoned((1, 1, m, n), INT8, device)
    box = (1, 1, m, n)
    given = descriptor(guarded(residual.to(device)), box)
    taken = descriptor(out, box)
    _pairs_kernel[(1,)](v[rows].contiguous().to(device), given, taken, N=n, M=m)
    assert_exact(out, reference.requantise(v.T + residual[0, 0]).view(out.shape))
