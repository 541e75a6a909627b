"""Attention: check a call, choose who computes it, call them.

PyTorch's own function is the specification: whatever trilby has no faster kernel for runs it, with its errors.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _pytorch

from . import attention_rules, reference
from .attention_arguments import Arguments, AttentionArguments, checked_softcap, contiguous
from .attention_at_once import ALL_KEYS, attention, attention_output, factor, output_at_once
from .attention_rules import (
    KERNEL_DTYPES,
    LARGEST_HEAD_DIM,
    is_pytorchs_at_sight,
    is_trilbys_inference,
)
from .observer import LIBRARIES, hand_over, hand_over_unseen
from .ops import reasons_against_device
from .options import UNBOUNDED, AttentionOptions
from .seed import draw_seed
from .shortcut import is_eager, reasons_of_context, wants_gradient


def reasons_for_pytorch(asked: AttentionArguments) -> tuple[str, ...]:
    """Every reason why a call of `scaled_dot_product_attention` is PyTorch's to compute; none: trilby computes it."""
    context = () if torch.compiler.is_compiling() else reasons_of_context()
    return context + attention_rules.reasons_for_pytorch(asked.call)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query · keyᵀ · scale) · value, never holding the scores: `F.scaled_dot_product_attention`, faster.

    Arguments, results, errors and gradients are those of `torch.nn.functional.scaled_dot_product_attention`. The causal
    mask is aligned to the top left, so for T = 3 queries and S = 5 keys (1 = seen)::

        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0

    What else is in the batch can change the last bits of one of its rows: small calls are PyTorch's, and a row more can
    make the call trilby's. `attend` hands none over for its size.

    Args:
        query: [B, H, T, D], float32, bfloat16 or float16 for trilby's kernels, with any strides.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        attn_mask: As PyTorch's, which computes it where that is as fast, or the mask requires a gradient.
        dropout_p: As PyTorch's. In trilby's kernels the mask follows from torch's generator (`torch.manual_seed`) and
            from the place of query and key, and takes no memory.
        is_causal: Hide from query i every key after i.
        scale: What scores are multiplied by; 1/√D by default.
        enable_gqa: Let H be a multiple of Hkv; query head h reads key head h // (H / Hkv).

    Returns:
        [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv).

    Raises:
        RuntimeError: Whatever PyTorch's function raises, for what PyTorch's function refuses.
    """
    # The cheapest questions first: a tiny call takes as long as ten of them.
    if dropout_p == 0.0:
        if not LIBRARIES and is_pytorchs_at_sight(query, key, attn_mask is not None):
            return _pytorch_in_few_words(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        is_plain = attn_mask is None and not torch.is_autocast_enabled("cpu")
        if is_plain and is_eager(query, key, value) and not wants_gradient(query, key, value):
            dtypes = query.dtype, key.dtype, value.dtype
            if is_trilbys_inference(query.shape, key.shape, value.shape, dtypes, enable_gqa):
                window = UNBOUNDED, 0 if is_causal else UNBOUNDED
                output: Tensor = attention_output(
                    query, key, value, None, None, None, scale, enable_gqa, False, *window
                )
                return output
            if not LIBRARIES:
                return _pytorch_in_few_words(query, key, value, None, is_causal, scale, enable_gqa)
    asked = AttentionArguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).in_autocasts_dtype
    if reasons := reasons_for_pytorch(asked):
        return hand_over(reasons, asked.by_pytorch)
    result: Tensor = attention(asked.query, asked.key, asked.value, *asked.options())[0]
    return result


def _pytorch_in_few_words(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if scale is None and not enable_gqa:  # keywords cost 2 of a tiny call's 6 µs
        return _pytorch(query, key, value, attn_mask, 0.0, is_causal)
    return _pytorch(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    lower_right: bool | None = None,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` with all that PyTorch's has no argument for.

    A score goes through, in this order: scale, softcap, ALiBi, an additive mask. A query that sees no key gets 0. The
    causal mask and the window are aligned to the first query and key or, `lower_right`, to the last, as a cache of
    earlier keys wants it. For T = 2 queries and S = 4 keys, is_causal (1 = seen)::

        upper left   lower right
        1 0 0 0      1 1 1 0
        1 1 0 0      1 1 1 1

    By the C++ kernels what else is in the batch changes no bit of a row's output, logsumexp and gradients, nor does the
    number of threads. With dropout that holds while the row keeps its index.

    Args:
        query: [B, H, T, D]; float32, bfloat16 or float16 for trilby's kernels.
        key: [B, Hkv, S, D]; query head h reads key head h // (H / Hkv).
        value: [B, Hkv, S, Dv].
        attn_mask: Broadcasts to [B, H, T, S]; bool (true is seen), or float32 or query's dtype, added to the scores. It
            has no gradient here: `scaled_dot_product_attention` gives one.
        dropout_p: The probability that a weight is dropped. The mask follows from torch's generator
            (`torch.manual_seed`) and from the place of query and key, and takes no memory.
        is_causal: Hide from a query every key after its own.
        scale: What scores are multiplied by; 1/√D by default.
        lower_right: Which corner is_causal, window_size and alibi_slopes count from. It must be said where the lengths
            differ: both conventions are in use, and one instead of the other is no error that anything would show.
        window_size: How many keys before and after its own a query sees; -1: all.
        softcap: Scores become softcap · tanh(score / softcap); 0: they do not.
        alibi_slopes: [H] or [B, H] float32: what a score loses for each step between query and key (Press, Smith and
            Lewis, "Train short, test long", 2022).
        key_lengths: [B] int32: how many of each batch's keys exist; all by default.
        block_table: [B, blocks] int32: batch b's keys lie, block after block, in the blocks block_table[b] of key
            [all blocks, Hkv, block size, D] and of value. It needs key_lengths, and has no gradients.
        return_logsumexp: Also return the logarithm of the softmax's denominator.

    Returns:
        [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv), and, if asked for, the logsumexp [B, H, T],
        float32, -inf where a query sees no key, without gradients.

    Raises:
        TypeError: A dtype that is not allowed.
        ValueError: Sizes that do not agree, or an alignment that is not said.
    """
    if is_causal:
        window_size = (window_size[0], 0)
    is_rich = alibi_slopes is not None or key_lengths is not None or block_table is not None or return_logsumexp
    if not is_rich and softcap == dropout_p == 0.0:
        at_once = output_at_once(query, key, value, attn_mask, None, None, scale, True, lower_right, window_size)
        if at_once is not None:
            return at_once
    arguments = Arguments(query, key, value, key_lengths, block_table)
    arguments.check()
    lengths_agree = key_lengths is None and query.shape[2] == key.shape[2]
    if lower_right is None and not lengths_agree and (window_size != ALL_KEYS or alibi_slopes is not None):
        raise ValueError(f"lower_right was not given, and query's length {query.shape[2]} may differ from the keys'")
    options = AttentionOptions(
        mask=arguments.expanded_mask(attn_mask),
        alibi_slopes=arguments.expanded_slopes(alibi_slopes),
        seed=draw_seed(dropout_p, query.device),
        key_lengths=contiguous(key_lengths),
        block_table=contiguous(block_table),
        scale=factor(query, scale),
        lower_right=bool(lower_right),
        window_left=window_size[0],
        window_right=window_size[1],
        softcap=checked_softcap(softcap),
        dropout_p=dropout_p,
    )
    output, logsumexp = compute(query, key, value, options)
    return (output, logsumexp) if return_logsumexp else output


def compute(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of checked arguments: by a kernel, or where there is none by what the operator means."""
    if reasons := tuple(reasons_for_reference(query, key, value, options)):
        arguments = {"query": query, "key": key, "value": value, **options._asdict()}
        output, logsumexp = hand_over_unseen(
            "trilby::attention", arguments, reasons, lambda: reference.attention(query, key, value, *options)
        )
        return output, logsumexp.detach()
    results: tuple[Tensor, Tensor] = attention(query, key, value, *options)
    return results


def reasons_for_reference(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Iterator[str]:
    """Every reason why no kernel computes a call of `attend` or `varlen_attn`; none: one does."""
    yield from reasons_of_context()
    yield from reasons_against_device(query.device)
    if query.dtype not in KERNEL_DTYPES:
        yield f"query's dtype is {query.dtype}, not float32, bfloat16 or float16"
    if max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD_DIM:
        yield f"the head dimension is {max(query.shape[-1], value.shape[-1])}, above {LARGEST_HEAD_DIM}"
