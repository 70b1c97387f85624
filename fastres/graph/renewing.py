"""A captured graph with other weights of the same network."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from fastres.checkpoints.reading import read_weights
from fastres.errors import BuildError, InputError
from fastres.graph.ir import Graph
from fastres.graph.specs import spec_of
from fastres.options import PathLike
from fastres.weights import is_finite, oddity
from fastres.wording import listed


def renewed(
    graph: Graph,
    ignored: Collection[str],
    state_dict: Mapping[str, Any] | PathLike,
    entry: str | None = None,
    max_bytes: int | None = None,
) -> Graph:
    """The graph with new values for every constant that a state_dict holds.

    Args:
        graph: with those constants on the meta device.
        ignored: entries of the model's state_dict that the graph does not read.
        state_dict, entry, max_bytes: see `fastres.checkpoints.reading.read_weights`.

    Raises:
        InputError: a weight is missing, unknown, misshapen, or not finite, or the file cannot be
            read.
    """
    if not isinstance(state_dict, Mapping | str | os.PathLike):
        raise InputError(
            f"state_dict is {type(state_dict).__name__}; expected names and tensors, or the path "
            "of a file of them"
        )
    own = [name for name, old in graph.constants.items() if old.is_meta]
    try:
        table = read_weights(state_dict, names={*own, *ignored}, entry=entry, max_bytes=max_bytes)
    except BuildError as error:
        raise InputError(f"{error}; nothing was changed") from error
    weights = graph.taken_as_weights
    constants = {}
    for name, old in graph.constants.items():
        if name not in table:
            if not old.is_meta:  # a constant of the model's code, or a buffer that is not saved
                constants[name] = old
                continue
            raise InputError(f"the weight {name} is missing; nothing was changed")
        new = table[name]
        odd = oddity(new) or ("a tensor on the meta device" if new.is_meta else "")
        if odd or spec_of(new.detach()) != spec_of(old):
            found = odd or spec_of(new)
            raise InputError(f"{name} is {found}, expected {spec_of(old)}; nothing was changed")
        unsound = new.is_floating_point() and not is_finite(new)
        if unsound and (name in weights or bool(new.isnan().any())):  # others may add -inf
            raise InputError(f"{name} holds NaN or infinite values; nothing was changed")
        constants[name] = new.detach().cpu()
    unknown = [
        str(name)
        for name in set(table) - set(constants) - set(ignored)
        if not str(name).endswith("num_batches_tracked")  # BatchNorm's counter of training steps
    ]
    if unknown:
        some = listed(sorted(unknown))
        raise InputError(f"{len(unknown)} weights are not the model's: {some}; nothing was changed")
    return graph.replace(constants=constants)
