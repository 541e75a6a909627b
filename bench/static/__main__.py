"""`python -m trilby.bench static`: what the compilers make of the Triton kernels, ours and public ones.

Compiles for GPUs that are not here, reads registers, spills, shared memory and the innermost loops' instructions by
pipe, and says which pipe bounds them. Liger's norms are compiled where `liger-kernel` is installed; other projects'
kernels where you say they are.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from rich.console import Console
    from triton import knobs
except ImportError as missing:
    sys.exit(f"trilby.bench static needs triton and rich: {missing}; pip install triton 'trilby[bench]'")
from trilby.kernels.gpu.targets import TARGETS

from .findings import Finding, examine
from .subjects import Places, attention_subjects, norm_subjects
from .table import HOW_TO_READ, attention_table, norm_table, verdicts, write_json

TARGETS_BY_DEFAULT = ("sm_80", "sm_90")
HEAD_DIMS = (64, 128)
WIDTHS = (1024, 4096)
LEAST_WIDTH = 184


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench static", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", choices=[*TARGETS, []], help=f"{', '.join(TARGETS_BY_DEFAULT)} by default"
    )
    parser.add_argument("--only", choices=("attention", "norm"), help="one group instead of both")
    parser.add_argument("--tutorial", type=Path, help="Triton's python/tutorials/06-fused-attention.py")
    parser.add_argument("--flash-attention", type=Path, help="the folder flash_attn of flash-attention's sources")
    parser.add_argument("--json", type=Path, default="build/static.json", help="where to write it all (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Compile, print, write."""
    options = parse(arguments)
    missing = [path for path in (options.tutorial, options.flash_attention) if path is not None and not path.exists()]
    if missing:
        sys.exit(f"{missing[0]} does not exist")
    if tool := missing_tool():
        sys.exit(tool)
    places = Places(options.tutorial, options.flash_attention)
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    found: list[Finding] = []
    for group, subjects, table in (
        ("attention", [one for D in HEAD_DIMS for one in attention_subjects(D, places)], attention_table),
        ("norm", [one for N in WIDTHS for one in norm_subjects(N)], norm_table),
    ):
        if options.only in (None, group):
            names = options.targets or TARGETS_BY_DEFAULT
            findings = []
            with console.status("") as status:
                for name in names:
                    for finding in examine(subjects, TARGETS[name]):
                        status.update(f"{name} {finding.subject.project} {finding.subject.operation}")
                        findings.append(finding)
            findings.sort(key=lambda one: (names.index(one.target), _place(one, subjects)))
            console.print(table(findings))
            found += findings
    for line in (*verdicts(found), *HOW_TO_READ):
        console.print(line, markup=False, highlight=False)
    write_json(found, options.json)
    console.print(f"everything found is in {options.json}", markup=False, highlight=False)
    return 0


def _place(finding: Finding, subjects: Sequence[object]) -> int:
    """Operations stay in order, and who is compared stands together."""
    operations = list(dict.fromkeys(subject.operation for subject in subjects))  # type: ignore[attr-defined]
    return operations.index(finding.subject.operation)


def missing_tool() -> str:
    """Which of the disassemblers is missing, if one is: triton's wheels for Linux carry them."""
    for name in ("cuobjdump", "nvdisasm"):
        try:
            getattr(knobs.nvidia, name).path  # noqa: B018
        except (AttributeError, RuntimeError) as error:
            return f"{name}, which triton's wheels carry, is missing: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
