"""The laws of the IR, checked after capture, after every pass, and on everything that is loaded.

1. Names are unique; a node reads only graph inputs, constants and nodes before it.
2. Every output is produced, and there is one per leaf of the output tree.
3. Every node's spec is what the shape rules say, and its dtype is that of all its inputs.
4. Inputs are as many as the operation takes; parameters fill exactly the slots that it has, with
   constants, or with values computed before of constants alone.
5. A variable size of a graph input is a bare symbol (N, H, W): an engine can only read those off.
6. A Normalize makes a floating-point value of a graph input in uint8, which it alone reads.
7. A Quantize makes 8 bits of a floating-point value, a Dequantize the reverse, by a finite positive
   scale; a weight has 8 bits exactly where there is a scale, float32 [K]. Nothing but a Dequantize
   reads a Quantize, and no caller.
8. Settings are numbers that the operation can have, of as many dimensions as its operand has.
9. What has parameters computes in floating point, and so do they, but for weights of 8 bits; what
   a node claims and what its call of PyTorch does are the same.
"""

from __future__ import annotations

from collections.abc import Container

from fastres.errors import GraphError
from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Dequantize,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Mul,
    Node,
    Normalize,
    Op,
    Quantize,
    Softmax,
    op_name,
)
from fastres.graph.shapes import node_shape
from fastres.graph.specs import EIGHT_BITS, Shape, Sym, TensorSpec, spec_of

_SCALES = (2.0**-126, 2.0**119)  # 448, the largest of 8 bits, times the second is a number
_SLOTS: dict[type, tuple[set[str], set[str]]] = {
    # operation: (slots that must be there, slots that may be)
    Conv2d: ({"weight"}, {"bias", "scale"}),
    Linear: ({"weight"}, {"bias", "scale"}),
    BatchNorm: ({"mean", "var"}, {"weight", "bias"}),
}


def check(graph: Graph, after: str = "capture", ask: bool = True) -> Graph:
    """Returns the graph if it is lawful.

    Args:
        ask: whether PyTorch is asked about its operators; else what they claim is believed.

    Raises:
        GraphError: names the law, the node, and the step after which it was broken.
    """
    try:
        _check(graph, ask)
    except GraphError as error:
        raise GraphError(f"after {after}: {error}") from error
    return graph


def _check(graph: Graph, ask: bool) -> None:
    shapes: dict[str, Shape] = {}
    fixed = set(graph.constants)
    for value in graph.inputs:
        _unique(graph, value.name, shapes)
        if any(isinstance(d, Sym) and d != Sym(d.symbol) for d in value.spec.shape):
            raise GraphError(f"input {value.name} is {value.spec}; its sizes must be bare symbols")
        shapes[value.name] = value.spec.shape
    for node in graph.nodes:
        _unique(graph, node.name, shapes)
        for name in node.inputs:
            if name not in shapes and name not in graph.constants:
                raise GraphError(f"{node.name} reads {name}, which nothing before it produces")
        _check_operands(graph, node, fixed)
        asked = ask or not isinstance(node.op, Aten)
        shape = node_shape(graph, node, shapes) if asked else node.spec.shape
        if shape != node.spec.shape:
            want = ", ".join(map(str, shape))
            raise GraphError(f"{node.name} claims {node.spec}, the shape rules say [{want}]")
        dtypes = {graph.spec(name).dtype for name in node.inputs}
        params = (name for slot, name in node.params.items() if _is_plain(node, slot))
        for spec in (node.spec, *map(graph.spec, params)) if node.params else ():
            if not _is_real(spec):
                raise GraphError(
                    f"{node.name} computes with {spec}, expected floating-point numbers"
                )
        if isinstance(node.op, Aten) and node.op.result != node.spec:
            raise GraphError(f"{node.name} claims {node.spec}, its call {node.op.result}")
        if isinstance(node.op, Normalize):
            _check_normalize(graph, node)
        elif isinstance(node.op, Quantize | Dequantize):
            _check_quantised(graph, node)
        elif dtypes != {node.spec.dtype} and not isinstance(node.op, Aten):
            found = ", ".join(sorted(dtypes))
            raise GraphError(f"{node.name} claims {node.spec}, its inputs are {found}")
        elif not _is_computed_in(node.op, node.spec):
            raise GraphError(f"{node.name}: PyTorch has no {op_name(node.op)} of {node.spec}")
        shapes[node.name] = shape
        if fixed.issuperset(node.inputs):
            fixed.add(node.name)
    for name in graph.outputs:
        if name not in shapes:
            raise GraphError(f"output {name} is produced by nothing")
    leaves = graph.output_tree.num_leaves
    if leaves != len(graph.outputs):
        raise GraphError(f"{len(graph.outputs)} outputs, but the output tree has {leaves} leaves")


