"""Whole training steps in turns: who is asked for takes part, and operators are told apart by their names."""

import pytest
from trilby.bench.models import has_transformers
from trilby.bench.results import OURS, RIVAL
from trilby.bench.step import HUGGING_FACE, main, part_of

SMALL = ["--size", "character", "--length", "16", "--batch-size", "2", "--steps", "1"]


def test_a_line_of_time_and_one_of_shares_for_each_that_is_asked_for(capsys):
    asked = [OURS, RIVAL, *[HUGGING_FACE] * has_transformers()]
    assert main([*SMALL, "--dropout", "0.1", "--only", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == asked * 2
    for line in lines[: len(asked)]:
        assert "tokens/s" in line
    for line in lines[len(asked) :]:
        shares = [int(part.split()[-1].rstrip("%")) for part in line.split(": ")[1].split(", ")]
        assert shares == sorted(shares, reverse=True)
        assert abs(sum(shares) - 100) <= len(shares)  # of rounding


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("aten::addmm", "matrix products"),
        ("MmBackward0", "matrix products"),
        ("attention", "attention"),
        ("attentionBackward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("add_norm", "norms"),
        ("aten::native_layer_norm_backward", "norms"),
        ("geluBackward", "GELU"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_foreach_norm", "optimizer"),
        ("aten::copy_", "casts and copies"),
        ("aten::nll_loss_backward", "loss"),
        ("aten::add", "the rest"),
    ],
)
def test_what_an_operator_belongs_to(operator, part):
    assert part_of(operator) == part
