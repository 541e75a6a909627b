"""The two commands: `python -m trilby.gpt train --text FILE` and `python -m trilby.gpt generate --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from trilby import kernels

from . import data
from .checkpoint import Checkpoint, save_checkpoint
from .config import PRESETS, GPTConfig, TrainConfig, parameter_count
from .generate import encode_prompt, stream_text
from .progress import progress
from .sampling import Sampling
from .tokenizers import NAMES, encode_documents, make_tokenizer
from .train import Training

CHECKPOINT = Path("checkpoint.safetensors")
# The tokenizer decides vocab_size; the command line has everything else that a configuration has.
MODEL_FIELDS = {name: kind for name, kind in get_type_hints(GPTConfig).items() if name != "vocab_size"}
TRAIN_FIELDS = get_type_hints(TrainConfig)


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` are, and return its exit status: 0, or 1 after one line that says why."""
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"trilby.gpt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrilby.gpt: stopped", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Every option of both commands; those of a configuration have its names and its defaults."""
    program = argparse.ArgumentParser(prog="python -m trilby.gpt", description="Train a GPT, and write with it.")
    commands = program.add_subparsers(required=True, metavar="train | generate")

    train = commands.add_parser("train", help="train a GPT on a text", allow_abbrev=False)
    train.set_defaults(command=train_command)
    train.add_argument("--text", metavar="FILE", help="default: $TRILBY_TEXT, tinyshakespeare or Python's manual")
    train.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE", help="default: %(default)s")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint, with its configuration")
    tokenizers = f"{', '.join(NAMES)}, or a SentencePiece model file; default: %(default)s"
    train.add_argument("--tokenizer", metavar="NAME", default="characters", help=tokenizers)
    train.add_argument("--vocab-size", type=int, metavar="N", help="how many tokens byte-pair learns from the text")
    train.add_argument("--preset", choices=list(PRESETS), default="character", help="default: %(default)s")
    _add_fields(train.add_argument_group("the model, where it differs from the preset"), MODEL_FIELDS, {})
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    _add_fields(train.add_argument_group("training"), TRAIN_FIELDS, defaults)

    generate = commands.add_parser("generate", help="write on from a prompt", allow_abbrev=False)
    generate.set_defaults(command=generate_command)
    generate.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE", help="default: %(default)s")
    generate.add_argument("--prompt", default="\n", metavar="TEXT", help="default: a new line")
    generate.add_argument("--max-new-tokens", type=int, default=500, metavar="N", help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: greedy; default: %(default)s")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that make up P only")
    generate.add_argument("--seed", type=int, default=1337, metavar="N", help="default: %(default)s")
    generate.add_argument("--device", default="cpu", help="default: %(default)s")
    return program


def train_command(options: argparse.Namespace) -> None:
    """Train, or go on training, and keep a checkpoint."""
    kernels.keep_memory()  # a program of its own may have the allocator keep what every step needs again
    text = data.default_text() if options.text is None else data.read_text(options.text)
    given = {name: getattr(options, name) for name in (*MODEL_FIELDS, *TRAIN_FIELDS)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.resume:
        tokenizer, training = _resume(options.checkpoint, text, given)
    else:
        tokenizer = make_tokenizer(options.tokenizer, [text.content], options.vocab_size)
        tokens = data.split(encode_documents(tokenizer, [text.content]))
        shape = {name: value for name, value in given.items() if name in MODEL_FIELDS}
        model = replace(PRESETS[options.preset], vocab_size=tokenizer.vocab_size, **shape)
        config = TrainConfig(**{name: value for name, value in given.items() if name in TRAIN_FIELDS})
        training = Training.start(model, config, tokens)
    print(f"text: {text.source}, {sum(map(len, training.tokens[:2])):,} tokens of {tokenizer.vocab_size:,} kinds")
    print(f"model: {parameter_count(training.model.config):,} parameters", flush=True)
    with progress(training.config.max_steps, training.steps_done) as on_step:
        training.run(on_step, save=lambda training: save_checkpoint(options.checkpoint, training, tokenizer))
    print(f"checkpoint: {options.checkpoint}, after step {training.steps_done}")


def generate_command(options: argparse.Namespace) -> None:
    """Print the prompt and what the model writes after it, as it writes it."""
    if options.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 0")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    checkpoint = Checkpoint.open(options.checkpoint)
    tokenizer = checkpoint.make_tokenizer()
    prompt = encode_prompt(tokenizer, options.prompt)
    model = checkpoint.make_model(device=options.device)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(options.seed)
    print(options.prompt, end="", flush=True)
    for piece in stream_text(model, tokenizer, prompt.to(device), options.max_new_tokens, sampling, generator):
        print(piece, end="", flush=True)
    print()


def _resume(path: Path, text: data.Text, given: dict[str, Any]) -> tuple[Any, Training]:
    """The training in the checkpoint at `path`; of the configuration only max_steps may be given anew."""
    if others := sorted(given.keys() - {"max_steps"}):
        raise ValueError(f"--resume goes on as the checkpoint says; {', '.join(others)} cannot change, only max_steps")
    checkpoint = Checkpoint.open(path)
    tokenizer = checkpoint.make_tokenizer()
    tokens = data.split(encode_documents(tokenizer, [text.content]))
    training = checkpoint.resume(tokens)
    training.config = replace(training.config, **given)
    return tokenizer, training


def _add_fields(group: argparse._ArgumentGroup, kinds: dict[str, Any], defaults: dict[str, Any]) -> None:
    """An option for every field, None where it is not given."""
    for name, kind in kinds.items():
        flag = "--" + name.replace("_", "-")
        note = f"default: {defaults[name]}" if name in defaults else None
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=note)
        elif choices := get_args(kind):
            group.add_argument(flag, choices=choices, default=None, help=note)
        else:
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            group.add_argument(flag, type=kind, default=None, metavar=metavar, help=note)


if __name__ == "__main__":
    sys.exit(main())
