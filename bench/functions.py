"""Whose functions are compared: a GPT's layers and RMS norms, PyTorch's, trilby's, and the reference in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from trilby import gpt, kernels
from trilby.kernels import reference
from trilby.kernels.seed import draw_seed


def _add_and_rms_norm(
    stream: Tensor, branch: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = stream + branch
    return F.rms_norm(summed, normalized_shape, weight, eps), summed


@dataclass(frozen=True)
class Functions(gpt.Layers):
    """A GPT's layers, and what newer models have in place of its norms.

    - `rms_norm(input, normalized_shape, weight, eps)`: `F.rms_norm`.
    - `add_rms_norm(stream, branch, normalized_shape, weight, eps)` returns `(normalized, summed)`, where
      `summed = stream + branch` and `normalized = rms_norm(summed)`.
    """

    rms_norm: Callable[..., Tensor] = F.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = _add_and_rms_norm


def sequence_by_sequence(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Layers.packed_attention` by one call of `attention` for each sequence: what to do without packed sequences.

    The outputs are joined as they lie in memory, (T, H, D), the cheapest way.
    """

    def packed_attention(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, dropout_p: float
    ) -> Tensor:
        lengths = starts.diff().tolist()
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
        outputs = [attention(*part, dropout_p=dropout_p, is_causal=True).transpose(1, 2) for part in parts]
        return torch.cat(outputs, dim=1).transpose(1, 2)

    return packed_attention


def compile_functions(functions: Functions) -> Functions:
    """`functions`, each that is timed through torch.compile; every shape is compiled anew."""
    torch.compiler.reset()  # after some shapes of one function it would give up, and run the function as it is
    attention = torch.compile(functions.attention, dynamic=False)
    return replace(
        functions,
        attention=attention,
        packed_attention=sequence_by_sequence(attention),
        layer_norm=torch.compile(functions.layer_norm, dynamic=False),
        add_layer_norm=torch.compile(functions.add_layer_norm, dynamic=False),
        rms_norm=torch.compile(functions.rms_norm, dynamic=False),
        add_rms_norm=torch.compile(functions.add_rms_norm, dynamic=False),
    )


PYTORCH = Functions(**vars(replace(gpt.PYTORCH, packed_attention=sequence_by_sequence(F.scaled_dot_product_attention))))
TRILBY = Functions(**vars(gpt.TRILBY), rms_norm=kernels.rms_norm, add_rms_norm=kernels.add_rms_norm)


def _reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    options = reference.AttentionOptions.plain(is_causal, 1 / math.sqrt(query.shape[-1]))._replace(
        mask=None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2]),
        seed=draw_seed(dropout_p, query.device),  # the one that trilby draws after the same torch.manual_seed
        dropout_p=dropout_p,
    )
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


def _reference_rms_norm(input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return reference.norm(input, weight, None, len(normalized_shape), False, eps)[0]


def _reference_add_rms_norm(
    stream: Tensor, branch: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = stream + branch
    return _reference_rms_norm(summed, normalized_shape, weight, eps), summed


TRUTH = Functions(
    _reference_attention,
    _reference_layer_norm,
    _reference_add_layer_norm,
    packed_attention=sequence_by_sequence(_reference_attention),
    rms_norm=_reference_rms_norm,
    add_rms_norm=_reference_add_rms_norm,
)
