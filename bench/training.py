"""Trains the reference GPT twice from one seed, with PyTorch's layers and with trilby's, step by step in turns.

A third GPT from the same seed is trained in float64: it tells which of two loss curves that differ is nearer the truth.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trilby.gpt import (
    PYTORCH,
    TRILBY,
    CharTokenizer,
    GPTConfig,
    Split,
    Text,
    TrainConfig,
    default_text,
    split,
)
from trilby.gpt import Training as Trainer
from trilby.gpt.ceiling import training_flops
from trilby.gpt.config import Precision

from .machine import Ceilings
from .measure import quantiles
from .results import OURS, RIVAL, Error, Row, Training, Work

FLOAT64 = "float64"
# Steps whose time is not counted: the first ones also allocate the gradients and the optimizer's state.
WARM_UP = 2


@dataclass(frozen=True)
class Lesson:
    """What is trained, for how long, and in what: "bfloat16" is autocast."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    steps: int
    precisions: tuple[Precision, ...]

    @property
    def shape(self) -> str:
        """The sizes, as the table shows them."""
        return (
            f"{self.n_layer} layers {self.n_head}x{self.n_embd // self.n_head} B={self.batch_size} T={self.block_size}"
        )

    def model(self, vocab_size: int) -> GPTConfig:
        """The GPT's shape."""
        return GPTConfig(self.block_size, vocab_size, self.n_layer, self.n_head, self.n_embd)

    def config(self, precision: Precision) -> TrainConfig:
        """The first steps of a usual training: the warm-up is not shortened to fit.

        With a warm-up of 6 steps the loss leaps by 3 nats once, at another step for every rounding, float64 included;
        no two curves could be compared.
        """
        return TrainConfig(batch_size=self.batch_size, eval_interval=0, precision=precision)


# nanoGPT's model of Shakespeare's characters, with a batch that two processors take a quarter of a second for. Not
# under autocast: on a processor without tiles (AMX), PyTorch's step took three times as long in bfloat16.
LESSON = Lesson(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=2, steps=24, precisions=("float32",))
QUICK_LESSON = Lesson(
    n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=4, steps=12, precisions=("float32", "bfloat16")
)


def training_steps(lesson: Lesson) -> int:
    """How many times `train` calls `advance`."""
    return lesson.steps * (len(lesson.precisions) + 1)


def train(
    lesson: Lesson, ceilings: Ceilings, advance: Callable[[], None]
) -> tuple[tuple[Row, ...], tuple[Training, ...]]:
    """Train in each precision; a row of the table and a pair of loss curves for each."""
    text = default_text()
    tokenizer = CharTokenizer.from_text(text.content)
    tokens = split(tokenizer.encode(text.content))
    model = lesson.model(tokenizer.vocab_size)
    truth = _train_in_float64(lesson, model, tokens, advance)
    rows, trainings = [], []
    for precision in lesson.precisions:
        losses, seconds = _train_in_turns(lesson, model, precision, tokens, advance)
        rates = {name: lesson.batch_size * lesson.block_size / quantiles(each).p50 for name, each in seconds.items()}
        training = Training(precision, text.source, losses | {FLOAT64: truth}, rates)
        trainings.append(training)
        rows.append(_row(lesson, model, training, seconds, ceilings, text))
    return tuple(rows), tuple(trainings)


def _train_in_float64(
    lesson: Lesson, model: GPTConfig, tokens: Split, advance: Callable[[], None]
) -> tuple[float, ...]:
    trainer = Trainer.start(model, lesson.config("float32"), tokens, PYTORCH)
    trainer.model.double()  # in place, so the optimizer still holds the same parameters
    losses = []
    for _ in range(lesson.steps):
        losses.append(trainer.step().loss)
        advance()
    return tuple(losses)


def _train_in_turns(
    lesson: Lesson, model: GPTConfig, precision: Precision, tokens: Split, advance: Callable[[], None]
) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]:
    """The losses, and the seconds of each step after the first few, by contestant."""
    config = lesson.config(precision)
    sides = {RIVAL: PYTORCH, OURS: TRILBY}
    trainers = {name: Trainer.start(model, config, tokens, layers) for name, layers in sides.items()}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for _ in range(lesson.steps):
        for name, trainer in trainers.items():
            step = trainer.step()
            steps[name].append((step.loss, step.seconds))
        advance()
    losses = {name: tuple(loss for loss, _ in pairs) for name, pairs in steps.items()}
    seconds = {name: tuple(second for _, second in pairs[WARM_UP:]) for name, pairs in steps.items()}
    return losses, seconds


def _row(
    lesson: Lesson,
    model: GPTConfig,
    training: Training,
    seconds: dict[str, tuple[float, ...]],
    ceilings: Ceilings,
    text: Text,
) -> Row:
    by = {name: training.distance(name, FLOAT64) for name in (OURS, RIVAL)}
    return Row(
        "GPT training",
        lesson.shape,
        training.dtype,
        "step",
        f"the reference GPT on {text.source}",
        seconds,
        Work(training_flops(model, lesson.batch_size), "flop", ceilings.flops[training.dtype]),
        # Rounding alone may move a loss by as much as training magnifies it: the curves' agreement is the judge.
        (Error("loss", by, training.usual_change),),
    )
