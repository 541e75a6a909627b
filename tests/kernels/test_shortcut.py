"""The short way into an operator is taken where nothing can notice, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from trilby.kernels import reference, scaled_dot_product_attention
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

    def loss(query: Tensor) -> Tensor:
        return attention(query, key, value).square().sum()

    expected = torch.autograd.grad(loss(query.requires_grad_()), query)[0]
    torch.testing.assert_close(torch.func.grad(loss)(query.detach()), expected)
    stacked = torch.stack([query.detach(), key])
    by_vmap = torch.vmap(lambda query: attention(query, key, value))(stacked)
    torch.testing.assert_close(by_vmap, torch.stack([attention(query, key, value) for query in stacked]))


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
