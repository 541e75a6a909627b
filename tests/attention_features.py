"""Calls of attention that ask for more than the causal mask, and the two whom their results are judged by."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from attention_case import gradients
from tolerance import assert_as_exact_as
from torch import Tensor
from trilby.kernels import reference
from trilby.kernels.options import AttentionOptions
from trilby.kernels.reference.attention import visible

Inputs = tuple[Tensor, Tensor, Tensor]
RESULTS = "output", "logsumexp", "grad_query", "grad_key", "grad_value"


@dataclass(frozen=True)
class Call:
    """Sizes, and what is asked for: `ask` is given the call and a dtype for its mask, and draws at random.

    Packed, `lengths` are the numbers of queries and keys of each sequence, T and S those of the rows, some of which no
    sequence owns.
    """

    ask: Callable[["Call", torch.dtype], AttentionOptions]
    B: int = 2
    H: int = 4
    Hkv: int = 2
    T: int = 70
    S: int = 150
    D: int = 24
    Dv: int = 40
    lengths: tuple[tuple[int, int], ...] = field(default=())

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Normal query, key and value that ask for gradients."""
        shapes = (self.H, self.T, self.D), (self.Hkv, self.S, self.D), (self.Hkv, self.S, self.Dv)
        query, key, value = (torch.randn(self.B, *shape).to(dtype).requires_grad_() for shape in shapes)
        return query, key, value

    def starts(self, which: int) -> Tensor:
        """[N + 1] int32: where the sequences start in the rows of query (0) or key (1), of which the first has none."""
        return torch.tensor([1, *(pair[which] for pair in self.lengths)]).cumsum(0, dtype=torch.int32)


def _asks(**options: object) -> Callable[[Call, torch.dtype], AttentionOptions]:
    """For what is the same for all sizes."""
    return lambda call, _dtype: AttentionOptions(scale=call.D**-0.5)._replace(**options)  # type: ignore[arg-type]


def _masked(draw: Callable[[Call, torch.dtype], Tensor]) -> Callable[[Call, torch.dtype], AttentionOptions]:
    def ask(call: Call, dtype: torch.dtype) -> AttentionOptions:
        mask = draw(call, dtype).expand(call.B, call.H, call.T, call.S)
        return AttentionOptions(scale=call.D**-0.5, mask=mask)

    return ask


