"""What the tests of trilby in PyTorch's place share: who computes, and a function's results with its gradients."""

from collections.abc import Callable

import torch
from tolerance import assert_as_exact_as
from torch import Tensor
from trilby.kernels import activated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::native_layer_norm",
    "aten::native_layer_norm_backward",
    "aten::_native_multi_head_attention",
)
ATTENTION, NORM = OPERATORS[:2], OPERATORS[2:4]


def is_trilbys(*operators: str) -> bool:
    """Whether PyTorch's dispatcher enters trilby for all of `operators`; it must be all or none."""
    entered = {"csrc/bindings_" in torch._C._dispatch_dump(operator) for operator in operators}
    assert len(entered) == 1
    return entered.pop()


def heads_inside(B: int, H: int, T: int, D: int, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D] as a projection of all heads leaves it: (B, T, H, D) in memory."""
    return torch.randn(B, T, H, D).to(dtype).transpose(1, 2)


def heads_outside(B: int, H: int, T: int, D: int, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D], contiguous."""
    return torch.randn(B, H, T, D).to(dtype)


def parts_of_one_projection(B: int, H: int, T: int, D: int, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D] as a slice of one projection of query, key and value, with gaps between its rows."""
    return torch.randn(B, T, 3, H, D).to(dtype)[:, :, 1].transpose(1, 2)


LAYOUTS = (heads_inside, heads_outside, parts_of_one_projection)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `function` gives, and the gradients of all inputs for one that is the same for every call."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype))
    return output.detach(), *(leaf.grad for leaf in leaves)


def assert_exact(function: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Activated, `function` and its gradients are as exact as PyTorch's, and are laid out in memory as PyTorch's."""
    rivals = with_gradients(function, *inputs)
    with activated():
        ours = with_gradients(function, *inputs)
    truths = with_gradients(truth, *(tensor.double() for tensor in inputs))
    for name, our, rival, true in zip(("output", *(f"gradient {i}" for i in range(9))), ours, rivals, truths):
        assert_as_exact_as(our, rival, true, name)
        assert (our.dtype, our.stride()) == (rival.dtype, rival.stride()), name
