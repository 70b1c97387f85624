"""`fastres` and `python -m fastres`: the command line, or what it lacks."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; where a package for it is missing, says which and exits with 3."""
    try:  # before anything that takes time
        from fastres.cli.interrupts import end_at_once

        end_at_once()
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        from fastres.cli.main import main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fastres":
            raise
        from fastres.installed import look_around

        print(f"error: the command line needs {error.name}, which is not installed")
        print(look_around().plain())
        sys.exit(3)
    main()


if __name__ == "__main__":
    main()
