"""Cases of the compile matrix, compiled by several processes."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

from triton import CompilationError

from .compile import Compilation, compile_call
from .matrix import Case, cases
from .targets import TARGETS


def chosen_cases(targets: Sequence[str], only: str) -> list[Case]:
    """Those for `targets`, or for all where none is named, whose name has `only` in it."""
    return [case for name in targets or TARGETS for case in cases(TARGETS[name]) if only in case.name]


def pool_of(jobs: int, targets: Sequence[str], only: str) -> Executor:
    """Of `jobs` processes, for `outcome_of`. Each lists the cases itself: a launch cannot be sent, its number can."""
    if jobs == 1:
        return ThreadPoolExecutor(1, initializer=_list, initargs=(targets, only))
    return ProcessPoolExecutor(jobs, get_context("spawn"), _list, (targets, only))


_listed: list[Case] = []  # in a process of the pool


def _list(targets: Sequence[str], only: str) -> None:
    _listed[:] = chosen_cases(targets, only)


def outcome_of(number: int) -> Compilation | str:
    """What became of a case, by its number in `chosen_cases`, without its assembly; or the compiler's last words."""
    try:
        return dataclasses.replace(compile_call(_listed[number].call, _listed[number].target), assembly="")
    except (CompilationError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