def _is_plain(node: Node, slot: str) -> bool:
    """Whether a parameter is floating-point: all but weights of 8 bits."""
    return "scale" not in node.params or slot != "weight"


def _check_normalize(graph: Graph, node: Node) -> None:
    (name,) = node.inputs
    given = {value.name: value.spec.dtype for value in graph.inputs}.get(name)
    alone = graph.sole_user(graph.users(), name) is node
    if given != "uint8" or not alone or not node.spec.torch_dtype.is_floating_point:
        raise GraphError(f"{node.name} must alone read an input in uint8, and make it floating")


def _check_quantised(graph: Graph, node: Node) -> None:
    assert isinstance(node.op, Quantize | Dequantize)
    read = graph.spec(node.inputs[0])
    whole, real = (node.spec, read) if isinstance(node.op, Quantize) else (read, node.spec)
    if whole.dtype not in EIGHT_BITS or not _is_real(real):
        raise GraphError(f"{node.name} makes {node.spec} of {read}, expected 8 bits and floating")
    if isinstance(node.op, Quantize):
        readers = graph.users().get(node.name, ())
        if node.name in graph.outputs or not all(isinstance(n.op, Dequantize) for n in readers):
            raise GraphError(f"{node.name} makes 8 bits, which only a Dequantize may read")
    if not _SCALES[0] <= node.op.scale <= _SCALES[1]:
        raise GraphError(
            f"{node.name} has the scale {node.op.scale}, expected a positive number with which 8 "
            f"bits stay within fp32: from {_SCALES[0]:.1e} to {_SCALES[1]:.1e}"
        )


def _check_weight(graph: Graph, node: Node) -> None:
    weight = graph.spec(node.params["weight"])
    if ("scale" in node.params) != (weight.dtype in EIGHT_BITS):
        raise GraphError(f"{node.name} has the weight {weight}; those of 8 bits have a scale")
    if "scale" in node.params:
        if node.params["scale"] not in graph.constants:
            raise GraphError(f"{node.name} has the scale {node.params['scale']}, no constant")
        scale = graph.constants[node.params["scale"]]
        if spec_of(scale) != TensorSpec((weight.shape[0],)):
            raise GraphError(f"{node.name} has the scale {spec_of(scale)}, expected f32 by channel")


def _is_real(spec: TensorSpec) -> bool:
    return spec.torch_dtype.is_floating_point and spec.dtype not in EIGHT_BITS


def _is_computed_in(op: Op, spec: TensorSpec) -> bool:
    """Whether PyTorch computes an operation in a dtype; of calls it is asked itself."""
    if _is_real(spec) or isinstance(op, Aten):
        return True
    activation = op.kind if isinstance(op, Activation) else getattr(op, "activation", None)
    if isinstance(op, GlobalAvgPool | Softmax) or activation not in (None, "relu"):
        return False
    if isinstance(op, AvgPool):
        return spec.dtype == "int64"
    return spec.dtype != "bool" or not (isinstance(op, MaxPool) or activation == "relu")


def _unique(graph: Graph, name: str, seen: dict[str, Shape]) -> None:
    if name in seen or name in graph.constants:
        raise GraphError(f"the name {name} is used twice")


def _arity(op: Op) -> int | None:
    """How many inputs an operation takes; None if any number."""
    if isinstance(op, Aten | Concat):
        return None
    if isinstance(op, Conv2d):
        return 2 if op.epilogue.residual else 1
    return 2 if isinstance(op, Add | Mul) else 1


def _check_operands(graph: Graph, node: Node, fixed: Container[str]) -> None:
    takes = _arity(node.op)
    if takes is not None and takes != len(node.inputs):
        raise GraphError(f"{node.name} cannot take {len(node.inputs)} inputs, but {takes}")
    must, may = _SLOTS.get(type(node.op), (set(), set()))
    if not must <= set(node.params) <= must | may:
        raise GraphError(f"{node.name} has parameters {sorted(node.params)}, needs {sorted(must)}")
    for slot, name in node.params.items():
        if name not in fixed:
            raise GraphError(f"{node.name}.{slot} is {name}, which is no constant")
    if isinstance(node.op, Conv2d | Linear):
        _check_weight(graph, node)
