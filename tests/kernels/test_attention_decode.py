"""Attention of few queries to many keys: exact at every edge on every level, the same for any number of threads."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_case import DTYPES, needs_extension
from tolerance import assert_as_exact_as
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from trilby.kernels import activated, reference, scaled_dot_product_attention
from trilby.kernels.attention import reasons_for_pytorch
from trilby.kernels.attention_arguments import AttentionArguments
from trilby.kernels.attention_rules import FEW_DECODED, MOST_DECODED, MOST_DECODED_ROWS, fewest_decoded
from trilby.kernels.options import AttentionOptions

OPERATOR = torch.ops.trilby.attention
SPLIT = 512  # keys that are attended to on their own
CAUSAL = AttentionOptions(scale=0.2, lower_right=True, window_right=0)
PLAIN = AttentionOptions(scale=0.2)
Inputs = tuple[Tensor, Tensor, Tensor]

# B, H, Hkv, T, S, D, Dv: splits of 512 keys visited as 8 runs; tiles of 1, 2 and 4 queries, of 4 to 16 keys, and of 1
# to 8 pairs of 8 to 32 columns.
SIZES = {
    "one key": (1, 1, 1, 1, 1, 8, 8),
    "fewer keys than runs": (2, 2, 2, 1, 5, 16, 16),
    "one key more than runs": (1, 1, 1, 1, 9, 16, 16),
    "one key less than a vector": (1, 2, 2, 2, 15, 16, 16),
    "one key short of a split": (1, 2, 2, 1, SPLIT - 1, 16, 16),
    "a split": (1, 2, 2, 1, SPLIT, 64, 64),
    "one key past a split": (2, 2, 2, 1, SPLIT + 1, 64, 64),
    "three splits": (1, 1, 1, 2, 2 * SPLIT + 100, 64, 64),
    "as many queries as it takes": (1, 2, 2, MOST_DECODED, 600, 64, 64),
    "one query more": (1, 2, 2, MOST_DECODED + 1, 600, 64, 64),
    "three queries": (1, 2, 2, 3, 90, 32, 32),
    "grouped heads": (2, 6, 2, 1, 600, 64, 64),
    "grouped heads, several queries": (1, 6, 2, 3, 600, 40, 40),
    "one key head for all": (1, 8, 1, 2, 600, 128, 128),
    "head dimension 1": (1, 2, 2, 1, 70, 1, 1),
    "head dimension 3": (1, 2, 2, 2, 70, 3, 3),
    "head dimension 80": (1, 2, 2, 1, 70, 80, 80),
    "head dimension 100": (1, 2, 1, 2, 70, 100, 100),
    "head dimension 256": (1, 2, 2, 1, 70, 256, 256),
    "values wider than keys": (1, 2, 2, 1, 70, 16, 72),
    "values narrower than keys": (1, 2, 2, 1, 70, 72, 5),
}  # fmt: skip


def draw(sizes: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Normal query, key and value."""
    B, H, Hkv, T, S, D, Dv = sizes
    return (
        torch.randn(B, H, T, D).to(dtype),
        torch.randn(B, Hkv, S, D).to(dtype),
        torch.randn(B, Hkv, S, Dv).to(dtype),
    )


