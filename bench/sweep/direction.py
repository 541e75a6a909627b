"""What of a call is timed: its output alone, or its gradients, too."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]


def runs(calls: Sequence[Callable[..., Any]], inputs: Sequence[Tensor], grad_output: Tensor | None) -> tuple[Run, Run]:
    """Both `calls` of `inputs`: forward, or with a `grad_output` forward and backward."""
    pytorch, ours = (partial(_run, call, inputs, grad_output) for call in calls)
    return pytorch, ours


def _run(call: Callable[..., Any], inputs: Sequence[Tensor], grad_output: Tensor | None) -> object:
    output = call(*inputs)
    return output if grad_output is None else torch.autograd.grad(output, inputs, grad_output)
