"""What was found in the machine code of a subject: one `Finding` for each line of the report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from trilby.kernels.gpu.assembly import Program
from trilby.kernels.gpu.targets import Target
from triton import CompilationError

from .bound import PIPES, TENSOR, Bound, Loop, bound, pipe_of
from .compiling import PROCESSORS, Launch, compiling_for
from .multiprocessor import MULTIPROCESSORS, RATES, resident_programs
from .subjects import PRODUCTS, ROWS, Subject
from .traffic import Traffic, traffic


@dataclass(frozen=True)
class LoopFinding:
    """One iteration of an attention kernel's innermost loop.

    Attributes:
        scores: Of query and key that it computes; None where neither tile nor instructions tell.
        instructions: Of all threads, by pipe.
        bound: How fast it can run at best; None where no model is.
    """

    scores: float | None
    instructions: dict[str, int]
    bound: Bound | None

    @cached_property
    def per_score(self) -> dict[str, float]:
        """Instructions of a thread for each score, by pipe, the tensor cores' left out."""
        return {pipe: n / self.scores for pipe, n in self.instructions.items() if pipe != TENSOR and self.scores}

    @property
    def beside_tensor(self) -> float:
        """All of them: what the tensor cores' work costs around it."""
        return sum(self.per_score.values())


@dataclass(frozen=True)
class KernelFinding:
    """What became of one launch.

    Attributes:
        launch: What was compiled.
        resident_warps: On a multiprocessor at once.
        most_warps: That could be, of kernels without registers or memory.
        loops: Of attention, the innermost ones, in program order.
        traffic: Of norms.
    """

    launch: Launch
    resident_warps: int
    most_warps: int
    loops: tuple[LoopFinding, ...] = ()
    traffic: Traffic | None = None

    @cached_property
    def unmasked(self) -> tuple[LoopFinding, ...]:
        """Of the loops that multiply alike, the one with the fewest instructions a score: it masks nothing."""
        products = products_of(self.launch.kernel, len(self.loops))
        alike = [[loop for loop, own in zip(self.loops, products) if own == n] for n in dict.fromkeys(products)]
        return tuple(min(loops, key=lambda loop: loop.beside_tensor) for loops in alike)


@dataclass(frozen=True)
class Finding:
    """One subject on one target.

    Attributes:
        target: By name.
        subject: What was compiled.
        kernels: Of the best of the candidates that the subject's autotuner has, if it has one.
        candidates: How many there were.
        variants: Of norms: how many different kernels so many numbers of rows needed.
        failure: The compiler's last words, if it refuses.
    """

    target: str
    subject: Subject
    kernels: tuple[KernelFinding, ...] = ()
    candidates: int = 0
    variants: int = 0
    failure: str = ""

    @property
    def beside_tensor(self) -> float | None:
        """Instructions a score beside the tensor cores', in the loops that mask nothing of all kernels."""
        if not self.kernels or not all(kernel.loops for kernel in self.kernels):
            return None
        return sum(loop.beside_tensor for kernel in self.kernels for loop in kernel.unmasked)

    def programs(self, kernel: KernelFinding) -> int:
        """How many programs a norm of `ROWS[0]` rows has."""
        own = self.subject.programs
        return kernel.launch.programs if own is None else own(ROWS[0], PROCESSORS)

    def bytes_moved(self) -> int | None:
        """Of a norm over `ROWS[0]` rows, on as many multiprocessors as an H100 has."""
        if not self.kernels or any(kernel.traffic is None for kernel in self.kernels):
            return None
        return sum(
            kernel.traffic.total(ROWS[0], self.programs(kernel))
            for kernel in self.kernels
            if kernel.traffic is not None
        )


