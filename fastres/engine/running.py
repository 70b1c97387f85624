"""How an engine runs what it took in: in parts, until a deadline, several in flight, or empty."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from fastres.backends.base import Executable, Run, until
from fastres.backends.reference import ReferenceExecutable
from fastres.deadlines import Deadline
from fastres.errors import GraphError, InputError
from fastres.graph.ir import Graph
from fastres.graph.shapes import infer_shapes


def in_parts(run: Run, inputs: Sequence[torch.Tensor], size: int, limit: int) -> list[torch.Tensor]:
    """The outputs of a batch, of which no more than `limit` is run at a time."""
    if size <= limit:
        return run(inputs)
    parts = [run([x[i : i + limit] for x in inputs]) for i in range(0, size, limit)]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def run_of(executable: Executable, timeout: Deadline | float) -> Run:
    """How it is run so that it is given up after `timeout`.

    Raises:
        InputError: `timeout` is no time, or not for this executable.
    """
    return until(executable, Deadline.after(timeout))


def in_flight(work: Iterable[Callable[[], Any]], depth: int) -> Iterator[Any]:
    """What the calls return, in their order, `depth` of them on threads at a time."""
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(depth, thread_name_prefix="fastres") as pool:
        try:
            for call in work:
                pending.append(pool.submit(call))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # the caller stopped early, or a call failed
            for future in pending:
                future.cancel()


def of_nothing(
    graph: Graph, inputs: Sequence[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """The outputs for an empty batch.

    Raises:
        InputError: the model has none.
    """
    try:
        shapes = infer_shapes(graph, [tuple(x.shape) for x in inputs])
        if all(0 in shapes[name] for name in graph.outputs):
            return [torch.empty(shapes[name], device=device) for name in graph.outputs]
        # an output without the batch has values all the same, such as the mean of nothing
        return ReferenceExecutable(graph, torch.float32, device).run(inputs)
    except (RuntimeError, IndexError, InputError, GraphError) as error:
        raise InputError(
            f"the batch is empty, and the model has no result for it: {error}"
        ) from error
