"""In PyTorch's place on GPUs, as far as it shows without one.

A torch without CUDA has no kernels for GPUs to take the place of. So stand-ins are put there, under the dispatch key
CUDA, and `activate` puts trilby's above them; both are entered with tensors of a CPU, where trilby:: operators compute.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import Library
from trilby.kernels import activate, activated, restore
from trilby.kernels.ops import NATIVE
from trilby.kernels.override import has_kernel_of_its_own
from trilby.kernels.provider_on_gpu import ATTENTION, NORM, EfficientAttention, FlashAttention, LayerNorm

OPERATORS = (*ATTENTION, *NORM)
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (2, 4, 100, 32)
needs_extension = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to activate: {NATIVE.reason}")


def overload(operator: str) -> Any:
    return getattr(torch.ops.aten, operator.removeprefix("aten::")).default


def enter(operator: str, *arguments: Any, **options: Any) -> Any:
    """What the kernel of a GPU for `operator` returns."""
    return overload(operator).redispatch(CUDA, *arguments, **options)


@pytest.fixture
def handed_over() -> Iterator[list[str]]:
    """Kernels in the place of PyTorch's for GPUs, and the names of those that were called."""
    called: list[str] = []
    library = Library("aten", "IMPL")
    for operator in OPERATORS:
        name = operator.removeprefix("aten::")
        count = len(overload(operator)._schema.returns)

        def kernel(*_: Any, _name: str = name, _count: int = count, **__: Any) -> Any:
            called.append(_name)
            results = [torch.full((), 7.0) for _ in range(_count)]
            if _name == "_scaled_dot_product_flash_attention":
                results[4] = results[5] = 7
            return tuple(results)

        library.impl(name, kernel, "CUDA", allow_override=True)
    yield called
    restore()
    library._destroy()


def described(results: tuple[Any, ...]) -> list[Any]:
    """All of results but their numbers and devices."""
    return [(r.shape, r.stride(), r.dtype) if isinstance(r, Tensor) else r for r in results]


