"""How much memory and work an engine from a file may take: a bound in proportion to the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastres.errors import GraphError
from fastres.graph.ir import Graph
from fastres.graph.need import need
from fastres.options import Sizes

BASE = 64 * 2**20  # bytes
OF_FILE = 64  # bytes for each byte of the file
OF_INPUT = 256  # and for each of what an engine is called with
WORK = 300  # operations for each of these bytes


@dataclass(frozen=True)
class Allowance:
    """What one run may hold at once: BASE + OF_FILE * file + OF_INPUT * input bytes, and WORK
    operations for each byte of that.

    A network that was not made to mislead stays far below: ResNet-50 at batch 256 holds a 24th.

    Args:
        size: of the file, in bytes.
        most: bytes in place of BASE and the file's, as the caller says; None for these.
    """

    size: int
    most: int | None = None

    def check(self, graph: Graph, shapes: Sequence[Sizes], given: int = 0) -> None:
        """
        Args:
            given: bytes of the caller's own inputs.

        Raises:
            GraphError: a run would take more.
        """
        own = BASE + OF_FILE * self.size if self.most is None else self.most
        allowed = own + OF_INPUT * given
        wanted = need(graph, shapes)
        if wanted.bytes > allowed or wanted.operations > WORK * allowed:
            sizes = " and ".join(str(list(shape)) for shape in shapes)
            raise GraphError(
                f"for inputs of {sizes} it would hold {_text(wanted.bytes)} and do "
                f"{wanted.operations:.1e} operations, a file of {_text(self.size)} may take "
                f"{_text(allowed)} and {WORK * allowed:.1e}: if you trust it, give "
                f"fastres.load(..., max_bytes={max(wanted.bytes, wanted.operations // WORK + 1)})"
            )


def _text(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**40 else f"{size:.1e} bytes"
