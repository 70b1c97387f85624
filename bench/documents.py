"""What every document of a benchmark says of where it comes from, and whether it can be written."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fastres
from fastres.cli.output import check_folder
from fastres.errors import FastresError
from fastres.timing.machine import machine, record

SCHEMA = 1


def headed(command: str, started: float, **run: Any) -> dict[str, Any]:
    """Command, version, schema, machine and run; what was measured follows.

    Args:
        started: seconds since the epoch.
        run: what else there is to say of the run.
    """
    return {
        "command": command,
        "fastres": fastres.__version__,
        "schema": SCHEMA,
        "machine": asdict(machine()),
        "run": {**record(["python", *sys.orig_argv[1:]], started), **run},
    }


def check_output(parser: argparse.ArgumentParser, output: Path | None) -> None:
    """Ends with status 2, before anything is measured, where the file cannot be written."""
    try:
        check_folder(output)
    except FastresError as error:
        parser.error(str(error))
