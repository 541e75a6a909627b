"""Who is compared, and one factory that sets any of them up for any case.

What the factory returns is called to time it, to measure its memory and to check its numbers: the same call, on the
same inputs, for every contestant, the float64 truth included.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from trilby.gpt import PYTORCH, TRILBY, Layers
from trilby.kernels import reference

from .cases import AttentionCase, Case, Direction, NormCase
from .results import COMPILED, OURS, RIVAL, Error
from .rivals import rivals

Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]

# Heads whose numbers are checked: the first, one in the middle and the last. Each costs T² float64 scores.
CHECKED_HEADS = 3


def contestants(compiled: bool, case: Case | None = None) -> dict[str, Layers]:
    """Those who are timed, by name, in the order of their turns; compiling the rival takes a C++ compiler.

    On a GPU others take part in a case, too, if they are installed and compute its operation.
    """
    found = {RIVAL: PYTORCH, OURS: TRILBY}
    if compiled:
        found[COMPILED] = compile_layers(PYTORCH)
    if case is not None and case.device == "cuda":
        found |= rivals(case.operation)
    return found


def compile_layers(layers: Layers) -> Layers:
    """`layers`, each function through torch.compile; every shape is compiled anew."""
    torch.compiler.reset()  # after some shapes of one function it would give up, and run the function as it is
    return Layers(
        attention=torch.compile(layers.attention, dynamic=False),
        layer_norm=torch.compile(layers.layer_norm, dynamic=False),
        add_layer_norm=torch.compile(layers.add_layer_norm, dynamic=False),
    )


@dataclass(frozen=True)
class Job:
    """A case with its inputs, ready for any contestant.

    Attributes:
        inputs: By name; gradients are taken of all.
        gradients: What flows into the outputs backward, by the outputs' names.
        compute: `(layers, inputs) -> outputs`, by name.
        pick: `(number, tensor, name) -> ` the part of an input, output or gradient to be checked on its own.
        picks: How many such parts there are.
    """

    inputs: Tensors
    gradients: Tensors
    compute: Callable[[Layers, Tensors], Tensors]
    pick: Callable[[int, Tensor, str], Tensor]
    picks: int

    def call(self, layers: Layers, direction: Direction) -> Call:
        """The call that is timed, measured and checked; it returns the outputs, and the gradients as `grad_…`."""
        return partial(_forward if direction == "forward" else _forward_and_backward, self, layers)

    def part(self, number: int, dtype: torch.dtype) -> "Job":
        """Part `number` alone, in `dtype`."""
        return replace(
            self,
            inputs={k: self.pick(number, v.detach(), k).to(dtype).requires_grad_() for k, v in self.inputs.items()},
            gradients={k: self.pick(number, v, k).to(dtype) for k, v in self.gradients.items()},
        )


def prepare(case: Case, dtype: torch.dtype, seed: int = 0) -> Job:
    """Draw the inputs of `case`, and of the gradients, from N(0, 1), on its device."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    if isinstance(case, NormCase):
        return _norm_job(case, draw)
    return _attention_job(case, draw)


def truths(job: Job) -> list[Tensors]:
    """What every part of the job should result in: the reference, in float64, on the same rounded inputs."""
    parts = (job.part(number, torch.float64) for number in range(job.picks))
    return [part.call(TRUTH, "forward+backward")() for part in parts]


def _forward(job: Job, layers: Layers) -> Tensors:
    with torch.no_grad():
        return job.compute(layers, job.inputs)


def _forward_and_backward(job: Job, layers: Layers) -> Tensors:
    outputs = job.compute(layers, job.inputs)
    incoming = [job.gradients[name] for name in outputs]
    gradients = torch.autograd.grad(list(outputs.values()), list(job.inputs.values()), incoming)
    return outputs | {f"grad_{name}": gradient for name, gradient in zip(job.inputs, gradients)}


def _attention_job(case: AttentionCase, draw: Callable[..., Tensor]) -> Job:
    B, H, T, D = case.B, case.H, case.T, case.D
    if case.packed:
        inputs = {"packed": draw(B, T, 3 * H * D)}
    else:
        inputs = {name: draw(B, H, T, D) for name in ("query", "key", "value")}
    return Job(
        inputs={name: tensor.requires_grad_() for name, tensor in inputs.items()},
        gradients={"output": draw(B, T, H, D).transpose(1, 2)},  # [B, H, T, D], in memory as a GPT's comes back
        compute=partial(_attend, case),
        pick=partial(_one_head, case),
        picks=min(CHECKED_HEADS, B * H),
    )


