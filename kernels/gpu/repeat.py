"""Calls repeated: what the processor found out for the first is kept, for others that differ in addresses alone.

To check a call, choose its launch parameters and have Triton look at every argument takes the processor several times
as long as a small launch takes the GPU. A call that was seen twice is repeated from then on: its tensors are allocated,
its kernels launched as they were compiled, with the new tensors in the old ones' places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import Call, entered
from .measured import file_in_force, is_trying

# Decoding to a growing cache is another call with every token: all are forgotten when there are so many.
MOST_KNOWN = 4096

Address = tuple[int, torch.dtype]


class Seen(Enum):
    """What is known of a call that is found out anew."""

    ONCE = 1
    OFTEN = 2  # and it can't be repeated


_known: dict[tuple[Any, ...], Repetition | Seen] = {}


@dataclass(frozen=True)
class Work:
    """What a call makes, and how.

    Attributes:
        results: What it returns.
        calls: The launches, in order. All of their tensors are the call's own, results or scratch, from their first
            element on; any other, such as a copy that a layout asked for, makes the work unrepeatable.
        scratch: Tensors of no value afterwards, with any views of them that are launched with.
        fills: Which of results and scratch are filled before, and with what.
    """

    results: tuple[Tensor, ...]
    calls: Sequence[Call]
    scratch: tuple[Tensor, ...] = ()
    fills: tuple[tuple[Tensor, float], ...] = ()

    def do(self, device: torch.device) -> list[Any]:
        """What each launch came to: the compiled kernel, or None where it is interpreted or the grid is empty."""
        for tensor, value in self.fills:
            tensor.fill_(value)
        return [call.run(device) for call in self.calls]


def perform(
    prepare: Callable[..., Work], tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """The results of `prepare(tensors, numbers)`, which must depend on nothing else but on settings among `numbers`."""
    key = (prepare, numbers, file_in_force(), *[None if tensor is None else _place(tensor) for tensor in tensors])
    known = None if is_trying() else _known.get(key)
    if isinstance(known, Repetition):
        return known(tensors)
    work = prepare(tensors, numbers)
    device = next(tensor.device for tensor in tensors if tensor is not None)
    launched = work.do(device)
    if known is Seen.ONCE:
        _known[key] = Repetition.of(work, tensors, launched, device) or Seen.OFTEN
    elif known is None and not is_trying():
        if len(_known) >= MOST_KNOWN:
            forget()
        _known[key] = Seen.ONCE
    return work.results


def count_repeatable() -> int:
    """How many calls are known well enough to be repeated."""
    return sum(isinstance(known, Repetition) for known in _known.values())


def forget() -> None:
    """Have every call find out anew."""
    _known.clear()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """All that a launch depends on but the address; of that, what Triton compiles in."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16, tensor.get_device()


class Pattern(NamedTuple):
    """Arguments, or a tuple among them, with tensors to be put in."""

    make: Callable[[list[Any]], Any]
    items: list[Any]
    places: tuple[tuple[int, int], ...]  # of tensors: where in items, and which
    inner: tuple[tuple[int, Pattern], ...]

    @classmethod
    def of(
        cls, make: Callable[[list[Any]], Any], items: list[Any], slots: dict[tuple[int, torch.dtype], int]
    ) -> Pattern:
        """`items`, whose tensors are found in `slots` by address and dtype.

        Raises:
            LookupError: One is not.
        """
        places = [(i, slots[_address(item)]) for i, item in enumerate(items) if isinstance(item, Tensor)]
        inner = [
            (i, Pattern.of(type(item)._make, list(item), slots))  # type: ignore[attr-defined]
            for i, item in enumerate(items)
            if isinstance(item, tuple)
        ]
        # Not the tensors themselves: they would never be freed.
        constants = [None if isinstance(item, (Tensor, tuple)) else item for item in items]
        return cls(make, constants, tuple(places), tuple(inner))

    def filled(self, tensors: Sequence[Tensor | None]) -> Any:
        """The arguments with `tensors` in their places."""
        items = self.items.copy()
        for i, slot in self.places:
            items[i] = tensors[slot]
        for i, pattern in self.inner:
            items[i] = pattern.filled(tensors)
        return self.make(items)


class Made(NamedTuple):
    """A tensor that a call makes: memory of its own, or a view of another that it makes."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    base: int | None  # which of all tensors; None: memory of its own
    offset: int  # in the base's storage

    def tensor(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Such a tensor."""
        if self.base is None:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)
        base = tensors[self.base]
        assert base is not None
        return base.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Repetition:
    """A call that is known."""

    device: torch.device
    made: tuple[Made, ...]
    results: int  # how many of those are
    fills: tuple[tuple[int, float], ...]
    launches: tuple[tuple[Callable[..., Any], Pattern], ...]

    @classmethod
    def of(
        cls, work: Work, tensors: tuple[Tensor | None, ...], launched: list[Any], device: torch.device
    ) -> Repetition | None:
        """Work that was done on `tensors`; None: it can't be repeated from what is known of it."""
        mine = (*work.results, *work.scratch)
        everything = (*tensors, *mine)
        slots: dict[Address, int] = {}
        for slot, tensor in enumerate(everything):
            if tensor is None or tensor.numel() == 0:
                continue
            if slots.setdefault(_address(tensor), slot) != slot and slot < len(tensors):
                return None  # one tensor as two arguments: another time they may be two
        if any(call.makes_descriptors for call in work.calls):
            return None
        try:
            launches = tuple(
                (call.again(kernel), Pattern.of(list, call.in_order(), slots))
                for call, kernel in zip(work.calls, launched)
                if 0 not in call.grid
            )
        except LookupError:
            return None
        number = {id(tensor): len(tensors) + i for i, tensor in reversed(list(enumerate(mine)))}
        bases = {tensor.untyped_storage().data_ptr(): number[id(tensor)] for tensor in reversed(mine)}
        made = []
        for i, tensor in enumerate(mine, len(tensors)):
            base = bases[tensor.untyped_storage().data_ptr()] if tensor.numel() else i
            place = None if base == i else base
            made.append(Made(tensor.shape, tensor.stride(), tensor.dtype, place, int(tensor.storage_offset())))
        fills = tuple((number[id(tensor)], value) for tensor, value in work.fills)
        return cls(device, tuple(made), len(work.results), fills, launches)

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """The results for other tensors."""
        everything = list(tensors)
        for made in self.made:
            everything.append(made.tensor(everything, self.device))
        for slot, value in self.fills:
            everything[slot].fill_(value)  # type: ignore[union-attr]
        with entered(self.device):
            for start, pattern in self.launches:
                start(*pattern.filled(everything))
        first = len(tensors)
        return tuple(everything[first : first + self.results])  # type: ignore[arg-type]


def _address(tensor: Tensor) -> Address:
    return tensor.data_ptr(), tensor.dtype
