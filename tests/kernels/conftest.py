"""Where kernels run, memory that betrays a wrong mask, and the parity policy."""

from collections.abc import Callable, Sequence

import pytest
import torch
from triton import knobs

from fastres.tolerances import errors

GUARD = 256  # elements of NaN before and after a tensor; keeps 16-byte alignment


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this process cannot run."""
    interpreting = knobs.runtime.interpret
    if item.get_closest_marker("interpret") and not interpreting:
        pytest.skip("needs TRITON_INTERPRET=1 from the start of the process")
    if item.get_closest_marker("compile") and interpreting:
        pytest.skip("Triton's compiler is off under TRITON_INTERPRET=1")
    if item.get_closest_marker("gpu") and (interpreting or not torch.cuda.is_available()):
        pytest.skip("needs an NVIDIA GPU, and TRITON_INTERPRET unset")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpret),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU under Triton's interpreter, or the GPU."""
    return torch.device(request.param)


@pytest.fixture
def guarded() -> Callable[[torch.Tensor], torch.Tensor]:
    """guarded(x): a copy of x that lies between NaN, so that a read past its ends shows.

    Integers lie between 113, a prime that random sums do not make up for.
    """

    def embed(x: torch.Tensor) -> torch.Tensor:
        around = float("nan") if x.dtype.is_floating_point else 113
        memory = torch.full((x.numel() + 2 * GUARD,), around, dtype=x.dtype, device=x.device)
        copy = memory[GUARD : GUARD + x.numel()].view(x.shape)
        return copy.copy_(x)

    return embed


@pytest.fixture
def poisoned() -> Callable[..., torch.Tensor]:
    """poisoned(shape, dtype, device): an output full of NaN or 0x80, between guards of ones."""

    def make(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        numel = torch.Size(shape).numel()
        memory = torch.ones(numel + 2 * GUARD, dtype=dtype, device=device)
        poison = float("nan") if dtype.is_floating_point else -128
        return memory[GUARD : GUARD + numel].view(*shape).fill_(poison)

    return make


@pytest.fixture
def assert_parity() -> Callable[..., None]:
    """assert_parity(candidate, oracle, baseline): the tolerance policy, and intact guards."""

    def check(candidate: torch.Tensor, oracle: torch.Tensor, baseline: torch.Tensor) -> None:
        if candidate.dtype == torch.bfloat16 and candidate.device.type == "cpu":
            # Triton's interpreter cuts fp32 off to bf16 where a GPU and PyTorch round
            baseline = (oracle.float().view(torch.int32) & -0x10000).view(torch.float32)
        found = errors(candidate, oracle)
        assert found.within(errors(baseline, oracle), candidate.dtype), found
        _check_guards(candidate)

    return check


@pytest.fixture
def assert_exact() -> Callable[..., None]:
    """assert_exact(candidate, oracle): the same bits, and intact guards.

    The oracle is of the candidate's dtype, or fp32 that is rounded to it here.
    """

    def check(candidate: torch.Tensor, oracle: torch.Tensor) -> None:
        if candidate.dtype == torch.bfloat16 and candidate.device.type == "cpu":
            # Triton's interpreter cuts fp32 off to bf16 where a GPU and PyTorch round
            oracle = (oracle.float().view(torch.int32) & -0x10000).view(torch.float32)
        oracle = oracle.to(candidate.dtype)
        found = candidate.cpu()
        assert found.shape == oracle.shape
        wrong = (found.float() != oracle.float()).nonzero()
        assert len(wrong) == 0, (
            f"{len(wrong)} of {found.numel()} differ, first at {wrong[0].tolist()}: "
            f"{found[tuple(wrong[0])]}, expected {oracle[tuple(wrong[0])]}"
        )
        _check_guards(candidate)

    return check


def _check_guards(candidate: torch.Tensor) -> None:
    memory = candidate.new_empty(0).set_(candidate.untyped_storage()).float()
    assert torch.all(memory[:GUARD] == 1) and torch.all(memory[-GUARD:] == 1), "overrun"
