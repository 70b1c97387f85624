"""How long a call may take, and how many callers there may be at a time."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from numbers import Real
from types import TracebackType

from fastres.errors import Busy, CallTimeout, InputError

_LONGEST = 10**6  # seconds, eleven days: a longer one is a mistake


@dataclass(frozen=True)
class Deadline:
    """The moment by which a call has to be answered.

    Args:
        seconds: as they were asked for.
        moment: on the clock of `time.monotonic`.
    """

    seconds: float
    moment: float

    @classmethod
    def after(cls, timeout: object) -> Deadline:
        """
        Raises:
            InputError: it is no number of seconds above 0.
        """
        if isinstance(timeout, Deadline):
            return timeout
        given = isinstance(timeout, Real) and not isinstance(timeout, bool)
        if not given or not 0 < timeout <= _LONGEST:  # type: ignore[operator]
            raise InputError(
                f"timeout is {timeout!r}; give seconds above 0, at most {_LONGEST}, or None for "
                "no limit"
            )
        seconds = float(timeout)  # type: ignore[arg-type]
        return cls(seconds, time.monotonic() + seconds)

    def left(self) -> float:
        """The seconds that remain.

        Raises:
            CallTimeout: none do.
        """
        seconds = self.moment - time.monotonic()
        if seconds <= 0:
            raise self.passed()
        return seconds

    def passed(self) -> CallTimeout:
        return CallTimeout(
            f"there was no answer within timeout={self.seconds:g} s, and what was under way was "
            "given up; the engine can be called as before"
        )


class Callers:
    """Counts who is inside of it, and lets in no more than `most` at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside >= self.most:
                raise Busy(
                    f"this engine has {self._inside} callers, as many as max_callers allows: call "
                    "again later, or set engine.max_callers to more"
                )
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
