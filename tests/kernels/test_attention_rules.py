"""One rule says who computes attention: trilby's function, trilby in PyTorch's place, `explain`, `strict` agree."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trilby.kernels import activated, explain, scaled_dot_product_attention, strict
from trilby.kernels import attention_rules as rules
from trilby.kernels.attention import reasons_for_pytorch
from trilby.kernels.attention_arguments import AttentionArguments
from trilby.kernels.attention_rules import AttentionCall
from trilby.kernels.observer import Call, watched
from trilby.kernels.ops import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to choose: {NATIVE.reason}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "none": lambda T, S: None,
    "causal": lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T),
    "padding": lambda T, S: (torch.arange(S) < S - 3).expand(2, 1, 1, S),
    "of heads": lambda T, S: (torch.arange(S) < S - 3).expand(4, T, S),
    "added": lambda T, S: torch.zeros(T, S),
    "added, causal": lambda T, S: torch.zeros(T, S).masked_fill(torch.ones(T, S).triu(S - T + 1) > 0, -torch.inf),
    "with a gradient": lambda T, S: torch.zeros(T, S).requires_grad_(),
}
# Each on one side of a limit or the other: few queries, a cache, small scores, masked ones, wide values, grouped heads.
SIZES = {
    "many queries": (2, 4, 4, 160, 160, 64, 64),
    "enough for a mask": (2, 4, 4, 200, 200, 64, 64),
    "few multiplications": (2, 4, 4, 33, 33, 16, 16),
    "few queries": (2, 4, 4, 31, 600, 64, 64),
    "few queries and keys": (2, 4, 4, 8, 8, 64, 64),
    "one query and a long cache": (2, 4, 4, 1, 2048, 64, 64),
    "one query and a short one": (2, 4, 4, 1, 100, 64, 64),
    "five queries and a long cache": (2, 4, 4, 5, 2048, 64, 64),
    "grouped heads": (2, 4, 2, 160, 160, 64, 64),
    "wide values": (2, 4, 4, 160, 160, 64, 80),
    "a large head": (2, 4, 4, 33, 33, 257, 257),
}


def served(function: Callable[[], object]) -> bool:
    """Whether one of trilby's kernels computed `function`, by their own count and that of the operator."""
    entered: list[str] = []

    def enter(call: Call, compute: Callable[[], Any]) -> Any:
        if not call.handed_over:
            entered.append(call.operator)
        return compute()

    before = sum(torch.ops.trilby.served_calls())
    with watched(enter):
        function()
    return sum(torch.ops.trilby.served_calls()) > before or any(
        operator.startswith("trilby::attention") for operator in entered
    )


def of_pytorchs_operator(call: AttentionCall) -> AttentionCall:
    """The call as it comes to trilby in PyTorch's place: by flash attention's operator, or composed of others."""
    mask = call.mask
    if call.dropout_p or call.query[3] != call.value[3] or call.dtypes[0] == torch.float64:
        return call
    if mask is not None and (mask.is_differentiated or len(mask.shape) == 3):
        return call
    return call._replace(in_place=True, trains=torch.is_grad_enabled(), enable_gqa=True)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3, 12])
@pytest.mark.parametrize("keys", [1, 32, 33, 600])
@pytest.mark.parametrize("queries", [1, 8, 9, 31, 32, 160])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_pytorchs_at_sight_is_so_by_the_rule(queries, keys, heads, trains, autocast):
    seen = torch.ones(queries, keys, dtype=torch.bool)
    for dtype, mask in product(DTYPES, (None, seen)):
        query = torch.zeros(1, heads, queries, 64, requires_grad=trains, dtype=dtype)
        key = torch.zeros(1, heads, keys, 64, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            at_sight = rules.is_pytorchs_at_sight(query, key, mask is not None)
            if at_sight:
                assert reasons_for_pytorch(AttentionArguments(query, key, key, mask).in_autocasts_dtype)
        assert at_sight or not (8 < queries < 32 or (trains and queries < 32))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SIZES)),
    st.sampled_from(sorted(MASKS)),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.booleans(),
)
@example("enough for a mask", "added", torch.float32, 0.0, False, False)
@example("enough for a mask", "added, causal", torch.float32, 0.0, False, False)
@example("one query and a long cache", "none", torch.float32, 0.0, False, False)
@example("few multiplications", "none", torch.bfloat16, 0.1, False, True)
@example("one query and a long cache", "of heads", torch.float32, 0.0, False, True)
def test_everyone_agrees_on_who_computes(size, mask, dtype, dropout_p, is_causal, trains):
    B, H, Hkv, T, S, D, Dv = SIZES[size]
    given_mask = MASKS[mask](T, S)
    query, key, value = (
        torch.zeros(shape, dtype=dtype, requires_grad=trains)
        for shape in ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
    )
    if given_mask is not None and given_mask.is_floating_point() and dtype == torch.float64:
        given_mask = given_mask.detach().double().requires_grad_(given_mask.requires_grad)
    is_causal = is_causal and given_mask is None
    arguments = (query, key, value, given_mask, dropout_p, is_causal)
    options = {"enable_gqa": Hkv != H}
    rule = not reasons_for_pytorch(AttentionArguments(*arguments, **options))

    def ours() -> Tensor:
        return scaled_dot_product_attention(*arguments, **options)

    def pytorchs() -> Tensor:
        return F.scaled_dot_product_attention(*arguments, **options)

    assert served(ours) == rule
    (explained,) = explain(ours)
    assert explained.is_trilbys == (not explained.reasons) == rule
    in_place = not rules.reasons_for_pytorch(of_pytorchs_operator(AttentionArguments(*arguments, **options).call))
    with activated():
        assert served(pytorchs) == in_place
        (explained,) = explain(pytorchs)
        assert explained.is_trilbys == (not explained.reasons) == in_place
    with nullcontext() if in_place else pytest.raises(RuntimeError, match="strict"), strict():
        pytorchs()
