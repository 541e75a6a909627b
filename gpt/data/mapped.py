"""Ids on the disk that are read as if they were in memory."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor


class MappedTokens:
    """(N) ids that stay on the disk until they are asked for.

    Indexed by places, int64 of any shape, it is the ids there, int64, in memory; by a slice, that part, on the disk.
    """

    def __init__(self, ids: np.ndarray[Any, Any], largest: int, sha256: str) -> None:
        self._ids = ids
        self.largest = largest
        self.sha256 = sha256  # of the whole file, and which part of it this is

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: slice) -> MappedTokens: ...

    @overload
    def __getitem__(self, index: Tensor) -> Tensor: ...

    def __getitem__(self, index: slice | Tensor) -> MappedTokens | Tensor:
        if isinstance(index, slice):
            return MappedTokens(self._ids[index], self.largest, f"{self.sha256}[{index.start}:{index.stop}]")
        return torch.from_numpy(self._ids[index.numpy()].astype(np.int64))
