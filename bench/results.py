"""What a run found: one `Row` per line of the table, and everything that the table and the JSON are made of."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .machine import Ceilings, Machine
from .measure import SELF_CHECK_BOUND, Quantiles, paired_ratios, quantiles

OURS = "trilby"
RIVAL = "PyTorch"
COMPILED = "PyTorch compiled"
RIVAL_AGAIN = "PyTorch again"


@dataclass(frozen=True)
class Error:
    """How far one result, an output or a gradient, is from the truth, for every contestant.

    Attributes:
        result: Which.
        by: The largest absolute difference from float64, by contestant.
        floor: What rounding a result of this size costs anyone.
    """

    result: str
    by: Mapping[str, float]
    floor: float

    @property
    def within_rule(self) -> bool:
        """Whether ours is at most twice the rival's, or what rounding alone costs."""
        return self.by[OURS] <= 2 * self.by[RIVAL] + self.floor

    @property
    def excess(self) -> float:
        """Ours as a multiple of the rival's; how results are ranked, worst first."""
        return self.by[OURS] / max(self.by[RIVAL], self.floor, 1e-300)


@dataclass(frozen=True)
class Work:
    """How much a call must do, and the most of it that this machine was seen to do in a second.

    Attributes:
        amount: Floating-point operations or bytes.
        unit: "flop" or "byte".
        ceiling: Of these per second.
    """

    amount: float
    unit: str
    ceiling: float

    def share(self, seconds: float) -> float:
        """How much of the ceiling a call that takes `seconds` reaches."""
        return self.amount / seconds / self.ceiling


@dataclass(frozen=True)
class Row:
    """One case, timed.

    Attributes:
        operation: What is computed.
        shape: On what.
        dtype: In what.
        direction: "forward", "forward+backward" or "step".
        why: What the case stands for.
        seconds: Per call, one number per round, by contestant.
        work: What a call must do.
        errors: Of every result, the worst for us first; none where a row is about time alone.
        peak_bytes: Memory that a call needs beyond its inputs, by contestant; None where the system cannot tell.
        absent: Contestants that this case is not for on this machine, and why.
        setting: What differs from the other rows, if anything.
        ours: The contestant that the ratio is about; in a self-check, PyTorch once more.
    """

    operation: str
    shape: str
    dtype: str
    direction: str
    why: str
    seconds: Mapping[str, tuple[float, ...]]
    work: Work
    errors: tuple[Error, ...] = ()
    peak_bytes: Mapping[str, int | None] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    setting: str = ""
    ours: str = OURS

    @property
    def is_self_check(self) -> bool:
        """Whether PyTorch ran against itself."""
        return self.ours == RIVAL_AGAIN

    @property
    def ratio(self) -> Quantiles:
        """The rival's time over ours, round by round; above 1 ours is faster."""
        return self.ratio_to(RIVAL)

    def ratio_to(self, contestant: str) -> Quantiles:
        """That contestant's time over ours, round by round."""
        return quantiles(paired_ratios(self.seconds[contestant], self.seconds[self.ours]))

    @property
    def is_slower(self) -> bool:
        """Whether we lose, as far as the table's two digits tell."""
        return not self.is_self_check and round(self.ratio.p50, 2) < 1

    def rate(self, contestant: str) -> Quantiles:
        """Of its work's units per second: the 20th percentile is of the slow rounds."""
        seconds = quantiles(self.seconds[contestant])
        return Quantiles(*(self.work.amount / each for each in (seconds.p80, seconds.p50, seconds.p20)))

    def share(self, contestant: str) -> float:
        """Of the ceiling, in the median round."""
        return self.work.share(quantiles(self.seconds[contestant]).p50)

    @property
    def is_exact(self) -> bool:
        """Whether every result keeps the error rule."""
        return all(error.within_rule for error in self.errors)


@dataclass(frozen=True)
class Training:
    """Two trainings from the same seed, and the same in float64.

    Attributes:
        dtype: In what the two were trained.
        text: Where the text is from.
        losses: Of every step, by contestant, and "float64" where that was trained, too.
        tokens_per_second: In the median step, by contestant.
        model: What was trained.
    """

    dtype: str
    text: str
    losses: Mapping[str, tuple[float, ...]]
    tokens_per_second: Mapping[str, float]
    model: str = "GPT"

    @property
    def largest_difference(self) -> float:
        """Between the two loss curves, in nats."""
        return self.distance(OURS, RIVAL)

    def distance(self, one: str, other: str) -> float:
        """The largest difference between two loss curves, in nats; infinite if a loss is a NaN."""
        differences = [abs(a - b) for a, b in zip(self.losses[one], self.losses[other])]
        return math.inf if any(map(math.isnan, differences)) else max(differences)

    @property
    def usual_change(self) -> float:
        """The median change of PyTorch's loss from one step to the next, in nats."""
        curve = self.losses[RIVAL]
        return quantiles([abs(a - b) for a, b in itertools.pairwise(curve)]).p50

    @property
    def agrees(self) -> bool:
        """Whether the curves differ by less than they move from one step to the next: no plot tells them apart."""
        return self.largest_difference < self.usual_change


@dataclass(frozen=True)
class Repeat:
    """One case, run again and again.

    Attributes:
        name: Operation, shape and dtype.
        repeats: How often.
        differing: How many runs returned other bits than the first.
    """

    name: str
    repeats: int
    differing: int


@dataclass(frozen=True)
class Run:
    """Everything that one `python -m trilby.bench` found."""

    command: str
    machine: Machine
    ceilings: Ceilings
    rows: tuple[Row, ...]
    trainings: tuple[Training, ...]
    settings: Mapping[str, object]
    seconds: float
    repeats: tuple[Repeat, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def self_checks(self) -> tuple[Row, ...]:
        """PyTorch against itself."""
        return tuple(row for row in self.rows if row.is_self_check)

    @property
    def comparisons(self) -> tuple[Row, ...]:
        """PyTorch against us."""
        return tuple(row for row in self.rows if not row.is_self_check)

    @property
    def is_noisy(self) -> bool:
        """Whether PyTorch against itself did not read 1."""
        return any(abs(row.ratio.p50 - 1) > SELF_CHECK_BOUND for row in self.self_checks)
