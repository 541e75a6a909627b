"""One kernel launch as data: run it on a device, or hand it to `compile.py` for a device that is not here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

from .tile import Heads


@dataclass(frozen=True)
class Call:
    """A kernel, its grid, its arguments by name and its launch options.

    The tensors may lie on the meta device: then the call can be compiled, not run.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]
    makes_descriptors: bool = False

    def run(self, device: torch.device) -> Any:
        """Launch on `device`; an empty grid is no launch.

        Returns:
            The compiled kernel; None where there was no launch, or it was interpreted.
        """
        if 0 in self.grid:
            return None
        with entered(device):
            # Contraction of a * b + c is what a GPU does by default; triton 3.9 warns unless it is asked for.
            launch = partial(self.kernel[self.grid], **self.arguments, **self.options, enable_fp_fusion=True)
            if self.makes_descriptors:
                return copy_context().run(_launch_with_memory, launch, device)
            return launch()

    def again(self, compiled: Any) -> Callable[..., Any]:
        """What launches once more, past Triton's look at every argument; `run` returned `compiled`."""
        launch: Callable[..., Any] = self.kernel[self.grid] if compiled is None else compiled[(*self.grid, 1, 1)[:3]]
        return launch

    def in_order(self) -> list[Any]:
        """The arguments as the kernel has them."""
        return [self.arguments[name] for name in self.kernel.arg_names]


def entered(device: torch.device) -> AbstractContextManager[None]:
    """Within it launches go to `device`. To enter where one is already would take as long as a third of a launch."""
    is_current = device.type != "cuda" or device.index in (None, torch.cuda.current_device())
    return nullcontext() if is_current else torch.cuda.device(device)


def _launch_with_memory(launch: Callable[[], object], device: torch.device) -> object:
    """Launch what makes tensor descriptors: Triton asks for memory to write them to, 128 bytes each.

    The user's own allocator stays. Since triton 3.5 it belongs to the context, of which this runs in a copy; in 3.4
    there is one for all threads, which is put back, and what another thread launches meanwhile gets memory of ours.
    """
    before = getattr(getattr(triton.runtime, "_allocation", None), "_allocator", None)

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    try:
        return launch()
    finally:
        if before is not None and not isinstance(before, ContextVar):
            triton.set_allocator(before)


def strides(name: str, tensor: torch.Tensor, dims: str) -> dict[str, int]:
    """The strides of `tensor` as the kernels name them: `query_stride_b`, `query_stride_h`, ..."""
    return {f"{name}_stride_{dim}": stride for dim, stride in zip(dims, tensor.stride())}


def unspecialized(number: int) -> int:
    """`number` as Triton compiles it once for all: inside a tuple it has variants for 1, multiples of 16 and 32 bits.

    An odd number beyond 32 bits is none of these; `tile.stride_of` reads it.
    """
    return 2**62 + 2 * number + 1


def heads(tensor: torch.Tensor) -> Heads:
    """A tensor [B, H, T, D] as kernels take it. Only its last stride is compiled in, if it is 1."""
    stride_b, stride_h, stride_t, stride_d = tensor.stride()
    return Heads(tensor, unspecialized(stride_b), unspecialized(stride_h), unspecialized(stride_t), stride_d)


def alignment_of(*tensors: torch.Tensor) -> int:
    """The elements that every stride but the last of every tensor is a multiple of: 16 bytes' worth, or 1.

    A kernel that knows this moves 16 bytes with one instruction whatever the lengths are, so that a new
    length needs no new compilation (Triton's own rule, stride % 16 == 0, is stricter than the hardware's).
    """
    elements = min(16 // tensor.element_size() for tensor in tensors)
    is_aligned = all(
        stride % (16 // tensor.element_size()) == 0 for tensor in tensors for stride in tensor.stride()[:-1]
    )
    return elements if is_aligned else 1


def addresses(products: bool, *tiles: tuple[int, torch.Tensor]) -> str:
    """How `tile.load_tokens` computes them, for tiles of so many rows of tensors [B, H, T, D].

    Where a tile begins is always computed in 64 bits. Inside it 32 bits nearly always do, and save a register for every
    16 bytes loaded: on sm_90 at head dimension 256 the difference between spilling and not. `products` save more where
    a loop has few other values to keep, and are for strides of less than 2^32 bytes.
    """
    if products and all(tensor.stride(-2) * tensor.element_size() < 2**32 for _, tensor in tiles):
        return "products"
    is_wide = any(
        (rows - 1) * tensor.stride(-2) + (tensor.shape[-1] - 1) * tensor.stride(-1) >= 2**31 for rows, tensor in tiles
    )
    return "wide" if is_wide else "narrow"


def padded(head_dim: int) -> int:
    """The columns of the tile that holds a head: a power of two, and at least what a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())
