"""Attention over sequences of different lengths, packed one after the other: PyTorch's `varlen_attn`, on CPUs too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .attention import compute
from .attention_arguments import Arguments, check_integers, checked_softcap, contiguous
from .attention_at_once import factor, output_at_once
from .options import UNBOUNDED, AttentionOptions
from .seed import draw_seed

if TYPE_CHECKING:
    from torch.nn.attention.varlen import AuxRequest


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence to itself: `torch.nn.attention.varlen.varlen_attn`, with gradients, on CPUs too.

    Sequence n has the rows cu_seq_q[n] up to cu_seq_q[n + 1] of query and, likewise, of key and value; it may be empty.
    The window is aligned to a sequence's last query and key, as PyTorch's. Two sequences, of 2 and 3 tokens, with a
    window_size of (-1, 0) (1 = seen)::

        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . 1 1 1

    By the C++ kernels what else is in the batch changes no bit of a sequence's output, logsumexp and gradients, nor
    does the number of threads. With dropout that holds while the sequence keeps its place: what is dropped goes by the
    row of query, counted from the batch's first.

    Args:
        query: [all queries, H, D]; float32, bfloat16 or float16 for trilby's kernels.
        key: [all keys, Hkv, D], or with a block_table [all blocks, block size, Hkv, D].
        value: [all keys, Hkv, Dv], or [all blocks, block size, Hkv, Dv].
        cu_seq_q: [N + 1] int32: where the sequences start, and where the last one ends.
        cu_seq_k: [N + 1] int32; none with a block_table.
        max_q: The most queries that a sequence has.
        max_k: The most keys; the kernels need no such bound.
        return_aux: With `lse` set, also return the logsumexp.
        scale: What scores are multiplied by; 1/√D by default.
        window_size: How many keys before and after its own a query sees; -1: all. (-1, 0) is causal.
        enable_gqa: Let H be a multiple of Hkv.
        seqused_k: [N] int32: how many keys of each sequence exist; all by default.
        block_table: [N, blocks] int32: the blocks in which each sequence's keys lie. It needs seqused_k, and has no
            gradients.
        num_splits: Accepted for PyTorch's sake: trilby's splits depend on a sequence's own length alone.
        softcap: Scores become softcap · tanh(score / softcap); 0: they do not.
        alibi_slopes: [H] or [N, H] float32, as `attend` has them.
        dropout_p: The probability that a weight is dropped, as `attend` has it.

    Returns:
        [all queries, H, Dv] in query's dtype, 0 in rows of no sequence, and, if asked for, the logsumexp
        [all queries, H], float32, without gradients.

    Raises:
        TypeError: A dtype that is not allowed.
        ValueError: Sizes that do not agree.
    """
    is_rich = seqused_k is not None or alibi_slopes is not None or (return_aux is not None and return_aux.lse)
    is_common = not is_rich and block_table is None and softcap == dropout_p == 0.0
    if is_common and cu_seq_q.is_cpu and cu_seq_k is not None and cu_seq_k.is_cpu:
        at_once = output_at_once(query, key, value, None, cu_seq_q, cu_seq_k, scale, enable_gqa, True, window_size)
        if at_once is not None:
            return at_once
    rank = 3 if block_table is None else 4
    for name, tensor, dimensions in (("query", query, 3), ("key", key, rank), ("value", value, rank)):
        if tensor.dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {dimensions} dimensions are needed")
    if (cu_seq_k is None) == (block_table is None):
        raise ValueError("one of cu_seq_k and block_table must be given, and not both")
    N = cu_seq_q.numel() - 1
    packed = [tensor.unsqueeze(0) if tensor.dim() == 3 else tensor for tensor in (query, key, value)]
    q, k, v = (tensor.transpose(1, 2) for tensor in packed)  # [1, H, rows, D]
    arguments = Arguments(q, k, v, seqused_k, block_table, sequences=N)
    arguments.check()
    check_integers("cu_seq_q", cu_seq_q, (N + 1,), query.device)
    if cu_seq_k is not None:
        check_integers("cu_seq_k", cu_seq_k, (N + 1,), query.device)
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(f"query has {q.shape[1]} heads and key {k.shape[1]}; enable_gqa=True allows a multiple")
    options = AttentionOptions(
        alibi_slopes=arguments.expanded_slopes(alibi_slopes),
        seed=draw_seed(dropout_p, query.device),
        query_starts=contiguous(cu_seq_q),
        key_starts=contiguous(cu_seq_k),
        key_lengths=contiguous(seqused_k),
        block_table=contiguous(block_table),
        scale=factor(query, scale),
        lower_right=True,
        window_left=window_size[0],
        window_right=window_size[1],
        softcap=checked_softcap(softcap),
        dropout_p=dropout_p,
        longest_query=max_q,
    )
    output, logsumexp = compute(q, k, v, options)
    result = output.transpose(1, 2).squeeze(0)
    return (result, logsumexp.squeeze(0).T) if return_aux is not None and return_aux.lse else result
