"""Who is compared, and one factory that sets any of them up for any case.

What the factory returns is called to time it, to measure its memory and to check its numbers: the same call, on the
same inputs, for every contestant, the float64 truth included.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from .cases import AttentionCase, Case, Direction, NormCase, VarlenCase
from .functions import PYTORCH, TRILBY, TRUTH, Functions, compile_functions
from .results import COMPILED, OURS, RIVAL, Error
from .rivals import rivals

Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]
# By contestant, and ours for those who have none of their own: of each part.
Truths = Mapping[str, list[Tensors]]

# Heads whose numbers are checked: the first, one in the middle and the last. Each costs T² float64 scores.
CHECKED_HEADS = 3
# Of dropout's numbers.
SEED = 1337


def contestants(compiled: bool, case: Case | None = None) -> dict[str, Functions]:
    """Those who are timed, by name, in the order of their turns; compiling the rival takes a C++ compiler.

    On a GPU others take part in a case, too, if they are installed and compute its operation. With dropout nobody is
    compiled: torch.compile draws other numbers, of which no truth in float64 is known.
    """
    found = {RIVAL: PYTORCH, OURS: TRILBY}
    if compiled and not _drops(case):
        found[COMPILED] = compile_functions(PYTORCH)
    if case is not None and case.device == "cuda":
        found |= rivals(case.operation)
    return found


def _drops(case: Case | None) -> bool:
    return isinstance(case, AttentionCase) and case.dropout_p > 0


@dataclass(frozen=True)
class Job:
    """A case with its inputs, ready for any contestant.

    Attributes:
        inputs: By name; gradients are taken of all.
        gradients: What flows into the outputs backward, by the outputs' names.
        compute: `(layers, inputs) -> outputs`, by name.
        pick: `(number, tensor, name) -> ` the part of an input, output or gradient to be checked on its own.
        picks: How many such parts there are.
        fixed: Inputs that have no gradient, by name: a mask, where sequences start.
        draws: Whether `compute` draws random numbers: then the generator is seeded before every call.
    """

    inputs: Tensors
    gradients: Tensors
    compute: Callable[[Functions, Tensors], Tensors]
    pick: Callable[[int, Tensor, str], Tensor]
    picks: int
    fixed: Tensors = field(default_factory=dict)
    draws: bool = False

    def call(self, functions: Functions, direction: Direction) -> Call:
        """The call that is timed, measured and checked; it returns the outputs, and the gradients as `grad_…`."""
        return partial(_forward if direction == "forward" else _forward_and_backward, self, functions)

    def part(self, number: int, dtype: torch.dtype) -> "Job":
        """Part `number` alone, in `dtype`."""
        return replace(
            self,
            inputs={k: self.pick(number, v.detach(), k).to(dtype).requires_grad_() for k, v in self.inputs.items()},
            gradients={k: self.pick(number, v, k).to(dtype) for k, v in self.gradients.items()},
            fixed={k: self.pick(number, v, k) for k, v in self.fixed.items()},
        )

    def outputs(self, functions: Functions) -> Tensors:
        """What `functions` compute, by name."""
        if self.draws:
            torch.manual_seed(SEED)
        return self.compute(functions, self.inputs | self.fixed)


def prepare(case: Case, dtype: torch.dtype, seed: int = 0) -> Job:
    """Draw the inputs of `case`, and of the gradients, from N(0, 1), on its device."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    if isinstance(case, NormCase):
        return _norm_job(case, draw)
    return _varlen_job(case, draw) if isinstance(case, VarlenCase) else _attention_job(case, draw)


def truths(job: Job) -> Truths:
    """What every part of the job should result in: the reference, in float64, on the same rounded inputs.

    PyTorch's dropout draws other numbers than trilby's. Its truth is then its own function in float64 from the same
    seed; a part is the first of what is computed, and so gets the first of the numbers, the same.
    """
    truth = _in_float64(job, TRUTH)
    return {OURS: truth, RIVAL: _in_float64(job, PYTORCH) if job.draws else truth}


def _in_float64(job: Job, functions: Functions) -> list[Tensors]:
    parts = (job.part(number, torch.float64) for number in range(job.picks))
    return [part.call(functions, "forward+backward")() for part in parts]


def _forward(job: Job, functions: Functions) -> Tensors:
    with torch.no_grad():
        return job.outputs(functions)


def _forward_and_backward(job: Job, functions: Functions) -> Tensors:
    outputs = job.outputs(functions)
    incoming = [job.gradients[name] for name in outputs]
    gradients = torch.autograd.grad(list(outputs.values()), list(job.inputs.values()), incoming)
    return outputs | {f"grad_{name}": gradient for name, gradient in zip(job.inputs, gradients)}


def _attention_job(case: AttentionCase, draw: Callable[..., Tensor]) -> Job:
    B, H, T, D = case.B, case.H, case.T, case.D
    if case.packed:
        inputs = {"packed": draw(B, T, 3 * H * D)}
    else:
        inputs = {"query": draw(B, H, T, D)} | {
            name: draw(B, case.heads_of_keys, case.keys, D) for name in ("key", "value")
        }
    return Job(
        inputs={name: tensor.requires_grad_() for name, tensor in inputs.items()},
        gradients={"output": draw(B, T, H, D).transpose(1, 2)},  # [B, H, T, D], in memory as a GPT's comes back
        compute=partial(_attend, case),
        pick=partial(_one_head, case.B, case.heads_of_keys),
        # Where weights are dropped, only the first head's numbers are known without drawing all that come before.
        picks=1 if _drops(case) else min(CHECKED_HEADS, B * case.heads_of_keys),
        fixed=_padding_mask(case),
        draws=_drops(case),
    )


