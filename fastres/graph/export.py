"""nn.Module → torch.export program, with everything refused that an engine could not keep."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from fastres.errors import CaptureError, first_line, is_interrupt
from fastres.graph.copies import to_trace
from fastres.graph.failed_export import explained
from fastres.graph.hooks import check_hooks, renew_weights
from fastres.graph.layouts import whatever_the_layout
from fastres.graph.leftovers import made
from fastres.graph.overhearing import overhearing
from fastres.graph.specs import GIVEN_DTYPES, widest
from fastres.graph.symbols import example, expression, is_fixed
from fastres.options import ANY_BATCH, Input, Sizes, usual_sizes
from fastres.weights import is_finite

# Tracing and the switches of numerics are global in PyTorch: one thread at a time.
TORCH_STATE = threading.RLock()


@contextmanager
def no_autocast() -> Iterator[None]:
    """Inside, a caller's autocast changes nothing."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def export(
    model: torch.nn.Module, inputs: Sequence[Input], shapes: Sequence[Sizes] | None = None
) -> ExportedProgram:
    """Exports a model with its batch size free, and H and W where the inputs range over them.

    Args:
        shapes: of the examples that the exporter follows through the model; None takes those of
            `example_shapes`, whose batch must come out free.

    Raises:
        CaptureError: training mode, no export, a size that the model fixes but should be free, or a
            forward hook that is no part of the network.
    """
    check_hooks(model)
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise CaptureError(
            f"the module {training or type(model).__name__!r} is in training mode: BatchNorm and "
            "Dropout would behave differently. Call model.eval() first"
        )
    renew_weights(model)
    shown = to_trace(model)
    if shapes is not None:
        return _followed(shown, inputs, shapes)
    try:
        program = _followed(shown, inputs, example_shapes(inputs))
    except CaptureError:  # it may take square pictures only
        square = [(2, *spec.usual[1:]) for spec in inputs]
        if square == example_shapes(inputs):
            raise
        program = _followed(shown, inputs, square)
    _check_free(program, inputs)
    return program


def example_shapes(inputs: Sequence[Input]) -> list[Sizes]:
    """The usual sizes and a batch of two; W is not H where both vary, as a model may compare them.

    The exporter would take both for one size from there on.
    """
    shapes = []
    for spec in inputs:
        shape = [2, *spec.usual[1:]]
        if {2, 3} <= set(spec.ranged) and shape[2] == shape[3]:
            shape[3] += 1 if shape[3] < spec.largest[3] else -1
        shapes.append(tuple(shape))
    return shapes


def _followed(
    model: torch.nn.Module, inputs: Sequence[Input], shapes: Sequence[Sizes]
) -> ExportedProgram:
    parameters = list(model.parameters())
    own = widest(p.dtype for p in parameters) or torch.float32
    device = parameters[0].device if parameters else torch.device("cpu")
    examples = tuple(  # without values: the exporter looks at sizes alone, and may get large ones
        torch.empty(shape, dtype=spec.dtype or own, device=device)
        for shape, spec in zip(shapes, inputs, strict=True)
    )
    free = tuple({i: Dim.AUTO for i in (0, *spec.ranged)} for spec in inputs)

    def traced(model: torch.nn.Module) -> ExportedProgram:
        return _exported(model, examples, free)

    return whatever_the_layout(model, traced)


def _exported(
    model: torch.nn.Module, examples: tuple[torch.Tensor, ...], free: tuple[dict[int, Any], ...]
) -> ExportedProgram:
    from fastres.graph.guards import noting_every_branch  # 0.3 s: sympy

    try:
        with TORCH_STATE, overhearing() as heard, torch.no_grad(), no_autocast():
            with warnings.catch_warnings(), noting_every_branch():
                warnings.simplefilter("ignore")  # the exporter's notes on its own internals
                shapes = _nested(model, free)
                return made(torch.export.export(model, examples, dynamic_shapes=shapes))
    except Exception as error:  # torch.export raises whatever the traced code and torch raise
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        raise CaptureError(explained(model, examples, error, heard.last_line)) from error


def functional(program: ExportedProgram) -> ExportedProgram:
    """The same program without in-place operations, as PyTorch's functionalisation rewrites it.

    Raises:
        CaptureError: PyTorch cannot.
    """
    free = _free_sizes(program)  # which both programs then share
    try:
        with TORCH_STATE, overhearing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `export`
            changed: ExportedProgram = program.run_decompositions({})
    except Exception as error:  # PyTorch raises many kinds where an operator has no such form
        raise CaptureError(
            "the model changes tensors in place in a way that PyTorch cannot rewrite: "
            f"{first_line(error)}. Use operations that return a new tensor"
        ) from error
    if _free_sizes(changed) != free:
        raise CaptureError(
            "the model changes a part of a tensor in place in a way that PyTorch can rewrite for "
            "one size only. Use operations that return a new tensor"
        )
    return changed