def heads(outside: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value, heads outside or inside of the tokens in memory."""
    B, H, T, D = SHAPE
    if outside:
        return tuple(torch.randn(SHAPE).to(dtype) for _ in range(3))
    return tuple(torch.randn(B, T, H, D).to(dtype).transpose(1, 2) for _ in range(3))


# ---- there and gone --------------------------------------------------------------------------------------------------


def test_activate_comes_above_the_kernels_of_gpus_and_goes(handed_over):
    before = [torch._C._dispatch_dump(operator) for operator in OPERATORS]
    activate()
    assert all("override.py" in torch._C._dispatch_dump(operator) for operator in OPERATORS)
    restore()
    assert [torch._C._dispatch_dump(operator) for operator in OPERATORS] == before


@pytest.mark.skipif(has_kernel_of_its_own(OPERATORS[0], "CUDA"), reason="this torch has kernels for GPUs")
@pytest.mark.filterwarnings("error")
def test_where_there_are_none_there_are_none_of_trilbys():
    with activated():
        assert not any(has_kernel_of_its_own(operator, "CUDA") for operator in OPERATORS)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def attend(operator: str, is_causal: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Output and gradients, by the two operators of PyTorch's that autograd would call."""

    def flash(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        output, logsumexp, *lengths, seed, offset, _ = results = enter(operator, *inputs, 0.0, is_causal, scale=0.2)
        assert described(results) == described(
            overload(operator)(*(t.to("meta") for t in inputs), 0.0, is_causal, scale=0.2)
        )
        last = (*lengths, 0.0, is_causal, seed, offset)
        return output, *enter(f"{operator}_backward", grad, *inputs, output, logsumexp, *last, scale=0.2)

    def efficient(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = enter(operator, *inputs, None, True, 0.0, is_causal, scale=0.2)
        assert described(results) == described(
            overload(operator)(*(t.to("meta") for t in inputs), None, True, 0.0, is_causal, scale=0.2)
        )
        output, logsumexp, seed, offset = results
        assert enter(operator, *inputs, None, False, 0.0, is_causal, scale=0.2)[1].numel() == 0
        *gradients, of_bias = enter(
            f"{operator}_backward", grad, *inputs, None, output, logsumexp, seed, offset, 0.0, [True] * 3 + [False],
            is_causal, scale=0.2,
        )  # fmt: skip
        assert of_bias is None
        return output, *gradients

    return flash if "flash" in operator else efficient


@needs_extension
@pytest.mark.parametrize("operator", [name for name in ATTENTION if "backward" not in name])
@pytest.mark.parametrize("outside", [False, True], ids=["heads inside", "heads outside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_attention_is_as_exact_as_pytorchs_and_as_the_fake_kernel_says(
    handed_over, operator, outside, dtype, is_causal
):
    inputs = heads(outside, dtype)
    grad = torch.randn_like(inputs[0])

    def by_autograd(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        output = F.scaled_dot_product_attention(*leaves, is_causal=is_causal, scale=0.2)
        return output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))

    with activated():
        ours = attend(operator, is_causal)(grad, *inputs)
    assert handed_over == []
    if "flash" in operator:
        assert [t.stride() for t in ours] == [torch.empty_like(t).stride() for t in (inputs[0], *inputs)]
    for i, (our, rival, truth) in enumerate(zip(ours, by_autograd(dtype), by_autograd(torch.float64))):
        assert_as_exact_as(our, rival, truth, f"result {i}")


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
def test_layer_norm_is_exact_and_as_the_fake_kernel_says(handed_over, dtype, affine, wanted):
    x, grad = (torch.randn(6, 5, 4, 16).to(dtype) for _ in range(2))
    parameters = [torch.randn(4, 16).to(dtype) for _ in range(2)] if affine else [None, None]
    wanted = (wanted[0], *(each and affine for each in wanted[1:]))
    forward, backward = NORM

    def both(call: Callable[..., Any], dtype: torch.dtype) -> tuple[Any, ...]:
        given = [tensor if tensor is None else tensor.to(dtype) for tensor in (x, *parameters, grad)]
        normalized, mean, rstd = results = call(forward, given[0], (4, 16), *given[1:3], 1e-5)
        if call is enter:
            fake = overload(forward)(
                *(x.to("meta"), (4, 16)), *(p if p is None else p.to("meta") for p in given[1:3]), 1e-5
            )
            assert [d[0] for d in described(results)] == [d[0] for d in described(fake)]
            assert mean.dtype == rstd.dtype == torch.float32  # as PyTorch's kernel on GPUs keeps them
        else:
            mean, rstd = mean.to(dtype), rstd.to(dtype)
        return normalized, *call(backward, given[3], given[0], (4, 16), mean, rstd, *given[1:3], wanted)

    def pytorchs(operator: str, *arguments: Any) -> Any:
        return overload(operator)(*arguments)

    with activated():
        ours = both(enter, dtype)
    assert handed_over == []
    for i, (our, rival, truth) in enumerate(zip(ours, both(pytorchs, dtype), both(pytorchs, torch.float64))):
        if i and not wanted[i - 1]:
            assert our is None
        else:
            assert_as_exact_as(our, rival, truth, f"result {i}")


# ---- handing over ----------------------------------------------------------------------------------------------------


@needs_extension
def test_what_trilby_does_not_compute_is_handed_to_the_kernel_that_was_there(handed_over):
    inputs = heads(False, torch.float64)
    with activated():
        output = enter("aten::_scaled_dot_product_flash_attention", *inputs)[0]
        enter("aten::_scaled_dot_product_flash_attention", *heads(False, torch.float16), 0.0, False, True)
        enter("aten::_scaled_dot_product_efficient_attention", *inputs, None, False)
        enter("aten::native_layer_norm", inputs[0], (32,), None, None, 1e-5)
        enter("aten::native_layer_norm", torch.ones(2, 3).half(), (3,), torch.ones(3), None, 1e-5)
    assert output == 7
    assert handed_over == [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "native_layer_norm",
        "native_layer_norm",
    ]


def on_gpu(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


CHOICES: dict[str, tuple[Callable[[], Any], str]] = {
    "flash attention": (lambda: FlashAttention(*[on_gpu()] * 3), ""),
    "grouped heads": (lambda: FlashAttention(on_gpu(), *[on_gpu((2, 2, 100, 32))] * 2), ""),
    "one query": (lambda: FlashAttention(on_gpu((2, 4, 1, 32)), *[on_gpu()] * 2), ""),
    "float32": (lambda: EfficientAttention(*[on_gpu(dtype=torch.float32)] * 3, None, True), ""),
    "dropout": (lambda: FlashAttention(*[on_gpu()] * 3, dropout_p=0.1), "dropout_p is 0.1"),
    "a mask": (lambda: EfficientAttention(*[on_gpu()] * 3, on_gpu((2, 4, 100, 100)), True), "attn_mask is given"),
    "a large head": (lambda: FlashAttention(*[on_gpu((2, 4, 100, 264))] * 3), "head dimension is 264"),
    "layer norm": (lambda: LayerNorm(on_gpu(), [32], None, None, 1e-5), ""),
    "a wide norm": (lambda: LayerNorm(on_gpu((2, 65537)), [65537], None, None, 1e-5), "more than 65536"),
    "a weight of another dtype": (
        lambda: LayerNorm(on_gpu(), [32], on_gpu((32,), torch.float32), None, 1e-5),
        "weight or bias is torch.float32",
    ),
}


@pytest.mark.parametrize(("call", "reason"), CHOICES.values(), ids=CHOICES)
def test_the_choice_for_a_gpu_needs_none(call, reason):
    with FakeTensorMode():
        reasons = call().reasons_for_pytorch()
    assert len(reasons) == bool(reason)
    assert all(reason in each for each in reasons)


@needs_extension
def test_torch_compile_plans_for_a_gpu_while_trilby_is_activated(handed_over):
    with activated(), FakeTensorMode():
        query = on_gpu()
        output = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        normalized = F.layer_norm(output, (32,))
    assert normalized.shape == SHAPE
    assert normalized.device.type == "cuda"
    assert handed_over == []
