"""Cross-check of a candidate against its reference: whole model, layer by layer, bisection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree

from fastres.engine.engine import Engine
from fastres.errors import InputError
from fastres.graph.ir import Graph
from fastres.graph.kinds import unwrapped
from fastres.options import DTYPE_OF, EIGHT_BITS, is_number
from fastres.parity.layers import Batch, LayerCheck, find_first, on_device
from fastres.parity.references import GraphReference, ModelReference, PictureReference, Reference
from fastres.parity.report import Comparison, ParityReport, Policy, notes_on
from fastres.tolerances import FLOOR, Distance
from fastres.weights import oddity

Named = Mapping[str, torch.Tensor]
Data = (
    torch.Tensor
    | Named
    | Iterable[torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor] | Named]
)


def verify(
    reference: torch.nn.Module | Graph | Engine,
    candidate: Engine | Callable[..., Any],
    data: Data,
    *,
    layerwise: bool = False,
    bisect: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
) -> ParityReport:
    """Checks that a candidate computes what its reference does.

    The oracle is the reference in float64: a model is copied, cast and called as it is. The
    baseline is PyTorch's own run of it in the candidate's precision, without TF32. A result passes
    if it has the oracle's structure, shape, dtype and pattern of NaN and infinities, and

        error <= max(2 * error of the baseline, floor)

    for the largest and the RMS error relative to the oracle's RMS (`fastres.tolerances`). The
    baseline of an int8 or fp8 engine is its quantised graph in PyTorch: the engine may add nothing
    to what quantisation costs. How much that is, SQNR, cosine and top-1 agreement say.

    Args:
        reference: an nn.Module in eval(); a graph, whose meaning in PyTorch is then the oracle; or
            an engine, which stands for its graph.
        candidate: an engine; or, for the whole model only, anything that is called as the model
            is. Its precision is then taken to be the dtype that it returns.
        data: a batch, or an iterable of batches; a batch of a model with several inputs is a tuple
            of tensors, or for an engine a mapping of them by name. For an engine with
            `io_dtype=torch.uint8`, decoded pictures as it takes them; the model is given the same,
            normalised in float64. Real pictures: on noise and on untrained weights hardly anything
            fails.
        layerwise: compare every node of the candidate's graph, too. For that the graph is lowered
            with all its values as outputs, which keeps a runtime from some of its own fusions: it
            is another executable than the engine's own.
        bisect: if an output fails, find the first node past its bound in engines that end after
            one node, and tell a wrong node from rounding that has added up.
        atol, rtol: replace the policy by |candidate - oracle| <= atol + rtol * |oracle|, as in
            torch.allclose; one left out is 0.

    Returns:
        A report; `report.raise_if_failed()` makes an error of it.

    Raises:
        InputError: no data, an empty batch, something that is no tensor, a negative tolerance, a
            model in training mode, layers asked of a candidate that is no engine or that was
            compiled from another model, or an attribute of the model that cannot be copied.
        CaptureError: layers were asked for and the model does not export, or it has a forward hook
            that is no part of it.
    """
    engine = candidate if isinstance(candidate, Engine) else None
    if engine is None and not callable(candidate):
        raise InputError(
            f"candidate is {type(candidate).__name__}; expected an Engine or a callable"
        )
    if engine is None and (layerwise or bisect):
        raise InputError("layerwise and bisect look inside an Engine; this candidate is none")
    quantised = engine is not None and engine.options.precision in EIGHT_BITS
    if quantised and bisect:
        raise InputError(
            "bisect is for floating-point engines; layerwise shows where a quantised one loses SQNR"
        )
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not (is_number(value) and value >= 0):
            raise InputError(f"{name} is {value!r}; it must be a number of at least 0")
    policy = Policy(torch.float32, atol, rtol, quantised)
    check = _Check(_reference(reference, engine), candidate, policy)
    layers: LayerCheck | None = None
    for batch in _batches(data, engine):
        check.add(batch)
        if engine is not None and layerwise:
            layers = layers or LayerCheck(engine, check.reference, check.policy)
            layers.add(engine.planar(batch))
    outputs = check.rows()
    notes = notes_on(outputs, check.images)
    bisection = None
    failing = next((i for i, row in enumerate(outputs) if not row.passed), None)
    if engine is not None and bisect and failing is not None:
        worst = check.worst(failing)
        bisection = find_first(engine, check.reference, check.policy, worst, failing)
        if bisection is None:
            notes += ("no node is past its bound on the worst batch alone: nothing to bisect",)
    if layers is not None:
        notes += ("the layers ran in an executable of their own, all values being outputs",)
    return ParityReport(
        reference=check.reference.name,
        candidate=_name(candidate),
        policy=str(check.policy),
        images=check.images,
        outputs=outputs,
        layers=layers.rows() if layers is not None else (),
        bisection=bisection,
        notes=notes,
        quantised=quantised,
    )


class _Check:
    """The whole model, batch by batch.

    `policy` gets the candidate's precision with the first batch: a callable shows it only then.
    """

    def __init__(self, reference: Reference, candidate: Any, policy: Policy) -> None:
        self.reference = reference
        self.policy = policy
        self.images = 0
        self._candidate = candidate
        # rounding to int8 is the engine's task: it is held to what its graph means in PyTorch
        self._quantised = GraphReference(candidate.graph) if policy.quantised else None
        self._leaves: dict[str, _Leaf] = {}

    def add(self, batch: Batch) -> None:
        got = _run(self._candidate, batch)
        batch = _planar(self._candidate, batch)
        if not self.images:
            self.policy = replace(self.policy, dtype=_precision(self._candidate, got))
        want = self.reference.run(batch, torch.float64)
        oracle = _tensors(want)
        baseline = _tensors((self._quantised or self.reference).run(batch, self.policy.dtype))
        if not self.images:
            own = self.reference.dtype
            as_is = self.reference.run(batch, own) if own != self.policy.dtype else None
            self._leaves = {
                name: _Leaf(self.policy, tensor.dtype)
                for name, tensor in (baseline if as_is is None else _tensors(as_is)).items()
            }
        self.images += len(batch[0])
        shapes = pytree.tree_structure(got), pytree.tree_structure(want)
        found = _tensors(got) if shapes[0] == shapes[1] else {}
        for name, leaf in self._leaves.items():
            if name in found:
                reason = self._dtype_reason(found[name], leaf.dtype)
                leaf.add(batch, found[name], baseline[name], oracle[name], reason)
            else:
                leaf.candidate.reason = f"returns {shapes[0]}, the reference {shapes[1]}"

    def rows(self) -> tuple[Comparison, ...]:
        return tuple(
            leaf.policy.judge(name, "output", leaf.candidate, leaf.baseline)
            for name, leaf in self._leaves.items()
        )

    def worst(self, index: int) -> Batch:
        """The batch on which this output was furthest from the oracle."""
        return list(self._leaves.values())[index].worst

    def _dtype_reason(self, got: torch.Tensor, expected: torch.dtype) -> str:
        """An engine returns the model's dtypes, whatever precision it computes in."""
        if not isinstance(self._candidate, Engine) or got.dtype == expected:
            return ""
        return f"dtype {got.dtype}, expected {expected}"


