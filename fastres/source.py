"""What is to be compiled: a model of any kind as a graph, with the inputs that its engine takes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.export import ExportedProgram

from fastres.calib.images import Preprocess
from fastres.errors import InputError
from fastres.graph import laws
from fastres.graph.capture import capture
from fastres.graph.export import inputs_of_program
from fastres.graph.ir import Graph, Node, Normalize, Value
from fastres.graph.kinds import Model as Model
from fastres.graph.kinds import accepted
from fastres.graph.leftovers import given_back
from fastres.graph.passes.merging import rename_inputs
from fastres.graph.specs import GIVEN_DTYPES, Sym, TensorSpec
from fastres.options import ANY_BATCH, Input, Sizes, usual_sizes
from fastres.weights import oddity

_Example = torch.Tensor | Input
Inputs = _Example | Sequence[_Example] | Mapping[str, _Example]


@dataclass(frozen=True)
class Source:
    """A model as a graph, with what its engine must know besides.

    Args:
        weights: the constants that a state_dict holds; the others keep their values.
        ignored_weights: state_dict entries that the graph does not read.
        largest_batch: None is any.
        chosen: whether the caller gave the ranges of H and W: then the model runs at both ends.
    """

    graph: Graph
    inputs: tuple[Input, ...]
    weights: Collection[str]
    ignored_weights: tuple[str, ...] = ()
    largest_batch: int | None = None
    chosen: bool = False


def source_of(model: Model, inputs: Inputs | None) -> Source:
    """Captures a model, or takes the graph that it is; see `fastres.compile`.

    Raises:
        InputError: no model, or inputs that are none or do not go with it.
        CaptureError: the model cannot be captured.
    """
    model = accepted(model)
    if isinstance(model, Graph | ExportedProgram) and inputs is not None:
        where = "fastres.build" if isinstance(model, Graph) else "torch.export.export"
        raise InputError(f"a {type(model).__name__} has its inputs already; give them to {where}")
    if isinstance(model, Graph):
        return Source(model, inputs_of(model), model.constants.keys())
    if isinstance(model, ExportedProgram):
        given = inputs_of_program(model)
    else:
        given = given_inputs(inputs, model)
    with given_back():
        captured = capture(model, given)
    graph = captured.graph
    weights = captured.program.state_dict.keys()
    ignored = tuple(k for k in weights if k not in graph.constants)
    if isinstance(model, ExportedProgram):
        limits = [i.largest[0] for i in given if i.smallest[0] < i.largest[0]]
        largest = min(limits, default=ANY_BATCH)
        return Source(graph, given, weights, ignored, None if largest == ANY_BATCH else largest)
    own = map(str, captured.program.graph_signature.user_inputs)  # as the forward calls them
    named = zip(given, graph.inputs, own, strict=True)
    typed = tuple(
        replace(i, dtype=value.spec.torch_dtype, name=i.name or name) for i, value, name in named
    )
    _check_shared(graph, typed)
    names = [entry.name for entry in typed]
    if len(set(names)) < len(names):
        raise InputError(f"two inputs have one name among {names}; give each Input its own")
    return Source(graph, typed, weights, ignored, chosen=True)


def _check_shared(graph: Graph, inputs: Sequence[Input]) -> None:
    """What the model takes for one size must be one in the examples."""
    first: dict[Sym, tuple[str | None, int]] = {}
    for value, entry in zip(graph.inputs, inputs, strict=True):
        for dim, size in zip(value.spec.shape, entry.usual, strict=True):
            if not isinstance(dim, Sym):
                continue
            other, known = first.setdefault(dim, (entry.name, size))
            if known != size:
                raise InputError(
                    f"{entry.name} is {list(entry.usual)}, with {size} where {other} has {known}: "
                    f"the model takes both for one size, {dim}. Give examples that agree; what has "
                    "one size always can be a buffer of the model"
                )


def check_pictures(preprocess: object, io_dtype: object) -> None:
    """
    Raises:
        InputError: one of them is not of its kind.
    """
    if not isinstance(preprocess, Preprocess | None):
        raise InputError(f"preprocess is {preprocess!r}; give a fastres.Preprocess, or None")
    if io_dtype is not None and io_dtype is not torch.uint8:
        raise InputError(
            f"io_dtype is {io_dtype!r}; give torch.uint8 for pictures that are normalised inside, "
            "or None for inputs as the model takes them"
        )


def taking_pictures(source: Source, preprocess: Preprocess | None) -> Source:
    """The same, fed decoded pictures, uint8 [N, H, W, 3], which the graph normalises itself.

    Raises:
        InputError: there is no preprocess, its numbers are none to normalise by, or the network
            does not take one normalised picture [N, 3, H, W].
    """
    if preprocess is None:
        raise InputError(
            "io_dtype=torch.uint8 leaves normalising to the engine: say how, by "
            "preprocess=Preprocess(mean=..., std=...)"
        )
    graph = source.graph
    specs = [value.spec for value in graph.inputs]
    shapes = [spec.shape for spec in specs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise InputError(
            f"the network takes {', '.join(map(str, specs))}; io_dtype=torch.uint8 is for networks "
            "of one input [N, 3, H, W]: leave it out, and normalise the inputs yourself"
        )
    if not specs[0].torch_dtype.is_floating_point:
        raise InputError(f"the network takes {specs[0]} already: leave out io_dtype=torch.uint8")
    op = Normalize.of(preprocess)
    numbers = torch.tensor(
        [*op.mean, *op.std, op.scale, *op.factors[0], *op.factors[1]],
        dtype=torch.float32,
        device="cpu",
    )
    if not bool(numbers.isfinite().all()) or min(op.std) < torch.finfo(torch.float32).tiny:
        raise InputError(f"{op} does not normalise: its factors {op.factors} overflow in fp32")
    (value,) = graph.inputs
    name = f"{value.name}.normalize"
    nodes = [rename_inputs(node, {value.name: name}) for node in graph.nodes]
    taking = graph.replace(
        inputs=(Value(value.name, TensorSpec(value.spec.shape, "uint8")),),
        nodes=(Node(name, op, (value.name,), value.spec), *nodes),
        outputs=tuple(name if output == value.name else output for output in graph.outputs),
    )
    inputs = tuple(replace(entry, dtype=torch.uint8) for entry in source.inputs)
    return replace(source, graph=laws.check(taking, "taking in pictures"), inputs=inputs)


def examples(source: Source) -> list[tuple[torch.Tensor, ...]]:
    """Random inputs: a batch of one, another batch, and both ends of what H and W range over."""
    batch = source.graph.inputs[0].spec.shape[0]
    few, several = (1, 3) if isinstance(batch, Sym) else (batch, batch)
    several = min(several, source.largest_batch or several)
    ends = source.chosen
    shapes = {
        tuple((few, *i.usual[1:]) for i in source.inputs),
        tuple((several, *(i.smallest if ends else i.usual)[1:]) for i in source.inputs),
        tuple((few, *(i.largest if ends else i.usual)[1:]) for i in source.inputs),
    }
    dtypes = [v.spec.torch_dtype for v in source.graph.inputs]
    random = torch.Generator().manual_seed(0)
    given = [
        tuple(_random(shape, dtype, random) for shape, dtype in zip(example, dtypes, strict=True))
        for example in sorted(shapes)
    ]
    if source.graph.normalize is None:
        return given
    return [tuple(x.permute(0, 2, 3, 1) for x in example) for example in given]


def _random(shape: Sizes, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """Numbers around 0, bytes of any value, or 0 and 1 where they may be indices."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=random, device="cpu").to(dtype)
    return torch.randint(
        0, 256 if dtype == torch.uint8 else 2, shape, generator=random, device="cpu"
    ).to(dtype)


