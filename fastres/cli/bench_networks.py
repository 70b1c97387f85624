"""The models of a `fastres bench` run, and what results of theirs are held against."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import fastres
from fastres.cli import pictures
from fastres.cli.bench_targets import keep_state
from fastres.cli.flags import Request
from fastres.cli.output import note, working
from fastres.cli.targets import Target, is_saved, open_target, split
from fastres.engine.engine import Engine
from fastres.errors import InputError
from fastres.options import DTYPE_OF, EIGHT_BITS, PRECISION_OF, Precision
from fastres.timing.checks import Reference, exact, own_error
from fastres.timing.contest import Contest, Entrant
from fastres.tolerances import Errors, errors

CALIBRATED_ON = 32  # pictures, where int8 is asked for and no table is given


@dataclass
class Network:
    """A model of the run.

    Args:
        request: for this model alone; its calibration is a table by now.
        tag: what the names of its targets start with; empty where it is the only one.
        state: a file with its weights, for all processes.
        images: a file with a batch that int8 peers calibrate with.
    """

    target: Target
    request: Request
    tag: str = ""
    state: Path | None = None
    images: Path | None = None
    _oracles: dict[int, Tensor] = field(default_factory=dict)
    _baselines: dict[tuple[Precision, int], Errors] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def module(self) -> nn.Module | None:
        return self.target.model if isinstance(self.target.model, nn.Module) else None

    def in_precision(self, precision: str | None) -> Request:
        """The request in one of its precisions; a calibration is for 8 bits."""
        table = self.request.calibration if precision in (None, *EIGHT_BITS) else None
        return replace(self.request, precision=precision, calibration=table)

    def precision(self, asked: str | None) -> Precision:
        """What it runs in when asked for that, or for nothing."""
        if isinstance(self.target.model, Engine):
            own = self.target.model.options.precision
            assert own is not None  # settled when it was compiled
            return own
        if asked is None and self.request.calibration is not None:
            return "int8"
        if asked is None and self.target.dtype not in PRECISION_OF:
            known = ", ".join(str(dtype) for dtype in PRECISION_OF)
            raise InputError(
                f"{self.name} has parameters of {self.target.dtype}; without --precision they must "
                f"be {known}"
            )
        return asked or PRECISION_OF[self.target.dtype]  # type: ignore[return-value]

    def expected(
        self, entrant: Entrant, ours: str, contest: Contest, batch: Tensor, rows: Sequence[int]
    ) -> Reference | None:
        """What is right at those rows; None for what has no code to be run in float64.

        Args:
            ours: the name of our engine in this precision, which tells what int8 means.
        """
        if self.module is None:
            return None
        size, chosen = len(batch), batch[list(rows)]
        if size not in self._oracles:
            self._oracles[size] = exact(self.module, chosen)
        oracle, key = self._oracles[size], (entrant.precision, size)
        if key not in self._baselines:
            if entrant.precision in EIGHT_BITS:
                meant = torch.from_numpy(contest.processes[ours].ask("quantised", rows))
                self._baselines[key] = errors(meant, oracle)
            else:
                own = own_error(self.module, chosen, DTYPE_OF[entrant.precision], oracle)
                self._baselines[key] = own
        return Reference(oracle, self._baselines[key])


def open_networks(
    models: Sequence[str], request: Request, precisions: Sequence[str | None], folder: Path
) -> list[Network]:
    """All models; they must take the same images, since they are fed the same ones.

    Untrained ones are settled on synthetic pictures, since the numbers of a fresh network cannot go
    wrong; for int8 without a table, one is made of such pictures.

    Args:
        folder: an existing one, for weights and tables that processes read.

    Raises:
        InputError: a flag that does not fit, or models that take different images.
    """
    networks = [Network(target, asked) for target, asked in _targets(models, request)]
    for network, tag in zip(networks, _short_names(networks), strict=True):
        network.tag = f"{tag} " * (len(networks) > 1)
    for i, network in enumerate(networks):
        _settle(network, folder / f"state-{i}.pt")
        if any(network.precision(asked) in EIGHT_BITS for asked in precisions):
            _calibrate(network, folder, i)
    return networks


def _targets(models: Sequence[str], request: Request) -> list[tuple[Target, Request]]:
    """--trust-engine is for the saved engines among them."""
    first, rest = split(models, request.weights)
    if request.weights is not None and rest:
        raise InputError(f"--weights goes with one model, got also {', '.join(rest)}")
    names = list(dict.fromkeys([first, *rest]))
    saved = [name for name in names if name is not None and is_saved(name)]
    found = []
    for name in names:
        trust = request.trust_engine if name in saved or not saved else None
        asked = replace(request, model=name, trust_engine=trust)
        found.append((open_target(asked), asked))
    kinds = {(target.shape, target.dtype, target.normalises): target for target, _ in found}
    if len(kinds) > 1:
        takes = "; ".join(f"{t.name} takes {t.dtype} {list(t.shape)}" for t in kinds.values())
        raise InputError(f"models timed in one run must take the same images: {takes}")
    return found


def _short_names(networks: Sequence[Network]) -> list[str]:
    """Engines by their file's name, which a table has room for, unless two share one."""
    full = [network.name for network in networks]
    short = [Path(name).name if os.path.exists(name) else name for name in full]
    return short if len(set(short)) == len(short) else full


def _settle(network: Network, path: Path) -> None:
    """All processes get the weights that are here: a factory may draw others at each call."""
    if network.module is None:
        return
    if network.target.untrained:
        with working(f"settling {network.name}"):
            pictures.settle(network.target)
        note(f"{network.name} has random weights: they are settled on synthetic pictures")
    network.state = keep_state(network.module, path)


def _calibrate(network: Network, folder: Path, number: int) -> None:
    if network.module is None:
        return
    batch = pictures.synthetic(CALIBRATED_ON, network.target)
    network.images = folder / f"images-{number}.pt"
    torch.save(batch, network.images)
    if network.request.calibration is None:
        with working(f"calibrating {network.name}"):
            table = fastres.quantize(
                network.module, batch, algorithm="mse", num_samples=CALIBRATED_ON, backend="cpu"
            )
        path = folder / f"table-{number}.json"
        table.save(path)
        network.request = replace(network.request, calibration=path)
        note(f"{network.name} in int8: calibrated with {CALIBRATED_ON} synthetic pictures")
