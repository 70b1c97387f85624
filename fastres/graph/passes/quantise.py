"""A calibrated graph → the same with int8 weights and a Quantize and Dequantize where int8 begins.

What a quantised node reads is quantised once, by the scale of the value it comes from, and read by
everybody in that form; a graph's outputs stay as they were. Pools, slices and paddings on the way
keep the scale, so the pair after them changes nothing and tells a runtime that they run in int8.

Where pairs stand belongs to the backend (`placement`): "skip" quantises what is added to a
convolution, which meets the accumulator in its epilogue; "both" also what the convolution gives
before the addition, which then is a node of its own. The scales are the same.

Weights are quantised per output channel. That moves a channel's mean by
sum_crs (w_int8 * scale - w)[k, c, r, s] * mean[c], which is taken off its bias; what the rounding
and saturating of activations adds is not.

Source: M. Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction
(2019), section 4.2.1, with channel means measured rather than worked out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from fastres.calib.table import STEPS, CalibrationTable
from fastres.errors import InputError
from fastres.graph import laws
from fastres.graph.ir import Add, Conv2d, Dequantize, Graph, Node, Quantize
from fastres.graph.passes.drop_dead import drop_dead
from fastres.graph.passes.merging import rename_inputs
from fastres.graph.passes.split_residual import split_residual
from fastres.graph.quantisable import (
    calibration_names,
    fingerprints,
    layer_of,
    never_negative,
    operands,
    path,
    quantisable,
)
from fastres.graph.specs import DTYPES, TensorSpec

Placement = Literal["skip", "both"]
EightBits = Literal["int8", "float8_e4m3fn"]
_LARGEST = {"int8": STEPS, "uint8": 255, "float8_e4m3fn": 448}
REDUCED = 63  # steps of a weight where pairs of products are summed in 16 bits: 2 * 255 * 64 < 2^15


def eight_bits(precision: str) -> EightBits:
    """The element type of a precision that needs a calibration."""
    return "float8_e4m3fn" if precision == "fp8" else "int8"


def quantise(
    graph: Graph,
    table: CalibrationTable,
    placement: Placement,
    kind: EightBits = "int8",
    weight_steps: int | None = None,
    unsigned: bool = False,
) -> Graph:
    """The quantised graph.

    Args:
        graph: optimised, as the table was made for.
        kind: to what.
        weight_steps: the largest magnitude of a weight: that of its type, or 63 (`REDUCED`).
        unsigned: whether int8 values that are never negative may be uint8, twice as fine.

    Raises:
        InputError: the table is for another graph or other weights, or lacks a tensor.
    """
    check_table(graph, table)
    if placement == "both":
        graph = split_residual(graph)
    names = calibration_names(graph)
    taking = [node for node in graph.nodes if _takes_part(graph, node, table, placement)]
    kinds = _kinds(graph, kind, unsigned)
    scales = _scales(graph, taking, table, names, kinds)
    constants = dict(graph.constants)
    renamed = {name: f"{name}.dequantized" for name in scales}
    nodes: list[Node] = []

    def pair(name: str, spec: TensorSpec) -> None:
        if name in scales:
            whole = f"{name}.quantized"
            eight = TensorSpec(spec.shape, kinds[name])
            nodes.append(Node(whole, Quantize(scales[name]), (name,), eight))
            nodes.append(Node(renamed[name], Dequantize(scales[name]), (whole,), spec))

    for value in graph.inputs:
        pair(value.name, value.spec)
    for node in graph.nodes:
        changed = node
        if node in taking and quantisable(node):
            entry = table.tensors.get(names.get(node.inputs[0], node.inputs[0]))
            means = () if entry is None else entry.means
            most = _LARGEST[kind] if weight_steps is None else weight_steps
            changed = _with_quantised_weight(node, constants, means, kind, most)
        nodes.append(rename_inputs(changed, renamed))
        pair(node.name, node.spec)
    quantised = graph.replace(nodes=tuple(nodes), constants=constants)
    return laws.check(drop_dead(quantised), "quantise")


def check_table(graph: Graph, table: CalibrationTable) -> None:
    """Refuses a table that is not this graph's.

    Raises:
        InputError: says whether the network or its weights are others, or a name is unknown.
    """
    structure, weights = fingerprints(graph)
    if table.graph != structure:
        raise InputError(
            "the calibration table is for another network: its layers or their names differ. Make "
            "one for this network with fastres.quantize"
        )
    if table.weights != weights:
        raise InputError(
            "the calibration table is for other weights of this network. Make one for these with "
            "fastres.quantize"
        )
    layers = [node.name for node in graph.nodes if quantisable(node)]
    if unknown := sorted(set(table.keep) - set(layers)):
        raise InputError(
            f"the calibration table keeps {unknown[0]} in floating point, which is no layer of "
            f"this network; there are {', '.join(layers[:5])} ..."
        )


def _takes_part(graph: Graph, node: Node, table: CalibrationTable, placement: Placement) -> bool:
    if layer_of(node.name) in table.keep or not operands(graph, node):
        return False
    return not isinstance(node.op, Add) or placement == "both"


def _kinds(graph: Graph, kind: EightBits, unsigned: bool) -> dict[str, str]:
    """By the name of a value: what it is quantised to."""
    found = {value.name: str(kind) for value in graph.inputs} | {n.name: str(kind) for n in graph}
    if unsigned and kind == "int8":
        found.update(dict.fromkeys(never_negative(graph), "uint8"))
    return found


def _scales(
    graph: Graph,
    taking: list[Node],
    table: CalibrationTable,
    names: dict[str, str],
    kinds: Mapping[str, str],
) -> dict[str, float]:
    """The scale of every value that these nodes read, and of those on the way to it."""
    scales: dict[str, float] = {}
    for node in taking:
        for name in operands(graph, node):
            source, *rest = path(graph, name)
            wanted = names.get(source, source)
            if wanted not in table.tensors:
                raise InputError(
                    f"the calibration table has no range of {wanted}, which {node.name} reads. "
                    "Make it again with fastres.quantize"
                )
            scale = table.scale(wanted, _LARGEST[kinds[source]])
            scales.update(dict.fromkeys((source, *rest), scale))
    return scales


def _with_quantised_weight(
    node: Node,
    constants: dict[str, torch.Tensor],
    means: tuple[float, ...],
    kind: EightBits,
    most: int,
) -> Node:
    """The node reading a weight of 8 bits, its scale, and a corrected bias, all new constants."""
    name = node.params["weight"]
    weight = constants[name].float()
    scale = weight.flatten(1).abs().amax(1) / most
    scale[scale <= torch.finfo(torch.float32).tiny] = 1.0  # nothing but zeros
    by_row = scale.view(-1, *[1] * (weight.ndim - 1))
    whole = weight / by_row
    whole = (whole.round_() if kind == "int8" else whole).clamp_(-most, most).to(DTYPES[kind])
    params = {**node.params, "weight": f"{name}.{kind}", "scale": f"{name}.scale"}
    constants[params["weight"]] = whole
    constants[params["scale"]] = scale
    if means:
        moved = whole.float().mul_(by_row).sub_(weight).reshape(*weight.shape[:2], -1).sum(2)
        groups = node.op.groups if isinstance(node.op, Conv2d) else 1
        pixels, odd = divmod(groups * weight.shape[1], len(means))  # several behind a Flatten
        if odd:
            raise InputError(
                f"the calibration table has {len(means)} channel means of what {node.name} reads, "
                f"which has {groups * weight.shape[1]} channels. Make it again with "
                "fastres.quantize"
            )
        mean = torch.tensor(means, dtype=torch.float64, device="cpu")
        mean = mean.repeat_interleave(pixels).view(groups, -1)
        parts = zip(moved.double().chunk(groups), mean, strict=True)
        shift = torch.cat([rows @ m for rows, m in parts])
        params["bias"] = f"{name}.corrected_bias"
        bias = constants[node.params["bias"]].double() if "bias" in node.params else 0.0
        constants[params["bias"]] = (bias - shift).to(constants[name].dtype)
    return node.with_(params=params)
