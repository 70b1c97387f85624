"""The two protocols that every backend meets: Backend (refuse or lower) and Executable (run)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, TypeAlias

import msgspec
import torch
from msgspec import Meta

from fastres.calib.table import CalibrationTable
from fastres.deadlines import Deadline
from fastres.errors import BackendUnavailable, InputError
from fastres.graph.ir import Graph
from fastres.options import Options, Precision, Sizes

HERE_ONLY = "it builds for this machine only; target= is for triton and tensorrt"


def elsewhere(target: str) -> BackendUnavailable:
    """What there is to say of using an engine that was built for another machine."""
    return BackendUnavailable(
        f"this engine was built for {target} and runs there only: save it, and fastres.load it on "
        "a machine with such a GPU"
    )


# what files may say of plans and kernels, of which nothing else can be made anew
Count: TypeAlias = Annotated[int, Meta(ge=0, lt=2**31)]
Time: TypeAlias = Annotated[float, Meta(ge=0.0, le=1e12)]  # microseconds
Text: TypeAlias = Annotated[str, Meta(max_length=1200, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]


class KernelInfo(msgspec.Struct, frozen=True):
    """One distinct machine code of an executable, and what it was compiled to.

    Args:
        kernel: name of the jit function.
        nodes: the graph's nodes that launch it, in order.
        tile: block sizes, warps and stages.
        spilled: bytes a thread writes to local memory for want of registers.
        shared_bytes: shared memory of a block.
        instructions: matrix products and wide memory accesses, by kind.
    """

    kernel: str
    nodes: tuple[str, ...]
    tile: str
    registers: Count
    spilled: Count
    shared_bytes: Count
    instructions: Annotated[dict[Text, Count], Meta(max_length=256)]


class Choice(msgspec.Struct, frozen=True):
    """How some nodes are run, and what else there was.

    Args:
        nodes: the graph's nodes that it is about.
        taken: the form taken, with its tile.
        microseconds: its time, estimated or measured.
        measured: whether a table of measurements says so.
        problem: the key under which tables know it; empty for several kernels.
        others: form → its time in words, or why it was not possible.
        estimated: microseconds by the model, of what is measured, too.
    """

    nodes: tuple[str, ...]
    taken: str
    microseconds: Time
    measured: bool
    problem: str
    others: Annotated[dict[Text, Text], Meta(max_length=64)]
    estimated: Time = 0.0


Limit = Literal["arithmetic", "memory", "l2", "launch"]


class StepBound(msgspec.Struct, frozen=True):
    """What holds up one step of an executable, in microseconds if nothing but that counted.

    Args:
        node: the graph's node that it runs, the last of several.
        form: kernel and tile.
        bound: which of the four is largest.
        arithmetic: products.
        memory: compulsory traffic to device memory.
        l2: what blocks load from the L2 cache and store there.
        launch: of its kernels.
    """

    node: str
    form: str
    bound: Limit
    arithmetic: float
    memory: float
    l2: float
    launch: float


class Account(msgspec.Struct, frozen=True):
    """What an executable tells of its own making; empty where a backend has nothing to tell.

    Args:
        kernels: what each distinct kernel was compiled to.
        choices: in which form nodes run, and what else there was.
        bounds: what holds up each step, calculated.
        notes: what went otherwise than it should have, and what was done.
    """

    kernels: tuple[KernelInfo, ...] = ()
    choices: tuple[Choice, ...] = ()
    bounds: tuple[StepBound, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompiledParts:
    """What `Executable.compiled` gave, perhaps out of a saved engine; empty where it had nothing.

    Args:
        files: by the names that a saved engine gives them.
        trusted: whether machine code among them may run, which can do anything.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    trusted: bool = False


@dataclass(frozen=True)
class NodeTime:
    """Time of one graph node in one run, in milliseconds; `ran_as` is the kernel that ran.

    Args:
        flop, bytes: work and traffic, where what ran is more or less than the node by itself.
        least: milliseconds that the machine's rates would allow, where these are known.
    """

    name: str
    milliseconds: float
    ran_as: str = ""
    flop: int | None = None
    bytes: int | None = None
    least: float | None = None


@dataclass(frozen=True)
class Refusal:
    """A node that a backend does not take, and why."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class Executable(Protocol):
    """A lowered graph. Any number of threads may call it; what it holds goes when it does."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs on inputs that fit the graph and returns freshly allocated outputs in its order."""

    def precisions(self) -> dict[str, str]:
        """The precision each node actually runs in, as far as the backend can tell."""

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        """The time of each node in one run."""

    def account(self) -> Account:
        """Kernels and choices, as far as they are known."""

    def compiled(self) -> CompiledParts:
        """What spares `lower` some work when it is given back to it, whatever the weights."""


def until(executable: Executable, deadline: Deadline) -> Run:
    """How an executable is run that shall give up at a deadline: `run_until`, where it has that.

    Raises:
        InputError: it cannot be stopped.
    """
    run: Callable[[Sequence[torch.Tensor], Deadline], list[torch.Tensor]] | None
    run = getattr(executable, "run_until", None)
    if run is None:
        raise InputError(
            "timeout= is for the backends cpu and reference; what this engine runs on cannot be "
            "stopped: leave it out"
        )
    return lambda inputs: run(inputs, deadline)


class Backend(Protocol):
    """Turns graphs into executables, or says why not."""

    name: str
    checked: bool  # whether what it builds is compared with the model unless the caller objects

    def unavailable(
        self, target: str | None = None, compiled: CompiledParts | None = None
    ) -> str | None:
        """None, or why this backend cannot run on this machine and what would help.

        Args:
            target: such as "sm_90", to build for; then why it cannot build for that one.
            compiled: what a saved engine brings along, with which less may be needed.
        """

    def precision(self, wanted: Precision) -> str | None:
        """None if the precision is supported, else the reason why it is not."""

    def quantise(self, graph: Graph, table: CalibrationTable, precision: Precision) -> Graph:
        """The graph in int8 or fp8, by the table's scales, as this backend wants it.

        Raises:
            InputError: the table is not this graph's.
        """

    def refusals(self, graph: Graph) -> tuple[Refusal, ...]:
        """Every node that cannot be lowered, with the reason; nothing is lowered."""

    def lower(
        self,
        graph: Graph,
        options: Options,
        shapes: tuple[Sizes, ...],
        compiled: CompiledParts | None = None,
    ) -> Executable:
        """Lowers a graph whose every node is supported, ready for inputs of these shapes.

        Args:
            compiled: what `Executable.compiled` gave for the same graph, perhaps on another
                machine; used as far as it fits.
        """

    def device(self, options: Options) -> torch.device:
        """Where the executable wants its inputs and puts its outputs."""
