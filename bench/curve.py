"""`python -m trilby.bench.curve`: one GPT learns characters with trilby's kernels and with PyTorch's, in turns.

The model, the batches and the steps are nanoGPT's for a laptop's CPU: 4 layers, 4 heads, 128 wide, T = 64, 12 rows,
2,000 steps; so are all settings but one, for both: the learning rate falls from 2e-3 to 0, not from 1e-3 to 1e-4. Both
begin with the same weights and see the same batches, a step of one after a step of the other, so that whatever else the
machine does meets both alike; on one thread only the processor's time for it is counted. The picture is of validation
losses over each one's own seconds of training; each is the mean of the whole validation text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from trilby.gpt import PRESETS, PYTORCH, TRILBY, CharTokenizer, Split, TrainConfig, Training, default_text, split
from trilby.gpt.plot import Curve, draw_losses
from trilby.gpt.train import evaluate_all
from trilby.kernels import keep_memory

from .measure import quantiles
from .results import OURS, RIVAL

LAYERS = {RIVAL: PYTORCH, OURS: TRILBY}


def main(arguments: Sequence[str]) -> int:
    """Train both, say how they did, and draw it."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench.curve", description=__doc__)
    parser.add_argument("--steps", type=int, default=TrainConfig.max_steps, metavar="N", help="default: %(default)s")
    parser.add_argument("--picture", type=Path, default="build/curve.svg", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    keep_memory()
    text = default_text()
    tokenizer = CharTokenizer.from_text(text.content)
    tokens = split(tokenizer.encode(text.content))
    config = TrainConfig(max_steps=options.steps, seed=options.seed)
    curves, seconds = learn(config, tokenizer.vocab_size, tokens, lambda line: print(line, file=sys.stderr, flush=True))
    faster = quantiles([rival / ours for rival, ours in zip(seconds[RIVAL], seconds[OURS])])
    size = f"{config.batch_size} x {PRESETS['character'].block_size} characters"
    rates = f"learning rate {config.learning_rate:g} to {config.min_learning_rate:g}"
    print(f"{text.source}, {options.steps} steps of {size}, {rates}, seed {options.seed}")
    for name, curve in curves.items():
        print(f"{name:8} validation loss {curve.y[-1]:.3f} after {curve.x[-1]:.0f} seconds of training")
    total = sum(seconds[RIVAL]) / sum(seconds[OURS])
    print(f"{total:.2f} times as fast; a step's median {faster.p50:.2f}, from {faster.p20:.2f} to {faster.p80:.2f}")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw_losses(options.picture, list(curves.values()), "seconds of training")
    print(f"picture: {options.picture}")
    return 0


def learn(
    config: TrainConfig, vocab_size: int, tokens: Split, report: Callable[[str], None]
) -> tuple[dict[str, Curve], dict[str, list[float]]]:
    """Train with each of `LAYERS` in turns.

    Returns:
        Validation losses over seconds of training; each step's seconds: of one thread the processor's.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    model = replace(PRESETS["character"], vocab_size=vocab_size)
    trainings = {name: Training.start(model, config, tokens, layers) for name, layers in LAYERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in LAYERS}
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYERS}
    for step in range(config.max_steps + 1):
        if step % config.eval_interval == 0 or step == config.max_steps:
            for name, training in trainings.items():
                loss = evaluate_all(training.model, tokens.validation, config)
                points[name].append((sum(seconds[name]), loss))
                report(f"step {step}: {name} {loss:.4f} after {points[name][-1][0]:.1f} s")
        if step < config.max_steps:
            for name, training in trainings.items():
                started = clock()
                training.step()
                seconds[name].append(clock() - started)
    curves = {name: Curve(name, [x for x, _ in each], [y for _, y in each]) for name, each in points.items()}
    return curves, seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
