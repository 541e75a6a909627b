"""`python -m trilby.bench.curve`: one GPT learns characters with trilby's kernels and with PyTorch's, in turns.

The model, the batches and the settings are nanoGPT's for a laptop's CPU: 4 layers, 4 heads, 128 wide, T = 64, 12 rows,
2,000 steps. Both begin with the same weights and see the same batches, a step of one after a step of the other, so that
whatever else the machine does meets both alike. The picture is of validation losses over each one's own seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trilby.gpt import PRESETS, PYTORCH, TRILBY, CharTokenizer, Split, TrainConfig, Training, default_text, split
from trilby.gpt.plot import Curve, draw_losses
from trilby.gpt.train import evaluate, evaluate_all
from trilby.kernels import keep_memory

from .measure import quantiles
from .results import OURS, RIVAL

LAYERS = {RIVAL: PYTORCH, OURS: TRILBY}


def main(arguments: Sequence[str]) -> int:
    """Train both, say how they did, and draw it."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench.curve", description=__doc__)
    parser.add_argument("--steps", type=int, default=TrainConfig.max_steps, metavar="N", help="default: %(default)s")
    parser.add_argument("--picture", type=Path, default="build/curve.svg", metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    keep_memory()
    text = default_text()
    tokenizer = CharTokenizer.from_text(text.content)
    tokens = split(tokenizer.encode(text.content))
    config = TrainConfig(max_steps=options.steps)
    curves, whole, seconds = learn(
        config, tokenizer.vocab_size, tokens, lambda line: print(line, file=sys.stderr, flush=True)
    )
    faster = quantiles([rival / ours for rival, ours in zip(seconds[RIVAL], seconds[OURS])])
    print(f"{text.source}, {options.steps} steps of {config.batch_size} x {PRESETS['character'].block_size} characters")
    for name, curve in curves.items():
        loss = f"{curve.y[-1]:.3f} in {config.eval_batches} batches, {whole[name]:.3f} in the whole validation text"
        print(f"{name:8} validation loss {loss}, after {curve.x[-1]:.0f} seconds of training")
    total = sum(seconds[RIVAL]) / sum(seconds[OURS])
    print(f"{total:.2f} times as fast; a step's median {faster.p50:.2f}, from {faster.p20:.2f} to {faster.p80:.2f}")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw_losses(options.picture, list(curves.values()), "seconds of training")
    print(f"picture: {options.picture}")
    return 0


def learn(
    config: TrainConfig, vocab_size: int, tokens: Split, report: Callable[[str], None]
) -> tuple[dict[str, Curve], dict[str, float], dict[str, list[float]]]:
    """Train with each of `LAYERS` in turns.

    Returns:
        Validation losses over seconds of training; the last in the whole text; each step's seconds.
    """
    model = replace(PRESETS["character"], vocab_size=vocab_size)
    trainings = {name: Training.start(model, config, tokens, layers) for name, layers in LAYERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in LAYERS}
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYERS}
    for step in range(config.max_steps + 1):
        if step % config.eval_interval == 0 or step == config.max_steps:
            for name, training in trainings.items():
                loss = evaluate(training.model, tokens.validation, config)
                points[name].append((sum(seconds[name]), loss))
                report(f"step {step}: {name} {loss:.4f} after {points[name][-1][0]:.1f} s")
        if step < config.max_steps:
            for name, training in trainings.items():
                seconds[name].append(training.step().seconds)
    curves = {name: Curve(name, [x for x, _ in each], [y for _, y in each]) for name, each in points.items()}
    whole = {name: evaluate_all(each.model, tokens.validation, config) for name, each in trainings.items()}
    return curves, whole, seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
