"""fastres.tolerances: the order of the checks, the figures, floors neither zero nor wide."""

import math

import pytest
import torch

from fastres.tolerances import FLOOR, RMS_FLOOR, Distance, Errors, allowed, errors

NAN, INF = float("nan"), float("inf")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_errors_are_relative_to_the_rms_of_the_oracle() -> None:
    oracle = torch.tensor([3.0, -3.0, 3.0, -3.0], dtype=torch.float64)
    found = errors(torch.tensor([3.0, -3.0, 3.3, -3.0]), oracle)
    assert found.largest == pytest.approx(0.1)
    assert found.rms == pytest.approx(0.05)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_errors_do_not_depend_on_the_scale(scale: float) -> None:
    oracle = noise(100)
    found = errors(oracle * (1 + 1e-6) * scale, oracle * scale)
    assert found.rms == pytest.approx(1e-6)


def test_against_a_zero_oracle_errors_are_absolute() -> None:
    assert errors(torch.full((4,), 0.5), torch.zeros(4)) == Errors(0.5, 0.5)


def test_the_shape_comes_first() -> None:
    found = errors(torch.full((2, 3), NAN), torch.zeros(3, 2))
    assert found.reason == "shape [2, 3], expected [3, 2]"
    assert math.isnan(found.largest) and math.isnan(found.rms)


def test_a_result_without_elements_has_no_error() -> None:
    assert errors(torch.empty(0, 10), torch.empty(0, 10)) == Errors(0.0, 0.0)


def test_an_empty_result_is_not_taken_for_a_full_one() -> None:
    assert errors(torch.empty(0, 10), torch.zeros(2, 10)).reason
    assert errors(torch.zeros(2, 10), torch.empty(0, 10)).reason


@pytest.mark.parametrize("strange", [NAN, INF, -INF])
def test_the_same_strange_values_are_left_out(strange: float) -> None:
    oracle = torch.tensor([1.0, strange, -1.0])
    assert errors(torch.tensor([1.0, strange, -1.5]), oracle) == Errors(0.5, math.sqrt(0.125))


@pytest.mark.parametrize(
    ("candidate", "oracle"),
    [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (INF, NAN), (INF, -INF)],
    ids=lambda value: str(value),
)
def test_another_pattern_of_strange_values_fails(candidate: float, oracle: float) -> None:
    found = errors(torch.tensor([2.0, candidate]), torch.tensor([2.0, oracle]))
    assert found.reason
    assert not found.within(Errors(1e9, 1e9), torch.float32)


def test_the_bound_is_twice_the_baseline_or_the_floor() -> None:
    floor, rms_floor = FLOOR[torch.float32], RMS_FLOOR[torch.float32]
    assert allowed(Errors(0.0, 0.0), torch.float32) == Errors(floor, rms_floor)
    assert allowed(Errors(0.1, 0.01), torch.float32) == Errors(0.2, 0.02)
    assert allowed(Errors(NAN, NAN, "NaN"), torch.float32) == Errors(floor, rms_floor)


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        (Errors(0.2, 0.02), True),
        (Errors(0.21, 0.02), False),
        (Errors(0.2, 0.021), False),
        (Errors(NAN, 0.02), False),
        (Errors(0.0, 0.0, "shape"), False),
    ],
    ids=["at the bound", "largest beyond", "RMS beyond", "NaN", "not comparable"],
)
def test_within(found: Errors, passes: bool) -> None:
    assert found.within(Errors(0.1, 0.01), torch.float32) is passes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_rounding_is_within_the_floor_and_three_bits_less_are_not(dtype: torch.dtype) -> None:
    """Against a baseline of 0: bf16 has three bits less than fp16, fp8 fewer than either."""
    exact = noise(1 << 20).relu()
    lucky = Errors(0.0, 0.0)
    coarser = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float8_e4m3fn}[dtype]
    assert errors(exact.to(dtype), exact).within(lucky, dtype)
    assert not errors(exact.to(coarser), exact).within(lucky, dtype)


def test_a_chain_of_sums_is_within_the_floor_of_fp32_and_tf32_is_not() -> None:
    """4608 products per output, as in ResNet's last stage: 1.2e-6 in a chain, 3e-4 in TF32."""
    x, w = noise(64, 4608).float(), noise(4608, 16, seed=1).float()
    exact = x.double() @ w.double()
    chain = torch.zeros(64, 16)
    for k in range(4608):
        chain += x[:, k, None] * w[k]
    coarse = (x.half().double() @ w.half().double()).float()  # factors of 11 bits, as TF32 has
    lucky = Errors(0.0, 0.0)
    assert errors(chain, exact).rms > RMS_FLOOR[torch.float32] / 2
    assert errors(chain, exact).within(lucky, torch.float32)
    assert not errors(coarse, exact).within(lucky, torch.float32)


def test_batches_add_up_to_the_whole() -> None:
    oracle, candidate = noise(6, 10), noise(6, 10) + 0.1 * noise(6, 10, seed=1)
    whole, parts = Distance(0.1, 0.1), Distance(0.1, 0.1)
    whole.add(candidate, oracle)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.add(candidate[part], oracle[part])
    for name in ("images", "count", "outside", "max_abs", "max_relative", "top1"):
        assert getattr(parts, name) == getattr(whole, name), name
    for name in ("cosine", "spread", "sqnr_db"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name)), name
    assert parts.errors.rms == pytest.approx(whole.errors.rms)
    assert parts.errors.largest == pytest.approx(whole.errors.largest)


def test_one_mismatch_among_batches_is_kept() -> None:
    distance = Distance()
    for candidate in (torch.ones(2, 3), torch.full((2, 3), NAN), torch.ones(2, 3)):
        distance.add(candidate, torch.ones(2, 3))
    assert distance.errors.reason == "6 of 6 values are NaN or infinite, expected 0"
    assert math.isnan(distance.cosine) and math.isnan(distance.top1)


def test_sqnr_is_centred_over_images() -> None:
    """A bias of 100 that all images share: raw SQNR would flatter by 40 dB."""
    signal, error = noise(1000, 10), 0.1 * noise(1000, 10, seed=1)
    distance = Distance()
    distance.add(100 + signal + error, 100 + signal)
    assert distance.sqnr_db == pytest.approx(20.0, abs=0.3)
    assert distance.spread == pytest.approx(0.01, rel=0.02)


def test_one_image_has_no_spread() -> None:
    distance = Distance()
    distance.add(noise(1, 10), noise(1, 10))
    assert math.isnan(distance.spread)
    assert distance.sqnr_db == math.inf


def test_images_of_different_sizes_have_no_spread() -> None:
    distance = Distance()
    distance.add(noise(2, 3, 4, 4), noise(2, 3, 4, 4))
    distance.add(noise(2, 3, 5, 5), noise(2, 3, 5, 5))
    assert math.isnan(distance.spread)
    assert distance.errors == Errors(0.0, 0.0)


def test_top1_counts_agreeing_rows() -> None:
    distance = Distance()
    distance.add(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])
    assert distance.top1 == 0.5


def test_outside_is_torch_allclose() -> None:
    oracle = noise(1000)
    candidate = oracle + 1e-3 * noise(1000, seed=1)
    distance = Distance(1e-4, 1e-3)
    distance.add(candidate, oracle)
    close = torch.isclose(candidate, oracle, atol=1e-4, rtol=1e-3)
    assert distance.outside == int((~close).sum()) > 0
