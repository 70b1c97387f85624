"""The calibration table: what each tensor of a network ranges over, and where int8 saturates.

A JSON file that every backend reads. It belongs to one graph with one set of weights, whose
fingerprints it bears; the same data in the same order give the same bytes.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from fastres.calib.files import read_regular, write_whole
from fastres.calib.thresholds import ALGORITHMS, Algorithm
from fastres.wording import LINE, listed, named

SCHEMA = 2  # 1 had no notes
STEPS = 127  # on each side of zero
_MOST_BYTES = 1 << 25  # of a file; ResNet-152's has 3 million
_LARGEST = 1e30  # beyond it nothing is calibrated
_ROUNDED = 1.001  # what was summed or rounded in float32 may be a little more
_TINY = 1e-30  # below, a threshold may come to nothing in float32


class TensorRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor over the calibration data.

    Args:
        largest: largest magnitude.
        thresholds: magnitude at which int8 saturates, by algorithm.
        quantiles: summary of the histogram of magnitudes: share of the values → magnitude.
        means: of each channel, of a tensor that a convolution or linear layer reads.
    """

    largest: float
    thresholds: dict[Algorithm, float]
    quantiles: dict[str, float] = {}
    means: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.largest, *self.thresholds.values(), *self.quantiles.values())
        if not all(math.isfinite(v) and 0 <= v <= _LARGEST for v in numbers):
            found = listed(numbers)
            raise ValueError(f"ranges are finite, not negative and up to {_LARGEST:g}: {found}")
        if set(self.thresholds) != set(ALGORITHMS):
            raise ValueError(f"thresholds are of {sorted(self.thresholds)}, not {list(ALGORITHMS)}")
        if max(numbers) > _ROUNDED * self.largest:
            raise ValueError(f"{max(numbers)} is above the largest magnitude, {self.largest}")
        if self.largest > _TINY and min(self.thresholds.values()) == 0:
            raise ValueError(f"a threshold is 0, and the largest magnitude {self.largest}")
        if not all(abs(mean) <= _ROUNDED * self.largest for mean in self.means):
            raise ValueError(f"a channel's mean is beyond the largest magnitude, {self.largest}")


class AccuracyPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `validate` said while nodes were chosen to stay in floating point.

    Args:
        algorithm: of the thresholds; empty for the network before quantisation.
        kept: nodes left in floating point.
        accuracy: as `validate` gave it.
    """

    algorithm: str
    kept: tuple[str, ...]
    accuracy: float


class CalibrationTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ranges of all tensors that may be quantised, and what was decided about them.

    Args:
        algorithm: whose thresholds hold.
        samples: images seen.
        graph, weights: fingerprints of what was calibrated, SHA-256 in hexadecimal.
        tensors: by the name of the value in the graph; what a convolution gives before its
            residual is added has the name of the node with `.main` after it.
        keep: nodes that stay in floating point.
        sensitivity: for nodes that were tried by themselves: SQNR in dB of the network's outputs
            with that node alone in int8.
        curve: accuracy before quantisation, and for what was tried after it.
        backend: that ran the network for `curve`; empty without it.
        notes: on images that are unlike the rest of the data.
    """

    algorithm: Algorithm
    samples: int
    graph: str
    weights: str
    tensors: dict[str, TensorRange]
    keep: tuple[str, ...] = ()
    sensitivity: dict[str, float] = {}
    curve: tuple[AccuracyPoint, ...] = ()
    backend: str = ""
    notes: tuple[str, ...] = ()
    format: Literal["fastres-calibration"] = "fastres-calibration"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"it was made of {self.samples} images")

    def scale(self, name: str, most: int = STEPS) -> float:
        """What 1 stands for in a tensor's 8 bits, a float32; 1 for nothing but zeros.

        Args:
            most: what the threshold becomes: 127 in int8, 448 in fp8 e4m3.

        Raises:
            KeyError: the table has no such tensor.
        """
        threshold = np.float32(self.tensors[name].thresholds[self.algorithm])
        step = threshold / np.float32(most)
        return float(step) if step > np.finfo(np.float32).tiny else 1.0

    def using(self, algorithm: Algorithm) -> CalibrationTable:
        """The same data's table with another algorithm's thresholds."""
        return msgspec.structs.replace(self, algorithm=algorithm)

    def to_json(self) -> bytes:
        """The bytes that `save` writes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table; nothing is left half-written.

        Raises:
            ValueError: the file cannot be written.
        """
        try:
            write_whole(Path(path), self.to_json())
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Reads a table; nothing in the file is taken on trust.

        Raises:
            ValueError: no such file, not a table, or one of a newer fastres; names the file.
        """
        where, name = Path(path), named(path, LINE // 2)
        try:
            data = read_regular(where, _MOST_BYTES)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        try:
            header = msgspec.json.decode(data, type=_Header)
            if header.schema > SCHEMA:
                raise ValueError(
                    f"it has schema {header.schema}, this fastres reads up to {SCHEMA}: upgrade it"
                )
            return msgspec.structs.replace(msgspec.json.decode(data, type=cls), schema=SCHEMA)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ValueError(
                f"{name} is no calibration table: {named(error, LINE // 2)}. Make one with "
                "fastres.quantize"
            ) from error


class _Header(msgspec.Struct, frozen=True):
    format: Literal["fastres-calibration"]
    schema: int
