"""`python -m trilby.bench`: checks and times trilby against PyTorch on this machine, and prints one table."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError:
    sys.exit("trilby.bench prints its table with rich, which is not installed: pip install 'trilby[bench]'")
from trilby.kernels import keep_memory

from .generation import DESK, QUICK_DESK, generation_rows
from .launching import launch_lines
from .machine import ceiling_steps, command_line, describe_machine, measure_ceilings
from .one_line import QUICK_TRIAL, TRIAL, trial_steps, try_models
from .rates import losses, rates_table, write_plots
from .report import foot, heading, is_alarm, table, write_json
from .results import Row, Run, Training
from .suite import Plan, allocator_row, kernel_rows, repeat_rows
from .training import LESSON, QUICK_LESSON, train, training_steps

# The table's rows are one line each at this width, and with one more contestant at the next; a terminal may be wider.
LEAST_WIDTH = 120
LEAST_WIDTH_COMPILED = 148
# What a run on a GPU may spend on launch choices: compiling each takes seconds, and all of it should take 8 minutes.
ADVICE_SECONDS = 90


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds, a small GPT: does it all work?")
    parser.add_argument("--only", choices=("attention", "norm", "gpt", "models"), help="one group instead of all")
    parser.add_argument("--threads", type=_positive, help="threads to compute with, instead of PyTorch's choice")
    parser.add_argument("--cold", action="store_true", help="evict the caches before every call")
    parser.add_argument("--compiled", action="store_true", help="PyTorch under torch.compile as one more contestant")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw what was reached (needs matplotlib)")
    parser.add_argument("--json", type=Path, default="build/bench.json", help="where to write it all (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run, print, write; 1 if a kernel's numbers are wrong, else 0: being slower is no error."""
    if arguments[:1] == ["static"]:
        from .static.__main__ import main as static  # triton is not everywhere

        return static(arguments[1:])
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no GPU here; `python -m trilby.bench static` needs none")
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plots draws with matplotlib, which is not installed: pip install 'trilby[plot]'")
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = Plan(options.only, options.quick, options.cold, options.compiled, options.device)
    console = Console()
    console.width = max(console.width, LEAST_WIDTH_COMPILED if plan.compiled or plan.device == "cuda" else LEAST_WIDTH)
    run = _run(plan, command_line(arguments), console)
    console.print(table(run) if plan.device == "cpu" else rates_table(run))
    for line in [*foot(run), *(losses(run) if plan.device == "cuda" else ()), *run.advice]:
        console.print(line, style="bold red" if is_alarm(line) else "", markup=False, highlight=False)
    write_json(run, options.json)
    for path in write_plots(run, options.plots) if options.plots else ():
        console.print(f"drawn: {path}", markup=False, highlight=False)
    console.print(f"{run.seconds:.0f} seconds; everything measured is in {options.json}", markup=False, highlight=False)
    return 0 if all(row.is_exact for row in run.comparisons) and not any(one.differing for one in run.repeats) else 1


def _run(plan: Plan, command: str, console: Console) -> Run:
    """Measure what `plan` says, behind a progress bar."""
    started = time.perf_counter()
    machine = describe_machine(plan.device)
    lesson = QUICK_LESSON if plan.quick else LESSON
    trains = plan.includes("gpt")
    desk = QUICK_DESK if plan.quick else DESK
    trial = QUICK_TRIAL if plan.quick else TRIAL
    tries = plan.includes("models")
    total = (
        ceiling_steps(plan.quick, plan.device)
        + plan.kernel_steps
        + (training_steps(lesson) + len(desk.requests)) * trains
        + trial_steps(trial) * tries
    )
    with _progress() as progress:
        task = progress.add_task("ceilings", total=total)

        def advance() -> None:
            progress.advance(task)

        ceilings = measure_ceilings(plan.quick, advance, plan.device)
        for line in heading(machine, ceilings):
            console.print(line, markup=False, highlight=False)
        rows: list[Row] = []
        if plan.shows_allocator:
            rows.append(allocator_row(plan, ceilings, "without keep_memory()"))
            advance()
        keep_memory()
        if plan.shows_allocator:
            rows.append(allocator_row(plan, ceilings, "with keep_memory()"))
            advance()
        for row in kernel_rows(plan, ceilings, advance):
            rows.append(row)
            progress.update(task, description=f"{row.operation} {row.shape}")
        progress.update(task, description="the same again and again")
        repeats = tuple(repeat_rows(plan, advance))
        trainings: tuple[Training, ...] = ()
        if trains:
            progress.update(task, description="GPT training")
            trained, trainings = train(lesson, ceilings, advance)
            rows += trained
            progress.update(task, description="GPT generation")
            rows += generation_rows(desk, ceilings, advance)
        if tries:
            progress.update(task, description="your model, one line")
            tried, others = try_models(trial, ceilings, advance)
            rows, trainings = rows + list(tried), trainings + others
        advised = tuple(launch_lines(plan)) if plan.device == "cuda" else ()
        if plan.device == "cuda" and plan.includes("attention") and not plan.quick:
            advised += _advice()
    seconds = time.perf_counter() - started
    return Run(command, machine, ceilings, tuple(rows), trainings, asdict(plan), seconds, repeats, advised)


def _advice() -> tuple[str, ...]:
    from trilby.kernels.gpu.targets import device_of  # triton is not everywhere
    from trilby.kernels.gpu.tune import attention_choices, median_seconds, questions

    from .advice import advice

    device = device_of(torch.empty(0, device="cuda"), "the GPU")
    asked = questions(device, ("forward", "key_value", "query"), attention_choices)
    return tuple(advice(asked, median_seconds, torch.cuda.get_device_name(), ADVICE_SECONDS))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
