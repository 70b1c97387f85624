"""The ordered list of passes, and why this order."""

from __future__ import annotations

from collections.abc import Callable

from fastres.graph import laws
from fastres.graph.ir import Graph
from fastres.graph.passes.drop_dead import drop_dead
from fastres.graph.passes.fold_batchnorm import fold_batchnorm
from fastres.graph.passes.fold_batchnorm_ahead import fold_batchnorm_ahead
from fastres.graph.passes.fold_constants import fold_constants
from fastres.graph.passes.fuse_activation import fuse_activation
from fastres.graph.passes.fuse_residual import fuse_residual
from fastres.graph.passes.merge_slices import merge_slices
from fastres.graph.passes.read_batchnorm import read_batchnorm

Pass = Callable[[Graph], Graph]

PIPELINE: tuple[Pass, ...] = (
    drop_dead,  # first, so that dead readers do not stand in the way of a fusion
    fold_constants,  # parameters that are computed of weights become constants, as all below has it
    merge_slices,  # the subsampling of shortcut A becomes one node
    read_batchnorm,  # multiplying by constants and adding them, as FrozenBatchNorm does
    fold_batchnorm,  # before any epilogue: only a bare convolution can be scaled
    fold_batchnorm_ahead,  # one that is not after a product, but in front of a Linear
    fuse_residual,  # before the activation, which comes after the addition
    fuse_activation,  # last fusion: it closes the epilogue
    drop_dead,  # the constants that folding replaced
)


def optimise(graph: Graph, dump: Callable[[str, Graph], None] | None = None) -> Graph:
    """Runs every pass; the laws are checked after each.

    Args:
        dump: called with each pass's name and the graph it left.

    Raises:
        GraphError: a pass broke a law (a defect of that pass).
    """
    for step in PIPELINE:
        graph = laws.check(step(graph), step.__name__)
        if dump is not None:
            dump(step.__name__, graph)
    return graph
