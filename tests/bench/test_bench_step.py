"""Whole training steps in turns: who is asked for takes part, and operators are told apart by their names."""

import pytest
from trilby.bench.learner import COMPILED, HUGGING_FACE, Learner, Lesson, Told, make_step, part_of
from trilby.bench.models import has_transformers
from trilby.bench.results import OURS, RIVAL
from trilby.bench.step import LESSONS, Outcome, main

SMALL = ["--size", "character", "--length", "16", "--batch-size", "2", "--steps", "1"]


def test_lines_of_time_and_shares_for_each_that_is_asked_for_and_a_table(capsys):
    assert main([*SMALL, "--dropout", "0.1", "--shares", "--only", OURS, RIVAL]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("B=2 T=16 dropout 0.1 float32")
    assert [line.split(":")[0] for line in lines[:4]] == [OURS, RIVAL] * 2
    for line in lines[:2]:
        assert "tokens/s" in line
    for line in lines[2:4]:
        shares = [int(part.split()[-1].rstrip("%")) for part in line.split(": ")[1].split(", ")]
        assert shares == sorted(shares, reverse=True)
        assert abs(sum(shares) - 100) <= len(shares)  # of rounding
    assert lines[-1].startswith("| B=2 T=16 dropout 0.1 float32 | ")


@pytest.mark.parametrize("contestant", [OURS, RIVAL, *[HUGGING_FACE] * has_transformers()])
def test_each_contestant_takes_a_step(contestant):
    make_step(contestant, Lesson(2, 16, 0.1, "bfloat16", "character"))()


@pytest.mark.slow  # for the compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at a block's inputs
def test_compiled_blocks_take_a_step():
    make_step(COMPILED, Lesson(2, 16, 0.0, "float32", "character"))()


def test_a_process_that_fails_is_an_error_here(capfd):
    too_long = Lesson(2, 65, 0.0, "float32", "character")
    with Learner(Told(OURS, too_long, 1, False)) as learner, pytest.raises(RuntimeError, match="ended with 1, at step"):
        learner.step()
    assert "T at most 64" in capfd.readouterr().err


def test_the_rival_in_the_table_is_the_fastest_and_the_memory_is_compared_with_the_least():
    seconds = {OURS: [1.0, 2.0], RIVAL: [3.0, 6.0], COMPILED: [1.5, 3.0]}
    outcome = Outcome(LESSONS[0], seconds, {OURS: 6, RIVAL: 8, COMPILED: None})
    row = [cell.strip() for cell in outcome.row().split("|")[1:-1]]
    assert row[3:] == [COMPILED, "1.50", "25% less"]


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
