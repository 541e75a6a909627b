"""What attention is asked for beyond query, key and value: in the operator's order, and in nobody else's."""

from typing import Final, NamedTuple

from torch import Tensor

UNBOUNDED = -1
TENSORS: Final = 7  # of the options, the first
NO_TENSORS: Final = (None,) * TENSORS


class AttentionOptions(NamedTuple):
    """The arguments of `trilby::attention` after the first three.

    A score goes through, in this order: `scale`; `softcap`; `alibi_slopes`; an additive `mask`; and where the pair is
    hidden it is -inf. Query i sees key j where i + offset - window_left <= j <= i + offset + window_right. The offset
    is 0, or, `lower_right`, the sequence's keys less its queries. With T = 3 queries, S = 5 keys, window_left 1 and
    window_right 0 (1 = seen)::

        upper left      lower right
        1 0 0 0 0       0 1 1 0 0
        1 1 0 0 0       0 0 1 1 0
        0 1 1 0 0       0 0 0 1 1

    Attributes:
        mask: [B, H, T, S] of any strides; bool (true is seen), or float32 or query's dtype to be added.
        alibi_slopes: [B, H] float32 of any strides: what a score loses for each step between query and key, counted
            with the offset (Press, Smith and Lewis, 2022).
        seed: [1] int64: which pairs dropout drops.
        query_starts: [N + 1] int32, contiguous: sequence n's queries are the rows query_starts[n] up to
            query_starts[n + 1] of a query [1, H, rows, D]; none: each batch is a sequence, and N is B.
        key_starts: [N + 1] int32: likewise for keys and values.
        key_lengths: [N] int32: how many keys of each sequence exist; none: all.
        block_table: [N, blocks] int32: the sequence's keys lie in blocks, key being [all blocks, Hkv, block size, D].
        scale: What scores are multiplied by.
        lower_right: Whether the window is aligned to the last query and key instead of to the first.
        window_left: How many keys before its own a query sees; negative: all.
        window_right: How many keys after its own; negative: all. Causal attention is 0.
        softcap: Scores become softcap · tanh(score / softcap); 0: they do not.
        dropout_p: The probability that a weight is dropped, after the softmax.
        longest_query: What no packed sequence has more queries than; 0 where query_starts is none.
    """

    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    seed: Tensor | None = None
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    block_table: Tensor | None = None
    scale: float = 1.0
    lower_right: bool = False
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    softcap: float = 0.0
    dropout_p: float = 0.0
    longest_query: int = 0

    @classmethod
    def plain(cls, is_causal: bool, scale: float) -> "AttentionOptions":
        """Attention to all keys, or, causal, to those up to the query's own, counted from the first."""
        return cls(scale=scale, window_right=0 if is_causal else UNBOUNDED)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first of the arguments, which are tensors."""
        return self[:TENSORS]

    @property
    def numbers(self) -> tuple[float | bool | int, ...]:
        """The others."""
        return self[TENSORS:]