def given_inputs(inputs: Inputs | None, model: torch.nn.Module) -> tuple[Input, ...]:
    """What a caller gave, or None, as inputs of a module, in the order of its forward."""
    if inputs is None:
        return (Input((1, 3, 224, 224)),)
    several: Iterable[object] = [inputs]
    if isinstance(inputs, Mapping):
        several = _in_order(inputs, model)
    elif isinstance(inputs, Iterable) and not isinstance(inputs, torch.Tensor):
        several = inputs
    return tuple(_as_input(item) for item in several)


def _in_order(given: Mapping[str, _Example], model: torch.nn.Module) -> list[_Example]:
    named = {name: example for name, example in given.items() if example is not None}
    parameters = inspect.signature(model.forward).parameters
    order = [name for name in parameters if name in named]
    if len(order) < len(named) or order != list(parameters)[: len(order)]:
        raise InputError(
            f"inputs are given for {', '.join(map(repr, named))}; {type(model).__name__}.forward "
            f"takes {', '.join(parameters)}: name the first of these, without a gap"
        )
    return [named[name] for name in order]


def _as_input(item: object) -> Input:
    if isinstance(item, Input):
        return item
    if odd := oddity(item):
        known = ", ".join(sorted(str(d).removeprefix("torch.") for d in GIVEN_DTYPES))
        raise InputError(
            f"inputs holds {odd}; give dense tensors as examples, or fastres.Input, of {known}"
        )
    assert isinstance(item, torch.Tensor)
    if item.dim() == 0:
        raise InputError("the example is a scalar; give one of rank 2 or more, batch first")
    return Input((max(1, item.shape[0]), *item.shape[1:]), dtype=item.dtype)


def inputs_of(graph: Graph | ExportedProgram) -> tuple[Input, ...]:
    """Inputs of a graph that brings its own sizes; a symbolic one may be anything up to 4096."""
    if isinstance(graph, ExportedProgram):
        return inputs_of_program(graph)
    found = []
    for value in graph.inputs:
        shape = value.spec.shape
        low = tuple(1 if isinstance(d, Sym) else d for d in shape)
        high = tuple(4096 if isinstance(d, Sym) else d for d in shape)
        sizes = (low, usual_sizes(low, high), high)
        found.append(Input(sizes, dtype=value.spec.torch_dtype, name=value.name))
    return tuple(found)
