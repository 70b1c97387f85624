"""fastres.export: a model as an ONNX file, for runtimes other than ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import torch

from fastres.assembly.assemble import optimised
from fastres.calib.files import write_whole
from fastres.calib.images import Preprocess
from fastres.errors import CaptureError, InputError, UnsupportedError
from fastres.graph import onnx as onnx_form
from fastres.graph.ir import Graph
from fastres.graph.passes.quantise import quantise
from fastres.graph.passes.thin_out import thin_out
from fastres.options import PathLike
from fastres.quantization.quantize import Calibration, opened, settled_precision, table_of
from fastres.source import Inputs, Model, check_pictures, source_of, taking_pictures

Placement = Literal["tensorrt", "openvino"]
ExportPrecision = Literal["fp32", "fp16", "int8"]


def export(
    model: Model,
    path: PathLike,
    *,
    inputs: Inputs | None = None,
    precision: ExportPrecision | None = None,
    calibration: Calibration | None = None,
    placement: Placement = "tensorrt",
    preprocess: Preprocess | None = None,
    io_dtype: torch.dtype | None = None,
) -> Graph:
    """Writes a model as ONNX, with BatchNorms folded, for trtexec and other runtimes.

    Inputs and outputs are float32 whatever the precision, with N, and H and W where they are
    ranged, as free sizes. In int8 pairs of QuantizeLinear and DequantizeLinear stand where values
    are rounded: symmetric, activations per tensor, weights per output channel; layers that the
    table keeps are float16.

    Args:
        model: as `fastres.compile` takes it, as are inputs, calibration, preprocess and io_dtype.
        path: the file; written whole or not at all.
        precision: "fp32", "fp16" or "int8"; None is fp32, or int8 with a calibration.
        placement: in int8, whose way of rounding residual additions: "tensorrt" rounds what is
            added to a convolution, and all zero points are 0; "openvino" also what the convolution
            gives, has uint8 behind a ReLU, and int8 as uint8 around 128 in a network with a Concat.
            Each runtime is fast with its own only.

    Returns:
        The graph that was written.

    Raises:
        CaptureError: as `fastres.compile`.
        InputError: an argument is out of range, or the file cannot be written.
        UnsupportedError: an operation has no ONNX form, or weights do not fit into float16.
    """
    if not (precision is None or isinstance(precision, str)) or precision not in (
        None,
        *get_args(ExportPrecision),
    ):
        raise InputError(f"precision is {precision!r}; ONNX is written in fp32, fp16 and int8")
    if not isinstance(placement, str) or placement not in get_args(Placement):
        raise InputError(f"placement is {placement!r}; there are tensorrt and openvino")
    settled_precision(precision, calibration)
    check_pictures(preprocess, io_dtype)
    if preprocess is not None and io_dtype is None:
        raise InputError(
            "preprocess says how pictures are normalised, and without io_dtype=torch.uint8 the "
            "file takes what is normalised already: give both, or neither"
        )
    file = _file(path)
    ranges = opened(calibration, model, inputs)
    source = source_of(model, inputs)
    table, _ = table_of(ranges, source)
    if io_dtype is not None:
        source = taking_pictures(source, preprocess)
    graph = optimised(source.graph, CaptureError)
    ours = table is not None and placement == "openvino"
    if table is not None:
        graph = quantise(graph, table, "both" if ours else "skip", unsigned=ours)
        graph = thin_out(graph) if ours else graph
    data = as_onnx(graph, half=precision == "fp16" or table is not None, for_openvino=ours)
    try:
        write_whole(file, data)
    except (OSError, ValueError) as error:  # a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{file} cannot be written: {why}; give a file in a folder that is there"
        ) from error
    return graph


def _file(path: PathLike) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise InputError(f"path is {type(path).__name__}; give the path of the file to write")
    if not os.fspath(path):
        raise InputError("path is empty; give the path of the file to write")
    return Path(path)


def as_onnx(graph: Graph, *, half: bool, for_openvino: bool = False) -> bytes:
    """The file's bytes; see `fastres.graph.onnx.to_onnx`.

    Raises:
        UnsupportedError: see `export`.
    """
    if refused := onnx_form.refusals(graph):
        listed = "\n".join(f"  {name}: {why}" for name, why in refused)
        raise UnsupportedError(
            f"{len(refused)} of {len(graph.nodes)} nodes cannot be written:\n{listed}"
        )
    return onnx_form.to_bytes(graph, half=half, for_openvino=for_openvino)
