"""How many bytes a norm kernel moves, read in Triton's own dialect: what is loaded and stored, in which loop.

Counted is what programs ask for, wherever it comes from: weights that every program reads once are found in L2 by most
of them, and a row's second reading, too. Masked-out elements count, so that widths should fill their blocks.
"""

import math
import re
from dataclasses import dataclass

_LOCATION = re.compile(r'loc\((?:[^()"]|"[^"]*"|\([^()]*\))*\)')
_CONSTANT = re.compile(r"(%\w+) = arith\.constant (-?\d+) : i\d+")
_LOOP = re.compile(r"scf\.for %\w+ = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")
_ACCESS = re.compile(
    r"tt\.(?:load|store|descriptor_load|descriptor_store|atomic_rmw)\b.* : (tensor<[^>]*>>|!tt\.ptr<\w+>)"
)
_POINTERS = re.compile(r"(?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]*(\d+)>")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one program moves: `per_row` in its loop over rows, and `once` outside of it."""

    per_row: int
    once: int

    def total(self, rows: int, programs: int) -> int:
        """Bytes of a launch of so many programs over so many rows."""
        return self.per_row * rows + self.once * programs


def traffic(ttir: str, rows: int = 1) -> Traffic:
    """Read a kernel whose loop takes so many `rows` at once; one without such a loop has one row for each program.

    Loops whose bounds are constants (the chunks of a wide row) are multiplied out; any other is the loop over rows.
    """
    constants: dict[str, int] = {}
    turns: list[int | None] = []  # of the blocks that are open: a constant loop's, 1 of others; None: the rows'
    in_rows = outside = 0
    has_rows = False
    for line in ttir.splitlines():
        if found := _CONSTANT.search(line):
            constants[found.group(1)] = int(found.group(2))
        if found := _ACCESS.search(line):
            moved = _bytes(found.group(1)) * math.prod(turn for turn in turns if turn is not None)
            if None in turns:
                in_rows += moved
            else:
                outside += moved
        body = _LOCATION.sub("", line)
        for _ in range(max(body.count("}") - body.count("{"), 0)):
            turns.pop()
        if body.count("{") > body.count("}"):
            loop = _LOOP.search(body)
            turns.append(_turns(loop.groups(), constants) if loop else 1)
            has_rows = has_rows or turns[-1] is None
    return Traffic(in_rows // rows, outside) if has_rows else Traffic(0, outside)


def _turns(bounds: tuple[str, ...], constants: dict[str, int]) -> int | None:
    if any(bound not in constants for bound in bounds):
        return None
    start, end, step = (constants[bound] for bound in bounds)
    return max(-(-(end - start) // step), 0)


def _bytes(pointers: str) -> int:
    found = _POINTERS.search(pointers)
    if found is None:
        return 0
    shape, bits = found.groups()
    elements = math.prod(int(size) for size in (shape or "1x").split("x") if size)
    return elements * max(int(bits) // 8, 1)
