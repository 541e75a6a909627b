"""`python -m trilby.kernels.gpu matrix | tune`: compile every kernel for every GPU, or measure on the one that is here.

`matrix` needs no GPU. It prints what became of each launch (registers, spills, shared memory, matrix instructions and
16-byte accesses) and fails if one spills where its launch row does not say so, exceeds its target's shared memory,
multiplies without matrix instructions or moves too little of what its loops move by 16 bytes. The last lines sum up
each target.

`tune` tries launch parameters other than the tables' own, and writes those that are clearly faster into a file, which
holds wherever the environment variable TRILBY_LAUNCH_TABLE names it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from triton import CompilationError

from .attention_launch import TABLES
from .compile import Compilation, compile_call
from .ledger import Ledger, key_of
from .matrix import Case, cases
from .measured import VARIABLE, Measured, write
from .targets import TARGETS, device_of
from .tune import Measure, Question, answer, median_seconds, questions


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
    tune = commands.add_parser("tune", help="measure launch parameters on this GPU")
    tune.add_argument("--output", type=Path, default="launch.json", help="the file that is written (%(default)s)")
    tables = (*TABLES, "norm_forward", "norm_backward")
    tune.add_argument("--only", nargs="+", choices=tables, default=(), help="tables, instead of all")
    return parser.parse_args(arguments)


def compile_matrix(targets: Sequence[str], only: str, ledger: Ledger) -> int:
    """Compile what `ledger` does not know, print all, and return how many cases are not as they must be."""
    failed = compiled = total = 0
    summary = []
    for name in targets or TARGETS:
        total_before, failed_before = total, failed
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
        summary.append(f"{name}: {total - total_before} cases, {failed - failed_before} failed")
    print("\n".join(summary))
    print(f"{total} cases, {compiled} compiled now, {failed} failed")
    return failed


def _compile(case: Case) -> Compilation | str:
    """What became of it, or the compiler's last words; those are not kept, so that the next run tries again."""
    try:
        return compile_call(case.call, case.target)
    except (CompilationError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def tune(asked: Sequence[Question], measure: Measure, device_name: str, output: Path) -> list[Measured]:
    """Answer each question, say so, and write the answers after each: what an interrupted run found is kept."""
    found: list[Measured] = []
    for number, question in enumerate(asked, 1):
        best = answer(question, measure, device_name)
        table, _, arithmetic, size, _ = question.place
        said = f"{best.numbers}: {best.reason}" if best else f"the table's own: {dict(question.own)}"
        print(f"{number}/{len(asked)} {table} {arithmetic} {size}: {said}", flush=True)
        found += [best] if best else []
        write(output, device_name, found)
    print(f"{len(found)} of {len(asked)} rows are better otherwise here. To launch so: export {VARIABLE}={output}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; 1 if anything failed."""
    options = parse(arguments)
    if options.command == "tune":
        if not torch.cuda.is_available():
            sys.exit("tune measures on a GPU, and PyTorch finds none here; `matrix` needs none")
        device = device_of(torch.empty(0, device="cuda"), "the GPU")
        asked = list(questions(device, options.only))
        tune(asked, median_seconds, torch.cuda.get_device_name(), options.output)
        return 0
    return min(compile_matrix(options.targets, options.only, Ledger(options.ledger)), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
