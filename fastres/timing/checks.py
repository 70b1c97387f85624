"""Whether a target computes what the network computes: nothing is timed that does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.backends.reference import ReferenceExecutable
from fastres.errors import ParityError
from fastres.graph.copies import copied
from fastres.graph.hooks import check_hooks
from fastres.graph.ir import Graph
from fastres.options import DTYPE_OF, Precision
from fastres.timing.benchmark import Target
from fastres.tolerances import Errors, allowed, errors

JUDGED = 8  # images of a batch that are compared; a float64 network is slow
# times our int8's own error: a peer has scales of its own (NNCF, CIFAR nets: up to 4.2 times)
OWN_SCALES = 8.0


@dataclass(frozen=True)
class Reference:
    """What a result is held against: the float64 result and PyTorch's own error beside it."""

    oracle: Tensor
    baseline: Errors


@dataclass(frozen=True)
class Verdict:
    """A result's distance from the reference, and what the policy allows, both over its RMS."""

    target: str
    precision: str
    batch_size: int
    rms: float
    largest: float
    allowed_rms: float
    allowed_largest: float
    wrong: str = ""
    model: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def raise_if_wrong(self) -> None:
        """
        Raises:
            ParityError: the result is beyond the policy. Its speed would mean nothing.
        """
        if self.wrong:
            raise ParityError(self.wrong)


def reference(
    model: nn.Module, example: Tensor, precision: Precision, quantised: Graph | None = None
) -> Reference:
    """Runs the network in float64, and in PyTorch in the precision itself.

    Args:
        quantised: for int8: the graph that is the network in int8.
    """
    dtype, oracle = DTYPE_OF[precision], exact(model, example)
    if quantised is None:
        return Reference(oracle, own_error(model, example, dtype, oracle))
    result = ReferenceExecutable(quantised, dtype).run([example.cpu()])[0]
    return Reference(oracle, errors(result, oracle))


def exact(model: nn.Module, example: Tensor) -> Tensor:
    """The network's result in float64, on the CPU.

    Raises:
        CaptureError: it has a forward hook that is no part of it.
    """
    check_hooks(model)
    with torch.no_grad():
        network = copied(model, dtype=torch.float64, device="cpu")
        result: Tensor = network(example.cpu().double())
    return result


def own_error(model: nn.Module, example: Tensor, dtype: torch.dtype, oracle: Tensor) -> Errors:
    """PyTorch's own distance from the oracle when it runs the network in that dtype."""
    with torch.no_grad():
        result = copied(model, dtype=dtype, device="cpu")(example.cpu().to(dtype))
    return errors(result, oracle)


def rows_to_judge(batch_size: int) -> list[int]:
    """The images of a batch that are compared: all of a small one, else the ends and between."""
    if batch_size <= JUDGED:
        return list(range(batch_size))
    return sorted({round(i * (batch_size - 1) / (JUDGED - 1)) for i in range(JUDGED)})


def judge(
    result: Tensor,
    expected: Reference,
    target: str,
    precision: Precision,
    batch_size: int,
    slack: float = 2.0,
) -> Verdict:
    """Holds a result to the tolerance policy, which allows twice PyTorch's own error."""
    dtype = DTYPE_OF[precision]
    found, bound = errors(result, expected.oracle), allowed(expected.baseline, dtype, slack)
    wrong = ""
    if not found.within(expected.baseline, dtype, slack):
        wrong = (
            f"{target} in {precision} at batch size {batch_size}: "
            + (found.reason or f"largest error {found.largest:.2e}, RMS {found.rms:.2e}")
            + f"; allowed are {bound.largest:.2e} and {bound.rms:.2e} of the result's RMS"
        )
    return Verdict(
        target,
        precision,
        batch_size,
        found.rms,
        found.largest,
        bound.rms,
        bound.largest,
        wrong,
    )


def check_target(
    target: Target, expected: Reference, example: Tensor, precision: Precision
) -> Verdict:
    """Runs a target and judges its result; call it before timing.

    Raises:
        ParityError: the result is beyond the policy, or no tensor.
    """
    result = target.call(example)
    if not isinstance(result, Tensor):
        raise ParityError(f"{target.name} returns {type(result).__name__}, expected a tensor")
    verdict = judge(result, expected, target.name, precision, len(example))
    verdict.raise_if_wrong()
    return verdict
