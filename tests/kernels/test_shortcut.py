"""The short way into an operator is taken where nothing can notice, and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from trilby.kernels import attend, reference, scaled_dot_product_attention, varlen_attn
from trilby.kernels.attention import reasons_for_pytorch
from trilby.kernels.attention_arguments import AttentionArguments
from trilby.kernels.ops import NATIVE
from trilby.kernels.shortcut import is_ordinary, short_way

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to enter: {NATIVE.reason}")


def attention(*inputs: Tensor) -> Tensor:
    """Large enough for trilby's kernel."""
    return scaled_dot_product_attention(*inputs, is_causal=True)


def inputs(**options: bool) -> tuple[Tensor, ...]:
    """Query, key and value."""
    return tuple(torch.randn(1, 8, 100, 32, **options) for _ in range(3))


class Subclass(torch.Tensor):
    pass


class CountingMode(TorchDispatchMode):
    """Counts the operators of trilby that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen += function.namespace == "trilby"
        return function(*arguments, **(keywords or {}))


def test_ordinary_is_a_plain_tensor_or_parameter_in_no_mode() -> None:
    tensor = torch.randn(2)
    assert is_ordinary(tensor, None, torch.nn.Parameter(tensor), tensor.clone().requires_grad_())
    assert not is_ordinary(tensor, tensor.to("meta"))
    assert not is_ordinary(tensor.as_subclass(Subclass))
    assert not is_ordinary(torch._neg_view(tensor))
    with CountingMode():
        assert not is_ordinary(tensor)
    with forward_ad.dual_level():
        assert not is_ordinary(tensor)
    seen = []
    torch.vmap(lambda row: seen.append(is_ordinary(row)) or row)(torch.randn(2, 2))
    assert seen == [False]


def test_a_tensor_of_a_gpu_that_is_not_there_is_not_ordinary() -> None:
    with FakeTensorMode():
        pretended = torch.empty(4, device="cuda")
    assert not is_ordinary(pretended, on_gpu=True)
    assert not is_ordinary(pretended)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to be ordinary on")
def test_on_a_gpu_both_ways_give_the_same_bits() -> None:
    tensors = tuple(tensor.cuda().requires_grad_() for tensor in inputs())
    assert is_ordinary(*tensors, on_gpu=True)
    assert not is_ordinary(*tensors)
    assert not is_ordinary(tensors[0], torch.empty(1), on_gpu=True)
    arguments = (*tensors, *reference.AttentionOptions.plain(True, 0.2))
    short, full = short_way("attention", 10)(*arguments)[0], torch.ops.trilby.attention(*arguments)[0]
    assert torch.equal(short, full)
    for a, b in zip(*(torch.autograd.grad(output.square().sum(), tensors) for output in (short, full))):
        assert torch.equal(a, b)


def test_a_dispatch_mode_sees_the_operator() -> None:
    with CountingMode() as mode:
        attention(*inputs())
    assert mode.seen == 1


def test_both_ways_give_the_same_bits() -> None:
    arguments = (*inputs(requires_grad=True), *reference.AttentionOptions.plain(True, 0.2))
    short, full = short_way("attention", 10)(*arguments)[0], torch.ops.trilby.attention(*arguments)[0]
    assert torch.equal(short, full)
    for a, b in zip(*(torch.autograd.grad(output.square().sum(), arguments[:3]) for output in (short, full))):
        assert torch.equal(a, b)


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    with torch.no_grad():
        assert not attention(*inputs(requires_grad=True)).requires_grad
    assert not attention(*inputs()).requires_grad
    query, key, value = inputs()
    assert attention(query, key.requires_grad_(), value).requires_grad


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # of PyTorch's vmap
def test_transforms_are_pytorchs() -> None:
    query, key, value = inputs()

    def through(transform: Callable[..., Any], attend: Callable[..., Tensor], queries: Tensor) -> Tensor:
        return transform(lambda query: attend(query, key, value, is_causal=True).square())(queries)

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.func.grad(lambda query: function(query).sum())

    for transform, queries in ((gradient, query), (torch.vmap, torch.stack([query, key]))):
        ours = through(transform, scaled_dot_product_attention, queries)
        assert torch.equal(ours, through(transform, F.scaled_dot_product_attention, queries))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of PyTorch's forward mode
def test_forward_mode_is_pytorchs_with_its_error() -> None:
    arguments = inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with pytest.raises(NotImplementedError) as theirs:
            F.scaled_dot_product_attention(dual, *arguments[1:], is_causal=True)
        with pytest.raises(NotImplementedError) as ours:
            attention(dual, *arguments[1:])
    assert str(ours.value) == str(theirs.value)


def test_inference_mode_computes_the_same() -> None:
    arguments = inputs()
    with torch.inference_mode():
        assert torch.equal(attention(*arguments), attention(*(tensor.clone() for tensor in arguments)))
    assert torch.equal(attention(*arguments), attention(*arguments))


STARTS = torch.tensor([0, 0, 7, 12], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_at_once_gives_the_bits_of_attention(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, H, 12, 16).to(dtype) for H in (4, 2, 2))
    seen = torch.rand(12, 12) < 0.8
    for mask, is_causal in ((None, True), (None, False), (seen, False), (torch.randn(2, 1, 1, 12).to(dtype), False)):
        at_once = attend(query, key, value, mask, is_causal=is_causal)
        checked, _ = attend(query, key, value, mask, is_causal=is_causal, return_logsumexp=True)
        assert torch.equal(at_once, checked)
        assert at_once.stride() == checked.stride()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_packed_rows_at_once_give_the_bits_of_attention(requires_grad: bool) -> None:
    rows = [torch.randn(12, 2, 16, requires_grad=requires_grad) for _ in range(3)]
    arguments = (*rows, STARTS, STARTS, 7, 7)
    at_once = varlen_attn(*arguments, window_size=(-1, 0))
    checked = varlen_attn(*arguments, window_size=(-1, 0), seqused_k=STARTS.diff())
    assert torch.equal(at_once, checked)
    assert at_once.requires_grad == requires_grad
    if requires_grad:
        for a, b in zip(*(torch.autograd.grad(output.square().sum(), rows) for output in (at_once, checked))):
            assert torch.equal(a, b)


def test_packed_rows_at_once_are_differentiated_twice() -> None:
    rows = [torch.randn(12, 1, 3, dtype=torch.float32, requires_grad=True) for _ in range(3)]
    output = varlen_attn(*rows, STARTS, STARTS, 7, 7)
    (first,) = torch.autograd.grad(output.square().sum(), rows[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), rows[1])
    assert second.isfinite().all()
    assert second.abs().max() > 0


def test_what_the_kernel_refuses_is_refused_by_name() -> None:
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(TypeError, match="value is torch"):
        attend(query, query, query.bfloat16())
    with pytest.raises(ValueError, match="lower_right was not given"):
        attend(query, query[:, :, :3], query[:, :, :3], is_causal=True)
    with pytest.raises(ValueError, match="attn_mask has shape"):
        attend(query, query, query, torch.ones(5, 4, dtype=torch.bool))
    rows, starts = query[0].transpose(0, 1), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="enable_gqa"):
        varlen_attn(rows, rows[:, :1], rows[:, :1], starts, starts, 4, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="is on"):
        attend(query, query.to("meta"), query)


@pytest.mark.parametrize(
    ("sizes", "trains", "is_trilbys"),
    [
        ((1, 2, 4, 4, 16), False, False),
        ((1, 3, 4, 4, 16), False, True),
        ((1, 2, 8, 33, 16), False, False),
        ((1, 2, 1, 1023, 64), False, False),
        ((1, 2, 1, 1024, 64), False, True),
        ((1, 3, 1, 128, 64), False, True),
        ((1, 2, 31, 31, 64), False, False),
        ((1, 2, 32, 32, 64), False, True),
        ((1, 2, 63, 63, 256), False, False),
        ((1, 2, 64, 64, 256), False, True),
        ((4, 12, 63, 63, 256), True, False),
        ((4, 12, 64, 64, 256), True, True),
    ],
    ids=str,
)
def test_limits_of_calls_at_once(sizes: tuple[int, ...], trains: bool, is_trilbys: bool) -> None:
    B, H, T, S, D = sizes
    query, key = torch.empty(B, H, T, D, requires_grad=trains), torch.empty(B, H, S, D)
    assert (reasons_for_pytorch(AttentionArguments(query, key, key)) == ()) == is_trilbys
