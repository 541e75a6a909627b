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
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from .attention_launch import TABLES
from .compile import Compilation
from .ledger import Ledger, key_of
from .measured import VARIABLE, Measured, write
from .pool import chosen_cases, outcome_of, pool_of
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
    matrix.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (%(default)s)")
    tune = commands.add_parser("tune", help="measure launch parameters on this GPU")
    tune.add_argument("--output", type=Path, default="launch.json", help="the file that is written (%(default)s)")
    tables = (*TABLES, "norm_forward", "norm_backward")
    tune.add_argument("--only", nargs="+", choices=tables, default=(), help="tables, instead of all")
    return parser.parse_args(arguments)


def compile_matrix(targets: Sequence[str], only: str, ledger: Ledger, jobs: int = 1) -> int:
    """Compile what `ledger` does not know, print all, and return how many cases are not as they must be.

    Where the compiler fails, its words are not kept, so that the next run tries again.
    """
    chosen = chosen_cases(targets, only)
    keys = [key_of(case.call, case.target) for case in chosen]
    unknown = {key: number for number, key in enumerate(keys) if ledger.find(key) is None}
    totals, failures = Counter[str](), Counter[str]()
    with pool_of(jobs, targets, only) as pool:
        compiling = {key: pool.submit(outcome_of, number) for key, number in unknown.items()}
        for case, key in zip(chosen, keys):
            outcome: Compilation | str | None = ledger.find(key)
            if outcome is None:
                outcome = compiling[key].result()
                if isinstance(outcome, Compilation):
                    ledger.add(key, f"{case.target.name} {case.name}", outcome)
            faults = [outcome] if isinstance(outcome, str) else case.faults(outcome)
            totals[case.target.name] += 1
            failures[case.target.name] += bool(faults)
            said = "" if outcome in faults else outcome
            print(f"{case.target.name:8} {case.name:56} {said} {'; '.join(faults)}", flush=True)
    for name, total in totals.items():
        print(f"{name}: {total} cases, {failures[name]} failed")
    print(f"{totals.total()} cases, {len(unknown)} compiled now, {failures.total()} failed")
    return failures.total()


def tune(asked: Sequence[Question], measure: Measure, device_name: str, output: Path) -> list[Measured]:
    """Answer each question, say so, and write the answers after each: what an interrupted run found is kept."""
    found: list[Measured] = []
    for number, question in enumerate(asked, 1):
        best = answer(question, measure, device_name)
        place = question.place
        said = f"{best.numbers}: {best.reason}" if best else f"the table's own: {dict(question.own)}"
        rich = " rich" if place.scores == "rich" else ""
        print(f"{number}/{len(asked)} {place.table}{rich} {place.arithmetic} {place.size}: {said}", flush=True)
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
    return min(compile_matrix(options.targets, options.only, Ledger(options.ledger), options.jobs), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