def examine(subjects: Sequence[Subject], target: Target) -> Iterator[Finding]:
    """Compile the subjects that are for a target, and read what became of them; what two launch alike, once."""
    compiled: dict[Callable[..., object], list[Launch] | str] = {}
    for subject in subjects:
        if subject.targets and target.name not in subject.targets:
            continue
        if subject.run not in compiled:
            compiled[subject.run] = _launches(subject, target)
        launches = compiled[subject.run]
        if isinstance(launches, str):
            yield Finding(target.name, subject, failure=launches)
        else:
            yield _finding(subject, target, [one for one in launches if one.kernel in subject.kernels])


def _launches(subject: Subject, target: Target) -> list[Launch] | str:
    """What it launches, or the compiler's last words."""
    try:
        with compiling_for(target) as launches:
            for rows in ROWS if subject.width else (None,):
                subject.run(*(() if rows is None else (rows,)))
    except CompilationError as error:
        return str(error).strip().splitlines()[-1]
    return launches


def _finding(subject: Subject, target: Target, launches: list[Launch]) -> Finding:
    if not launches:
        return Finding(target.name, subject, failure=f"launched none of {', '.join(subject.kernels)}")
    best = []
    for name in subject.kernels:
        candidates = [one for one in launches if one.kernel == name]
        if subject.width:  # they move the same; the one in the middle, of those that an autotuner has
            best.append(_kernel(candidates[len(candidates) // 2], subject, target))
        elif candidates:
            best.append(min((_kernel(one, subject, target) for one in candidates), key=_rank))
    variants = len(launches) if subject.width else 0
    return Finding(target.name, subject, tuple(best), len(launches), variants)


def _rank(kernel: KernelFinding) -> tuple[bool, bool, float, int]:
    """Candidates that fit and do not spill first, then the fewest instructions, then the most residents."""
    beside = sum(loop.beside_tensor for loop in kernel.unmasked)
    return kernel.resident_warps == 0, kernel.launch.compilation.spills > 0, beside, -kernel.resident_warps


def products_of(kernel: str, loops: int) -> tuple[int, ...]:
    """What a score costs in each of so many loops of a kernel, as `PRODUCTS` says."""
    listed = PRODUCTS.get(kernel, ())
    return tuple(listed[min(number, len(listed) - 1)] for number in range(loops)) if listed else ()


def _kernel(launch: Launch, subject: Subject, target: Target) -> KernelFinding:
    made, processor = launch.compilation, MULTIPROCESSORS[target.name]
    programs = resident_programs(processor, launch.warps, made.registers, made.shared_bytes)
    return KernelFinding(
        launch,
        programs * launch.warps,
        processor.partitions * processor.warps,
        tuple(_loops(launch, subject.head_dim, target)) if subject.head_dim else (),
        traffic(launch.ttir, launch.constants.get("BLOCK_M", 1)) if subject.width else None,
    )


def _loops(launch: Launch, head_dim: int, target: Target) -> Iterator[LoopFinding]:
    bodies = Program.of(launch.compilation.assembly).loops(lambda one: pipe_of(one) == TENSOR)
    rates = RATES.get(target.name)
    for instructions, number in zip(bodies, products_of(launch.kernel, len(bodies))):
        loop = Loop(instructions, launch.warps, target.warp_size)
        flops_of_a_score = 2 * number * head_dim
        multiplied = None if loop.flops is None else loop.flops / flops_of_a_score
        scores = _scores(launch, multiplied)
        if multiplied is not None and scores is not None and multiplied < scores / 2:
            continue  # of smaller tiles than the launch's: a loop for what is rare
        modeled = bound(loop, rates, scores * flops_of_a_score) if rates is not None and scores else None
        yield LoopFinding(scores, {pipe: loop.per_thread(pipe) for pipe in PIPES}, modeled)


def _scores(launch: Launch, multiplied: float | None) -> float | None:
    """Scores that an iteration computes: whole tiles, as many as it multiplies for; or, of unknown tiles, just that."""
    if "BLOCK_M" not in launch.constants or "BLOCK_N" not in launch.constants:
        return multiplied
    tile: int = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"]
    return tile if multiplied is None else tile * max(int(multiplied / tile), 1)
