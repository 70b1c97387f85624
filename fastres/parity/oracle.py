"""The captured program's own ATen calls, run by PyTorch in a chosen dtype: the layerwise oracle.

It knows nothing of the IR, its readers or its meaning: the exported program is walked call by
call, so whatever capture misreads, a pass breaks or a backend miscomputes shows up against it.
Only the names of the values are the graph's (`Captured.values`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_map

from fastres.errors import InputError
from fastres.graph.capture import Captured
from fastres.graph.specs import widest
from fastres.parity.other_dtypes import InDtype


def activations(
    captured: Captured,
    inputs: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    names: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """What each value was right after the call that made it.

    Args:
        captured: a model as `fastres.graph.capture` read it.
        inputs: one per input of the program, of any batch size; floating ones are cast to `dtype`.
        dtype: of the whole computation: parameters, inputs, and every floating dtype that the
            program names in a call.
        names: the values wanted, all by default; the walk ends with the last of them.

    Returns:
        Tensors by the graph's value names, on the parameters' device. None of them is changed by
        an in-place call that came later.

    Raises:
        InputError: the number of inputs does not fit, or the program has no value of some name.
    """
    known = set(captured.values.values())
    wanted = known if names is None else set(names)
    if not wanted <= known:
        raise InputError(f"the program has no value named {', '.join(sorted(wanted - known)[:5])}")
    kept: dict[str, torch.Tensor] = {}
    sharing: dict[int, list[str]] = {}  # storage → the values kept in it

    def protect(target: torch.Tensor) -> None:
        for name in sharing.pop(_storage(target), ()):
            kept[name] = kept[name].clone()

    steps = _steps(captured, inputs, dtype, protect)
    while len(kept) < len(wanted):
        name, value = next(steps)
        if name in wanted and name not in kept:
            kept[name] = value
            sharing.setdefault(_storage(value), []).append(name)
    steps.close()
    return kept


def walk(
    captured: Captured, inputs: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same values one at a time, in order, each freed after its last use.

    A call that changes nothing, such as dropout, gives what it reads, by that name, once more. A
    value may be changed in place by a later call: use it before asking for the next.
    """
    return _steps(captured, inputs, dtype, lambda target: None)


@torch.no_grad()
def _steps(
    captured: Captured,
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype,
    before_change: Callable[[torch.Tensor], None],
) -> Generator[tuple[str, torch.Tensor]]:
    """Runs call after call; `before_change` sees each tensor that is about to be overwritten."""
    program = captured.program
    env = _placeholders(program, inputs, dtype)
    dying = _last_uses(program)

    own = widest(t.dtype for t in program.state_dict.values()) or torch.float32

    def value_of(arg: Any) -> Any:
        return env[arg] if isinstance(arg, torch.fx.Node) else arg

    for node in program.graph.nodes:
        # a call that returns nothing only asserts something of the traced sizes and dtypes
        if node.op == "call_function" and (node.users or node.meta.get("val") is not None):
            args, kwargs = tree_map(value_of, (node.args, dict(node.kwargs)))
            assert callable(node.target)
            for target in _overwritten(node.target, args):
                before_change(target)
            with InDtype(dtype, own):
                env[node] = node.target(*args, **kwargs)
            if node.name in captured.values:
                yield captured.values[node.name], env[node]
        for dead in dying[node]:
            env.pop(dead, None)


def _placeholders(
    program: ExportedProgram, inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> dict[torch.fx.Node, Any]:
    """Parameters, buffers, constants and inputs, cast, by the node that stands for them."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    wanted = len(program.graph_signature.user_inputs)
    if len(inputs) != wanted:
        raise InputError(f"the model takes {wanted} inputs, got {len(inputs)}")
    weights = [t for t in program.state_dict.values() if isinstance(t, torch.Tensor)]
    given = iter(inputs)
    env: dict[torch.fx.Node, Any] = {}
    for spec in program.graph_signature.input_specs:
        fed = spec.kind == InputKind.USER_INPUT
        name = str(spec.target)
        tensor = next(given) if fed else program.state_dict.get(name, program.constants.get(name))
        tensor = tensor.detach()
        if fed:  # an in-place call must not reach the caller's; capture refuses those on weights
            tensor = tensor.to(weights[0].device if weights else None, copy=True)
        env[nodes[spec.arg.name]] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return env


def _last_uses(program: ExportedProgram) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """For each call, the values that no call after it reads; its own if nobody does."""
    dying: dict[torch.fx.Node, list[torch.fx.Node]] = {node: [] for node in program.graph.nodes}
    seen: set[torch.fx.Node] = set()
    for node in reversed(program.graph.nodes):
        for used in (*node.all_input_nodes, node):
            if used not in seen and node.op == "call_function":
                seen.add(used)
                dying[node].append(used)
    return dying


def _overwritten(target: Callable[..., Any], args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments that the operator writes to, as its schema says."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    return [a for a, w in zip(args, written, strict=False) if w and isinstance(a, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
