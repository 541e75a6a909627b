"""`generate`, `explain`, `trace` and `export`, on a checkpoint and on published weights."""

import pytest
import torch
from trilby.gpt import GPT, CharTokenizer, GPTConfig, TrainConfig, Training, save_checkpoint, split
from trilby.gpt.__main__ import main

TEXT = "shall I compare thee to a summer day? " * 20


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = CharTokenizer.from_text(TEXT)
    model = GPTConfig(block_size=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)
    config = TrainConfig(batch_size=2, max_steps=1, eval_interval=0)
    save_checkpoint(tmp_path / "model", Training.start(model, config, split(tokenizer.encode(TEXT))), tokenizer)
    return str(tmp_path / "model")


def said(capsys, *arguments):
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [[], ["--temperature", "0"], ["--top-k", "3"], ["--top-p", "0.5"], ["--slide", "4"], ["--weights", "int8"]],
    ids=str,
)
def test_a_cache_changes_no_text(checkpoint, capsys, flags):
    common = ["generate", "--checkpoint", checkpoint, "--prompt", "shall ", "--max-new-tokens", "20", *flags]
    text = said(capsys, *common)
    assert text.startswith("shall ")
    assert len(text) == len("shall ") + 20 + len("\n")
    assert said(capsys, *common, "--no-cache") == text
    assert said(capsys, *common, "--seed", "1337") == text


def test_another_seed_is_another_text(checkpoint, capsys):
    common = ["generate", "--checkpoint", checkpoint, "--prompt", "shall ", "--max-new-tokens", "40"]
    assert said(capsys, *common, "--seed", "1") != said(capsys, *common, "--seed", "2")


def test_several_prompts_go_on_as_each_alone(checkpoint, capsys):
    common = ["generate", "--checkpoint", checkpoint, "--max-new-tokens", "6", "--temperature", "0"]
    alone = [said(capsys, *common, "--prompt", prompt) for prompt in ("shall ", "I")]
    assert said(capsys, *common, "--prompt", "shall ", "--prompt", "I") == "".join(alone)


def test_explain_and_trace_print(checkpoint, capsys):
    assert "The loss is their mean" in said(capsys, "explain", "--checkpoint", checkpoint, "--text", "shall I")
    assert "writing on, tokens (1, 1):" in said(capsys, "trace", "--preset", "character")


def test_export_writes_what_is_read_back(checkpoint, capsys, tmp_path):
    assert "parameters" in said(capsys, "export", "--checkpoint", checkpoint, "--to", str(tmp_path / "folder"))
    assert main(["generate", "--pretrained", str(tmp_path / "folder")]) == 1
    assert "of GPT-2's vocabulary there are 50257" in capsys.readouterr().err


def test_published_weights_generate(capsys, tmp_path):
    pytest.importorskip("tiktoken")
    torch.manual_seed(0)
    from trilby.gpt import save_pretrained

    save_pretrained(tmp_path, GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)))
    common = ["generate", "--pretrained", str(tmp_path), "--prompt", "Hi", "--max-new-tokens", "4"]
    text = said(capsys, *common)
    assert text.startswith("Hi")
    assert said(capsys, *common) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "s", "--slide", "0"], "slide is 0; it must be at least 1 and at most block_size, 8"),
        (["explain", "--text", "s"], "text has 1 tokens; it must have at least 2 and at most 9"),
        (["explain", "--text", "shall", "--head", "2"], "head is 2; the model has 0 to 1"),
    ],
)
def test_what_goes_wrong_is_one_line_that_says_what(checkpoint, capsys, arguments, message):
    command, *rest = arguments
    assert main([command, "--checkpoint", checkpoint, *rest]) == 1
    assert capsys.readouterr().err == f"trilby.gpt: {message}\n"


def test_a_trace_of_no_tokens_is_refused(capsys):
    assert main(["trace", "--length", "0"]) == 1
    assert "length is 0; it must be at least 1 and at most 1024" in capsys.readouterr().err
