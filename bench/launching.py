"""What a call on a GPU takes the processor: rates leave it out, but a small model's training is made of it."""

from collections.abc import Iterator

import torch

from .cases import DIRECTIONS, AttentionCase, Case, NormCase
from .contestants import contestants, prepare
from .measure import Budget, interleaved, quantiles
from .results import OURS, RIVAL
from .suite import Plan

# As small as a model's first try is: the GPU is done with either before the processor has launched it.
CASES: dict[str, tuple[Case, ...]] = {
    "attention": (AttentionCase(1, 12, 128, 64, "launching", device="cuda"),),
    "norm": (
        NormCase(128, 768, "launching", device="cuda"),
        NormCase(128, 768, "launching", device="cuda", add=True),
    ),
}
BUDGET = Budget(seconds=0.2, most_rounds=100, before=torch.cuda.synchronize)


def launch_lines(plan: Plan) -> Iterator[str]:
    """A line for each case of `plan` and direction: from a call to its return, on a GPU with nothing else to do."""
    for case in (case for group, cases in CASES.items() if plan.includes(group) for case in cases):
        job = prepare(case, torch.bfloat16)
        sides = contestants(compiled=False)
        for direction in DIRECTIONS:
            calls = {name: job.call(sides[name], direction) for name in (OURS, RIVAL)}
            taken = {name: 1e6 * quantiles(seconds).p50 for name, seconds in interleaved(calls, BUDGET).items()}
            yield (
                f"a call's own time on the processor, {case.operation} {case.shape} {direction}: "
                f"trilby {taken[OURS]:.0f} us, PyTorch {taken[RIVAL]:.0f} us."
            )
