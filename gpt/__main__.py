"""The commands: `python -m trilby.gpt train --text FILE`, `… generate --prompt TEXT`, and others."""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
from trilby import kernels

from . import explain, trace
from .ceiling import measure_ceiling
from .checkpoint import Checkpoint
from .config import PRESETS, GPTConfig, TrainConfig, parameter_count
from .display import show
from .generate import encode_prompt, generate_texts, stream_text
from .model import GPT
from .pretrained import load_pretrained, pretrained_tokenizer, save_pretrained
from .progress import byte_progress, progress
from .run import Run
from .sampling import Sampling
from .settings import Settings, make_settings
from .sizes import lines_of, presets_table
from .tokenizers import NAMES, Tokenizer, decode
from .train import Step, check_device
from .weights import Weights, hold

RUN = Path("run")
# The tokenizer decides vocab_size; the command line has everything else that a configuration has.
MODEL_FIELDS = {name: kind for name, kind in get_type_hints(GPTConfig).items() if name != "vocab_size"}
TRAIN_FIELDS = get_type_hints(TrainConfig)
DATA_FIELDS = ("text", "tokenizer", "vocab_size")


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


class Parser(argparse.ArgumentParser):
    """A parser that answers an option that there is not with the one that is nearest."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and `message`, and exit with 2."""
        known = [option for action in self._every_action() for option in action.option_strings]
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized") and unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)

    def _every_action(self) -> list[argparse.Action]:
        """Its own actions, and those of its commands."""
        commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [
            *self._actions,
            *(inner for each in commands for one in each.choices.values() for inner in one._actions),
        ]


def parser() -> argparse.ArgumentParser:
    """Every option of every command; those of a configuration have its names and its defaults."""
    program = Parser(prog="python -m trilby.gpt", description="Train a GPT, write with it, and see inside.")
    commands = program.add_subparsers(required=True, metavar="train | presets | generate | explain | trace | export")

    train = commands.add_parser("train", help="train a GPT on a text", allow_abbrev=False)
    train.set_defaults(command=train_command)
    train.add_argument("--run", type=Path, default=RUN, metavar="FOLDER", help="what it leaves; default: %(default)s")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint, with its configuration")
    train.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML, as config.toml in a run; flags come before it"
    )
    train.add_argument("--sample-tokens", type=int, default=200, metavar="N", help="to write at every checkpoint")
    texts = "a document each; default: $TRILBY_TEXT, tinyshakespeare or Python's manual"
    train.add_argument("--text", nargs="+", metavar="FILE", help=texts)
    tokenizers = f"{', '.join(NAMES)}, or a SentencePiece model file; default: characters"
    train.add_argument("--tokenizer", metavar="NAME", help=tokenizers)
    train.add_argument("--vocab-size", type=int, metavar="N", help="how many tokens byte-pair learns from the text")
    train.add_argument("--preset", choices=list(PRESETS), help=f"default: {Settings.preset}")
    _add_fields(train.add_argument_group("the model, where it differs from the preset"), MODEL_FIELDS, {})
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    _add_fields(train.add_argument_group("training"), TRAIN_FIELDS, defaults)

    presets = commands.add_parser("presets", help="the published sizes, and what memory they take")
    presets.set_defaults(command=presets_command)

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
    weights = "how weights are held: fewer bytes are read sooner, and are less exact; default: %(default)s"
    generate.add_argument("--weights", choices=get_args(Weights), default="float32", help=weights)
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
    """Train, or go on training, and keep everything in the folder of the run."""
    kernels.keep_memory()  # a program of its own may have the allocator keep what every step needs again
    if options.sample_tokens < 0:
        raise ValueError(f"sample_tokens is {options.sample_tokens}; it must be at least 0")
    run, flags = Run(options.run), _flags(options)
    with byte_progress("tokenizing") as on_bytes:
        if options.resume:
            changes = {name: value for table in flags.values() for name, value in table.items()}
            tokenizer, training = run.resume(changes, on_bytes)
        else:
            tokenizer, training = run.start(make_settings(options.config, flags), on_bytes)
    tokens, config, model = training.tokens, training.config, training.model.config
    print(f"text: {len(tokens.train) + len(tokens.validation):,} tokens of {tokenizer.vocab_size:,} kinds")
    print(f"model: {parameter_count(model):,} parameters", flush=True)
    ceiling = measure_ceiling(model, config.precision, check_device(config.device))
    with (
        run.recording(training, tokenizer, options.sample_tokens) as (record, save),
        progress(config.max_steps, training.steps_done, ceiling) as report,
    ):

        def on_step(step: Step) -> None:
            record(step)
            report(step)

        training.run(on_step, save)
    print(f"checkpoint: {run.checkpoint}, after step {training.steps_done}")


def presets_command(options: argparse.Namespace) -> None:
    """Print the published sizes."""
    print("\n".join(lines_of(presets_table())))


def generate_command(options: argparse.Namespace) -> None:
    """Print the prompt and what the model writes after it, as it writes it; of several prompts, one after another."""
    if options.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 0")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    model, tokenizer = _load_model(options)
    model = hold(model, options.weights)
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
    checkpoint = Run(RUN).checkpoint
    command.add_argument("--checkpoint", type=Path, default=checkpoint, metavar="FILE", help="default: %(default)s")
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


def _flags(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options that were given, by the table of a configuration file that they belong to."""
    tables = {"": ("preset",), "data": DATA_FIELDS, "model": MODEL_FIELDS, "train": TRAIN_FIELDS}
    return {
        table: {name: value for name in names if (value := getattr(options, name)) is not None}
        for table, names in tables.items()
    }


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
