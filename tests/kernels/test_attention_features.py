"""Whatever attention is asked for, the C++ kernels compute it as exactly as PyTorch with the scores written out."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from attention_blocks import Cache
from attention_case import DTYPES, gradients, needs_extension
from attention_features import FEATURES, Call, Judged, seen_pairs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trilby.kernels.options import AttentionOptions

OPERATOR = torch.ops.trilby.attention


def check(one: Judged, asked: AttentionOptions | None = None) -> None:
    """Compute a call, told `asked` instead where given, and judge the results."""
    output, logsumexp = OPERATOR(*one.inputs, *(asked or one.options))
    one.judge(output, logsumexp, *gradients(output, one.inputs, one.grad_output))


@lru_cache
def judged(name: str, dtype: torch.dtype) -> Judged:
    """Of one of `FEATURES`, the same for every level."""
    torch.manual_seed(0)
    return Judged.of(FEATURES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_as_exact_as_pytorch_with_scores_written_out(name: str, dtype: torch.dtype, level: str) -> None:
    check(judged(name, dtype))


@needs_extension
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_as_exact_as_pytorch_whatever_is_combined(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    sequences = data.draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=4))
    bound = st.one_of(st.just(-1), st.integers(0, 100))
    heads = data.draw(st.integers(1, 2))
    # Not smaller: of a gradient of a few numbers PyTorch's error is now and then next to nothing by luck.
    call = Call(
        lambda call, dtype: AttentionOptions(),
        B=1 if sequences else data.draw(st.integers(1, 2)),
        H=heads * data.draw(st.integers(1, 2)),
        Hkv=heads,
        T=sum(queries for queries, _ in sequences) + data.draw(st.integers(8, 60)),
        S=sum(keys for _, keys in sequences) + data.draw(st.integers(8, 60)),
        D=data.draw(st.integers(8, 70)),
        Dv=data.draw(st.integers(8, 70)),
        lengths=tuple(sequences),
    )
    count, dtype = len(sequences) or call.B, data.draw(st.sampled_from(DTYPES))
    shortest = min(keys for _, keys in sequences) if sequences else call.S
    mask = torch.randn(call.B, 1, call.T, call.S)
    masks = (None, mask < 0, mask.masked_fill(mask < -1, -torch.inf), mask.to(dtype))
    dropout_p = data.draw(st.sampled_from((0.0, 0.2)))
    options = AttentionOptions(
        mask=None if sequences or (chosen := data.draw(st.sampled_from(masks))) is None
        else chosen.expand(-1, call.H, -1, -1),
        alibi_slopes=data.draw(st.sampled_from((None, torch.rand(count, call.H)))),
        seed=torch.randint(2**63 - 1, (1,)) if dropout_p else None,
        query_starts=call.starts(0) if sequences else None,
        key_starts=call.starts(1) if sequences else None,
        key_lengths=data.draw(st.sampled_from((None, torch.randint(0, shortest + 1, (count,), dtype=torch.int32)))),
        scale=data.draw(st.sampled_from((call.D**-0.5, -0.3))),
        lower_right=data.draw(st.booleans()),
        window_left=data.draw(bound),
        window_right=data.draw(bound),
        softcap=data.draw(st.sampled_from((0.0, 2.0))),
        dropout_p=dropout_p,
    )  # fmt: skip
    call = replace(call, T=call.T + 1, S=call.S + 1) if sequences else call  # the first row is nobody's
    # A query of one key has a gradient of 0, which the factor of dropout makes a rounding, in the output, here.
    assume(not dropout_p or bool((seen_pairs(call, options).sum(-1) > 1).any()))
    check(Judged.of(replace(call, ask=lambda call, dtype: options), dtype))


@pytest.mark.parametrize("length", [7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257])
def test_lengths_around_every_tile(length: int, level: str) -> None:
    """Panels of 8, 16 or 32 queries, blocks of 64 keys, tiles of up to 128 queries, of 256 keys."""
    options = AttentionOptions(
        scale=0.4, window_left=17, window_right=3, lower_right=True, seed=torch.tensor([1]), dropout_p=0.2
    )
    call = Call(lambda call, dtype: options, B=1, H=1, Hkv=1, T=length, S=length + 9, D=8, Dv=8)
    check(Judged.of(call, torch.float32))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("size", [1, 16, 48, 64, 100], ids=lambda size: f"blocks of {size}")
def test_keys_in_blocks_are_keys(size: int, packed: bool, level: str) -> None:
    """The same keys, out of order in blocks, of which what no sequence has is NaN, give the same bits."""
    cache = Cache((150, 0, 77), H=4, Hkv=2, T=40, S=150, D=16, window_left=90)
    cache.assert_blocks_change_nothing(OPERATOR, size, packed)


@pytest.mark.parametrize("name", [name for name in FEATURES if "packed" not in name])
def test_hidden_keys_and_values_cannot_leak(name: str, level: str) -> None:
    """Keys and values of NaN and infinity are felt by the queries that see them, and by no other: not a bit changes."""
    call = FEATURES[name]
    options = call.ask(call, torch.float32)
    query, key, value = (tensor.detach() for tensor in call.inputs(torch.float32))
    chosen = torch.tensor([3, call.S // 2, call.S - 1])
    bad_key, bad_value = key.clone(), value.clone()
    bad_key[:, :, chosen] = torch.nan
    bad_value[:, :, chosen] = torch.inf
    feels = seen_pairs(call, options)[..., chosen].any(-1)  # [B, H, T]
    grad_output = torch.randn(call.B, call.H, call.T, call.Dv) * ~feels[..., None]

    def results(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = query.clone().requires_grad_()
        output, logsumexp = OPERATOR(leaf, key, value, *options)
        return output, logsumexp, torch.autograd.grad(output, leaf, grad_output)[0]

    for clean, poisoned in zip(results(key, value), results(bad_key, bad_value)):
        assert torch.equal(poisoned[~feels], clean[~feels])


@pytest.mark.parametrize("name", [name for name in FEATURES if "packed" in name])
def test_a_sequence_feels_nothing_of_its_neighbors(name: str, level: str) -> None:
    call = FEATURES[name]
    options = call.ask(call, torch.float32)
    starts = call.starts(0), call.starts(1)
    inputs = tuple(tensor.detach() for tensor in call.inputs(torch.float32))
    grad_output = torch.randn(call.B, call.H, call.T, call.Dv)

    def results(poison: bool) -> tuple[Tensor, ...]:
        leaves, grad = tuple(tensor.clone() for tensor in inputs), grad_output.clone()
        for tensor, of in ((leaves[0], starts[0]), (leaves[1], starts[1]), (leaves[2], starts[1]), (grad, starts[0])):
            if poison:  # sequence 5, and what is nobody's
                tensor[:, :, of[5] : of[6]] = torch.nan
                tensor[:, :, : of[0]] = tensor[:, :, of[-1] :] = torch.nan
        output, logsumexp = OPERATOR(*(leaf.requires_grad_() for leaf in leaves), *options)
        return output, *gradients(output, leaves, grad), logsumexp[..., None]

    for clean, poisoned, of in zip(results(False), results(True), (0, 0, 1, 1, 0)):
        others = torch.ones(clean.shape[2], dtype=torch.bool)
        others[starts[of][5] : starts[of][6]] = False
        assert torch.equal(poisoned[:, :, others], clean[:, :, others])
        owned = (torch.arange(clean.shape[2]) >= starts[of][0]) & (torch.arange(clean.shape[2]) < starts[of][-1])
        assert (clean[:, :, ~owned] == (-torch.inf if clean.shape[3] == 1 else 0)).all()


@pytest.mark.parametrize("name", ["everything", "packed, everything", "mask with blocks that nothing sees", "window"])
@pytest.mark.usefixtures("threads")
def test_every_number_of_threads_gives_the_same_bits(name: str, level: str) -> None:
    one = judged(name, torch.bfloat16)
    results = []
    for run in range(30 if name == "packed, everything" else 5):
        torch.set_num_threads((1, 2, 4, 3, 8)[run % 5])
        output, logsumexp = OPERATOR(*one.inputs, *one.options)
        results.append((output, logsumexp, *gradients(output, one.inputs, one.grad_output)))
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later))


@pytest.mark.parametrize("name", ["everything", "packed, everything"])
def test_inputs_may_lie_anyhow(name: str, level: str) -> None:
    """Every tensor read at strides: bits do not change."""
    one = judged(name, torch.float16)

    def scattered(tensor: Tensor) -> Tensor:
        apart = torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)
        return apart.transpose(-3, -2).contiguous().transpose(-3, -2)[..., 0]

    leaves = tuple(scattered(tensor.detach()).requires_grad_() for tensor in one.inputs)
    options = one.options
    if options.mask is not None:
        options = options._replace(mask=scattered(options.mask))
    assert options.alibi_slopes is not None
    options = options._replace(alibi_slopes=scattered(options.alibi_slopes))
    expected = OPERATOR(*one.inputs, *one.options)[0]
    output = OPERATOR(*leaves, *options)[0]
    assert torch.equal(output, expected)
    for ours, theirs in zip(
        gradients(output, leaves, scattered(one.grad_output)), gradients(expected, one.inputs, one.grad_output)
    ):
        assert torch.equal(ours, theirs)


MUTANTS = {
    "the window is one key too wide": ("window", {"window_left": 21}),
    "the window is one key too narrow": ("window", {"window_left": 19}),
    "the window is aligned to the wrong corner": ("window, lower right", {"lower_right": False}),
    "the softcap is dropped": ("softcap", {"softcap": 0.0}),
    "the slopes are dropped": ("alibi", {"alibi_slopes": None}),
    "distances are counted without the offset": ("alibi, lower right, both ways", {"lower_right": False}),
    "the mask is dropped": ("boolean mask", {"mask": None}),
    "the additive mask is dropped": ("additive mask", {"mask": None}),
    "nothing is dropped": ("dropout", {"dropout_p": 0.0}),
    "other pairs are dropped": ("dropout", {"seed": torch.tensor([12345])}),
    "keys that do not exist are seen": ("key lengths", {"key_lengths": None}),
    "one sequence begins one row late": (
        "packed",
        {"key_starts": torch.tensor([1, 34, 40, 40, 40, 40, 180, 184, 312])},
    ),
}


@needs_extension
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_kernel_with_one_mistake_is_found(mutant: str) -> None:
    name, mistake = MUTANTS[mutant]
    one = judged(name, torch.float32)
    if "key_starts" in mistake:
        mistake = {"key_starts": mistake["key_starts"].int()}
    with pytest.raises(AssertionError, match="error"):
        check(one, one.options._replace(**mistake))


@needs_extension
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask": torch.ones(2, 4, 70, 149)}, "mask must be"),
        ({"mask": torch.ones(2, 4, 70, 150).int()}, "mask must be bool, float32 or of query's dtype"),
        ({"alibi_slopes": torch.ones(2, 3)}, "alibi_slopes must be float32"),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
        ({"dropout_p": 1.5, "seed": torch.tensor([1])}, "dropout_p must be from 0 to 1, not 1.5"),
        ({"key_lengths": torch.tensor([1, 151], dtype=torch.int32)}, r"key_lengths\[1\] is 151, not from 0 to 150"),
        ({"key_lengths": torch.ones(3, dtype=torch.int32)}, "key_lengths must be int32"),
        ({"query_starts": torch.tensor([0, 5], dtype=torch.int32)}, "query_starts needs a query"),
        ({"block_table": torch.ones(2, 1, dtype=torch.int32)}, "block_table needs key_lengths"),
    ],
)
def test_what_would_be_read_outside_is_refused_by_name(wrong: dict[str, Tensor], message: str) -> None:
    call = Call(lambda call, dtype: AttentionOptions())
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(*call.inputs(torch.float32), *AttentionOptions(**wrong))


@needs_extension
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 71], "query_starts must ascend"),
        ([5, 3], "query_starts must ascend"),
        ([-1, 4], "query_starts must ascend"),
    ],
)
def test_starts_outside_the_rows_are_refused(starts: list[int], message: str) -> None:
    numbers = torch.tensor(starts, dtype=torch.int32)
    call = Call(lambda call, dtype: AttentionOptions(), B=1)
    with pytest.raises(RuntimeError, match="query_starts must ascend from 0 or more to 70 or less"):
        OPERATOR(*call.inputs(torch.float32), *AttentionOptions(query_starts=numbers, key_starts=numbers))
