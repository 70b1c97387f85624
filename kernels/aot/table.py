"""Prints a table over every kernel family: what the machine code of each launch uses."""

import argparse
from collections.abc import Iterable

from fastres.kernels.aot.cases import CompileCase, all_cases
from fastres.kernels.aot.cases_int8 import byte_cases
from fastres.kernels.aot.compiling import compile_launch
from fastres.kernels.aot.facts import MATRIX, fits, stores


def main() -> None:
    """Prints the table for one target."""
    parser = argparse.ArgumentParser(
        prog="python -m fastres.kernels.aot.table", description=__doc__
    )
    parser.add_argument("--sm", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--int8", action="store_true", help="the launches of 8 bits")
    given = parser.parse_args()
    cases = byte_cases if given.int8 else all_cases
    print_table(cases(given.sm), given.sm)


def print_table(cases: Iterable[CompileCase], sm: int) -> None:
    """One line for each case: what its machine code uses."""
    print(
        f"{'case':38} {'tile':16} regs spill  shared fits code "
        f"{'stores by bytes':24} matrix instructions"
    )
    for case in cases:
        facts = compile_launch(case.launch, sm)
        blocks = [
            str(n) for name, n in case.launch.constants.items() if name.startswith(("BLOCK", "BOX"))
        ]
        tile = f"{'x'.join(blocks)} w{case.launch.num_warps} s{case.launch.num_stages}"
        matrix = {name: n for name, n in facts.instructions.items() if MATRIX.match(name)}
        print(
            f"{case.name:38} {tile:16} {facts.registers:4} {facts.spill_stores:5} "
            f"{facts.shared_bytes:7} {'yes' if fits(facts, sm) else 'NO':4} "
            f"{sum(facts.instructions.values()):4} {stores(facts)!s:24} {matrix}"
        )


if __name__ == "__main__":
    main()
