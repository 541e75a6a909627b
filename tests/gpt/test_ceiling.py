"""What a step computes, counted by hand, and its share of what the machine computes."""

import torch
from trilby.gpt import GPTConfig
from trilby.gpt.ceiling import Ceiling, measure_ceiling, training_flops


def test_a_step_counts_six_operations_per_parameter_and_token():
    model = GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=4, bias=False)
    matrices = 12 * 4 * 4 + 10 * 4  # one block's and the decoder's
    norms = 3 * 4
    attention = 3.5 * 4 * 3 * 2 * 8 * 8 * 2 / 2
    assert training_flops(model, batch_size=3) == 6 * (matrices + norms) * 3 * 8 + attention


def test_the_share_is_of_the_work_in_the_time():
    assert Ceiling(flops_per_token=50.0, rate=1000.0).share(tokens=8, seconds=2.0) == 0.2


def test_the_ceiling_is_measured_here():
    config = GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=4)
    ceiling = measure_ceiling(config, "bfloat16", torch.device("cpu"))
    assert ceiling.flops_per_token == training_flops(config, 3) / 24
    assert ceiling.rate > 1e8  # a processor that multiplies at all
