"""Conv2d, Linear, Add or BatchNorm, then an activation → one node with that activation.

Refused where the producer's result has another reader (it wants the value before the activation),
or where it has an activation already.
"""

from __future__ import annotations

import msgspec

from fastres.graph.ir import Activation, Add, BatchNorm, Conv2d, Graph, Linear, Op
from fastres.graph.passes.merging import Merger
from fastres.kernels.epilogue import ActivationKind, Epilogue


def fuse_activation(graph: Graph) -> Graph:
    merger = Merger(graph)
    for producer in graph.nodes:
        reader = merger.sole_reader(producer.name)
        if reader is None or not isinstance(reader.op, Activation):
            continue
        op = _with_activation(producer.op, reader.op.kind)
        if op is not None:
            merger.merge(producer, reader, producer.with_(op=op))
    return merger.finish()


def _with_activation(op: Op, kind: ActivationKind) -> Op | None:
    if isinstance(op, Conv2d) and op.epilogue.activation is None:
        epilogue = Epilogue(residual=op.epilogue.residual, activation=kind)
        return msgspec.structs.replace(op, epilogue=epilogue)
    if isinstance(op, Linear | Add | BatchNorm) and op.activation is None:
        return msgspec.structs.replace(op, activation=kind)
    return None