class _Leaf:
    """One output: the distances of candidate and baseline from the oracle, and the worst batch.

    Args:
        policy: of the candidate's precision. An output that the model returns in a coarser dtype is
            rounded to that once, and allowed to be.
        dtype: in which the model returns it.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        coarser = dtype in FLOOR and torch.finfo(dtype).eps > torch.finfo(policy.dtype).eps
        self.policy = replace(policy, dtype=dtype) if coarser else policy
        self.dtype = dtype
        self.candidate, self.baseline = policy.distance(), Distance()
        self.worst: Batch = ()

    def add(
        self,
        batch: Batch,
        got: torch.Tensor,
        base: torch.Tensor,
        want: torch.Tensor,
        reason: str,
    ) -> None:
        before = self.candidate.reason, self.candidate.max_abs
        self.baseline.add(base.to(self.policy.dtype) if base.is_floating_point() else base, want)
        self.candidate.add(got, want)
        self.candidate.reason = self.candidate.reason or reason
        if not self.worst or before != (self.candidate.reason, self.candidate.max_abs):
            self.worst = batch


def _reference(reference: object, engine: Engine | None) -> Reference:
    node = None if engine is None else engine.graph.normalize
    reference = unwrapped(reference)
    if isinstance(reference, torch.nn.Module):
        inputs = () if engine is None else engine.inputs
        if node is None:
            return ModelReference(reference, inputs)
        floats = [replace(entry, dtype=node.spec.torch_dtype) for entry in inputs]
        return PictureReference(ModelReference(reference, floats), node)
    if isinstance(reference, Engine | Graph):
        graph = reference.graph if isinstance(reference, Engine) else reference
        inner = GraphReference(graph)
        if graph.normalize is not None and node is None:
            raise InputError(
                "the reference takes decoded pictures, the candidate does not: compile both with "
                "the same io_dtype, or give the model as the reference"
            )
        return inner if node is None or graph.normalize else PictureReference(inner, node)
    raise InputError(
        f"reference is {type(reference).__name__}; expected an nn.Module, a Graph or an Engine"
    )


def _batches(data: object, engine: Engine | None) -> Iterator[Batch]:
    """Every batch as a tuple of tensors.

    Raises:
        InputError: there is none, one is empty, or one holds something that is no tensor.
    """
    if not isinstance(data, Iterable):
        raise InputError(f"data is {type(data).__name__}; expected a tensor or batches of tensors")
    count = 0
    for item in [data] if isinstance(data, torch.Tensor | Mapping) else data:
        batch = tuple(item) if isinstance(item, tuple | list) else (item,)
        if engine is not None and isinstance(item, Mapping):
            batch = engine.in_order(item)
        for tensor in batch:
            if odd := oddity(tensor) or ("a tensor on the meta device" if tensor.is_meta else ""):
                raise InputError(f"batch {count} holds {odd}, not a dense tensor with values")
        if not batch or not batch[0].dim() or not len(batch[0]):
            sizes = [list(tensor.shape) for tensor in batch]
            raise InputError(f"batch {count} is empty ({sizes}): there is nothing to compare")
        yield batch
        count += 1
    if not count:
        raise InputError("data holds no batch: there is nothing to compare")


@torch.no_grad()
def _run(candidate: Any, batch: Batch) -> Any:
    given = on_device(candidate, batch) if isinstance(candidate, Engine) else batch
    return candidate(*given)


def _planar(candidate: Any, batch: Batch) -> Batch:
    return candidate.planar(batch) if isinstance(candidate, Engine) else batch


def _precision(candidate: Any, output: Any) -> torch.dtype:
    """The dtype whose rounding errors a candidate is allowed."""
    if isinstance(candidate, Engine):
        precision = candidate.options.precision or "fp32"
        # TF32 keeps as many bits of each factor as fp16 does
        return torch.float16 if precision == "tf32" else DTYPE_OF[precision]
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return next((leaf.dtype for leaf in leaves if leaf.dtype in FLOOR), torch.float32)


def _tensors(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output by their place in it; None is nothing to compare.

    Raises:
        InputError: something in it is no tensor.
    """
    found = {}
    for path, leaf in pytree.tree_leaves_with_path(output):
        name = pytree.keystr(path) or "output"
        if leaf is None:
            continue
        if not isinstance(leaf, torch.Tensor):
            raise InputError(f"{name} is {type(leaf).__name__}; only tensors can be compared")
        found[name] = leaf
    return found


def _name(candidate: object) -> str:
    if isinstance(candidate, Engine):
        return repr(candidate)
    return str(getattr(candidate, "__qualname__", type(candidate).__name__))
