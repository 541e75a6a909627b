"""Sizes are those that the papers publish, and a configuration that exists is one that works."""

import dataclasses

import pytest
import torch
from trilby.gpt import GPT, PRESETS, GPTConfig, TrainConfig, parameter_count
from trilby.gpt.config import from_dict, to_dict

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_gpt2_has_the_parameters_of_its_published_weights(name, count):
    assert parameter_count(PRESETS[name]) == count


def test_gpt3_is_the_one_of_its_paper():
    gpt3 = PRESETS["gpt3"]
    assert (gpt3.block_size, gpt3.vocab_size, gpt3.n_layer) == (2048, 50257, 96)
    assert (gpt3.n_embd, gpt3.n_head, gpt3.n_embd // gpt3.n_head) == (12288, 96, 128)
    assert round(parameter_count(gpt3) / 1e9) == 175


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_what_the_model_has(name, bias):
    config = dataclasses.replace(PRESETS[name], bias=bias)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("n_layer", 0, ValueError),
        ("n_layer", 2.0, TypeError),
        ("n_layer", True, TypeError),
        ("n_head", 7, ValueError),
        ("dropout", 1.0, ValueError),
        ("dropout", float("nan"), ValueError),
        ("bias", 1, TypeError),
        ("vocab_size", "50257", TypeError),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=field):
        GPTConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("batch_size", 0, ValueError),
        ("learning_rate", -1.0, ValueError),
        ("learning_rate", float("inf"), ValueError),
        ("beta2", 1.0, ValueError),
        ("precision", "float16", ValueError),
        ("sampler", "shuffled", ValueError),
        ("seed", None, TypeError),
    ],
)
def test_a_training_that_cannot_be_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=field):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("config", [PRESETS["gpt2-xl"], TrainConfig(learning_rate=1, precision="bfloat16")])
def test_a_configuration_survives_being_written_down(config):
    assert from_dict(type(config), to_dict(config)) == config


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"'n_layers'; did you mean n_layer\?"):
        from_dict(GPTConfig, {"n_layers": 2})
