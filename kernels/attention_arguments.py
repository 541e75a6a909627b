"""What callers pass to attention, checked, and brought to the form that the operator takes.

Every error names the argument, what it was, and what is allowed.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention_rules import AttentionCall, Mask, errors_of_mask
from .options import UNBOUNDED, AttentionOptions
from .seed import draw_seed
from .shortcut import wants_gradient


@dataclass(frozen=True)
class AttentionArguments:
    """The arguments of `scaled_dot_product_attention`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def call(self) -> AttentionCall:
        """What decides who computes them."""
        query, key, value = self.query, self.key, self.value
        return AttentionCall(
            query.shape,
            key.shape,
            value.shape,
            (query.dtype, key.dtype, value.dtype),
            (query.device, key.device, value.device),
            None if self.attn_mask is None else Mask.of(self.attn_mask),
            self.dropout_p,
            self.is_causal,
            self.enable_gqa,
            wants_gradient(query, key, value),
        )

    @property
    def in_autocasts_dtype(self) -> "AttentionArguments":
        """As autocast, where it is enabled, has PyTorch's function compute them."""
        device = self.query.device.type
        if not torch.is_autocast_enabled(device):
            return self
        dtype, mask = torch.get_autocast_dtype(device), self.attn_mask
        query, key, value = (
            tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
            for tensor in (self.query, self.key, self.value)
        )
        if mask is not None and mask.dtype == torch.float32:
            mask = mask.to(dtype)
        return replace(self, query=query, key=key, value=value, attn_mask=mask)

    def options(self) -> AttentionOptions:
        """What the operator is asked for; dropout draws its seed."""
        size = (*self.query.shape[:3], self.key.shape[2])
        return AttentionOptions(
            mask=None if self.attn_mask is None else self.attn_mask.expand(size),
            seed=draw_seed(self.dropout_p, self.query.device),
            scale=1.0 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale,
            window_right=0 if self.is_causal else UNBOUNDED,
            dropout_p=self.dropout_p,
        )

    def by_pytorch(self) -> Tensor:
        """What PyTorch's function returns, or raises."""
        return scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


@dataclass(frozen=True)
class Arguments:
    """The tensors that decide a call's sizes.

    Attributes:
        query: [B, H, T, D].
        key: [B, Hkv, S, D], or [all blocks, Hkv, block size, D].
        value: [B, Hkv, S, Dv], or [all blocks, Hkv, block size, Dv].
        key_lengths: [N] int32.
        block_table: [N, blocks] int32.
        sequences: N; none: one for each batch.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_lengths: Tensor | None = None
    block_table: Tensor | None = None
    sequences: int | None = None

    @property
    def count(self) -> int:
        """How many sequences there are, N."""
        return self.query.shape[0] if self.sequences is None else self.sequences

    def check(self) -> None:
        """Refuse what the kernels would compute wrongly.

        Raises:
            TypeError, ValueError: As `attend` says.
        """
        query, key, value = self.query, self.key, self.value
        check = _check_sizes if torch.compiler.is_compiling() else _check_sizes_once  # compiled, sizes are symbols
        check(
            (query.shape, key.shape, value.shape),
            (query.dtype, key.dtype, value.dtype),
            (query.device, key.device, value.device),
            self.block_table is None and self.sequences is None,
        )
        self._check_lengths()

    def _check_lengths(self) -> None:
        if self.key_lengths is not None:
            check_integers("key_lengths", self.key_lengths, (self.count,), self.query.device)
        if self.block_table is not None:
            check_integers("block_table", self.block_table, (self.count, self.block_table.shape[-1]), self.query.device)
            if self.key_lengths is None:
                raise ValueError("block_table was given without key_lengths; how many keys there are must be said")

    def expanded_mask(self, mask: Tensor | None) -> Tensor | None:
        """`mask` as [B, H, T, S].

        Raises:
            TypeError, ValueError: It is of another dtype or device, does not broadcast, or requires a gradient.
        """
        if mask is None:
            return None
        if self.block_table is not None:
            raise ValueError("attn_mask was given with block_table; keys in blocks have no places for a mask")
        size = (*self.query.shape[:3], self.key.shape[2])
        for error in errors_of_mask(Mask.of(mask), size, self.query.dtype, self.query.device):
            raise error
        return mask.expand(size)

    def expanded_slopes(self, slopes: Tensor | None) -> Tensor | None:
        """`slopes` as [N, H].

        Raises:
            TypeError, ValueError: They are not float32, of another size, or require a gradient.
        """
        if slopes is None:
            return None
        if slopes.dtype != torch.float32:
            raise TypeError(f"alibi_slopes is {slopes.dtype}; it must be torch.float32")
        if slopes.requires_grad:
            raise ValueError("alibi_slopes requires a gradient; it must not")
        H = self.query.shape[1]
        if slopes.shape not in ((H,), (self.count, H)):
            raise ValueError(f"alibi_slopes has shape {tuple(slopes.shape)}; it must be {(H,)} or {(self.count, H)}")
        return slopes.expand(self.count, H)


def _check_sizes(
    sizes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    of_batches: bool,
) -> None:
    """Refuse sizes, dtypes and devices of query, key and value that do not agree; `of_batches`: key has query's B."""
    for name, size, dtype, device in zip(("query", "key", "value"), sizes, dtypes, devices):
        if len(size) != 4:
            raise ValueError(f"{name} has shape {tuple(size)}; 4 dimensions, [B, H, T, D], are needed")
        if dtype != dtypes[0] or not dtype.is_floating_point:
            raise TypeError(f"{name} is {dtype} and query {dtypes[0]}; all must be of one floating dtype")
        if device != devices[0]:
            raise ValueError(f"{name} is on {device}, and query on {devices[0]}")
    query, key, value = sizes
    B, H, _, D = query
    batches, heads, S, _ = key
    if of_batches:
        batches = B
    if key[0] != batches or key[3] != D:
        raise ValueError(f"key has shape {tuple(key)}; it must be {(batches, heads, S, D)}")
    if value[:3] != key[:3]:
        raise ValueError(f"value has shape {tuple(value)}; it must be {(*key[:3], value[3])}")
    if H % heads if heads else H:
        raise ValueError(f"query has {H} heads; they must be a multiple of key's {heads}")


# A model asks for the same sizes again and again. What is refused is not remembered.
_check_sizes_once = lru_cache(4096)(_check_sizes)


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse what is not an int32 tensor of `shape` on `device`.

    Raises:
        TypeError, ValueError: As said.
    """
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} is {tensor.dtype}; it must be torch.int32")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, and query on {device}")


def contiguous(integers: Tensor | None) -> Tensor | None:
    """`integers`, a few for each sequence, side by side as the kernels read them."""
    return None if integers is None else integers.contiguous()


def checked_softcap(softcap: float) -> float:
    """`softcap`.

    Raises:
        ValueError: It is negative or no number.
    """
    if not softcap >= 0.0:
        raise ValueError(f"softcap was {softcap}; it must be 0 (none) or more")
    return softcap
