"""What an engine says of itself: per node what it does, what was fused, where and how it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from fastres.backends.base import Account, Choice, KernelInfo, Refusal, StepBound
from fastres.graph.ir import Conv2d, Dequantize, Graph, Linear, Quantize, op_name
from fastres.options import EIGHT_BITS
from fastres.text import empty_table, json_text, render

if TYPE_CHECKING:
    from rich.table import Table

_NUMBERS = ("regs", "spill", "shared")
_LIMITS = {"arithmetic": "arithmetic", "memory": "memory", "l2": "L2", "launch": "launch"}
MERGED = "merged"  # the runtime folded the node into its neighbour and no longer lists it


@dataclass(frozen=True)
class NodeInfo:
    """One node that runs.

    `fused` lists the captured operations it stands for; `precision` is the one it was compiled to
    run in, `reason` why it runs in PyTorch rather than in the backend.
    """

    name: str
    op: str
    fused: tuple[str, ...]
    output: str
    backend: str
    precision: str
    reason: str | None = None


@dataclass(frozen=True)
class EngineInfo:
    """An engine's account of itself; `str()` is a table."""

    backend: str
    precision: str
    nodes: tuple[NodeInfo, ...]
    passed_over: tuple[str, ...]
    account: Account = Account()

    @property
    def fallbacks(self) -> tuple[NodeInfo, ...]:
        """The nodes that run in PyTorch because the backend refuses them."""
        return tuple(node for node in self.nodes if node.reason is not None)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that nodes run in, the most common first."""
        counted = Counter(node.precision for node in self.nodes if node.precision != MERGED)
        return tuple(name for name, _ in counted.most_common())

    @property
    def not_quantised(self) -> tuple[NodeInfo, ...]:
        """Of an int8 or fp8 engine: convolutions and linear layers that run in something else."""
        if self.precision not in EIGHT_BITS:
            return ()
        wanted = (op_name(Conv2d()), op_name(Linear()))
        return tuple(n for n in self.nodes if n.op in wanted and n.precision != self.precision)

    def to_dict(self) -> dict[str, Any]:
        account = msgspec.to_builtins(self.account)
        fields = asdict(replace(self, account=Account()))
        del fields["account"]
        return {**fields, **account}

    def to_json(self) -> str:
        return json_text(self.to_dict())

    def __str__(self) -> str:
        table = empty_table(title=f"{len(self.nodes)} nodes on {self.backend} in {self.precision}")
        for column in ("node", "op", "fused", "output", "backend", "precision"):
            table.add_column(column, overflow="fold")
        for node in self.nodes:
            fused = " + ".join(name.rsplit(".", 1)[-1] for name in node.fused)
            table.add_row(node.name, node.op, fused, node.output, node.backend, node.precision)
        lines = [render(table)]
        if self.account.choices:
            lines.append(render(choice_table(self.account.choices)))
        if self.account.bounds:
            lines.append(render(bound_table(self.account.bounds)))
        if self.account.kernels:
            lines.append(render(kernel_table(self.account.kernels)))
        if self.precision in EIGHT_BITS:
            names = ", ".join(f"{node.name} ({node.precision})" for node in self.not_quantised)
            lines.append(f"layers not in {self.precision}: {names or 'none'}")
        lines += [f"fallback {node.name}: {node.reason}" for node in self.fallbacks]
        lines += [f"note: {note}" for note in self.account.notes]
        lines += [f"passed over: {reason}" for reason in self.passed_over]
        return "\n".join(lines)


def choice_table(choices: Sequence[Choice]) -> Table:
    """One row for each choice; us: estimated, or measured where a star stands: (estimated)."""
    title = "what runs in which form, and what else there was (us; * measured, and estimated)"
    table = empty_table(title=title)
    table.add_column("nodes", overflow="fold")
    table.add_column("taken")
    table.add_column("us", justify="right")
    table.add_column("instead of", overflow="fold")
    for choice in choices:
        others = "\n".join(f"{form}: {why}" for form, why in choice.others.items())
        behind = f"* ({choice.estimated:.1f})" if choice.measured else ""
        time = f"{choice.microseconds:.1f}{behind}"
        table.add_row(", ".join(choice.nodes), choice.taken, time, others)
    return table


def bound_table(bounds: Sequence[StepBound]) -> Table:
    """One row for each step, with what holds it up; and for all that the same thing holds up."""
    title = "what holds up each step: us if nothing but that counted, calculated"
    table = empty_table(title=title)
    for column in ("step", "form", *_LIMITS.values(), "bound"):
        table.add_column(column, justify="right" if column in _LIMITS.values() else "left")
    for step in bounds:
        times = (f"{getattr(step, name):.1f}" for name in _LIMITS)
        table.add_row(step.node, step.form, *times, _LIMITS[step.bound])
    table.add_section()
    for name, text in _LIMITS.items():
        if held := [step for step in bounds if step.bound == name]:
            times = (f"{sum(getattr(step, other) for step in held):.1f}" for other in _LIMITS)
            table.add_row(f"{len(held)} steps", "", *times, text)
    every = (f"{sum(getattr(step, name) for step in bounds):.1f}" for name in _LIMITS)
    longest = sum(max(getattr(step, name) for name in _LIMITS) for step in bounds)
    table.add_row(f"{len(bounds)} steps", f"the longest of each: {longest:.1f}", *every, "")
    return table


def kernel_table(kernels: Sequence[KernelInfo]) -> Table:
    """One row for each distinct kernel."""
    title = f"{len(kernels)} kernels, {sum(len(k.nodes) for k in kernels)} launches"
    table = empty_table(title=title)
    for column in ("kernel", "for", "tile", "regs", "spill", "shared", "code"):
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for k in kernels:
        more = f" and {len(k.nodes) - 1} more" if len(k.nodes) > 1 else ""
        code = ", ".join(f"{count} {name}" for name, count in k.instructions.items())
        numbers = [str(n) for n in (k.registers, k.spilled, k.shared_bytes)]
        table.add_row(k.kernel, k.nodes[0] + more, k.tile, *numbers, code)
    return table


def describe(
    graph: Graph,
    *,
    backend: str,
    precision: str,
    ran: Mapping[str, str],
    refused: Sequence[Refusal],
    passed_over: Sequence[str],
    account: Account,
) -> EngineInfo:
    """Puts together what the graph, the executable and the choice of backend know."""
    reasons = {refusal.node: refusal.reason for refusal in refused}
    whole = {node.inputs[0]: node.spec for node in graph.nodes if isinstance(node.op, Quantize)}
    nodes = []
    for node in graph.nodes:
        if isinstance(node.op, Quantize | Dequantize):  # part of what they stand between
            continue
        reason = reasons.get(node.name)
        actual = ran.get(node.name, MERGED)
        where = backend if reason is None else "pytorch"
        nodes.append(
            NodeInfo(
                node.name,
                op_name(node.op),
                node.origins,
                str(whole.get(node.name, node.spec)),
                where,
                actual,
                reason,
            )
        )
    return EngineInfo(backend, precision, tuple(nodes), tuple(passed_over), account)
