"""A network in 8 bits whose numbers mean nothing: for what is compiled or timed, not believed."""

from __future__ import annotations

import torch

import fastres
from fastres.graph.ir import Graph
from fastres.graph.passes.quantise import eight_bits, quantise
from fastres.options import EIGHT_BITS, Precision
from fastres.quantization.calibrate import collect


def in_precision(graph: Graph, shape: tuple[int, ...], precision: Precision) -> Graph:
    """For int8 and fp8 the quantised graph, by the ranges of one random picture.

    Which kernels there are does not depend on the ranges.
    """
    if precision not in EIGHT_BITS:
        return graph
    one = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(0))
    table = collect(graph, [fastres.Input(shape)], [(one,)], "minmax")
    return quantise(graph, table, "skip", eight_bits(precision))
