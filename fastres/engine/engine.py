"""What `fastres.compile` returns: called like the model, checked, thread-safe, able to explain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import msgspec
import torch
import torch.utils._pytree as pytree

from fastres.artifact.contents import Contents, write
from fastres.assembly.assemble import with_weights
from fastres.assembly.parts import Lowered, Parts
from fastres.backends.base import CompiledParts, Executable, elsewhere
from fastres.calib.images import ImageLike
from fastres.deadlines import Callers, Deadline
from fastres.engine.allowance import CallAllowance
from fastres.engine.info import EngineInfo, describe
from fastres.engine.inputs import EngineInputs, Taken
from fastres.engine.predict import OnError, Prediction, predict
from fastres.engine.running import in_flight, in_parts, of_nothing, run_of
from fastres.engine.tracing import beside_compiler, refuse
from fastres.errors import FastresError, InputError
from fastres.graph.ir import Graph
from fastres.graph.shapes import infer_shapes
from fastres.options import PathLike, integer
from fastres.streams import OnStreams

if TYPE_CHECKING:
    from fastres.engine.profile import Profile

Batch = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


@dataclass(eq=False)
class Engine:
    """A compiled network; made by `fastres.compile` or `fastres.load`, not by hand.

    Any number of threads may call one engine. Results are bit-identical for the same engine, batch
    size and thread count; between batch sizes they differ in the last bits.
    """

    # dataclasses.replace, and copy.replace, take this from the engine that they copy
    parts: InitVar[Any] = property(lambda engine: _refuse_copies())
    _closed: bool = field(default=False, init=False)
    _process: int = field(default_factory=os.getpid, init=False)
    _callers: Callers | None = field(default=None, init=False)

    def __post_init__(self, parts: Parts) -> None:
        self._lowered, self._origin = parts.lowered, parts.origin
        self.backend, self.options, self.inputs = parts.backend, parts.options, parts.inputs
        self.preprocess, self.notes = parts.preprocess, parts.notes
        self.passed_over = parts.passed_over
        self.allowance = CallAllowance(self.options, parts.allowance)
        self._tree = self.graph.output_tree
        self._gives_one = self._tree.is_leaf()
        self._given = EngineInputs(self.graph, self.inputs, self.options)
        self._streams = OnStreams(self.device) if self.device.type == "cuda" else None

    @property
    def graph(self) -> Graph:
        """The optimised graph that runs."""
        return self._lowered.graph

    @property
    def source(self) -> Graph:
        """The graph as captured, without the values of its weights."""
        return self._origin.graph

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        """state_dict entries of the model that no output depends on."""
        return self._origin.ignored_weights

    @property
    def device(self) -> torch.device:
        """Where inputs must lie and outputs come to lie."""
        assert self.options.device is not None  # settled when the backend was chosen
        return self.options.device

    @property
    def io_dtype(self) -> torch.dtype | None:
        """torch.uint8 if the engine is called with decoded pictures; None: as the model is."""
        return torch.uint8 if self._given.pictures else None

    @property
    def accepted(self) -> tuple[Taken, ...]:
        """The inputs as it is called with them, and what their sizes range over."""
        return self._given.taken

    @property
    def max_callers(self) -> int | None:
        """How many calls may be under way, running or waiting; one more is refused (Busy).

        None, as it is at first, stands for any number; it can be set. `map` and `predict` keep no
        more batches in flight.
        """
        return None if self._callers is None else self._callers.most

    @max_callers.setter
    def max_callers(self, most: int | None) -> None:
        self._callers = None if most is None else Callers(integer("max_callers", most))

    def __call__(
        self,
        /,
        *inputs: torch.Tensor,
        timeout: float | Deadline | None = None,
        **named: torch.Tensor,
    ) -> Any:
        """Runs the network.

        Args:
            inputs: as the model takes them: [N, C, H, W], contiguous or channels_last, in the
                model's dtype, on the engine's device; with `io_dtype=torch.uint8` decoded pictures,
                uint8 [N, H, W, 3] in RGB. N may be 0; above `max_batch_size` the batch is run in
                parts.
            timeout: seconds after which the call is given up, on the backends cpu and reference;
                what is compiled for a shape that is new is compiled to its end first. None: never.
                An input of this name is given by its place.
            named: inputs by the names that the model's forward has for them, as in
                `engine(pixel_values=x)`.

        Returns:
            What the model returns (a tensor, or the same nesting of tensors), on the same device,
            without gradient.

        Raises:
            InputError: an input does not fit; says what was expected and what came. Or something
                is recording the call that an engine cannot be recorded by, such as torch.export.
            CallTimeout: `timeout` is over. The engine can be called as before.
            Busy: there are `max_callers` already.
            BackendUnavailable: the engine was built for a GPU that is not here.
        """
        if torch.compiler.is_dynamo_compiling():  # only as torch.compile reads this
            return beside_compiler(self.__call__, inputs, {"timeout": timeout, **named})
        lowered = self._runnable()
        run = lowered.executable.run if timeout is None else run_of(lowered.executable, timeout)
        inputs, size = self._given.take(inputs, named)
        self.allowance.check(lowered.graph, inputs)
        if size == 0:
            outputs = of_nothing(lowered.graph, inputs, self.device)
        elif self._callers is None:
            outputs = in_parts(run, inputs, size, self.options.max_batch_size or size)
        else:
            with self._callers:
                outputs = in_parts(run, inputs, size, self.options.max_batch_size or size)
        # whatever is called right after a network has emptied the caches costs 10 to 50 us
        typed = [
            y if y.dtype == dtype else y.to(dtype)
            for y, dtype in zip(outputs, lowered.dtypes, strict=True)
        ]
        return typed[0] if self._gives_one else pytree.tree_unflatten(typed, self._tree)

    def _runnable(self) -> Lowered:
        if self.options.target is not None:
            raise elsewhere(self.options.target)
        return self._open()

    def planar(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Inputs as the graph takes them: decoded pictures are seen as [N, 3, H, W]."""
        return self._given.planar(inputs)

    def in_order(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """A batch as the inputs of one call: a tensor, several, or a mapping of them by name.

        Raises:
            InputError: a name is unknown or missing.
        """
        if isinstance(batch, Mapping):
            return self._given.in_order((), batch)
        return tuple(batch) if isinstance(batch, tuple | list) else (cast(torch.Tensor, batch),)

    def map(self, batches: Iterable[Batch], *, depth: int = 2) -> Iterator[Any]:
        """Runs many batches with up to `depth` in flight; yields results in order.

        A batch is a tensor, several of them in order, or a mapping of them by their names.

        With `hint="throughput"` the batches in flight run on streams of their own. On a GPU they do
        in any case, and batches may lie in the CPU's memory: copying one overlaps with computing
        another.

        Raises:
            InputError: batches is no iterable, depth is no integer of at least 1, or a batch does
                not fit (raised when its turn comes).
        """
        depth = integer("depth", depth)
        if not isinstance(batches, Iterable):
            raise InputError(f"batches is {type(batches).__name__}; give an iterable of batches")
        self._runnable()
        return self.mapped(batches, depth)

    def mapped(
        self, batches: Iterable[Batch], depth: int, deadline: Deadline | None = None
    ) -> Iterator[Any]:
        """As `map`, until a deadline."""
        return in_flight(self._work(batches, deadline), min(depth, self.max_callers or depth))

    def _work(
        self, batches: Iterable[Batch], deadline: Deadline | None
    ) -> Iterator[Callable[[], Any]]:
        streams = self._streams
        for batch in batches:
            if deadline is not None:
                deadline.left()
            inputs = self.in_order(batch)
            call = partial(self, *inputs, timeout=deadline)
            yield streams.submission(self, inputs) if streams else call

    def predict(
        self,
        images: Sequence[ImageLike],
        *,
        batch_size: int = 8,
        top_k: int = 5,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> list[Prediction]:
        """Classifies images: decoded, preprocessed as in training, softmax, `top_k` best.

        Args:
            images: paths of regular files, PIL pictures, or uint8 arrays [H, W, 3] in RGB.
            on_error: "raise" ends at the first image that cannot be taken; "row" gives it a
                `Prediction` without classes, whose `error` says why, and goes on.
            timeout: seconds for all of it, as for a call; asked for between batches while images
                are decoded.

        Raises:
            InputError: the engine has no `preprocess`, or one with other numbers than it
                normalises by; an image is unreadable, too large or of another size than the engine
                takes, which is named; or the network does not return one [N, classes] tensor.
            CallTimeout: `timeout` is over.
        """
        executable, deadline = self._runnable().executable, None
        if timeout is not None:
            deadline = Deadline.after(timeout)
            run_of(executable, deadline)  # refused before anything is read
        return predict(self, images, batch_size, top_k, on_error, deadline)

    @property
    def info(self) -> EngineInfo:
        """Per node: operation, what was fused into it, backend, precision, fallbacks and why."""
        lowered = self._open()
        account = lowered.executable.account()
        return describe(
            lowered.graph,
            backend=self.backend.name,
            precision=self.options.precision or "fp32",
            ran=lowered.executable.precisions(),
            refused=lowered.refused,
            passed_over=self.passed_over,
            account=msgspec.structs.replace(account, notes=(*self.notes, *account.notes)),
        )

    def profile(
        self, /, *inputs: torch.Tensor, trace: PathLike | None = None, **named: torch.Tensor
    ) -> Profile:
        """Time, GFLOP/s, GB/s and, on a GPU, share of the roofline of every node in one run.

        Args:
            inputs, named: as the engine is called.
            trace: a file for what torch.profiler sees of the measuring and of one whole run after
                it, in Chrome's format (chrome://tracing, Perfetto).

        Raises:
            InputError: an input does not fit, the batch is empty, or the file cannot be written.
        """
        from fastres.engine.profile import make_profile, traced

        lowered = self._runnable()
        inputs, size = self._given.take(inputs, named)
        if size == 0:
            raise InputError("the batch is empty: there is nothing to profile")
        self.allowance.check(lowered.graph, inputs)
        shapes = infer_shapes(lowered.graph, [tuple(x.shape) for x in inputs])
        executable = lowered.executable
        with traced(trace):
            times = executable.profile(inputs)
            if trace is not None:
                executable.run(inputs)
        return make_profile(lowered.graph, shapes, times, executable.precisions())

    def update_weights(
        self,
        state_dict: Mapping[str, Any] | PathLike,
        *,
        entry: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        """Takes new weights for the same architecture; calls under way finish with the old ones.

        Args:
            state_dict: the model's, a checkpoint that has one, or the path of either.
            entry, max_bytes: where in a checkpoint it lies, if that must be said, and what the
                tensors of a file may take; see `fastres.build`.

        Raises:
            InputError: a weight is missing, unknown, misshapen, or not finite, or the file cannot
                be read; nothing is changed.
        """
        parts = Parts(self._open(), self._origin, self.backend, self.options, self.inputs)
        self._lowered = with_weights(parts, state_dict, entry, max_bytes)
        if self._closed:  # meanwhile, by another thread
            self.close()
            self._open()

    def save(self, path: PathLike) -> None:
        """Saves graph, weights and settings; see `fastres.load`. Ends in .fastres: one zip file.

        Nothing is left half-written; a saved engine that is there already is replaced.

        Raises:
            ArtifactError: the path holds something else or cannot be written, or the model returns
                something that cannot be written down.
        """
        contents = Contents(
            self.graph,
            self.source,
            replace(self.options, backend=(self.backend.name,)),
            self.inputs,
            self.preprocess,
            self.ignored_weights,
            dict(self.compiled_parts().files),
        )
        write(contents, path)

    def compiled_parts(self) -> CompiledParts:
        """What was compiled and is worth keeping; see `Executable.compiled`."""
        return self._open().executable.compiled()

    def close(self) -> None:
        """Lets go of the executable: calls under way come to their end, and others are refused."""
        self._closed = True
        self._lowered = replace(self._lowered, executable=cast(Executable, None))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        _refuse_copies()

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks of an object before it reads its code."""
        refuse("torch.jit.script")

    @property
    def _jit_override_qualname(self) -> NoReturn:
        """What torch.jit.trace asks of an object before it calls it."""
        refuse("torch.jit.trace")

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self._given.taken))
        return (
            f"Engine({inputs}; {len(self.graph.nodes)} nodes on {self.backend.name} in "
            f"{self.options.precision})"
        )

    def _open(self) -> Lowered:
        lowered = self._lowered  # before the question: another thread may close the engine now
        if self._closed:
            raise FastresError("this engine was closed; compile or load it again")
        if os.getpid() != self._process:  # threads of the runtimes do not survive a fork
            raise FastresError(
                "this engine was made before the process was forked, and would hang here; load or "
                "compile it in this process, or start processes with the method 'spawn'"
            )
        return lowered


def _refuse_copies() -> NoReturn:
    raise FastresError(
        "an engine cannot be pickled or copied: write it with engine.save(path), and read it with "
        "fastres.load(path) as often as needed"
    )