def _free_sizes(program: ExportedProgram) -> list[tuple[str, int]]:
    """The inputs' dimensions that are not one number."""
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    inputs = [str(name) for name in program.graph_signature.user_inputs if name in nodes]
    shapes = {name: getattr(nodes[name].meta["val"], "shape", ()) for name in inputs}
    return [(n, i) for n, shape in shapes.items() for i, s in enumerate(shape) if not is_fixed(s)]


def _nested(model: torch.nn.Module, free: tuple[dict[int, Any], ...]) -> tuple[Any, ...]:
    """`free` in the form torch.export wants: what a forward's *args takes is one nested tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return free
    before = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:before], free[before:])


def _check_free(program: ExportedProgram, inputs: Sequence[Input]) -> None:
    """The exporter fixes sizes that a model was written for; then no other size would be right."""
    from fastres.graph.guards import where_fixed  # 0.3 s: sympy

    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    names = program.graph_signature.user_inputs
    for name, spec in zip(names, inputs, strict=True):
        shape = nodes[str(name)].meta["val"].shape
        fixed = [i for i in (0, *spec.ranged) if is_fixed(shape[i])]
        if 0 in fixed:
            raise CaptureError(
                f"the model only takes batches of {shape[0]} in {name}: a line of it, or an "
                f"operator that it calls, makes one number of the batch size"
                f"{where_fixed(shape[0])}. Write x.size(0), or -1, in its place; or compile "
                "torch.export.export(model, (x,)) for that batch size"
            )
        if fixed:
            raise CaptureError(
                f"the model, followed with {name} {[example(n) for n in shape]}, fixes dimension "
                f"{fixed[0]} at {shape[fixed[0]]}{where_fixed(shape[fixed[0]])}, but the Input "
                "ranges over it: give a fixed shape, or rewrite the line that fixes it"
            )
        if expression(shape[0]) in [expression(shape[i]) for i in spec.ranged]:
            raise CaptureError(
                f"the model only takes {name} {list(shape)} where H or W is the batch size, but "
                "the Input ranges over them: give a fixed shape"
            )


def inputs_of_program(program: ExportedProgram) -> tuple[Input, ...]:
    """What a program exported elsewhere says that it takes: its sizes and their ranges.

    Raises:
        CaptureError: it does not take every batch size from 2 up to its largest, decides by its
            sizes, or takes something else than tensors by place.
    """
    from fastres.graph.guards import within_guards  # 0.3 s: sympy

    tree = program.call_spec.in_spec
    if tree is not None and tree.children()[1].num_leaves > 1:  # one is the last, and has a name
        raise CaptureError(
            "the program was exported with several keyword arguments, which have no order; export "
            "it with positional ones"
        )
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        if not isinstance(spec.arg, TensorArgument):
            raise CaptureError(f"the argument {spec.arg} is no tensor; only tensors are fed")
        name, value = spec.arg.name, nodes[spec.arg.name].meta["val"]
        if value.dim() < 2:
            raise CaptureError(f"{name} is {list(value.shape)}; an input has a batch of something")
        ranges = [_range_of(program, size) for size in value.shape]
        if not is_fixed(value.shape[0]) and ranges[0].start > 2:  # 2 says no more than "not 1"
            raise CaptureError(
                f"the program takes batches of at least {ranges[0].start} in {name}; export it "
                "with a batch size that may be anything from 1"
            )
        low, high = tuple(r.start for r in ranges), tuple(r.stop - 1 for r in ranges)
        usual = usual_sizes(low, high)
        found.append(Input((low, usual, high), dtype=value.dtype, name=name))
    return within_guards(program, found)


def _range_of(program: ExportedProgram, size: Any) -> range:
    if is_fixed(size):
        return range(int(size), int(size) + 1)
    bounds = program.range_constraints[expression(size)]
    return range(max(1, int(bounds.lower)), int(min(bounds.upper, ANY_BATCH)) + 1)


def check_finite(program: ExportedProgram) -> None:
    """Refuses weights that are NaN or infinite, or have no values at all.

    A buffer's infinities may be meant: a mask of classes that are ruled out adds -inf to them.

    Raises:
        CaptureError: names the weight.
    """
    tensors = {**program.state_dict, **program.constants}
    parameters = set(program.graph_signature.parameters)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        if tensor.dtype not in GIVEN_DTYPES:
            continue  # refused by name if anything reads it
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device: it has no values to compile")
        if not is_finite(tensor) and (name in parameters or bool(tensor.isnan().any())):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CaptureError(
                f"{name} {list(tensor.shape)} holds {bad} values that are NaN or infinite; the "
                "engine's numbers would be wrong. Load sound weights first"
            )