def _padding_mask(case: AttentionCase) -> Tensors:
    """(B, 1, 1, S), true where a key exists."""
    if not case.lengths:
        return {}
    lengths = torch.tensor(case.lengths, device=case.device)
    return {"mask": torch.arange(case.keys, device=case.device) < lengths[:, None, None, None]}


def _attend(case: AttentionCase, functions: Functions, inputs: Tensors) -> Tensors:
    if "packed" in inputs:
        query, key, value = _unpacked(inputs["packed"], case.D).transpose(1, 3).unbind(dim=2)  # [B, H, T, D] each
    else:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
    options: dict[str, Tensor | bool] = {"attn_mask": inputs["mask"]} if case.lengths else {}
    options |= {"enable_gqa": True} if case.key_heads else {}
    return {
        "output": functions.attention(query, key, value, dropout_p=case.dropout_p, is_causal=case.is_causal, **options)
    }


def _unpacked(packed: Tensor, D: int) -> Tensor:
    """(B, T, 3·H·D) -> (B, T, 3, H, D)."""
    return packed.view(*packed.shape[:2], 3, -1, D)


def _one_head(B: int, Hkv: int, number: int, tensor: Tensor, name: str) -> Tensor:
    """One of `CHECKED_HEADS` heads of keys: evenly spread, the first and the last among them; and of its queries."""
    heads = B * Hkv
    batch, head = divmod(number * (heads - 1) // max(min(CHECKED_HEADS, heads) - 1, 1), Hkv)
    if name == "starts":
        return tensor
    if name == "mask":
        return tensor[batch : batch + 1]
    if name.endswith("packed"):
        return _unpacked(tensor[batch : batch + 1], tensor.shape[2] // (3 * Hkv))[:, :, :, head].flatten(
            2
        )  # (1, T, 3·D)
    group = tensor.shape[1] // Hkv
    return tensor[batch : batch + 1, head * group : (head + 1) * group]  # [1, group, T, D]


def _varlen_job(case: VarlenCase, draw: Callable[..., Tensor]) -> Job:
    def draw_heads() -> Tensor:
        return draw(1, sum(case.lengths), case.H, case.D).transpose(1, 2)  # [1, H, T, D], in memory as a GPT's

    starts = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=case.device)
    return Job(
        inputs={name: draw_heads().requires_grad_() for name in ("query", "key", "value")},
        gradients={"output": draw_heads()},
        compute=partial(_attend_packed, max(case.lengths)),
        pick=partial(_one_head, 1, case.H),
        picks=min(CHECKED_HEADS, case.H),
        fixed={"starts": starts},
    )


def _attend_packed(longest: int, functions: Functions, inputs: Tensors) -> Tensors:
    query, key, value, starts = inputs.values()
    return {"output": functions.packed_attention(query, key, value, starts, longest, 0.0)}


def _norm_job(case: NormCase, draw: Callable[..., Tensor]) -> Job:
    shape = (case.N, case.C)
    inputs = {"stream": draw(*shape), "branch": draw(*shape)} if case.add else {"input": draw(*shape)}
    # Around 1 and 0, as training leaves them.
    inputs |= {"weight": 1 + draw(case.C) / 8} | ({"bias": draw(case.C) / 8} if case.is_centered else {})
    gradients = {name: draw(*shape) for name in (("output", "summed") if case.add else ("output",))}
    return Job(
        inputs={name: tensor.requires_grad_() for name, tensor in inputs.items()},
        gradients=gradients,
        compute=_add_and_normalize if case.add else _normalize,
        pick=_everything,
        picks=1,
    )


def _normalize(functions: Functions, inputs: Tensors) -> Tensors:
    stream, *parameters = inputs.values()
    norm = functions.layer_norm if len(parameters) == 2 else functions.rms_norm
    return {"output": norm(stream, stream.shape[-1:], *parameters, 1e-5)}


def _add_and_normalize(functions: Functions, inputs: Tensors) -> Tensors:
    stream, branch, *parameters = inputs.values()
    add_and_norm = functions.add_layer_norm if len(parameters) == 2 else functions.add_rms_norm
    normalized, summed = add_and_norm(stream, branch, stream.shape[-1:], *parameters, 1e-5)
    return {"output": normalized, "summed": summed}


def _everything(number: int, tensor: Tensor, name: str) -> Tensor:
    return tensor


def errors(job: Job, results: Mapping[str, Tensors], truth: Truths) -> list[Error]:
    """The error of every result that was computed, the worst for us first; `results` by contestant."""
    names = next(iter(results.values())).keys()
    found = []
    for name in names:
        by = {
            contestant: max(
                largest_difference(job.pick(number, tensors[name], name), part[name])
                for number, part in enumerate(truth.get(contestant, truth[OURS]))
            )
            for contestant, tensors in results.items()
        }
        dtype = results[OURS][name].dtype
        magnitude = max(largest(part[name]) for part in truth[OURS])
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
