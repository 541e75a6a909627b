"""Unchanged models in turns, with trilby in PyTorch's place and without: two rows and a pair of loss curves each."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from trilby.bench import models as bench_models
from trilby.bench.machine import Ceilings, Copy, Machine
from trilby.bench.models import MODELS, Model
from trilby.bench.one_line import QUICK_TRIAL, TRIAL, trial_steps, try_models
from trilby.bench.report import foot
from trilby.bench.results import OURS, RIVAL, Run
from trilby.gpt import GPTConfig
from trilby.kernels import explain

CEILINGS = Ceilings({"float32": 1e11, "bfloat16": 2e11}, (Copy(2**20, 5e10),))
CONFIG = GPTConfig(block_size=64, vocab_size=11, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture
def tried(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    monkeypatch.setenv("TRILBY_TEXT", str(text))
    monkeypatch.setattr(bench_models, "HUGGING_FACE", ())  # ten seconds of importing
    trial, steps = replace(QUICK_TRIAL, steps=4, calls=4), []
    rows, trainings = try_models(trial, CEILINGS, lambda: steps.append(1))
    assert len(steps) == trial_steps(trial)
    return rows, trainings


def test_every_model_is_trained_and_run(tried):
    rows, trainings = tried
    assert [(row.operation, row.direction) for row in rows] == [
        (model.name, direction) for model in MODELS for direction in ("step", "forward")
    ]
    for row in rows:
        assert len(row.seconds[OURS]) == len(row.seconds[RIVAL]) == 2
        assert set(row.peak_bytes) == ({RIVAL, OURS} if row.direction == "step" else set())
    assert [training.model for training in trainings] == [model.name for model in MODELS]
    assert all(training.agrees and len(training.losses[OURS]) == 4 for training in trainings)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_calls_pytorchs_functions_alone(model):
    net = model.make(CONFIG)
    found = explain(net, torch.zeros(2, 64, dtype=torch.int64))
    assert {call.operator.partition("::")[0] for call in found} == {"aten"}
    assert sum(call.function == scaled_dot_product_attention.__name__ for call in found) == CONFIG.n_layer


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_causal_model_sees_no_later_token_and_another_sees_all(model: Model):
    net, tokens = model.make(CONFIG).eval(), torch.zeros(1, 64, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 40] = 5
    with torch.no_grad():
        differs = (net(tokens) != net(changed)).any(-1)[0]
    assert differs[40]
    assert differs[:40].any() == (not model.is_causal)


def test_a_step_does_three_times_the_work_of_a_call():
    model = MODELS[0]
    net = model.make(CONFIG)
    forward, step = (model.flops(CONFIG, 2, net, direction) for direction in ("forward", "step"))
    assert 3 * forward < step < 3.5 * forward


def test_hugging_faces_model_is_tried_if_it_is_there(monkeypatch):
    assert TRIAL.shape == "3 layers 6x64 B=1 T=512"
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench_models.models() == MODELS


def test_the_foot_names_model_and_memory(tried):
    rows, trainings = tried
    machine = Machine("a processor", 2, 2, 2**34, 2**25, "Linux x86_64", 0.1, "AVX2", {}, {})
    lines = foot(Run("", machine, CEILINGS, rows, trainings, {}, 1.0))
    for model in MODELS:
        assert any(line.startswith(f"{model.name} in float32") and "agree" in line for line in lines)
    if all(row.peak_bytes.get(OURS) is not None for row in rows if row.direction == "step"):
        assert any(line.startswith("peak memory of a step") for line in lines)
