"""`python -m trilby.kernels.gpu matrix`: compile every kernel for every GPU, with no GPU at hand.

Prints what became of each launch (registers, spills, shared memory, matrix instructions, 16-byte accesses) and fails if
one spills, exceeds its target's shared memory, or multiplies without matrix instructions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from triton import CompilationError

from .compile import Compilation, compile_call
from .ledger import Ledger, key_of
from .matrix import Case, cases
from .targets import TARGETS


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trilby.kernels.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    matrix = commands.add_parser("matrix", help="compile every launch for every target")
    matrix.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="such as sm_90; all by default")
    matrix.add_argument("--only", default="", help="cases whose name has this in it")
    matrix.add_argument(
        "--ledger",
        type=Path,
        default="build/compile-matrix.jsonl",
        help="where outcomes are kept, so that a repeated run compiles only what changed (%(default)s)",
    )
    return parser.parse_args(arguments)


def compile_matrix(targets: Sequence[str], only: str, ledger: Ledger) -> int:
    """Compile what `ledger` does not know, print all, and return how many cases are not as they must be."""
    failed = compiled = total = 0
    for name in targets or TARGETS:
        for case in cases(TARGETS[name]):
            if only not in case.name:
                continue
            total += 1
            key = key_of(case.call, case.target)
            outcome: Compilation | str | None = ledger.find(key)
            if outcome is None:
                compiled += 1
                outcome = _compile(case)
                if isinstance(outcome, Compilation):
                    ledger.add(key, f"{name} {case.name}", outcome)
            faults = [outcome] if isinstance(outcome, str) else case.faults(outcome)
            failed += bool(faults)
            print(f"{name:8} {case.name:56} {outcome if outcome not in faults else ''} {'; '.join(faults)}", flush=True)
    print(f"{total} cases, {compiled} compiled now, {failed} failed")
    return failed


def _compile(case: Case) -> Compilation | str:
    """What became of it, or the compiler's last words; those are not kept, so that the next run tries again."""
    try:
        return compile_call(case.call, case.target)
    except (CompilationError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def main(arguments: Sequence[str]) -> int:
    """Run the command; 1 if anything failed."""
    options = parse(arguments)
    return min(compile_matrix(options.targets, options.only, Ledger(options.ledger)), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
