"""In which form a convolution runs, alone or with its neighbours: reckoned, and written down.

A form is a kernel with a tile. On sm_90 and newer, what the copy engine can take goes through it.
Stems read folded pictures, with their max pool where they can. Whether a projection is merged into
the last 1x1, and whether a whole bottleneck boundary becomes one kernel, is decided by the sum of
times. The vendor's form takes the place of ours where it was measured to be faster. A recorded plan
decides in their stead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastres.backends.base import Choice
from fastres.backends.triton.planning.form import (
    SEVERAL,
    Form,
    Kind,
    Way,
    choice_of,
    instead,
    preferred,
    quickest,
    several,
    strange,
)
from fastres.backends.triton.planning.plan import (
    AnyStep,
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchLinear,
    LaunchStem,
    LaunchStemPool,
    LaunchVendor,
)
from fastres.backends.triton.planning.posing import Posing
from fastres.backends.triton.planning.problems import AnyTile, Problem
from fastres.backends.triton.planning.regions import Boundary
from fastres.backends.triton.planning.table import Tiles
from fastres.errors import UnsupportedError
from fastres.graph.ir import Node
from fastres.kernels.geometry import mergeable
from fastres.kernels.tiles import ChainTile, ConvTile, StemPoolTile

_THEN_A_POOL = "and a pool"
_BY_ITSELF = "and that by itself"
_NOT_MEASURED = "not measured; tune=True does so"


class Reckoner:
    """Chooses forms for one graph and one set of shapes, and keeps the reckoning.

    Args:
        posing: what the graph's nodes ask of kernels.
        tiles: the best tile of each problem on the target.
        recorded: a plan's steps by node, whose forms are taken over; None to choose.
    """

    def __init__(
        self, posing: Posing, tiles: Tiles, recorded: Mapping[str, AnyStep] | None = None
    ) -> None:
        self.choices: list[Choice] = []
        self._posing = posing
        self._tiles = tiles
        self._target = tiles.target
        self._recorded = recorded
        self._stems: dict[str, dict[str, str]] = {}  # that run as any other: what else there was

    def linear(self, node: Node) -> ConvTile:
        """The tile of a linear layer: a 1x1 convolution of a 1x1 picture."""
        problem = self._posing.linear(node)
        if self._recorded is not None:
            step = self._recorded.get(node.name)
            if isinstance(step, LaunchLinear) and problem.takes(step.tile, self._target):
                self._took((node,), "pointers", step.tile, problem)
                return step.tile
            raise strange(node)
        form = self._form("pointers", problem)
        self.choices.append(choice_of((node,), form, {}))
        assert isinstance(form.tile, ConvTile)
        return form.tile

    def convolution(self, node: Node, *, plain: bool, projection: Node | None = None) -> Form:
        """The form of a convolution that runs for itself, or with a projection merged into it.

        Args:
            plain: whether its residual, if any, is a whole tensor: no view of another one.
        """
        if self._recorded is not None:
            return self._recorded_form(node, plain, projection)
        form, others = self._convolution(node, plain, projection)
        nodes = (node,) if projection is None else (projection, node)
        others = {**self._stems.get(node.name, {}), **others}
        self.choices.append(choice_of(nodes, form, others))
        return form

    def stem(self, node: Node, pool: Node | None) -> StemPoolTile | ConvTile | None:
        """The tile with which a stem reads its picture folded; None if it runs as any other.

        A StemPoolTile computes the max pool with it. Over plain pixels a stem loads element by
        element, which no estimate sees: it comes last until all ways are measured. Without tensor
        cores that matters less than the zeros which folding multiplies, and the estimates decide.

        Args:
            pool: the max pool that alone reads it; None where there is none.
        """
        if self._recorded is not None:
            return self._recorded_stem(node, pool)
        posing, reasons = self._posing, {}
        rest: tuple[Form, ...] = ()
        ways: list[Way] = []
        if pool is not None:
            together = posing.stem_and_pool(node)
            reason = posing.pooling_reason(node) or self._no_tile(together)
            if reason is None:
                ways.append(Way(self._form("stem and pool", together)))
                rest = (self._form("max pool", posing.pool_of(node)),)
            else:
                reasons["stem and pool"] = reason
        apart = _THEN_A_POOL if rest else ""
        folded = posing.folded_stem(node)
        reason = posing.folding_reason(node) or self._no_tile(folded)
        if reason is None:
            ways.append(Way(self._form("folded stem", folded), rest, apart))
        else:
            reasons["folded stem"] = reason
        plain = Way(self._form("pointers", posing.pointers(node)), rest, apart)
        ways.append(plain)
        taken = (preferred if folded.tensor_cores else quickest)(ways)
        others = {**instead(ways, taken), **reasons}
        tile = taken.form.tile
        if taken is plain:
            self._stems[node.name] = others  # written down where it is planned as a convolution
            return None
        nodes = (node,) if pool is None or not isinstance(tile, StemPoolTile) else (node, pool)
        self.choices.append(choice_of(nodes, taken.form, others))
        assert isinstance(tile, StemPoolTile | ConvTile)
        return tile

    def merges(self, node: Node, projection: Node) -> bool:
        """Whether a projection runs within the convolution that adds it."""
        if self._recorded is not None:
            step = self._recorded.get(node.name)
            return isinstance(step, LaunchBoxConv2d) and step.projection is not None
        problem = self._posing.boxes(node, projection)
        if self._posing.box_reason(node, True, projection) or self._no_tile(problem):
            return False
        merged = Way(self._alone(node, projection))
        apart = Way(several((self._alone(node), self._alone(projection))))
        return quickest([merged, apart]) is merged

    def chains(self, boundary: Boundary) -> tuple[Boundary, ChainTile] | None:
        """The boundary that becomes one kernel, and its tile; None if it stays several.

        It may be shorter than the one given: without the next block's first 1x1.
        """
        if self._recorded is not None:
            return self._recorded_chain(boundary)
        ways = [Way(self._apart(boundary))]
        chained: list[Boundary | None] = [None]
        reasons: dict[str, str] = {}
        for candidate in (boundary, boundary.shorter):
            if candidate is None:
                continue
            kind: Kind = "chain" if candidate.following else "chain without the next 1x1"
            reason = self._posing.chain_reason(candidate)
            reason = reason or self._no_tile(self._posing.chain(candidate))
            if reason is not None:
                reasons[kind] = reason
                continue
            chain = Way(self._form(kind, self._posing.chain(candidate)))
            if boundary.following is not None and candidate.following is None:
                chain = Way(chain.form, (self._alone(boundary.following),), _BY_ITSELF)
            ways.append(chain)
            chained.append(candidate)
        taken = quickest(ways)
        others = {**reasons, **instead(ways, taken)}
        self.choices.append(choice_of(boundary.nodes, taken.form, others))
        found = chained[ways.index(taken)]
        if found is None:
            return None
        assert isinstance(taken.form.tile, ChainTile)
        return found, taken.form.tile

    def _apart(self, boundary: Boundary) -> Form:
        """The same nodes as kernels of their own."""
        projection = boundary.projection
        forms = [self._alone(boundary.conv2)]
        if projection is not None and self.merges(boundary.conv3, projection):
            forms.append(self._alone(boundary.conv3, projection))
        else:
            alone = (boundary.conv3, projection)
            forms += [self._alone(node) for node in alone if node is not None]
        if boundary.following is not None:
            forms.append(self._alone(boundary.following))
        return several(forms)

    def _alone(self, node: Node, projection: Node | None = None) -> Form:
        return self._convolution(node, True, projection)[0]

    def _convolution(
        self, node: Node, plain: bool, projection: Node | None
    ) -> tuple[Form, dict[str, str]]:
        ours, others = self._ours(node, plain, projection)
        library = self._tiles.library
        if library is None or projection is not None:
            return ours, others
        problem = self._posing.vendor(node, library)
        reason = self._posing.vendor_reason(node, plain) or self._no_tile(problem)
        if reason is None and not self._tiles.best(problem).measured:
            reason = _NOT_MEASURED
        if reason is not None:
            return ours, {**others, "vendor": reason}
        # The model knows nothing of it. What estimates decide is decided as if ours ran.
        theirs = replace(self._form("vendor", problem), estimate=ours.estimate)
        if ours.measured and theirs.seconds < ours.seconds:
            return theirs, {**others, str(ours): ours.time}
        return ours, {**others, str(theirs): theirs.time}

    def _ours(
        self, node: Node, plain: bool, projection: Node | None
    ) -> tuple[Form, dict[str, str]]:
        """In a kernel of ours."""
        pointers, others = None, {}
        if projection is None:
            pointers = self._pointers(node)
            if pointers.merged > 1:
                single = self._form("pointers", self._posing.pointers(node))
                others = {str(single): single.time}
        problem = self._posing.boxes(node, projection)
        reason = self._posing.box_reason(node, plain, projection) or self._no_tile(problem)
        if reason is not None:
            assert pointers is not None
            return pointers, {**others, "boxes": reason}
        boxed = self._form("boxes", problem)
        if pointers is None:
            return boxed, {}
        ways = [Way(boxed), Way(pointers)]
        taken = preferred(ways)
        return taken.form, {**others, **instead(ways, taken)}

    def _pointers(self, node: Node) -> Form:
        """With as many groups in one product as is quickest: a narrow one leaves a tile empty."""
        shape = self._posing.shape(node)
        ways = [
            Way(self._form("pointers", self._posing.pointers(node, merged=n)))
            for n in mergeable(shape.groups, shape.c // shape.groups)
        ]
        return quickest(ways).form

    def _form(self, kind: Kind, problem: Problem) -> Form:
        try:
            best = self._tiles.best(problem)
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        times = best.seconds, best.estimate, best.measured
        return Form(kind, best.tile, *times, problem.key, merged=problem.merged)

    def _no_tile(self, problem: Problem) -> str | None:
        """Why a problem cannot be run; None if it can."""
        try:
            self._tiles.best(problem)
        except ValueError as error:
            return str(error).partition("\n")[0]
        return None

    def _recorded_stem(self, node: Node, pool: Node | None) -> StemPoolTile | ConvTile | None:
        recorded = self._recorded or {}
        step = None if pool is None else recorded.get(pool.name)
        if pool is not None and isinstance(step, LaunchStemPool):
            problem = self._posing.stem_and_pool(node)
            possible = self._posing.pooling_reason(node) is None
            if possible and problem.takes(step.tile, self._target):
                self._took((node, pool), "stem and pool", step.tile, problem)
                return step.tile
            raise strange(pool)
        step = recorded.get(node.name)
        if not isinstance(step, LaunchStem):
            return None
        problem = self._posing.folded_stem(node)
        possible = self._posing.folding_reason(node) is None
        if possible and problem.takes(step.tile, self._target):
            self._took((node,), "folded stem", step.tile, problem)
            return step.tile
        raise strange(node)

    def _recorded_chain(self, boundary: Boundary) -> tuple[Boundary, ChainTile] | None:
        step = (self._recorded or {}).get(boundary.conv3.name)
        if not isinstance(step, LaunchChain):
            self._took(boundary.nodes, SEVERAL, None, None)
            return None
        chained = boundary if step.next_target is not None else boundary.shorter or boundary
        problem = self._posing.chain(chained)
        possible = self._posing.chain_reason(chained) is None
        if not (possible and problem.takes(step.tile, self._target)):
            raise strange(boundary.conv3)
        kind: Kind = "chain" if chained.following else "chain without the next 1x1"
        self._took(boundary.nodes, kind, step.tile, problem)
        return chained, step.tile

    def _recorded_form(self, node: Node, plain: bool, projection: Node | None) -> Form:
        step = (self._recorded or {}).get(node.name)
        posing = self._posing
        nodes = (node,) if projection is None else (projection, node)
        if isinstance(step, LaunchConv2d) and projection is None:
            shape, merged = posing.shape(node), step.merged
            possible = merged in mergeable(shape.groups, shape.c // shape.groups)
            problem = posing.pointers(node, merged=merged if possible else 1)
            if possible and problem.takes(step.tile, self._target):
                return self._took(nodes, "pointers", step.tile, problem)
        elif isinstance(step, LaunchBoxConv2d) and not posing.box_reason(node, plain, projection):
            problem = posing.boxes(node, projection)
            if problem.takes(step.tile, self._target):
                return self._took(nodes, "boxes", step.tile, problem)
        elif isinstance(step, LaunchVendor) and projection is None:
            problem = posing.vendor(node, self._tiles.library or "")
            possible = not posing.vendor_reason(node, plain)
            if possible and problem.takes(step.tile, self._target):
                return self._took(nodes, "vendor", step.tile, problem)
        raise strange(node)

    def _took(
        self, nodes: tuple[Node, ...], kind: Kind, tile: AnyTile | None, problem: Problem | None
    ) -> Form:
        """A recorded form, written down as it was when it was chosen, but for the times."""
        key, merged = ("", 1) if problem is None else (problem.key, problem.merged)
        form = Form(kind, tile, 0.0, 0.0, problem=key, merged=merged)
        self.choices.append(choice_of(nodes, form, {}))
        return form