def _padding(call: Call, _dtype: torch.dtype) -> Tensor:
    """The first batch has a third of the keys, the others all of them."""
    lengths = torch.tensor([call.S // 3, *[call.S] * (call.B - 1)])
    return (torch.arange(call.S) < lengths[:, None])[:, None, None]


def _rows_that_see_nothing(call: Call, _dtype: torch.dtype) -> Tensor:
    return (torch.rand(1, call.H, call.T, call.S) < 0.5) & (torch.arange(call.T) % 3 > 0)[:, None]


def _blocks_that_nothing_sees(call: Call, _dtype: torch.dtype) -> Tensor:
    documents = (torch.arange(call.T) * 5 // call.T)[:, None] == torch.arange(call.S) * 5 // call.S
    return documents.expand(1, 1, -1, -1)


def _float32_with_infinities(call: Call, _dtype: torch.dtype) -> Tensor:
    return torch.randn(call.B, 1, call.T, call.S).masked_fill(torch.rand(call.T, call.S) < 0.3, -torch.inf)


def _biased(call: Call, dtype: torch.dtype) -> AttentionOptions:
    slopes = torch.rand(call.H, call.B).T
    mask = torch.randn(call.H, call.T, call.S).to(dtype).expand(call.B, -1, -1, -1)
    return AttentionOptions(mask, slopes, scale=call.D**-0.5, lower_right=True)


def _alibi(lower_right: bool, right: int) -> Callable[[Call, torch.dtype], AttentionOptions]:
    def ask(call: Call, _dtype: torch.dtype) -> AttentionOptions:
        slopes = torch.rand(call.H).expand(call.B, -1)
        return _asks(alibi_slopes=slopes, lower_right=lower_right, window_right=right)(call, _dtype)

    return ask


def _dropout(dropout_p: float, **options: object) -> Callable[[Call, torch.dtype], AttentionOptions]:
    return _asks(seed=torch.tensor([-(2**62) + 12345]), dropout_p=dropout_p, **options)


def _lengths(call: Call, _dtype: torch.dtype) -> AttentionOptions:
    lengths = torch.tensor([call.S - 20, *[0] * (call.B - 1)], dtype=torch.int32)
    return AttentionOptions(key_lengths=lengths, scale=call.D**-0.5, lower_right=True, window_right=0)


def _everything(call: Call, dtype: torch.dtype) -> AttentionOptions:
    options = _biased(call, dtype)
    lengths = torch.randint(call.S // 2, call.S, (call.B,), dtype=torch.int32)
    return options._replace(
        seed=torch.tensor([2**40]), key_lengths=lengths, window_left=60, window_right=9, softcap=1.5, dropout_p=0.3
    )


def _packed(**options: object) -> Callable[[Call, torch.dtype], AttentionOptions]:
    def ask(call: Call, dtype: torch.dtype) -> AttentionOptions:
        of_lengths = {"query_starts": call.starts(0), "key_starts": call.starts(1), "lower_right": True}
        longest = max(queries for queries, _ in call.lengths)
        return _asks(**of_lengths, longest_query=longest, **options)(call, dtype)

    return ask


def _everything_packed(call: Call, dtype: torch.dtype) -> AttentionOptions:
    lengths = torch.tensor([max(0, keys - 7) for _, keys in call.lengths], dtype=torch.int32)
    options = {"alibi_slopes": torch.rand(len(call.lengths), call.H), "key_lengths": lengths, "softcap": 1.5}
    return _packed(**options, seed=torch.tensor([3]), dropout_p=0.3, window_left=40, window_right=5)(call, dtype)


PACKED = ((33, 33), (0, 5), (1, 1), (5, 0), (0, 0), (70, 140), (20, 3), (129, 129))
FEATURES = {
    "boolean mask": Call(_masked(lambda call, _: torch.rand(call.B, call.H, call.T, call.S) < 0.5)),
    "mask of padding": Call(_masked(_padding)),
    "mask with rows that see nothing": Call(_masked(_rows_that_see_nothing)),
    "mask with blocks that nothing sees": Call(_masked(_blocks_that_nothing_sees), T=300, S=400),
    "additive mask": Call(_masked(lambda call, dtype: torch.randn(call.H, call.T, call.S).to(dtype))),
    "additive mask, one number a query": Call(_masked(lambda call, dtype: torch.randn(call.T, 1).to(dtype))),
    "float32 mask with infinities": Call(_masked(_float32_with_infinities)),
    "causal, lower right": Call(_asks(lower_right=True, window_right=0)),
    "causal, lower right, fewer keys than queries": Call(_asks(lower_right=True, window_right=0), T=150, S=70),
    "window": Call(_asks(window_left=20, window_right=0), T=300, S=300),
    "window, lower right": Call(_asks(window_left=70, window_right=7, lower_right=True), T=200, S=333),
    "window of one key": Call(_asks(window_left=0, window_right=0)),
    "window of keys to come": Call(_asks(window_right=100, window_left=-1)),
    "window that ends before the keys do": Call(_asks(window_left=3, window_right=3), T=300, S=40),
    "softcap": Call(_asks(softcap=1.5, window_right=0)),
    "softcap that all scores reach": Call(_asks(softcap=0.1, scale=3.0)),
    "alibi": Call(_alibi(False, 0)),
    "alibi, lower right, both ways": Call(_alibi(True, -1)),
    "alibi and an additive mask": Call(_biased),
    "dropout": Call(_dropout(0.1, window_right=0)),
    "dropout in a window": Call(_dropout(0.5, window_left=30, window_right=2), T=200, S=200),
    "dropout of everything": Call(_dropout(1.0)),
    "key lengths": Call(_lengths),
    "everything": Call(_everything, T=150, S=170),
    "packed": Call(_packed(), B=1, T=262, S=315, lengths=PACKED),
    "packed, causal": Call(_packed(window_right=0), B=1, T=262, S=315, lengths=PACKED),
    "packed, everything": Call(_everything_packed, B=1, T=262, S=315, lengths=PACKED),
}


def seen_pairs(call: Call, options: AttentionOptions) -> Tensor:
    """bool [B, H, T, S] of a call that is not packed."""
    pairs = visible(call.T, call.S, options).expand(call.B, call.H, -1, -1)
    if options.key_lengths is not None:
        exists = torch.arange(call.S) < options.key_lengths[:, None, None, None]
        each = [visible(call.T, int(n), options) for n in options.key_lengths]
        pairs = torch.stack([F.pad(one, (0, call.S - one.shape[1])) for one in each])[:, None] & exists
        pairs = pairs.expand(-1, call.H, -1, -1)
    if options.mask is not None:
        pairs = pairs & (options.mask if options.mask.dtype == torch.bool else options.mask != -torch.inf)
    return pairs


def written_out(inputs: Inputs, call: Call, options: AttentionOptions) -> Tensor:
    """The rival: PyTorch's own function with a mask, or, for what it has no argument for, plain PyTorch in float32."""
    query = inputs[0]
    biased = options.mask is not None and options.mask.dtype not in (torch.bool, query.dtype)
    if options.softcap or options.dropout_p or options.query_starts is not None or options.alibi_slopes is not None:
        return reference.attention(*inputs, *options)[0]
    if biased:
        return reference.attention(*inputs, *options)[0]
    mask = seen_pairs(call, options)
    if options.mask is not None and options.mask.dtype != torch.bool:
        mask = options.mask.masked_fill(~mask, -torch.inf)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(*inputs, mask, scale=options.scale, enable_gqa=True)


@dataclass(frozen=True)
class Judged:
    """A call, and what its results, in the order of `RESULTS`, are judged by, whichever kernels compute them."""

    inputs: Inputs
    options: AttentionOptions
    grad_output: Tensor
    truth: tuple[Tensor, ...]
    rival: tuple[Tensor, ...]

    @classmethod
    def of(cls, call: Call, dtype: torch.dtype) -> "Judged":
        """A call with random inputs."""
        inputs, options = call.inputs(dtype), call.ask(call, dtype)
        grad_output = torch.randn(call.B, call.H, call.T, call.Dv).to(dtype)
        exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        output, logsumexp = reference.attention(*exact, *options)
        truth = output, logsumexp, *gradients(output, exact, grad_output)
        theirs = written_out(inputs, call, options)
        rounded = reference.attention(*(tensor.detach().float() for tensor in inputs), *options)[1]
        rival = theirs, rounded, *gradients(theirs, inputs, grad_output)
        return cls(inputs, options, grad_output, truth, rival)

    def judge(self, *results: Tensor) -> None:
        """Of the results that are given each must obey the rule of `tolerance`."""
        for name, mine, rival, truth in zip(RESULTS, results, self.rival, self.truth):
            assert_as_exact_as(mine, rival, truth, name)
