"""Who takes part in a `fastres bench` run: ours, and the peers that run the same beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastres.cli.bench_networks import Network
from fastres.cli.bench_results import Lane
from fastres.cli.output import note
from fastres.errors import InputError
from fastres.timing.contest import Entrant
from fastres.timing.peers import refusal, tunes_itself, usual_peers

MAKERS = "fastres.cli.bench_targets"


@dataclass(frozen=True)
class Invited:
    """What a run was asked for.

    Args:
        precisions: as asked for; None: the network's own.
        peers: their names; None: those that are usual on the device.
        transfers: whether calls start and end in the CPU's memory.
    """

    networks: Sequence[Network]
    precisions: Sequence[str | None]
    peers: Sequence[str] | None
    device: torch.device
    transfers: bool

    def entrants(self, example: Path) -> list[Entrant]:
        """Each of ours, then its peers.

        Args:
            example: a file with a batch that peers are made for.
        """
        found = []
        for network in self.networks:
            for asked in self.precisions:
                own = self._own(network, asked)
                found.append(own)
                found += [
                    self._peer(peer, network, own, example)
                    for peer in self._peers_of(network)
                    if refusal(peer, own.precision, self.device) is None
                ]
        return found

    def refused(self) -> dict[str, str]:
        """Why peers run in none of the precisions, or not in all, by name."""
        networks = [network for network in self.networks if network.module is not None]
        precisions = dict.fromkeys(n.precision(p) for n in networks for p in self.precisions)
        found: dict[str, str] = {}
        for name in usual_peers(self.device) if self.peers is None else self.peers:
            whys = {precision: refusal(name, precision, self.device) for precision in precisions}
            wrong = {precision: why for precision, why in whys.items() if why is not None}
            if len(wrong) < len(whys):
                found |= {f"{name} in {precision}": why for precision, why in wrong.items()}
            elif wrong:
                found[name] = next(iter(wrong.values()))
        return found

    def _own(self, network: Network, asked: str | None) -> Entrant:
        tag = network.tag + f"{asked} " * (len(self.precisions) > 1)
        given = {
            "request": network.in_precision(asked),
            "state": network.state,
            "transfers": self.transfers,
        }
        measures = bool(network.request.tune) or "tensorrt" in (network.request.backend or "")
        return Entrant(
            f"{tag}fastres",
            network.name,
            network.precision(asked),
            f"{MAKERS}:ours",
            given,
            ours=True,
            alone=measures,
        )

    def _peer(self, peer: str, network: Network, own: Entrant, example: Path) -> Entrant:
        given = {
            **own.arguments,
            "name": peer,
            "example": example,
            "images": network.images,
            "precision": own.precision,
            "device": str(self.device),
        }
        return Entrant(
            own.name.removesuffix("fastres") + peer,
            network.name,
            own.precision,
            f"{MAKERS}:peer",
            given,
            alone=tunes_itself(peer),
        )

    def _peers_of(self, network: Network) -> Sequence[str]:
        if network.module is not None:
            return usual_peers(self.device) if self.peers is None else self.peers
        if self.peers:
            raise InputError(f"peers need the model's code, which {network.name} does not have")
        note(f"{network.name} is timed without a check: only a model can be checked against")
        return ()


def lanes_of(entrants: Sequence[Entrant]) -> list[Lane]:
    """Each of ours, and the peers that run the same model in the same precision."""
    return [
        Lane(
            own.name,
            own.model,
            own.precision,
            tuple(
                e.name
                for e in entrants
                if not e.ours and (e.model, e.precision) == (own.model, own.precision)
            ),
        )
        for own in entrants
        if own.ours
    ]


def pairs(lanes: Sequence[Lane]) -> list[tuple[str, Lane, Lane]]:
    """Nets of fastres that are there as v1 and as v1.5, in one precision: (net, v1, v1.5)."""
    by_version = {}
    for lane in lanes:
        source, _, name = lane.model.partition(":")
        net, _, version = name.partition("@")
        if source == "fastres":
            by_version[net, version or "v1.5", lane.precision] = lane
    return [
        (net, lane, by_version[net, "v1.5", precision])
        for (net, version, precision), lane in by_version.items()
        if version == "v1" and (net, "v1.5", precision) in by_version
    ]
