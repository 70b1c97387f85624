"""Whether every image of a batch gets the result that it would get alone: may a batch be split?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastres.errors import GraphError, InputError
from fastres.graph import aten
from fastres.graph.ir import Add, Aten, Graph, Mul, Node, Softmax
from fastres.graph.shapes import infer_shapes
from fastres.graph.specs import Sym

_PROBED = (5, 8)  # images in the batches on which an operation outside the IR is tried
Shapes = Mapping[str, tuple[int, ...]]


def check_split(
    graph: Graph, input_shapes: Sequence[Sequence[int]], largest: int, tried: bool = True
) -> None:
    """
    Args:
        largest: batch that is run as one.
        tried: see `why_not_split`.

    Raises:
        InputError: running a batch in parts would give other results.
    """
    reason = why_not_split(graph, input_shapes, tried)
    if reason is not None:
        raise InputError(
            f"{reason}, so a batch above max_batch_size={largest} cannot be run in parts: pass "
            "oversize='error' to refuse such batches, or no max_batch_size"
        )


def why_not_split(
    graph: Graph, input_shapes: Sequence[Sequence[int]], tried: bool = True
) -> str | None:
    """Why running a batch in parts would give other results; None if it would not.

    The operations of the IR are known. One outside it must not compute with the batch size, and is
    tried on random numbers, small and large: on small batches and on each of their images alone.

    Args:
        input_shapes: a shape of each input to try them at; its batch size does not matter.
        tried: False runs nothing, and leaves that to the first batch that is run in parts.
    """
    first = [value.spec.shape[0] for value in graph.inputs]
    batch = first[0]
    if not isinstance(batch, Sym) or any(size != batch for size in first):
        return f"the model takes a batch of {' and '.join(str(size) for size in first)}"
    try:
        shapes = [_sizes(graph, input_shapes, size) for size in _PROBED] if tried else []
    except GraphError as error:
        return f"it does not take a batch of every size: {error}"
    images = {value.name for value in graph.inputs}  # values with one entry for each image
    for node in graph.nodes:
        if images.isdisjoint(node.inputs):
            continue  # computed from constants alone
        if node.spec.shape[:1] != (batch,):
            return f"{node.name} has the shape {node.spec}, which does not begin with the batch"
        if _mixes(graph, node, images, shapes):
            return f"{node.name} mixes the images of a batch"
        images.add(node.name)
    loose = [name for name in graph.outputs if name not in images]
    return f"the output {loose[0]} does not depend on the batch" if loose else None


def _sizes(graph: Graph, input_shapes: Sequence[Sequence[int]], batch: int) -> Shapes:
    return infer_shapes(graph, [(batch, *shape[1:]) for shape in input_shapes])


def _mixes(graph: Graph, node: Node, images: set[str], shapes: Sequence[Shapes]) -> bool:
    if isinstance(node.op, Softmax):
        return node.op.dim in (0, -len(node.spec.shape))
    if isinstance(node.op, Add | Mul):  # broadcasting aligns the last dimensions, not the first
        ranks = {len(graph.spec(name).shape) for name in node.inputs if name in images}
        return ranks != {len(node.spec.shape)}
    if not isinstance(node.op, Aten):
        return False
    return aten.reads_batch(node.op) or any(
        _probe(graph, node, node.op, images, sizes, scale)
        for sizes in shapes
        for scale in (1.0, 1e4)
    )


def _probe(
    graph: Graph, node: Node, op: Aten, images: set[str], sizes: Shapes, scale: float
) -> bool:
    """Whether the operation's result for a batch differs from its results for each image."""
    random = torch.Generator().manual_seed(0)

    def operand(name: str) -> torch.Tensor:
        if name in graph.constants:
            return graph.constants[name].cpu()
        dtype = graph.spec(name).torch_dtype
        if dtype.is_floating_point:
            return (scale * torch.randn(sizes[name], generator=random, device="cpu")).to(dtype)
        return torch.randint(0, 2, sizes[name], generator=random, device="cpu").to(dtype)

    operands = [operand(name) for name in node.inputs]
    count = next(len(x) for name, x in zip(node.inputs, operands, strict=True) if name in images)
    parts = [
        [
            x[i : i + 1] if name in images else x
            for name, x in zip(node.inputs, operands, strict=True)
        ]
        for i in range(count)
    ]
    try:
        with torch.no_grad():
            whole = aten.call(op, operands)
            alone = torch.cat([aten.call(op, part) for part in parts])
    except Exception:  # PyTorch raises many kinds where a call does not take a single image
        return True
    # no measure of accuracy: wide enough for bf16 (eps 7.8e-3), far below what mixing changes
    return whole.shape != alone.shape or not torch.allclose(
        whole.double(), alone.double(), rtol=1e-2, atol=1e-4 * scale, equal_nan=True
    )