def judge(inputs: Inputs, options: AttentionOptions) -> None:
    """Output and logsumexp obey the rule of `tolerance`; the rival is PyTorch with the scores written out."""
    truth = reference.attention(*(tensor.double() for tensor in inputs), *options)
    rival = reference.attention(*inputs, *options)
    for ours, theirs, true, what in zip(OPERATOR(*inputs, *options), rival, truth, ("output", "logsumexp")):
        assert_as_exact_as(ours, theirs, true, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_as_exact_as_pytorch_at_every_edge(name: str, dtype: torch.dtype, level: str) -> None:
    inputs = draw(SIZES[name], dtype)
    judge(inputs, CAUSAL)
    exact = tuple(tensor.double() for tensor in inputs)
    truth = F.scaled_dot_product_attention(*exact, scale=0.2, enable_gqa=True)
    rival = F.scaled_dot_product_attention(*inputs, scale=0.2, enable_gqa=True)
    assert_as_exact_as(OPERATOR(*inputs, *PLAIN)[0], rival, truth, "without a mask")


def _features(T: int, S: int) -> dict[str, AttentionOptions]:
    seen = torch.rand(2, 4, T, S) < 0.5
    seen[0, 0] = False  # sees nothing
    added = torch.randn(1, 1, T, S)
    return {
        "top left": replace_options(window_right=0),
        "window": replace_options(lower_right=True, window_left=70, window_right=3),
        "window in the middle": replace_options(window_left=10, window_right=600),
        "softcap": replace_options(softcap=0.7),
        "alibi": replace_options(alibi_slopes=torch.rand(2, 4), lower_right=True, window_right=0),
        "boolean mask": replace_options(mask=seen),
        "added mask": replace_options(mask=added.masked_fill(added < -1, -torch.inf).expand(2, 4, T, S)),
        "mask of query's dtype": replace_options(mask=added.expand(2, 4, T, S)),
        "key lengths": replace_options(key_lengths=torch.tensor([0, S - 9], dtype=torch.int32), lower_right=True),
        "all at once": replace_options(
            mask=seen,
            alibi_slopes=torch.rand(4).expand(2, 4),
            key_lengths=torch.tensor([S, 520], dtype=torch.int32),
            softcap=2.0,
            lower_right=True,
            window_left=500,
            window_right=1,
        ),
        "negative scale": replace_options(scale=-0.3),
        "scale zero": replace_options(scale=0.0),
        "large scale": replace_options(scale=5.0),
    }


def replace_options(**changed: object) -> AttentionOptions:
    """`PLAIN` but for what is `changed`."""
    return PLAIN._replace(**changed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_as_exact_as_pytorch_whatever_is_asked_for(T: int, dtype: torch.dtype, level: str) -> None:
    inputs = draw((2, 4, 2, T, 700, 48, 48), dtype)
    for name, options in _features(T, 700).items():
        if name == "mask of query's dtype":
            options = options._replace(mask=options.mask.to(dtype))
        judge(inputs, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 16, 100])
def test_pages_in_any_order_and_shared_pages(size: int, dtype: torch.dtype, level: str) -> None:
    lengths = torch.tensor([0, 1, 530, 700], dtype=torch.int32)
    most = -(-700 // size)
    blocks = torch.randperm(2 * most, dtype=torch.int32)[:most]
    table = torch.stack([blocks.roll(shift) for shift in (0, 3, 5, 0)]).contiguous()
    inputs = draw((2 * most, 4, 2, 1, size, 40, 24), dtype)
    queries = torch.randn(4, 4, 2, 40).to(dtype)
    judge((queries, *inputs[1:]), CAUSAL._replace(key_lengths=lengths, block_table=table))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_of_one_token(dtype: torch.dtype, level: str) -> None:
    lengths = [600, 0, 1, 70]
    key_starts = torch.tensor([2, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query_starts = torch.tensor([1, 2, 3, 3, 5], dtype=torch.int32)  # row 0 and the last are nobody's
    options = CAUSAL._replace(query_starts=query_starts, key_starts=key_starts, longest_query=2)
    inputs = draw((1, 4, 2, 6, 700, 40, 40), dtype)
    judge(inputs, options)
    output, logsumexp = OPERATOR(*inputs, *options)
    for nobodys in (0, 5):
        assert torch.equal(output[:, :, nobodys], torch.zeros(1, 4, 40, dtype=dtype))
        assert (logsumexp[:, :, nobodys] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_no_bit(dtype: torch.dtype, level: str) -> None:
    query, key, value = draw((2, 4, 2, 2, 600, 24, 24), dtype)
    expected = OPERATOR(query, key, value, *CAUSAL)[0]
    inside = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value))
    assert torch.equal(OPERATOR(*inside, *CAUSAL)[0], expected)
    longer = (torch.cat([tensor, torch.full_like(tensor, torch.nan)], 2)[:, :, :600] for tensor in (key, value))
    assert torch.equal(OPERATOR(query.mT.contiguous().mT, *longer, *CAUSAL)[0], expected)
    wider = (torch.cat([tensor, torch.full_like(tensor, torch.nan)], 3)[..., :24] for tensor in (key, value))
    assert torch.equal(OPERATOR(query, *wider, *CAUSAL)[0], expected)
    every_second = torch.stack([key, key], -1).flatten(-2)[..., ::2]  # the other kernel's, whose rounding differs
    judge((query, every_second, value), CAUSAL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("threads")
def test_every_number_of_threads_gives_the_same_bits(dtype: torch.dtype, level: str) -> None:
    inputs = draw((1, 6, 2, 2, 3000, 64, 64), dtype)
    results = []
    for threads in (1, 2, 4, 3):
        torch.set_num_threads(threads)
        results.append(OPERATOR(*inputs, *CAUSAL))
    for output, logsumexp in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(logsumexp, results[0][1])


def test_a_sequence_does_not_depend_on_the_others(level: str) -> None:
    query, key, value = draw((3, 2, 2, 1, 900, 32, 32), torch.float32)
    lengths = torch.tensor([900, 600, 3], dtype=torch.int32)
    whole = OPERATOR(query, key, value, *PLAIN._replace(key_lengths=lengths))[0]
    for n, length in enumerate(lengths.tolist()):
        alone = OPERATOR(query[n : n + 1], key[n : n + 1, :, :length], value[n : n + 1, :, :length], *PLAIN)[0]
        assert torch.equal(whole[n : n + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_in_chunks_equals_prefill_at_once(dtype: torch.dtype, level: str) -> None:
    """Chunks of 1 to 4 queries, each against what the cache holds by then."""
    query, key, value = draw((1, 2, 1, 30, 30, 32, 32), dtype)
    chunks, done = [], 0
    for length in (1, 2, 3, 4, 4, 4, 4, 4, 4):
        done += length
        chunk = query[:, :, done - length : done], key[:, :, :done], value[:, :, :done]
        chunks.append(OPERATOR(*chunk, *CAUSAL)[0])
    truth = reference.attention(query.double(), key.double(), value.double(), *CAUSAL)[0]
    rival = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.2, enable_gqa=True)
    assert_as_exact_as(torch.cat(chunks, 2), rival, truth, "chunks")
    assert_as_exact_as(OPERATOR(query, key, value, *CAUSAL)[0], rival, truth, "at once")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_hidden_is_not_felt(poison: float, level: str) -> None:
    query, key, value = draw((2, 2, 1, 2, 700, 24, 24), torch.float32)
    seen = torch.rand(2, 1, 2, 700) < 0.7
    seen[..., 650:] = False
    lengths = torch.tensor([650, 600], dtype=torch.int32)
    for options in (
        PLAIN._replace(mask=seen.expand(2, 2, 2, 700)),
        CAUSAL._replace(key_lengths=lengths),
        CAUSAL._replace(key_lengths=lengths, window_left=100),
    ):
        hidden = torch.ones(2, 700, dtype=torch.bool)
        for n in range(2):
            if options.mask is not None:
                hidden[n] = ~seen[n, 0].any(0)
            else:
                first = 0 if options.window_left < 0 else int(lengths[n]) - 2 - options.window_left
                hidden[n, first : lengths[n]] = False
        bad_key, bad_value = (tensor.masked_fill(hidden[:, None, :, None], poison) for tensor in (key, value))
        expected = OPERATOR(query, key, value, *options)
        for clean, poisoned in zip(expected, OPERATOR(query, bad_key, bad_value, *options)):
            assert torch.equal(clean, poisoned)
    # One of two queries sees the last key; the other does not feel it.
    value[:, :, 699] = poison
    first, last = OPERATOR(query, key, value, *CAUSAL)[0].unbind(2)
    assert first.isfinite().all()
    assert not last.isfinite().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_and_infinity_propagate_as_in_pytorch(where: int, bad: float, level: str) -> None:
    inputs = draw((1, 1, 1, 1, 600, 8, 8), torch.float32)
    inputs[where][0, 0, -1, 3] = bad
    ours = OPERATOR(*inputs, *PLAIN)[0]
    theirs = F.scaled_dot_product_attention(*(tensor.double() for tensor in inputs), scale=0.2)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


@needs_extension
@pytest.mark.parametrize("sizes", [(0, 2, 2, 1, 5, 8, 8), (2, 0, 0, 1, 5, 8, 8), (2, 2, 2, 1, 0, 8, 8)], ids=str)
def test_empty_sizes(sizes: tuple[int, ...]) -> None:
    query, key, value = draw(sizes, torch.float32)
    output, logsumexp = OPERATOR(query, key, value, *PLAIN)
    assert torch.equal(output, torch.zeros_like(query))
    assert torch.equal(logsumexp, torch.full(query.shape[:3], -torch.inf))


# What is PyTorch's by the rule, and what is trilby's.


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [2, FEW_DECODED, FEW_DECODED + 1, MOST_DECODED])
def test_few_queries_of_many_keys_are_trilbys(T: int, dtype: torch.dtype) -> None:
    S = -(-fewest_decoded(dtype, T) // (T * 4 * 64))
    query, key, value = draw((1, 4, 4, T, S, 64, 64), dtype)
    assert reasons_for_pytorch(AttentionArguments(query, key, value)) == ()
    assert any(
        "fewer than" in reason
        for reason in reasons_for_pytorch(AttentionArguments(query, key[:, :, 1:], value[:, :, 1:]))
    )
    truth = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    rival = F.scaled_dot_product_attention(query, key, value)
    assert_as_exact_as(scaled_dot_product_attention(query, key, value), rival, truth, "decode")


@needs_extension
def test_more_queries_and_rows_are_pytorchs() -> None:
    query, key = torch.empty(1, 4, MOST_DECODED + 1, 64), torch.empty(1, 4, 65536, 64)
    assert any("queries" in reason for reason in reasons_for_pytorch(AttentionArguments(query, key, key)))
    query, key = torch.empty(1, 2 * MOST_DECODED_ROWS, 1, 64), torch.empty(1, 1, 65536, 64)
    assert any(
        "queries" in reason for reason in reasons_for_pytorch(AttentionArguments(query, key, key, enable_gqa=True))
    )


# Whoever asks.


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
@torch.no_grad()
def test_pytorchs_function_decodes_while_trilby_is_activated(T: int, dtype: torch.dtype) -> None:
    """The same bits come of the operator; PyTorch makes numbers to be added of a mask that is true where it is seen."""
    query, key, value = draw((2, 4, 4, T, 2048, 64, 64), dtype)
    for mask in (None, torch.ones(T, 2048, dtype=torch.bool).tril(2048 - T)):
        added = mask if mask is None else torch.zeros(2, 4, T, 2048, dtype=dtype).masked_fill(~mask, -torch.inf)
        options = PLAIN._replace(mask=added)
        expected = OPERATOR(query, key, value, *options)[0]
        with activated():
            before = sum(torch.ops.trilby.served_calls())
            ours = F.scaled_dot_product_attention(query, key, value, mask, scale=0.2)
            served = sum(torch.ops.trilby.served_calls()) - before
        assert served == 1
        assert torch.equal(ours, expected)


@needs_extension
def test_a_mask_by_pytorchs_name_is_decoded() -> None:
    query, key, value = draw((2, 4, 4, 3, 2048, 64, 64), torch.float32)
    for function in (scaled_dot_product_attention, activated()(F.scaled_dot_product_attention)):
        ours = function(query, key, value, causal_lower_right(3, 2048), scale=0.2)
        truth = reference.attention(query.double(), key.double(), value.double(), *CAUSAL)[0]
        rival = F.scaled_dot_product_attention(query, key, value, causal_lower_right(3, 2048), scale=0.2)
        assert_as_exact_as(ours, rival, truth, "lower right")


class TestMutants:
    """Decoding with one mistake each: if the rule lets one pass, it proves nothing."""

    def judge(self, inputs: Inputs, mutant: Tensor) -> None:
        truth = reference.attention(*(tensor.double() for tensor in inputs), *PLAIN)[0]
        with pytest.raises(AssertionError, match="mutant: error"):
            assert_as_exact_as(mutant, reference.attention(*inputs, *PLAIN)[0], truth, "mutant")

    def test_the_last_key_skipped(self) -> None:
        query, key, value = draw((1, 2, 2, 1, 1000, 32, 32), torch.float32)
        self.judge((query, key, value), OPERATOR(query, key[:, :, :-1], value[:, :, :-1], *PLAIN)[0])

    def test_splits_merged_without_their_maxima(self) -> None:
        query, key, value = draw((1, 2, 2, 1, 2 * SPLIT, 32, 32), torch.float32)
        halves = [
            reference.attention(query, k, v, *PLAIN)[0] for k, v in zip(key.split(SPLIT, 2), value.split(SPLIT, 2))
        ]
        self.judge((query, key, value), sum(halves) / 2)

    def test_probabilities_rounded_to_bfloat16(self) -> None:
        query, key, value = draw((1, 2, 2, 1, 1000, 32, 32), torch.float32)
        weights = (query @ key.mT / math.sqrt(25)).softmax(-1).bfloat16().float()
        self.judge((query, key, value), weights @ value)

    def test_heads_of_a_group_exchanged(self) -> None:
        query, key, value = draw((1, 4, 2, 1, 100, 32, 32), torch.float32)
        self.judge((query, key, value), OPERATOR(query[:, [0, 2, 1, 3]], key, value, *PLAIN)[0])
