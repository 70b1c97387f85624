"""BatchNorm then Linear → one Linear, as in heads that normalise features first.

With y = g * x + s, g = gamma / sqrt(var + eps) and s = beta - mean * g, per feature:
w' = w * g over the columns, b' = b + w @ s. Computed in float64 and rounded once.

Refused where the normalised features have another reader (or are an output), where the BatchNorm
ends in an activation, and where a feature is not one number (before a Flatten).
"""

from __future__ import annotations

from fastres.graph.ir import BatchNorm, Graph, Linear
from fastres.graph.passes.fold_batchnorm import folded_dtype, scale_and_shift
from fastres.graph.passes.merging import Merger


def fold_batchnorm_ahead(graph: Graph) -> Graph:
    merger = Merger(graph)
    for norm in graph.nodes:
        if not isinstance(norm.op, BatchNorm) or norm.op.activation or len(norm.spec.shape) != 2:
            continue
        linear = merger.sole_reader(norm.name)
        if linear is None or not isinstance(linear.op, Linear) or merger.taken(norm.name):
            continue
        scale, shift = scale_and_shift(graph, norm)
        weight = graph.constants[linear.params["weight"]]
        bias = weight.double() @ shift
        if "bias" in linear.params:
            bias += graph.constants[linear.params["bias"]].double()
        names = {slot: f"{norm.name}.folded_{slot}" for slot in ("weight", "bias")}
        dtype = folded_dtype(weight)
        merger.constants[names["weight"]] = (weight.double() * scale).to(dtype)
        merger.constants[names["bias"]] = bias.to(dtype)
        merger.merge(norm, linear, linear.with_(inputs=norm.inputs, params=names))
    return merger.finish()
