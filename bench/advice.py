"""Which launch choices are faster on this GPU than the tables': asked at the end of a GPU's run, a few at a time.

Everything else that can be tuned is `python -m trilby.kernels.gpu tune`'s to measure; that takes an hour.
"""

import time
from collections.abc import Callable, Iterable

from trilby.kernels.gpu.tune import Measure, Question, answer

# Head dimensions of most models; the others' rows are `tune`'s.
HEAD_DIMS = (64, 128)


def asked_here(questions: Iterable[Question]) -> list[Question]:
    """Of all questions those of half precision, usual heads and long sequences: a full run has time for these."""
    found = []
    for question in questions:
        place = question.place
        is_plain = place.arithmetic == "half" and place.scores == "plain"
        if is_plain and place.size in HEAD_DIMS and place.q_len > max(HEAD_DIMS):
            found.append(question)
    return found


def advice(
    questions: Iterable[Question],
    measure: Measure,
    device_name: str,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """What to turn on, one line each; questions that no time is left for are counted."""
    asked, lines = asked_here(questions), []
    until = clock() + seconds
    for number, question in enumerate(asked):
        if clock() > until:
            lines.append(f"launch choices: no time was left for {len(asked) - number} of {len(asked)} questions.")
            break
        best = answer(question, measure, device_name)
        if best is not None:
            changed = {name: value for name, value in best.numbers.items() if value != question.own[name]}
            words = ", ".join(f"{name} = {value}" for name, value in changed.items())
            lines.append(f"turn on: {best.place.table} D {best.place.size}, {words}: {best.reason}.")
    return lines or [f"launch choices: the tables' own are the best of those asked in {len(asked)} questions."]
