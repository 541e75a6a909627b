"""The commands: `python -m trilby.gpt train --text FILE`, `python -m trilby.gpt generate --prompt TEXT`, and others."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from trilby import kernels

from . import data, explain, trace
from .checkpoint import Checkpoint, save_checkpoint
from .config import PRESETS, GPTConfig, TrainConfig, parameter_count
from .display import show
from .generate import encode_prompt, generate_texts, stream_text
from .model import GPT
from .pretrained import load_pretrained, pretrained_tokenizer, save_pretrained
from .progress import progress
from .sampling import Sampling
from .tokenizers import NAMES, Tokenizer, decode, encode_documents, make_tokenizer
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
    """Every option of every command; those of a configuration have its names and its defaults."""
    program = argparse.ArgumentParser(
        prog="python -m trilby.gpt", description="Train a GPT, write with it, and see inside."
    )
    commands = program.add_subparsers(required=True, metavar="train | generate | explain | trace | export")

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
    _add_model(generate)
    prompt = "default: a new line; several are continued together"
    generate.add_argument("--prompt", action="append", metavar="TEXT", help=prompt)
    generate.add_argument("--max-new-tokens", type=int, default=500, metavar="N", help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: greedy; default: %(default)s")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that make up P only")
    generate.add_argument("--seed", type=int, default=1337, metavar="N", help="default: %(default)s")
    slide = "tokens by which a full context moves: 1 reads all it can, more is faster; default: %(default)s"
    generate.add_argument("--slide", type=int, default=1, metavar="N", help=slide)
    cache = "keep keys and values: the same tokens as without, and sooner; default: yes"
    generate.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True, help=cache)

    show = commands.add_parser("explain", help="show a model at work on a text, step by step", allow_abbrev=False)
    show.set_defaults(command=explain_command)
    _add_model(show)
    show.add_argument("--text", required=True, metavar="TEXT", help="what it reads")
    for name in ("layer", "head"):
        show.add_argument(f"--{name}", type=int, default=0, metavar="N", help="whose attention; default: %(default)s")

    tell = commands.add_parser("trace", help="tell which kernel serves which layer", allow_abbrev=False)
    tell.set_defaults(command=trace_command)
    tell.add_argument("--preset", choices=list(PRESETS), default="gpt2", help="default: %(default)s")
    tell.add_argument("--batch-size", type=int, default=1, metavar="N", help="default: %(default)s")
    tell.add_argument("--length", type=int, metavar="T", help="of the texts; default: the longest context")

    export = commands.add_parser("export", help="write a model as transformers reads it", allow_abbrev=False)
    export.set_defaults(command=export_command)
    _add_model(export)
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where")
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
    """Print the prompt and what the model writes after it, as it writes it; of several prompts, one after another."""
    if options.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 0")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    model, tokenizer = _load_model(options)
    prompts = options.prompt or ["\n"]
    device = next(model.parameters()).device
    texts = [encode_prompt(tokenizer, prompt)[0].to(device) for prompt in prompts]
    generator = torch.Generator(device).manual_seed(options.seed)
    how: dict[str, Any] = {"slide": options.slide, "use_cache": options.cache}
    if len(prompts) == 1:
        prompt = texts[0][None]
        pieces = stream_text(model, tokenizer, prompt, options.max_new_tokens, sampling, generator, **how)
        show(prompts[0], pieces)
        return
    continued = generate_texts(model, texts, options.max_new_tokens, sampling, generator, **how)
    for prompt, text, whole in zip(prompts, texts, continued):
        show(prompt, [decode(tokenizer, whole[len(text) :].tolist())])


def explain_command(options: argparse.Namespace) -> None:
    """Print what a model does with a text."""
    model, tokenizer = _load_model(options)
    tokens = encode_prompt(tokenizer, options.text)[0].to(next(model.parameters()).device)
    for line in explain.describe(model, tokenizer, tokens, options.layer, options.head):
        print(line)


def trace_command(options: argparse.Namespace) -> None:
    """Print which kernels serve a new model of a known size; of its blocks, which are all alike, the first two."""
    config = PRESETS[options.preset]
    for name, value, most in (("batch_size", options.batch_size, None), ("length", options.length, config.block_size)):
        if value is not None and not 1 <= value <= (most or value):
            raise ValueError(f"{name} is {value}; it must be at least 1" + (f" and at most {most}" if most else ""))
    model = GPT(replace(config, n_layer=min(config.n_layer, 2)))
    for line in trace.describe(model, options.batch_size, options.length or config.block_size - 1):
        print(line)


def export_command(options: argparse.Namespace) -> None:
    """Write a model into a folder."""
    model, _ = _load_model(options)
    save_pretrained(options.to, model)
    print(f"{options.to}: {parameter_count(model.config):,} parameters, for GPT2LMHeadModel.from_pretrained")


def _add_model(command: argparse.ArgumentParser) -> None:
    """The options that say which model, and how it is held."""
    command.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE", help="default: %(default)s")
    pretrained = "GPT-2 as transformers keeps it, instead of a checkpoint: a folder or a safetensors file"
    command.add_argument("--pretrained", type=Path, metavar="PATH", help=pretrained)
    command.add_argument("--device", default="cpu", help="default: %(default)s")


def _load_model(options: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    """The model that `options` name, and its tokenizer."""
    if options.pretrained is not None:
        model = load_pretrained(options.pretrained, device=options.device)
        return model, pretrained_tokenizer(model.config)
    checkpoint = Checkpoint.open(options.checkpoint)
    return checkpoint.make_model(device=options.device), checkpoint.make_tokenizer()


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
