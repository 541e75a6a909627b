"""In the place of what PyTorch composes of several operators: attention that is no flash attention's, RMS norms."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from activation import DTYPES, LAYOUTS, assert_exact, heads_inside, with_gradients
from tolerance import assert_as_exact_as
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from trilby.kernels import activate, activated, attend, explain, reference
from trilby.kernels.ops import NATIVE
from trilby.kernels.options import AttentionOptions

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to activate: {NATIVE.reason}")
LARGE = (1024, 1024)  # an RMS norm that is worth taking in any dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_is_as_exact_as_pytorchs(dtype, affine):
    inputs = (torch.randn(LARGE).to(dtype), *([torch.randn(LARGE[-1]).to(dtype)] if affine else []))

    def normalize(x: Tensor, *weight: Tensor) -> Tensor:
        return F.rms_norm(x, LARGE[-1:], *weight)

    assert_exact(normalize, normalize, inputs)
    with activated():
        assert all(e.is_trilbys for e in explain(normalize, *inputs))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nn_rms_norm_is_trilbys_in_training_and_inference(context):
    with context(), activated():
        (found,) = explain(nn.RMSNorm(LARGE[-1]), torch.randn(LARGE))
    assert found.is_trilbys


@pytest.mark.parametrize("shape", [(4, 64), (0, 64), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rms_norms_that_are_not_covered_are_pytorchs_bit_by_bit(shape, dtype):
    inputs = torch.randn(shape, dtype=dtype), torch.randn(shape[-1:], dtype=dtype)
    expected = with_gradients(lambda x, w: F.rms_norm(x, shape[-1:], w), *inputs)
    with activated():
        for ours, theirs in zip(with_gradients(lambda x, w: F.rms_norm(x, shape[-1:], w), *inputs), expected):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_wider_than_keys_are_trilbys_and_as_exact(dtype, layout):
    inputs = layout(2, 4, 100, 32, dtype), layout(2, 4, 100, 32, dtype), layout(2, 4, 100, 48, dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    rivals = with_gradients(attend, *inputs)
    truths = with_gradients(
        lambda q, k, v: reference.attention(q, k, v, *AttentionOptions.plain(True, 32**-0.5))[0],
        *(t.double() for t in inputs),
    )
    with activated():
        ours = with_gradients(attend, *inputs)
        assert all(e.is_trilbys for e in explain(attend, *inputs))
    for i, (our, rival, truth) in enumerate(zip(ours, rivals, truths)):
        assert_as_exact_as(our, rival, truth, f"result {i}")


def composed_attention(inputs: tuple[Tensor, ...]) -> Tensor:
    """Which PyTorch composes, for values are wider than keys."""
    return F.scaled_dot_product_attention(*inputs, is_causal=True)


def covered(requires_grad: bool = False) -> tuple[Tensor, ...]:
    shapes = ((2, 4, 100, 32), (2, 4, 100, 32), (2, 4, 100, 48))
    return tuple(torch.randn(shape, requires_grad=requires_grad) for shape in shapes)


DROPPING = {
    "causal": {"is_causal": True},
    "a mask": {"attn_mask": torch.ones(100, 100).tril(3) > 0},
    "a scale": {"scale": 0.3},
    "grouped heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", DROPPING.values(), ids=DROPPING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_that_of_attend_bit_by_bit(options, dtype):
    heads = 2 if "enable_gqa" in options else 4
    for_attend = {name: value for name, value in options.items() if name != "enable_gqa"}
    if "attn_mask" in options:  # PyTorch's function makes it one to be added
        hidden = torch.zeros(100, 100, dtype=dtype).masked_fill(~options["attn_mask"], -torch.inf)
        for_attend["attn_mask"] = hidden
    inputs = heads_inside(2, 4, 100, 32, dtype), *(heads_inside(2, heads, 100, 32, dtype) for _ in range(2))

    def dropped(function: Callable[..., Tensor], options: dict[str, object]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return with_gradients(lambda *inputs: function(*inputs, dropout_p=0.3, **options), *inputs)

    expected = dropped(attend, for_attend)
    with activated():
        found = dropped(F.scaled_dot_product_attention, options)
        assert all(e.is_trilbys for e in explain(dropped, F.scaled_dot_product_attention, options))
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_drops_the_same_again(use_reentrant):
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.2, batch_first=True)
    x = torch.randn(2, 70, 64)

    def gradients(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return with_gradients(run, x)

    with activated():
        assert all(e.is_trilbys for e in explain(layer, x))
        expected = gradients(layer)
        found = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


def test_dropout_keeps_the_mean_and_drops_the_share_that_is_asked_for():
    q = torch.randn(1, 2, 64, 32)
    ones = torch.ones(1, 2, 64, 32)
    with activated():
        means = torch.stack([F.scaled_dot_product_attention(q, q, ones, dropout_p=0.5) for _ in range(200)]).mean()
        assert not torch.equal(*(F.scaled_dot_product_attention(q, q, ones, dropout_p=0.5) for _ in range(2)))
        everything = F.scaled_dot_product_attention(q, q, ones, dropout_p=1.0)
    assert abs(means - 1) < 0.02  # 25 600 rows of 64 weights: six standard deviations
    assert not everything.any()


def test_a_mask_that_learns_is_pytorchs_to_compute():
    inputs, mask = covered(), torch.zeros(100, 100, requires_grad=True)
    with activated():
        (found,) = explain(F.scaled_dot_product_attention, *inputs, attn_mask=mask)
        F.scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=0.1).sum().backward()
    assert any(reason.startswith("attn_mask requires a gradient") for reason in found.reasons)
    assert mask.grad.any()


def test_a_user_who_rules_out_flash_attention_gets_none():
    inputs = tuple(heads_inside(2, 4, 100, 32, torch.float32) for _ in range(3))
    with activated(), sdpa_kernel(SDPBackend.MATH):
        (found,) = explain(F.scaled_dot_product_attention, *inputs)
    assert not found.is_trilbys
    assert "torch.nn.attention.sdpa_kernel rules out flash attention" in found.reasons


def test_a_mode_sees_every_step_of_what_pytorch_composes():
    inputs = covered()
    with FlopCounterMode(display=False) as expected:
        composed_attention(inputs)
    with activated(), FlopCounterMode(display=False) as found:
        composed_attention(inputs)
    assert found.get_total_flops() == expected.get_total_flops() > 0


def test_compiled_it_is_pytorchs_and_stays_so_after_restore():
    inputs, x = covered(), torch.randn(LARGE)

    def both(inputs: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor]:
        return composed_attention(inputs), F.rms_norm(x, LARGE[-1:])

    expected = both(inputs, x)
    torch._dynamo.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    with activated():
        within = compiled(inputs, x)
    for results in (within, compiled(inputs, x)):
        for ours, theirs in zip(results, expected):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own jvp
def test_transforms_of_torch_func_and_forward_mode_are_pytorchs():
    q, k, v = covered()
    tangent = torch.randn_like(q)

    def loss(q: Tensor) -> Tensor:
        return composed_attention((q, k, v)).square().sum() + F.rms_norm(q, (32,)).sum()

    def all_of_them() -> list[Tensor]:
        stacked = torch.stack((q, 2 * q))
        return [
            torch.func.grad(loss)(q),
            torch.func.jvp(loss, (q,), (tangent,))[1],
            torch.func.vmap(loss)(stacked),
            torch.func.vmap(torch.func.grad(loss))(stacked),
        ]

    expected = all_of_them()
    with activated():
        for ours, theirs in zip(all_of_them(), expected):
            torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_as_exact_as_pytorchs():
    inputs = (*covered(), torch.randn(LARGE))

    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v, x = leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        loss = composed_attention((q, k, v)).square().sum() + F.rms_norm(x, LARGE[-1:], eps=1e-5).pow(3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    rivals, truths = second(torch.float32), second(torch.float64)
    activate()
    for i, (our, rival, truth) in enumerate(zip(second(torch.float32), rivals, truths)):
        assert_as_exact_as(our, rival, truth, f"input {i}")
