"""Machine code as text, NVIDIA's SASS (`nvdisasm -c`) or AMD's assembly: its instructions and its innermost loops."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?PT?\d*\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);?\s*$")
_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_SASS_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_AMD = re.compile(r"^\t()([a-z][a-z0-9_]*)\s*(.*?)(?:;.*)?$")
_AMD_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_AMD_TARGET = re.compile(r"(\.LBB\d+_\d+)")
_ALWAYS = ("BRA", "s_branch")
_SOMETIMES = ("s_cbranch",)
_ENDS = ("EXIT", "RET", "s_endpgm", "BPT")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a program.

    Attributes:
        opcode: With its modifiers: "HMMA.16816.F32.BF16", "v_exp_f32".
        operands: As they read.
        is_predicated: It may do nothing.
    """

    opcode: str
    operands: str = ""
    is_predicated: bool = False

    def is_in(self, *names: str) -> bool:
        """Whether the opcode's first part is one of `names`."""
        return self.opcode.partition(".")[0] in names


@dataclass(frozen=True)
class Program:
    """Instructions in order, and where labels stand: the number of the instruction that follows."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @classmethod
    def of(cls, text: str) -> "Program":
        """Read SASS or AMD's assembly, whichever it is."""
        is_sass = "//-----" in text or re.search(r"^\s+/\*0000\*/", text, re.MULTILINE) is not None
        instruction, label = (_SASS, _SASS_LABEL) if is_sass else (_AMD, _AMD_LABEL)
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if found := label.match(line):
                labels[found.group(1)] = len(instructions)
            elif found := instruction.match(line):
                predicate, opcode, operands = found.groups()
                instructions.append(Instruction(opcode, operands.strip(), bool(predicate)))
        return cls(tuple(instructions), labels)

    def loops(self, has: Callable[[Instruction], bool]) -> list[tuple[Instruction, ...]]:
        """The innermost of the loops in which some instruction fulfills `has`, in program order.

        A loop is what lies on the ways from its first block back to it. Loops that only wait (for a barrier, say) have
        nothing of interest in them, and count as part of the loop that they stand in, once.
        """
        blocks = self._blocks()
        found = [loop for loop in _natural_loops(self._successors(blocks)) if self._has(loop, blocks, has)]
        innermost = [loop for loop in found if not any(other < loop for other in found)]
        return [
            tuple(one for block in sorted(loop) for one in self.instructions[slice(*blocks[block])])
            for loop in sorted(innermost, key=min)
        ]

    def _has(self, loop: frozenset[int], blocks: list[tuple[int, int]], has: Callable[[Instruction], bool]) -> bool:
        return any(has(one) for block in loop for one in self.instructions[slice(*blocks[block])])

    def _blocks(self) -> list[tuple[int, int]]:
        """Where straight pieces start and end."""
        starts = {0, *self.labels.values()}
        starts |= {number + 1 for number, one in enumerate(self.instructions) if self._leaves(one)}
        ordered = sorted(start for start in starts if start < len(self.instructions))
        return list(zip(ordered, [*ordered[1:], len(self.instructions)]))

    def _leaves(self, instruction: Instruction) -> bool:
        return instruction.is_in(*_ALWAYS, *_ENDS) or instruction.opcode.startswith(_SOMETIMES)

    def _successors(self, blocks: list[tuple[int, int]]) -> list[list[int]]:
        """The blocks that may follow each block."""
        number_of = {start: number for number, (start, _) in enumerate(blocks)}
        following = []
        for number, (_, end) in enumerate(blocks):
            last = self.instructions[end - 1]
            after = [number + 1] if number + 1 < len(blocks) else []
            target = self._target(last)
            if target is not None:
                is_certain = last.is_in(*_ALWAYS) and not last.is_predicated and last.operands.startswith(("`", "."))
                after = ([] if is_certain else after) + [number_of[target]] * (target in number_of)
            elif last.is_in(*_ENDS) and not last.is_predicated:
                after = []
            following.append(after)
        return following

    def _target(self, instruction: Instruction) -> int | None:
        if not (instruction.is_in(*_ALWAYS) or instruction.opcode.startswith(_SOMETIMES)):
            return None
        found = _SASS_TARGET.search(instruction.operands) or _AMD_TARGET.search(instruction.operands)
        return self.labels.get(found.group(1)) if found else None


def _natural_loops(successors: list[list[int]]) -> list[frozenset[int]]:
    """Blocks of each loop: those that reach, without passing its head, a block that goes back to the head.

    Only a block that dominates the one that goes back to it is a head (Aho et al., "Compilers", 9.6): a wait that the
    compiler put behind the loop goes back into its middle, and makes no loop.
    """
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for each in following:
            predecessors[each].append(block)
    dominators = _dominators(predecessors)
    loops: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if head in dominators[block]:
                body, pending = loops.setdefault(head, {head}), [block]
                while pending:
                    each = pending.pop()
                    if each not in body:
                        body.add(each)
                        pending += predecessors[each]
    return [frozenset(body) for body in loops.values()]


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """For each block those that every way to it from the first passes; all, of blocks that no way leads to."""
    everything = set(range(len(predecessors)))
    dominators = [{0}] + [everything] * (len(predecessors) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            ways = [dominators[each] for each in predecessors[block]]
            found = set.intersection(*ways) | {block} if ways else everything
            if found != dominators[block]:
                dominators[block], changed = found, True
    return dominators
