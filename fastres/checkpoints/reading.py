"""Where the weights of a network lie in what training leaves, and what they are called there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastres.checkpoints.files import read_checkpoint
from fastres.errors import BuildError
from fastres.options import PathLike
from fastres.wording import LINE, listed, named

# What PyTorch's wrappers put into the names of what they wrap: DataParallel, its distributed kin
# and AveragedModel; torch.compile; FSDP; checkpointing of activations.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DEEPEST = 1 << 24  # keys that lead to the tables of a checkpoint, all of them together
_RESIDUAL = ("conv1.weight", "layer1.0.conv1.weight")  # no network is built without these


@dataclass(frozen=True)
class _Place:
    """Where names of a network begin: in one table of a checkpoint, behind a prefix.

    Args:
        keys: those that lead to the table.
        prefix: of its names, without wrappers; ends in a dot unless it is empty.
    """

    keys: tuple[str, ...]
    table: Mapping[Any, Any]
    prefix: str = ""

    @property
    def entry(self) -> str:
        """What the user calls it."""
        return ".".join([*self.keys, *self.prefix.split(".")[:-1]])


@dataclass(frozen=True)
class _Names:
    """By what a network is known.

    Args:
        wanted: names without wrappers → as the network spells them.
        least: how many of them must be there.
        wrapped: whether wrappers are taken off the names of a checkpoint.
    """

    wanted: Mapping[str, str]
    least: int
    wrapped: bool = True

    @staticmethod
    def of(names: Collection[str] | None) -> _Names:
        if names is None:
            return _Names({name: name for name in _RESIDUAL}, len(_RESIDUAL))
        half = (len(names) + 1) // 2
        plain = {_unwrapped(name): name for name in names}
        if len(plain) < len(names):  # the network has modules of its own of such a name
            return _Names({name: name for name in names}, half, wrapped=False)
        return _Names(plain, half)

    def plain(self, key: Any) -> Any:
        return _unwrapped(key) if self.wrapped and isinstance(key, str) else key

    def prefixes(self, table: Mapping[Any, Any]) -> list[str]:
        """Behind which prefixes of a table enough of the names are."""
        lengths = {name.count(".") + 1 for name in self.wanted}
        found: Counter[str] = Counter()
        for name in dict.fromkeys(self.plain(key) for key in table if isinstance(key, str)):
            parts = name.split(".")
            for length in lengths:
                if length <= len(parts) and ".".join(parts[-length:]) in self.wanted:
                    found["".join(f"{part}." for part in parts[:-length])] += 1
        return [prefix for prefix, count in found.items() if count >= self.least]


def read_weights(
    source: PathLike | Mapping[str, Any],
    *,
    names: Collection[str] | None = None,
    entry: str | None = None,
    max_bytes: int | None = None,
) -> Mapping[str, Any]:
    """The state_dict of one network, out of a file or a checkpoint in memory.

    A checkpoint is a table, or tables in tables with whatever else training keeps. The network lies
    where its names begin: in any table, behind any prefix. What PyTorch's wrappers put into names
    (`module.`, `_orig_mod.`) is taken off wherever it stands, and counters beside the network are
    left out. Nothing else that looks like weights is, unless `entry` says so.

    Args:
        names: of the network's weights; None looks for a residual network with torchvision's.
        entry: where to look, if networks lie in several places, or other weights beside the one:
            the keys and prefixes that lead there, with dots between them.
        max_bytes: of a file; see `fastres.checkpoints.files.read_checkpoint`.

    Returns:
        Names as the network spells them → what the checkpoint has; of a file, tensors. The largest
        table as it is, where none has the names.

    Raises:
        BuildError: the file cannot be read, it holds no table of tensors, or several networks or
            other weights, of which `entry` must say which are meant.
    """
    if not isinstance(entry, str | None):
        raise BuildError(f"entry is {entry!r}; give the name of an entry of the checkpoint")
    if isinstance(source, Mapping):
        return _network(source, "the checkpoint", names, entry)
    called, found = named(Path(source), LINE // 2), read_checkpoint(source, max_bytes)
    table = _network(found, called, names, entry)
    wrong = [
        k for k, v in table.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))
    ]
    if wrong:
        raise BuildError(f"{called} holds entries that are no named tensors: {listed(wrong)}")
    return table


def _network(
    found: Any, called: str, names: Collection[str] | None, entry: str | None
) -> Mapping[Any, Any]:
    """The part of a checkpoint that is the network."""
    unasked = entry is None
    if unasked and names is not None and isinstance(found, Mapping) and set(names) <= found.keys():
        return found
    containers = _containers(found)
    tables = [
        _Place(keys, inner)
        for keys, inner in containers
        if isinstance(inner, Mapping) and _count(inner.values())
    ]
    if not tables:
        what = (listed(found) or "nothing") if isinstance(found, Mapping) else type(found).__name__
        raise BuildError(
            f"{called} holds {what}, where a table of tensors was expected: give "
            "model.state_dict(), or what has it as an entry"
        )
    known = _Names.of(names)
    places = [replace(t, prefix=prefix) for t in tables for prefix in known.prefixes(t.table)]
    chosen = _among(places or tables, called, entry)
    if not places:  # whoever wants the weights will say what is missing
        return max(chosen, key=lambda place: _count(place.table.values())).table
    if len(chosen) > 1:
        raise BuildError(_question(called, chosen))
    place = chosen[0]
    beside = [
        repr(".".join(keys))
        for keys, inner in containers
        if keys[: len(place.keys)] != place.keys and _has_layers(inner)
    ]
    if unasked and beside:
        raise BuildError(
            f"{called} has weights under {listed(beside)} too, which are not of the network under "
            f"{place.entry!r}: pass entry={place.entry!r} to leave them out"
        )
    return _trimmed(place, known, called, strict=place.entry != entry)


def _among(places: Sequence[_Place], called: str, entry: str | None) -> Sequence[_Place]:
    """Those at the entry, or else below it."""
    if entry is None:
        return places
    chosen = [place for place in places if place.entry == entry]
    chosen = chosen or [place for place in places if place.entry.startswith(f"{entry}.")]
    if not chosen:
        have = listed([repr(place.entry) for place in places])
        raise BuildError(f"{called} has no such weights under {entry!r}; there are those of {have}")
    return chosen


def _containers(found: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Every table and list in a checkpoint, and what leads to it, but for states of optimizers."""
    reached: list[tuple[tuple[str, ...], Any]] = []
    seen, depths = set(), 0
    waiting: list[tuple[tuple[str, ...], Any]] = [((), found)]
    for keys, inner in waiting:  # which grows meanwhile
        state = isinstance(inner, Mapping) and "param_groups" in inner
        if state or not isinstance(inner, Mapping | list | tuple) or id(inner) in seen:
            continue
        depths += len(keys)
        if depths > _DEEPEST:
            raise BuildError(
                f"the checkpoint holds tables {len(keys)} deep in each other: too many"
            )
        seen.add(id(inner))
        reached.append((keys, inner))
        items = inner.items() if isinstance(inner, Mapping) else enumerate(inner)
        waiting.extend(
            ((*keys, str(key)), value)
            for key, value in items
            if isinstance(value, Mapping | list | tuple)
        )
    return reached


