"""Training: a seed decides everything, trilby's kernels and PyTorch's learn the same, and the model learns."""

import dataclasses
import math

import pytest
import torch
from tolerance import assert_as_exact_as
from torch.nn import functional as F
from trilby.gpt import PYTORCH, TRILBY, GPTConfig, Split, TrainConfig, Training, evaluate, split, train
from trilby.gpt.data import Documents
from trilby.gpt.train import check_device, evaluate_all, learning_rate, make_optimizer

SHORT = TrainConfig(batch_size=4, max_steps=20, warmup_steps=5, eval_interval=10, eval_batches=2)


@pytest.mark.parametrize("sampler", ["random", "contiguous"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_the_same_seed_gives_the_same_bits(config, tokens, layers, dropout, sampler):
    model, settings = dataclasses.replace(config, dropout=dropout), dataclasses.replace(SHORT, sampler=sampler)
    first, second = (train(model, settings, tokens, layers) for _ in range(2))
    assert first.losses == second.losses
    assert first.validation_losses == second.validation_losses
    other = train(model, dataclasses.replace(settings, seed=1), tokens, layers)
    assert other.losses != first.losses


@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_the_same_seed_gives_the_same_bits_with_several_threads(wide, tokens, layers):
    wide = dataclasses.replace(wide, dropout=0.1)
    settings = dataclasses.replace(SHORT, batch_size=8, max_steps=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (train(wide, settings, tokens, layers) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert first.losses == second.losses


def test_two_trainings_that_take_turns_go_as_each_would_alone(config, tokens):
    model = dataclasses.replace(config, dropout=0.1)
    alone = train(model, SHORT, tokens).losses
    one, other = (Training.start(model, SHORT, tokens, layers) for layers in (TRILBY, PYTORCH))
    together = []
    for _ in range(SHORT.max_steps):
        together.append(one.step().loss)
        other.step()
    assert together == alone


def test_pytorchs_global_generator_is_left_as_it_was(config, tokens):
    before = torch.get_rng_state()
    train(dataclasses.replace(config, dropout=0.1), SHORT, tokens)
    assert torch.equal(torch.get_rng_state(), before)


def loss_curve(config, settings, tokens, layers, dtype=torch.float32):
    """Twenty steps from the same weights on the same batches, in float32 or exactly: in float64."""
    training = Training.start(config, settings, tokens, layers)
    training.model.to(dtype)
    return torch.tensor(training.run().losses, dtype=dtype)


def test_trilbys_curve_is_as_near_the_exact_one_as_pytorchs(wide, tokens):
    settings = dataclasses.replace(SHORT, batch_size=8, eval_interval=0)
    exact = loss_curve(wide, settings, tokens, PYTORCH, torch.float64)
    assert exact[-1] < exact[0] - 0.3, "twenty steps should teach it something"
    ours, rival = (loss_curve(wide, settings, tokens, layers) for layers in (TRILBY, PYTORCH))
    assert_as_exact_as(ours, rival, exact, "loss curve")


MUTANTS = {
    "sees the future": {"attention": lambda *heads, is_causal, **options: PYTORCH.attention(*heads, **options)},
    "another scale": {"attention": lambda query, *rest, **options: PYTORCH.attention(query * 0.5, *rest, **options)},
    "another eps": {"layer_norm": lambda x, shape, weight, bias, eps: PYTORCH.layer_norm(x, shape, weight, bias, 2e-5)},
    "forgets to add": {
        "add_layer_norm": lambda stream, branch, *rest: PYTORCH.add_layer_norm(stream, 0 * branch, *rest)
    },
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_layer_bends_the_curve(config, tokens, mutant):
    settings = dataclasses.replace(SHORT, eval_interval=0)
    wrong = dataclasses.replace(PYTORCH, **MUTANTS[mutant])
    exact = loss_curve(config, settings, tokens, PYTORCH, torch.float64)
    ours, rival = (loss_curve(config, settings, tokens, layers) for layers in (wrong, PYTORCH))
    with pytest.raises(AssertionError, match="loss curve: error"):
        assert_as_exact_as(ours, rival, exact, "loss curve")


def test_it_learns_a_text_by_heart():
    tokens = torch.arange(5).repeat(100)
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=16)
    settings = TrainConfig(batch_size=8, max_steps=100, learning_rate=1e-2, warmup_steps=10, eval_interval=100)
    result = train(config, settings, split(tokens))
    assert result.losses[0] == pytest.approx(math.log(5), abs=0.1)
    assert result.validation_losses[100] < 0.05


def test_a_step_says_what_it_did(config, tokens):
    steps = []
    result = Training.start(config, SHORT, tokens).run(on_step=steps.append)
    assert [step.number for step in steps] == list(range(1, 21))
    assert [step.loss for step in steps] == result.losses
    assert [step.seconds for step in steps] == result.seconds
    assert {step.tokens for step in steps} == {4 * 16}
    assert [step.number for step in steps if step.validation_loss is not None] == [10, 20]
    assert [step.learning_rate for step in steps] == [learning_rate(step, SHORT) for step in range(20)]


def test_it_saves_at_every_interval_and_at_the_end(config, tokens):
    saved = []
    settings = dataclasses.replace(SHORT, save_interval=8)
    Training.start(config, settings, tokens).run(save=lambda training: saved.append(training.steps_done))
    assert saved == [8, 16, 20]


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    config = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2)
    assert [learning_rate(step, config) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate(60, config) == pytest.approx(0.6)
    assert learning_rate(110, config) == pytest.approx(0.2)
    assert learning_rate(1000, config) == pytest.approx(0.2)
    falling = [learning_rate(step, config) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_only_matrices_decay(config, tokens):
    training = Training.start(config, SHORT, tokens)
    decay = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(training.model, SHORT).param_groups
        for parameter in group["params"]
    }
    for name, parameter in training.model.named_parameters():
        matrix = name.endswith("weight") and ".ln_" not in name
        assert decay.pop(id(parameter)) == (SHORT.weight_decay if matrix else 0.0), name
    assert not decay


@pytest.mark.parametrize("grad_clip", [0.0, 1e-3])
def test_the_gradient_is_clipped_as_a_whole(config, tokens, grad_clip, monkeypatch):
    training = Training.start(config, dataclasses.replace(SHORT, grad_clip=grad_clip), tokens)
    norms = []

    def record() -> None:
        norms.append(torch.cat([p.grad.flatten() for p in training.model.parameters()]).norm().item())

    monkeypatch.setattr(training.optimizer, "step", record)
    training.step()
    if grad_clip:
        assert norms == [pytest.approx(grad_clip, rel=1e-3)]
    else:
        assert norms[0] > 0.1


@pytest.mark.parametrize("sampler", ["contiguous", "padded"])
def test_accumulated_batches_make_the_step_of_one_large_batch(config, tokenizer, sampler):
    lengths = (5, 17, 9, 2, 12, 16, 3, 14)  # padded, each of the batches has another number of targets
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    tokens = split(torch.randint(config.vocab_size, (sum(lengths),)).repeat(2), Documents(starts, marked=False))
    gradients = {}
    for name, (batch_size, accumulation_steps), layers, dtype in (
        ("ours", (2, 3), TRILBY, torch.float32),
        ("rival", (6, 1), PYTORCH, torch.float32),
        ("truth", (6, 1), PYTORCH, torch.float64),
    ):
        settings = dataclasses.replace(
            SHORT, batch_size=batch_size, accumulation_steps=accumulation_steps, sampler=sampler, eval_interval=0
        )
        training = Training.start(config, dataclasses.replace(settings, grad_clip=0.0), tokens, layers)
        training.model.to(dtype)
        gradients[name] = {}
        training.optimizer.step = lambda training=training, name=name: gradients[name].update(
            {key: p.grad.clone() for key, p in training.model.named_parameters()}
        )
        gradients[name]["loss"] = torch.tensor(training.step().loss, dtype=dtype)
    for key, truth in gradients["truth"].items():
        assert_as_exact_as(gradients["ours"][key], gradients["rival"][key], truth, key)


def test_evaluation_has_no_dropout_and_draws_nothing(config, tokens):
    training = Training.start(dataclasses.replace(config, dropout=0.5), SHORT, tokens)
    first, second = (evaluate(training.model, tokens.validation, SHORT) for _ in range(2))
    assert first == second


def test_all_of_a_text_is_each_whole_chunk_once(config, tokens):
    training, T = Training.start(config, SHORT, tokens), config.block_size
    text = torch.as_tensor(tokens.validation[: 7 * T + 3])  # chunks in batches of 4 and 3, and a rest
    x, y = text[: 7 * T].view(7, T), text[1 : 7 * T + 1].view(7, T)
    mean = torch.tensor(evaluate_all(training.model, text, SHORT))
    with torch.no_grad():
        rival = F.cross_entropy(training.model(x).flatten(0, 1), y.flatten())
        truth = F.cross_entropy(training.model.double()(x).flatten(0, 1), y.flatten())
    assert_as_exact_as(mean, rival, truth, "mean loss")


def test_evaluating_more_often_does_not_change_the_training(config, tokens):
    model = dataclasses.replace(config, dropout=0.1)
    often, never = (dataclasses.replace(SHORT, eval_interval=interval) for interval in (1, 0))
    assert train(model, often, tokens).losses == train(model, never, tokens).losses


@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_bfloat16_learns_as_float32_does(config, tokens, layers):
    full = train(config, SHORT, tokens, layers).losses
    half = train(config, dataclasses.replace(SHORT, precision="bfloat16"), tokens, layers).losses
    assert half != full
    # bfloat16 keeps 8 bits: every step's gradient is off by up to 2^-8 of itself, and so is the way that it has come.
    fallen = full[0] - min(full)
    assert max(abs(a - b) for a, b in zip(half, full)) < 2**-8 * (full[0] + len(full) * fallen)


def test_a_text_that_cannot_be_trained_on_is_refused_before_the_first_step(config, tokens):
    with pytest.raises(ValueError, match=f"the id {int(tokens.train.max())}; vocab_size is 5"):
        Training.start(dataclasses.replace(config, vocab_size=5), SHORT, tokens)
    with pytest.raises(ValueError, match="at least 17"):
        Training.start(config, SHORT, Split(tokens.train, tokens.validation[:16]))
    with pytest.raises(ValueError, match="at least 17"):
        Training.start(config, SHORT, split(tokens.train[:16]))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"device is 'cuda:99'; this machine has cpu"):
        check_device("cuda:99")