def _attend(case: AttentionCase, layers: Layers, inputs: Tensors) -> Tensors:
    if "packed" in inputs:
        query, key, value = _unpacked(inputs["packed"], case.D).transpose(1, 3).unbind(dim=2)  # [B, H, T, D] each
    else:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
    output: Tensor = layers.attention(query, key, value, dropout_p=0.0, is_causal=case.is_causal)
    return {"output": output}


def _unpacked(packed: Tensor, D: int) -> Tensor:
    """(B, T, 3·H·D) -> (B, T, 3, H, D)."""
    return packed.view(*packed.shape[:2], 3, -1, D)


def _one_head(case: AttentionCase, number: int, tensor: Tensor, name: str) -> Tensor:
    """One of `CHECKED_HEADS` heads of `tensor`: evenly spread, the first and the last among them."""
    heads = case.B * case.H
    batch, head = divmod(number * (heads - 1) // max(min(CHECKED_HEADS, heads) - 1, 1), case.H)
    if name.endswith("packed"):
        return _unpacked(tensor[batch : batch + 1], case.D)[:, :, :, head].flatten(2)  # (1, T, 3·D)
    return tensor[batch : batch + 1, head : head + 1]  # [1, 1, T, D]


def _norm_job(case: NormCase, draw: Callable[..., Tensor]) -> Job:
    shape = (case.N, case.C)
    inputs = {"stream": draw(*shape), "branch": draw(*shape)} if case.add else {"input": draw(*shape)}
    # Around 1 and 0, as training leaves them.
    inputs |= {"weight": 1 + draw(case.C) / 8, "bias": draw(case.C) / 8}
    gradients = {name: draw(*shape) for name in (("output", "summed") if case.add else ("output",))}
    return Job(
        inputs={name: tensor.requires_grad_() for name, tensor in inputs.items()},
        gradients=gradients,
        compute=_add_and_normalize if case.add else _normalize,
        pick=_everything,
        picks=1,
    )


def _normalize(layers: Layers, inputs: Tensors) -> Tensors:
    C = inputs["input"].shape[-1]
    return {"output": layers.layer_norm(inputs["input"], (C,), inputs["weight"], inputs["bias"], 1e-5)}


def _add_and_normalize(layers: Layers, inputs: Tensors) -> Tensors:
    stream, branch, weight, bias = inputs.values()
    normalized, summed = layers.add_layer_norm(stream, branch, stream.shape[-1:], weight, bias, 1e-5)
    return {"output": normalized, "summed": summed}


def _everything(number: int, tensor: Tensor, name: str) -> Tensor:
    return tensor


def _reference_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    options = reference.AttentionOptions.plain(is_causal, 1 / math.sqrt(query.shape[-1]))
    return reference.attention(query, key, value, *options)[0]


def _reference_layer_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    return reference.norm(input, weight, bias, len(normalized_shape), True, eps)[0]


def _reference_add_layer_norm(
    stream: Tensor, branch: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = stream + branch
    return _reference_layer_norm(summed, normalized_shape, weight, bias, eps), summed


TRUTH = Layers(_reference_attention, _reference_layer_norm, _reference_add_layer_norm)


def errors(job: Job, results: Mapping[str, Tensors], truth: list[Tensors]) -> list[Error]:
    """The error of every result that was computed, the worst for us first; `results` by contestant."""
    names = next(iter(results.values())).keys()
    found = []
    for name in names:
        by = {
            contestant: max(
                largest_difference(job.pick(number, tensors[name], name), part[name])
                for number, part in enumerate(truth)
            )
            for contestant, tensors in results.items()
        }
        dtype = results[OURS][name].dtype
        magnitude = max(largest(part[name]) for part in truth)
        # One rounding to the result's dtype and four of float32 on the way there.
        floor = magnitude * (torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps)
        found.append(Error(name, by, floor))
    return sorted(found, key=lambda error: -error.excess)


def largest_difference(result: Tensor, truth: Tensor) -> float:
    """Max |result - truth|; infinite if either has a NaN or an infinity."""
    return largest(result.to(torch.float64, copy=True).sub_(truth))


def largest(tensor: Tensor) -> float:
    """Max |tensor| in one pass; infinite if it has a NaN."""
    low, high = (bound.item() for bound in tensor.aminmax())
    return math.inf if math.isnan(low) else float(max(-low, high))
