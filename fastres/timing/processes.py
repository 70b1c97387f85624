"""A target in a process of its own, where no other runtime's threads and memory are in its way.

The child pins itself to the cores it is given before it imports anything that starts threads,
makes its target, and then does what it is asked through a pipe. What it prints goes to a file.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.errors import FastresError
from fastres.timing import turns

PATIENCE = 10.0  # seconds in which a child that was told to end must have ended
LONGEST = 1800.0  # seconds for an answer, then a child counts as hung; tuning takes minutes


class Stopped(FastresError):
    """The process of a target ended by itself, or an error was raised in it."""


@dataclass
class Made:
    """What a maker gives back, in the child.

    Args:
        call: with one batch on `device`; returns a tensor.
        device: where the batch must be.
        facts: what the parent is told of it; must be picklable.
        more: further questions the parent may ask, by name; each gets the batch, then what else is
            asked.
        transfers: whether a call starts and ends with a batch in the CPU's memory.
    """

    call: Callable[[Tensor], Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    facts: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    transfers: bool = False


class Process:
    """A contestant in a process of its own.

    Args:
        name: of the target.
        maker: "package.module:function", which is called with `arguments` in the child and returns
            a `Made`.
        cores: the child is pinned to them.
        folder: an existing one, where batches are handed over and what the child prints is kept.

    Raises:
        FastresError: what the maker raised.
        Stopped: something else was raised by it, or the child died.
    """

    def __init__(
        self,
        name: str,
        maker: str,
        arguments: Mapping[str, Any],
        *,
        cores: Sequence[int],
        folder: Path,
    ) -> None:
        self.name = name
        self._folder = folder
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = folder / f"{id(self)}.log"
        self._child = context.Process(
            target=_serve,
            args=(theirs, maker, dict(arguments), list(cores), self._log),
            daemon=True,
        )
        # Ctrl-C on a terminal goes to the child as well, even before it can say that it ignores it;
        # the first tracker of a process would let it through again
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._child.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.facts: dict[str, Any] = {}
        self._failure: FastresError | None = None

    def wait(self) -> dict[str, Any]:
        """Waits until the target is made; what the maker tells of it."""
        self.facts = self._answer()
        return self.facts

    def feed(self, batch: Tensor, *, rows: Sequence[int] | None = None) -> Tensor:
        """Gives the batch that is used from now on, and runs it.

        Returns:
            The result, or those rows of it, on the CPU in float32.
        """
        path = self._folder / f"batch-{tuple(batch.shape)}-{batch.dtype}.pt"
        if not path.exists():
            torch.save(batch, path)
        return torch.from_numpy(self.ask("feed", path, rows))

    def warm_up(self, seconds: float) -> float:
        return float(self.ask("warm_up", seconds))

    def turn(self, calls: int) -> list[float]:
        return list(self.ask("turn", calls))

    def ask(self, *question: Any) -> Any:
        """Asks the child; the first word is a question that `_Served` or the maker knows.

        Raises:
            FastresError: what the child raised.
            Stopped: something else was raised there, or it died.
        """
        with suppress(OSError):  # of a child that has died, which `_answer` tells of
            self._pipe.send(question)
        return self._answer()

    def dismiss(self) -> None:
        """Tells the child to end, and does not wait for it."""
        self._pipe.close()

    def kill(self) -> None:
        """Ends the child, and what it has started, at once; who waits for it hears that it died."""
        if self._child.is_alive() and self._child.pid is not None:
            with suppress(ProcessLookupError):  # so young that it leads no group yet
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.kill()

    def close(self) -> None:
        """Ends the child."""
        self.dismiss()
        self._child.join(PATIENCE)
        if self._child.is_alive():
            self.kill()
            self._child.join()

    def raise_failure(self) -> None:
        """
        Raises:
            FastresError: what an earlier question came to, if it failed.
        """
        if self._failure is not None:
            raise self._failure

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(LONGEST):
                self.kill()
                kind, value = Stopped, f"it gave no answer for {LONGEST / 60:g} minutes"
            else:
                kind, value = self._pipe.recv()
        except (EOFError, OSError):
            kind, value = Stopped, self._death()
        if kind is None:
            return value
        self._failure = Stopped(f"{self.name} stopped: {value}") if kind is Stopped else kind(value)
        raise self._failure

    def _death(self) -> str:
        self._child.join(PATIENCE)
        printed = self._log.read_text(errors="replace") if self._log.exists() else ""
        last = f"; the last it printed: {_last_line(printed)}" if printed.strip() else ""
        return f"its process died, exit status {self._child.exitcode}{last}"


class _Served:
    """The child's side of a `Process`."""

    def __init__(self, made: Made) -> None:
        self._made = made
        self._batch = torch.empty(0)

    def feed(self, path: Path, rows: Sequence[int] | None) -> np.ndarray:
        batch: Tensor = torch.load(path, weights_only=True)
        self._batch = batch if self._made.transfers else batch.to(self._made.device)
        result = self._made.call(self._batch)
        if not isinstance(result, Tensor):
            raise Stopped(f"it returns {type(result).__name__}; a tensor is expected")
        chosen = result if rows is None else result[list(rows)]
        return np.array(chosen.detach().float().cpu().numpy())

    def warm_up(self, seconds: float) -> float:
        return turns.warm_up(self._made.call, self._batch, seconds)

    def turn(self, calls: int) -> list[float]:
        return turns.turn(self._made.call, self._batch, calls)

    def answer(self, question: str, *rest: Any) -> Any:
        if question in self._made.more:
            return self._made.more[question](self._batch, *rest)
        known: dict[str, Callable[..., Any]] = {
            "feed": self.feed,
            "warm_up": self.warm_up,
            "turn": self.turn,
        }
        return known[question](*rest)


def _serve(
    pipe: Connection, maker: str, arguments: dict[str, Any], cores: list[int], log: Path
) -> None:
    """What the child does: makes its target and answers until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    os.setpgid(0, 0)  # compilers and their helpers, which it starts, are of its group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, cores)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module, _, function = maker.partition(":")
    served: list[_Served] = []

    def make() -> dict[str, Any]:
        made = getattr(importlib.import_module(module), function)(**arguments)
        served.append(_Served(made))
        return dict(made.facts)

    with torch.no_grad():
        _tell(pipe, make)
        while served:
            try:
                question = pipe.recv()
            except (EOFError, OSError):
                gc.freeze()  # else the interpreter looks through all it holds, for a second
                return
            _tell(pipe, partial(served[0].answer, *question))


def _end_with_parent() -> None:
    """A parent that was killed closes no pipe that a child would look at while it is busy."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _tell(pipe: Connection, work: Callable[[], Any]) -> None:
    """Sends what the work gives, or what it raised."""
    try:
        told: tuple[Any, Any] = (None, work())
    except FastresError as error:
        told = (type(error), str(error))
    except Exception as error:
        traceback.print_exc()
        told = (Stopped, f"{type(error).__name__}: {_last_line(str(error))}")
    pipe.send(told)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""
