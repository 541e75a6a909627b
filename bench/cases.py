"""What is timed, and why: a table of cases, and how much work each of them is.

Work is counted as the field does. Attention: 4·B·H·T²·D floating-point operations forward, half of them under a causal
mask, and 2.5 times as many backward (Dao, flash-attention's benchmarks). Norms: whole tensors moved between the
processor and memory at the very least; what PyTorch's unfused calls move on top is their own loss.
"""

from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["forward", "forward+backward"]
Device = Literal["cpu", "cuda"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
# On a GPU, attention in float32 is nobody's concern, and norms in float32 are those of mixed precision.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class AttentionCase:
    """Attention of B sequences of T positions, H heads of D numbers.

    Attributes:
        device: Where it is run.
        is_causal: Each position looks at itself and those before; else at all.
        packed: query, key and value are views of one (B, T, 3·H·D) tensor, as a GPT's are, and the gradient is that
            tensor's; else three tensors (B, H, T, D).
        why: What this case stands for.
        quick: Whether a quick run has it too.
        cached: How many keys and values there are, where they are not the T of the queries.
        key_heads: How many heads keys and values have, where they are fewer than H.
        lengths: How many keys of each sequence exist; a mask, (B, 1, 1, T) of booleans, hides the padding after them.
        dropout_p: The probability that a weight is dropped.
        directions: What is timed.
    """

    B: int
    H: int
    T: int
    D: int
    why: str
    packed: bool = False
    quick: bool = False
    device: Device = "cpu"
    is_causal: bool = True
    cached: int | None = None
    key_heads: int | None = None
    lengths: tuple[int, ...] = ()
    dropout_p: float = 0.0
    directions: tuple[Direction, ...] = DIRECTIONS

    @property
    def keys(self) -> int:
        """How many keys and values there are."""
        return self.cached or self.T

    @property
    def heads_of_keys(self) -> int:
        """How many heads keys and values have."""
        return self.key_heads or self.H

    @property
    def operation(self) -> str:
        """What is computed."""
        return "attention"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """In what it is run."""
        return DTYPES if self.device == "cpu" else ("bfloat16",)

    @property
    def shape(self) -> str:
        """The sizes, as the table shows them."""
        heads = f"{self.H}" + f"/{self.key_heads}" * bool(self.key_heads)
        positions = f"{self.T}" + f"/{self.cached}" * bool(self.cached)
        full = not (self.is_causal or self.cached or self.lengths)
        notes = " packed" * self.packed + " full" * full + " padded" * bool(self.lengths)
        return f"{self.B}x{heads}x{positions}x{self.D}{notes}" + " dropout" * bool(self.dropout_p)


@dataclass(frozen=True)
class VarlenCase:
    """Causal attention of sequences of these lengths in one row without padding, H heads of D numbers."""

    lengths: tuple[int, ...]
    H: int
    D: int
    why: str
    quick: bool = False
    device: Device = "cpu"
    directions: tuple[Direction, ...] = DIRECTIONS

    @property
    def operation(self) -> str:
        """What is computed."""
        return "varlen_attn"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """In what it is run."""
        return DTYPES

    @property
    def shape(self) -> str:
        """The sizes, as the table shows them."""
        return f"{len(self.lengths)}x{self.H}x({min(self.lengths)}-{max(self.lengths)})x{self.D}"


@dataclass(frozen=True)
class NormCase:
    """Layer norm over the last C of N rows, with weight and bias; with `add`, of the sum of two such tensors.

    Not `is_centered` it is RMS norm, which has no bias.
    """

    N: int
    C: int
    why: str
    add: bool = False
    quick: bool = False
    device: Device = "cpu"
    is_centered: bool = True
    directions: tuple[Direction, ...] = DIRECTIONS

    @property
    def operation(self) -> str:
        """What is computed."""
        return "add_" * self.add + ("layer_norm" if self.is_centered else "rms_norm")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """In what it is run."""
        return DTYPES

    @property
    def shape(self) -> str:
        """The sizes, as the table shows them."""
        return f"{self.N}x{self.C}"


Case = AttentionCase | VarlenCase | NormCase

ATTENTION_CASES: tuple[AttentionCase | VarlenCase, ...] = (
    AttentionCase(1, 12, 128, 64, "a prompt: little work, so the cost of a call and of uneven threads shows"),
    AttentionCase(4, 12, 256, 64, "GPT-2 at a short context: one block of keys per head", quick=True),
    AttentionCase(4, 12, 256, 64, "the same, laid out as a GPT's are", packed=True, quick=True),
    AttentionCase(4, 12, 1024, 64, "GPT-2 in training"),
    AttentionCase(4, 12, 1024, 64, "the same, laid out as a GPT's are", packed=True),
    AttentionCase(1, 12, 4096, 64, "a long context: the masked half is most of what can be saved"),
    AttentionCase(1, 16, 2048, 128, "the head of most models after GPT-2"),
    AttentionCase(1, 12, 1024, 64, "heads of queries that share those of keys, as Llama's", key_heads=4),
    AttentionCase(
        4, 12, 512, 64, "texts of several lengths in one batch", is_causal=False, lengths=(512, 384, 256, 128)
    ),
    # Forward alone is a model's that is not trained, and has no dropout. One sequence: 4 take PyTorch 2 seconds a turn.
    AttentionCase(1, 12, 1024, 64, "training with dropout", dropout_p=0.1, directions=("forward+backward",)),
    # Nothing but reading keys and values: a ratio can be no higher than PyTorch's share of the ceiling leaves it.
    AttentionCase(8, 12, 1, 64, "one token after a long text", is_causal=False, cached=8192, directions=("forward",)),
    VarlenCase((100, 350, 650, 1000), 12, 64, "texts of several lengths without padding", quick=True),
)

_NORM_SIZES = (
    NormCase(8, 32, "tiny: the cost of a call and nothing else", quick=True),
    NormCase(64, 768, "one short prompt through GPT-2: about as much call as work"),
    NormCase(4096, 768, "GPT-2 in training, 4 x 1024 positions", quick=True),
    NormCase(8192, 768, "twice that: beyond most caches"),
    NormCase(8192, 1600, "GPT-2 XL in training"),
    NormCase(1024, 12288, "GPT-3's width: a row no longer fits into registers"),
)
NORM_CASES = (
    *(NormCase(size.N, size.C, size.why, add, size.quick) for add in (False, True) for size in _NORM_SIZES),
    NormCase(8192, 768, "what models after GPT-2 have in place of layer norm", quick=True, is_centered=False),
    NormCase(8192, 768, "the same after the residual add", add=True, quick=True, is_centered=False),
    NormCase(512, 768, "one short text: PyTorch composes an RMS norm of several operators", is_centered=False),
)

# 16,384 positions of a model 2048 wide, as flash-attention's charts have them, so that numbers can be set beside them.
_GPU_ATTENTION_SIZES = (
    (512, "short sequences, many of them: launches and tiles that end early show"),
    (1024, "GPT-2 in training"),
    (2048, "Llama's first context"),
    (4096, "Llama 2's context"),
    (8192, "Llama 3's context"),
    (16384, "a long context: the kernels' own speed, and nothing else"),
)
GPU_ATTENTION_CASES = tuple(
    AttentionCase(16384 // T, 2048 // D, T, D, why, quick=T == 1024, device="cuda", is_causal=is_causal)
    for D in (64, 128)
    for is_causal in (True, False)
    for T, why in _GPU_ATTENTION_SIZES
    if is_causal or T in (1024, 4096, 16384)
)
# Liger's sizes, so that numbers can be set beside its own, and GPT-2's.
_GPU_NORM_SIZES = (
    NormCase(4096, 768, "GPT-2 in training: more launch than work", quick=True, device="cuda"),
    NormCase(16384, 1600, "GPT-2 XL in training", device="cuda"),
    NormCase(4096, 4096, "Llama's width", device="cuda"),
    NormCase(4096, 16384, "the widest row that registers hold", device="cuda"),
)
GPU_NORM_CASES = tuple(replace(size, add=add) for add in (False, True) for size in _GPU_NORM_SIZES)

# PyTorch against itself, timed exactly as the others are: what the harness and the machine add on their own.
SELF_CHECKS: tuple[tuple[Case, Direction], ...] = (
    (ATTENTION_CASES[1], "forward"),
    (_NORM_SIZES[0], "forward"),
    (_NORM_SIZES[2], "forward+backward"),
)
GPU_SELF_CHECKS: tuple[tuple[Case, Direction], ...] = (
    (GPU_ATTENTION_CASES[1], "forward"),
    (_GPU_NORM_SIZES[0], "forward+backward"),
)
# Awkward lengths that are run again and again on a GPU: a race shows as bits that differ (flash-attention's own).
REPEAT_CASES: tuple[Case, ...] = (
    AttentionCase(8, 12, 239, 64, "a length of no tile", device="cuda"),
    AttentionCase(8, 4, 799, 128, "the same, of wide heads", device="cuda"),
    AttentionCase(8, 4, 1023, 256, "the same, of the widest", device="cuda"),
    NormCase(4099, 1023, "rows and columns of no tile", device="cuda"),
    NormCase(513, 12289, "the same, beyond registers", add=True, device="cuda"),
)
# glibc gives each tensor above 32 MiB back to the system when it is freed, and its pages are paid for again; the output
# of this case is one such tensor, and shows what that costs.
ALLOCATION_CASE = NormCase(8192, 1600, "an output above 32 MiB")


def attention_flops(B: int, H: int, T: int, D: int, direction: Direction, is_causal: bool = True) -> float:
    """Floating-point operations of attention, recomputing the scores backward included; half of them under a mask."""
    forward = 4 * B * H * T * T * D / (2 if is_causal else 1)
    return forward if direction == "forward" else (1 + 2.5) * forward


def attention_work(case: AttentionCase | VarlenCase, direction: Direction) -> float:
    """Floating-point operations of a case: those of the pairs that it looks at."""
    if isinstance(case, VarlenCase):
        return sum(attention_flops(1, case.H, T, case.D, direction) for T in case.lengths)
    seen = sum(case.lengths) / (case.B * case.keys) if case.lengths else 1
    return seen * case.keys / case.T * attention_flops(case.B, case.H, case.T, case.D, direction, case.is_causal)


def read_bytes(case: AttentionCase, itemsize: int) -> int:
    """Bytes of keys and values; of one query and its output there are S times fewer."""
    return 2 * case.B * case.heads_of_keys * case.keys * case.D * itemsize


def norm_bytes(case: NormCase, direction: Direction, itemsize: int) -> int:
    """Bytes that must at least be moved; weight, bias and statistics are a thousandth of it and not counted.

    =================  ===========================================  ==========================================  =======
    operation          forward                                      backward                                    tensors
    =================  ===========================================  ==========================================  =======
    `layer_norm`       read x, write y                              read x and dy, write dx                     2, 5
    `add_layer_norm`   read stream and branch, write y and the sum  read the sum, dy and dsum, write one dx     4, 8
    =================  ===========================================  ==========================================  =======

    RMS norm moves the same.
    """
    forward, both = (4, 8) if case.add else (2, 5)
    return (forward if direction == "forward" else both) * case.N * case.C * itemsize
