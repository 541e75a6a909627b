"""The next batch is loaded while the step before it computes, and a run still resumes exactly."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .batches import Batch, Batches


class Prefetched:
    """`batches`, one batch ahead, in a thread of its own.

    `state()` is that of the batches that were handed out, whatever has been loaded beyond them. The thread ends with
    `close`, or when nothing refers to the object any more.

    Args:
        batches: Not to be used by anyone else from here on.
        device: A CUDA device to load for: batches are put in pinned memory, from which they are copied without waiting.
    """

    def __init__(self, batches: Batches, device: torch.device | None = None) -> None:
        self._batches = batches
        self._pinned = device is not None and device.type == "cuda"
        self._state = batches.state().clone()  # after the batch that was handed out last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trilby-batches")
        self._ahead: Future[tuple[Batch, Tensor]] | None = None

    def next(self) -> Batch:
        """The next batch, and the one after it begins to load; an error in loading is raised here."""
        ahead = self._ahead or self._thread.submit(self._load)
        batch, self._state = ahead.result()
        self._ahead = self._thread.submit(self._load)
        return batch

    def state(self) -> Tensor:
        """Where the supply is, as far as it was handed out."""
        return self._state

    def restore(self, state: Tensor) -> None:
        """Go on from `state`; what was loaded ahead is dropped."""
        if self._ahead is not None:
            self._ahead.exception()  # wait for it
            self._ahead = None
        self._batches.restore(state)
        self._state = self._batches.state().clone()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _load(self) -> tuple[Batch, Tensor]:
        batch = self._batches.next()
        if self._pinned:
            batch = batch.pin_memory()
        return batch, self._batches.state().clone()
