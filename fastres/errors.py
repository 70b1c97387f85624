"""What can go wrong, one class per thing a caller can do about it.

Every message says what was found, where, what is supported, and what to do.
"""

from __future__ import annotations

from fastres.wording import message


class FastresError(Exception):
    """Base of every error that fastres raises on purpose.

    What it says is made fit to be shown, whatever names of files and in files are in it.
    """

    def __init__(self, *said: object) -> None:
        super().__init__(*(message(part) if isinstance(part, str) else part for part in said))


class CaptureError(FastresError):
    """The model cannot be read: training mode, non-finite weights, or it does not export."""


class BuildError(FastresError):
    """A state_dict does not describe a residual network, or leaves something to be said."""


class GraphError(FastresError):
    """A graph breaks one of the laws of the IR; raised for damaged files and faulty passes."""


class UnsupportedError(FastresError):
    """A backend refuses the model, the precision or the device; all reasons are listed at once."""


class BackendUnavailable(FastresError):
    """A backend cannot run here: a package, a driver or a device is missing."""


class InputError(FastresError, ValueError):
    """An argument does not fit: wrong dtype, shape, channels, device, or not a tensor."""


class OutOfMemory(FastresError):
    """A device has no room for what a call needs; a smaller batch may still run."""


class CallTimeout(FastresError, TimeoutError):
    """A call was given up, as its `timeout` was over; the engine can be called again."""


class Busy(FastresError):
    """An engine has as many callers as its `max_callers` allows; one of them has to end first."""


class DeviceLost(FastresError):
    """A GPU has reported an error that stays: only a new process can use it again."""


class ArtifactError(FastresError):
    """A saved engine is damaged, incomplete, newer than this version, or would take too much."""


class ParityError(FastresError):
    """A candidate's numbers are outside the tolerance policy."""


def is_interrupt(error: BaseException) -> bool:
    """Whether what a library raised goes back to Ctrl-C: some make errors of their own of that."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt) or "KeyboardInterrupt" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def described(error: BaseException) -> str:
    """Kind and message of an error out of somebody's code, whose message may itself fail."""
    try:
        said = str(error)
    except Exception:
        said = "its message cannot be shown"
    return f"{type(error).__name__}: {said}"


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, of which PyTorch writes pages."""
    return described(error).strip().partition("\n")[0]


def missing(package: str, error: Exception) -> str:
    """What there is to say of a package that cannot be imported."""
    return f"{package} cannot be imported ({error}); pip install {package}"
