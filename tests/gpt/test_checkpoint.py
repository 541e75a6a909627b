"""Checkpoints: training goes on bit for bit, a kill at any moment costs nothing, a hostile file does nothing."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trilby.gpt import PYTORCH, TRILBY, Checkpoint, CheckpointError, TrainConfig, Training, save_checkpoint
from trilby.gpt.data import TokenFile, write_token_file

SHORT = TrainConfig(batch_size=4, max_steps=20, warmup_steps=5, eval_interval=0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoint.safetensors"


@pytest.fixture
def saved(path, config, tokens, tokenizer):
    """A checkpoint after three steps."""
    training = Training.start(config, SHORT, tokens)
    for _ in range(3):
        training.step()
    save_checkpoint(path, training, tokenizer)
    return path


@pytest.mark.parametrize("sampler", ["random", "contiguous"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
@pytest.mark.parametrize("steps", [0, 10])
def test_twenty_steps_are_some_a_checkpoint_and_the_rest(
    path, config, tokens, tokenizer, steps, layers, dropout, sampler
):
    model, settings = dataclasses.replace(config, dropout=dropout), dataclasses.replace(SHORT, sampler=sampler)
    uninterrupted = Training.start(model, settings, tokens, layers)
    losses = uninterrupted.run().losses

    interrupted = Training.start(model, settings, tokens, layers)
    for _ in range(steps):
        interrupted.step()
    save_checkpoint(path, interrupted, tokenizer)
    resumed = Checkpoint.open(path).resume(tokens, layers)
    assert resumed.steps_done == steps
    assert resumed.run().losses == losses[steps:]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), uninterrupted.model.parameters()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("sampler", ["random", "contiguous", "packed", "padded"])
def test_it_goes_on_bit_for_bit_with_a_token_file_and_accumulated_batches(path, config, text, tokenizer, sampler):
    files = [path.parent / f"{number}.txt" for number in range(4)]
    path.parent.mkdir()
    for number, file in enumerate(files):
        file.write_text(text[number * 1000 : number * 1100 + 1000], encoding="utf-8")
    tokens = write_token_file(path.parent / "tokens", files, tokenizer).split()
    model = dataclasses.replace(config, dropout=0.1)
    settings = dataclasses.replace(SHORT, sampler=sampler, accumulation_steps=3, max_steps=8)
    interrupted = Training.start(model, settings, tokens)
    for _ in range(4):
        interrupted.step()
    save_checkpoint(path, interrupted, tokenizer)
    losses = interrupted.run().losses
    again = TokenFile.open(path.parent / "tokens").split()
    assert Checkpoint.open(path).resume(again).run().losses == losses
    files[3].write_text("99")
    other = write_token_file(path.parent / "tokens", files, tokenizer).split()
    with pytest.raises(CheckpointError, match="another text"):
        Checkpoint.open(path).resume(other)


def test_it_goes_on_bit_for_bit_where_every_kernel_is_trilbys(path, wide, tokens, tokenizer):
    model, settings = dataclasses.replace(wide, dropout=0.1), dataclasses.replace(SHORT, batch_size=8, max_steps=6)
    interrupted = Training.start(model, settings, tokens)
    for _ in range(3):
        interrupted.step()
    save_checkpoint(path, interrupted, tokenizer)
    assert Checkpoint.open(path).resume(tokens).run().losses == interrupted.run().losses


def test_a_checkpoint_knows_what_it_is(saved, config, tokenizer):
    checkpoint = Checkpoint.open(saved)
    assert (checkpoint.model, checkpoint.train, checkpoint.steps_done) == (config, SHORT, 3)
    assert checkpoint.make_tokenizer() == tokenizer


def test_its_model_is_ready_to_generate(saved, config, tokens):
    model = Checkpoint.open(saved).make_model()
    assert not model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    x = tokens.train[None, : config.block_size]
    resumed = Checkpoint.open(saved).resume(tokens).model.eval()
    assert torch.equal(model(x), resumed(x))


def test_another_text_is_refused(saved, tokens):
    with pytest.raises(CheckpointError, match="another text"):
        Checkpoint.open(saved).resume(tokens._replace(train=tokens.train[1:]))


def test_saving_leaves_nothing_else_behind(saved, config, tokens, tokenizer):
    save_checkpoint(saved, Training.start(config, SHORT, tokens), tokenizer)
    assert os.listdir(saved.parent) == [saved.name]
    assert Checkpoint.open(saved).steps_done == 0


def test_a_failure_while_saving_leaves_the_old_checkpoint(saved, config, tokens, tokenizer, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(saved, Training.start(config, SHORT, tokens), tokenizer)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


SAVE_FOR_EVER = """
import sys
from trilby.gpt import Checkpoint, CharTokenizer, save_checkpoint, split
checkpoint = Checkpoint.open(sys.argv[1])
tokenizer = checkpoint.make_tokenizer()
training = checkpoint.resume(split(tokenizer.encode(open(sys.argv[2], encoding="utf-8").read())))
print("ready", flush=True)
while True:
    save_checkpoint(sys.argv[1], training, tokenizer)
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(saved, text, tokens):
    file = saved.parent / "text.txt"
    file.write_text(text, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(saved), str(file)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        before = saved.stat().st_ino
        while saved.stat().st_ino == before:  # until it has been written again at least once
            pass
        process.send_signal(signal.SIGKILL)
    assert Checkpoint.open(saved).resume(tokens).step().number == 4


class TestHostileFiles:
    def test_a_file_that_is_not_there_is_the_systems_error(self, path):
        with pytest.raises(FileNotFoundError):
            Checkpoint.open(path)

    @pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{}"], ids=repr)
    def test_what_is_not_safetensors_is_refused(self, tmp_path, content):
        file = tmp_path / "file"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            Checkpoint.open(file)

    def test_a_pickle_is_refused_and_not_run(self, tmp_path):
        file, canary = tmp_path / "file", tmp_path / "canary"

        class Payload:
            def __reduce__(self):
                return (canary.write_text, ("executed",))

        file.write_bytes(pickle.dumps(Payload()))
        with pytest.raises(CheckpointError):
            Checkpoint.open(file)
        torch.save(Payload(), file)
        with pytest.raises(CheckpointError):
            Checkpoint.open(file)
        assert not canary.exists()

    def test_a_checkpoint_cut_short_anywhere_is_refused(self, saved):
        whole = saved.read_bytes()
        for length in range(0, len(whole), len(whole) // 23):
            saved.write_bytes(whole[:length])
            with pytest.raises(CheckpointError):
                Checkpoint.open(saved)

    @pytest.mark.parametrize("name", ["model.transformer.wpe.weight", "dropout", "batches"])
    def test_a_single_wrong_bit_in_the_numbers_is_noticed(self, saved, tokens, name):
        tensors = load_file(saved)
        place = saved.read_bytes().index(tensors[name].numpy().tobytes())
        damaged = bytearray(saved.read_bytes())
        damaged[place] ^= 1
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"damaged.*{name}"):
            Checkpoint.open(saved).resume(tokens)

    def test_safetensors_of_something_else_are_refused(self, tmp_path):
        save_file({"weight": torch.ones(2)}, tmp_path / "file")
        with pytest.raises(CheckpointError, match="not a checkpoint of trilby"):
            Checkpoint.open(tmp_path / "file")

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("format",), 99),
            (("steps_done",), -1),
            (("steps_done",), "3"),
            (("steps_done",), 0),
            (("model", "n_layer"), 3),
            (("model", "n_layer"), 10**12),
            (("model", "n_embd"), 2**40),
            (("model", "block_size"), 2**62),
            (("model", "n_embd"), "32"),
            (("model", "os"), "system"),
            (("model",), []),
            (("train", "sampler"), "contiguous"),
            (("train", "learning_rate"), float("nan")),
            (("tokenizer",), None),
            (("checksums",), 5),
        ],
        ids=str,
    )
    def test_a_header_that_does_not_describe_its_tensors_is_refused(self, saved, place, value):
        rewrite(saved, header=lambda header: set_at(header, place, value))
        with pytest.raises(CheckpointError):
            Checkpoint.open(saved)

    def test_a_header_too_deep_to_read_is_refused(self, saved):
        save_file(load_file(saved), saved, {"trilby": "[" * 100_000})
        with pytest.raises(CheckpointError, match="not a checkpoint of trilby"):
            Checkpoint.open(saved)

    @pytest.mark.parametrize("name", ["model.transformer.wpe.weight", "optimizer.step.transformer.wte.weight"])
    @pytest.mark.parametrize("change", ["missing", "transposed", "another dtype"])
    def test_a_tensor_that_does_not_belong_is_refused(self, saved, name, change):
        def tamper(tensors):
            tensor = tensors.pop(name)
            if change == "transposed":
                tensors[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[None].repeat(2, 1)
            elif change == "another dtype":
                tensors[name] = tensor.to(torch.float64)

        rewrite(saved, tensors=tamper)
        with pytest.raises(CheckpointError):
            Checkpoint.open(saved)

    def test_a_tensor_too_many_is_refused(self, saved):
        rewrite(saved, tensors=lambda tensors: tensors.update(extra=torch.ones(1)))
        with pytest.raises(CheckpointError, match="extra"):
            Checkpoint.open(saved)

    @pytest.mark.parametrize("name", ["dropout", "batches"])
    @pytest.mark.parametrize("broken", [torch.full((5056,), 255), torch.zeros(5)], ids=["of ones", "too short"])
    def test_a_broken_generator_is_refused(self, saved, tokens, name, broken):
        broken = broken.to(torch.uint8)
        rewrite(
            saved,
            header=lambda header: set_at(header, ("checksums", name), zlib.crc32(broken.numpy().data)),
            tensors=lambda tensors: tensors.update({name: broken}),
        )
        with pytest.raises(CheckpointError, match="broken generator"):
            Checkpoint.open(saved).resume(tokens)

    def test_a_tokenizer_that_is_none_is_refused(self, saved):
        rewrite(saved, header=lambda header: set_at(header, ("tokenizer", "kind"), "pickle"))
        with pytest.raises(ValueError, match="does not describe a tokenizer"):
            Checkpoint.open(saved).make_tokenizer()


def set_at(header, place, value):
    for key in place[:-1]:
        header = header[key]
    header[place[-1]] = value


def rewrite(path, header=lambda header: None, tensors=lambda tensors: None):
    """Write the checkpoint at `path` again after `header` and `tensors` have changed their parts of it."""
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["trilby"])
    loaded = load_file(path)
    header(values)
    tensors(loaded)
    save_file(loaded, path, {"trilby": json.dumps(values)})
