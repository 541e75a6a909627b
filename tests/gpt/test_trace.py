"""The trace of kernels: every layer's, and the truth about them."""

import pytest
import torch
from trilby.gpt import GPT, PYTORCH
from trilby.gpt.trace import describe, trace
from trilby.kernels.ops import NATIVE


@pytest.mark.skipif(not NATIVE.loaded, reason="the C++ extension is not built")
def test_the_kernels_of_a_model_that_is_large_enough(wide):
    model = GPT(wide)
    tokens = torch.zeros(8, 64, dtype=torch.int64)
    found = trace(model, lambda: model.loss(tokens, tokens))
    products = [each for each in found if each.called.startswith("linear")]
    assert [each.layer for each in products] == [
        f"h.{n}.{part}" for n in (0, 1) for part in ("attn",) * 2 + ("mlp",) * 2
    ]
    assert all("because gradients are asked for" in each.called for each in products)
    others = [each for each in found if each not in products]
    assert [each.layer for each in others] == [
        *(f"h.{n}.{part}" for n in (0, 1) for part in ("ln_1", "attn", "ln_2", "mlp")),
        "ln_f",
    ]
    assert all(each.is_trilbys and "trilby's C++ kernel" in each.called for each in others)


def test_of_what_is_pytorchs_there_is_a_reason(config):
    model = GPT(config)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    found = trace(model, lambda: model(tokens))
    assert len(found) == 2 * (1 + 3 + 1 + 3) + 1
    assert not any(each.is_trilbys for each in found)
    assert all("because" in each.called for each in found)


def test_a_model_of_pytorchs_layers_has_none_of_trilbys(wide):
    model = GPT(wide, PYTORCH)
    tokens = torch.zeros(8, 64, dtype=torch.int64)
    assert not any(each.is_trilbys for each in trace(model, lambda: model(tokens)))


def test_the_model_is_left_as_it_was(config):
    model = GPT(config).eval()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ZeroDivisionError):
        trace(model, lambda: 1 // 0)
    before = model(tokens)
    trace(model, lambda: model(tokens))
    assert torch.equal(model(tokens), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_every_occasion_is_described_and_layers_alike_are_one_line(config):
    lines = list(describe(GPT(config), 2, 8))
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "training, tokens (2, 8):",
        "reading a prompt, tokens (2, 8):",
        "writing on, tokens (2, 1):",
    ]
    assert sum("h.*.attn (2)" in line for line in lines) == 2 * 3  # two products and attention
    assert sum("h.*, ln_f" in line for line in lines) == 1  # a token's way through all of them is one call