def _count(values: Iterable[Any]) -> int:
    """How many are tensors."""
    return sum(isinstance(value, torch.Tensor) for value in values)


def _has_layers(container: Mapping[Any, Any] | Sequence[Any]) -> bool:
    """Whether there are weights of layers, which are matrices at least; a list has no names."""
    weights: Iterable[Any] = container
    if isinstance(container, Mapping):
        weights = (value for key, value in container.items() if str(key).endswith("weight"))
    return any(isinstance(value, torch.Tensor) and value.dim() > 1 for value in weights)


def _question(called: str, places: Sequence[_Place]) -> str:
    apart = len({place.keys for place in places}) == len(places)  # else by their prefixes
    entries = [".".join(place.keys) if apart else place.entry for place in places]
    ways = " or ".join(f"entry={named(repr(entry))}" for entry in entries[:4])
    return (
        f"{called} holds weights of the network in {len(places)} places, {listed(entries)}, such "
        f"as raw and averaged ones, and nothing tells which are meant: pass {ways}"
    )


def _trimmed(place: _Place, known: _Names, called: str, *, strict: bool) -> dict[Any, Any]:
    """What lies behind the prefix, by the network's own names.

    Args:
        strict: whether the rest of the table may only be counters.
    """
    keys: dict[Any, str] = {}  # of the table
    rest = []
    for key in place.table:
        name = known.plain(key)
        if place.prefix and not (isinstance(name, str) and name.startswith(place.prefix)):
            rest.append(key)
            continue
        name = name.removeprefix(place.prefix) if place.prefix else name
        name = known.wanted.get(name, name)
        if name in keys:
            raise BuildError(
                f"{called} has two weights for {named(name)}, {named(keys[name])} and "
                f"{named(key)}: leave one out"
            )
        keys[name] = key
    lost = [key for key in rest if not _counts(place.table[key])]
    if lost and strict:
        raise BuildError(
            f"{called} has {len(lost)} entries beside the network under {place.entry!r}: "
            f"{listed(lost)}. Pass entry={place.entry!r} to leave them out"
        )
    inside = _shared_start(key for key in keys.values() if not _counts(place.table[key]))
    return {
        name: place.table[key]
        for name, key in keys.items()
        if name in known.wanted or str(key).startswith(inside) or not _counts(place.table[key])
    }


def _counts(value: Any) -> bool:
    """Whether it is one whole number, as of steps or averages; what is learnt is none."""
    return isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point()


def _shared_start(names: Iterable[Any]) -> str:
    """The modules that all names begin with, wrappers included."""
    modules = [str(name).split(".")[:-1] for name in names]
    return "".join(f"{module}." for module in os.path.commonprefix(modules))


def _unwrapped(name: str) -> str:
    *modules, last = name.split(".")
    return ".".join([*(m for m in modules if m not in _WRAPPERS), last])
