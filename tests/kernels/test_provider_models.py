"""Models run unchanged with trilby in PyTorch's place, whatever PyTorch does to them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import trilby.kernels
from activation import with_gradients
from tolerance import assert_as_exact_as
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from trilby.kernels import activated
from trilby.kernels.ops import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to activate: {NATIVE.reason}")


# ---- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block as GPT's users write it: one projection of query, key and value, and PyTorch's own layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        query, key, value = self.qkv(self.first(x)).split(C, dim=2)
        query, key, value = (
            tensor.view(B, T, self.heads, C // self.heads).transpose(1, 2) for tensor in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.contract(F.gelu(self.expand(self.second(x))))


class Attending(nn.Module):
    """nn.MultiheadAttention on one sequence, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False, is_causal=True, attn_mask=self.mask.to(x.dtype))[0]


MODELS = {
    "a GPT": lambda: nn.Sequential(Block(128, 4), Block(128, 4), nn.LayerNorm(128)),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True),
    "norm first": lambda: nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True, norm_first=True),
    "nn.TransformerDecoderLayer": lambda: Decoding(),
    "nn.MultiheadAttention": Attending,
}


class Decoding(nn.Module):
    """nn.TransformerDecoderLayer that attends to itself and to what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(128, 4, 256, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def losses_and_outputs(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The losses of eight steps, and what the trained model gives; the same for every dtype but for rounding."""
    torch.manual_seed(5)
    model = make().to(dtype)
    x, y = (torch.randn(4, 64, 128).to(dtype) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model(x).detach()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_trains_as_before(make):
    rivals, truths = losses_and_outputs(make, torch.float32), losses_and_outputs(make, torch.float64)
    with activated():
        ours = losses_and_outputs(make, torch.float32)
    assert rivals[0][-1] < rivals[0][0]
    assert not torch.equal(ours[1], rivals[1])  # other kernels, other roundings
    for name, our, rival, truth in zip(("losses", "outputs"), ours, rivals, truths):
        assert_as_exact_as(our, rival, truth, name)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_infers_as_before(make, mode):
    model = make().eval()
    x = torch.randn(4, 64, 128)
    with mode():
        expected = model(x)
        with activated():
            torch.testing.assert_close(model(x), expected)


# ---- with the rest of PyTorch ----------------------------------------------------------------------------------------


def test_compiled_whole_and_equal_to_eager():
    model = MODELS["a GPT"]()
    x = torch.randn(4, 64, 128)
    with activated():
        eager = with_gradients(model, x)
        torch._dynamo.reset()
        compiled = with_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for ours, theirs in zip(compiled, eager):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_compiled_by_inductor_and_activated_afterwards():
    """A compiled model calls PyTorch's attention operator, so it too is trilby's."""
    model = MODELS["a GPT"]()
    x = torch.randn(4, 64, 128)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    before = with_gradients(compiled, x)
    with activated():
        after = with_gradients(compiled, x)
        eager = with_gradients(model, x)
    assert not torch.equal(before[0], after[0])
    for ours, theirs in zip(after, eager):
        torch.testing.assert_close(ours, theirs)


def test_autocast():
    model = MODELS["a GPT"]()
    x = torch.randn(4, 64, 128)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    rival, truth = with_gradients(cast, x), with_gradients(model, x)
    with activated():
        ours = with_gradients(cast, x)
    for our, their, true in zip(ours, rival, truth):
        assert our.dtype == their.dtype
        assert_as_exact_as(our, their, true.double(), "autocast")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    model = MODELS["a GPT"]()
    x = torch.randn(4, 64, 128)
    with activated():
        expected = with_gradients(model, x)
        found = with_gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # from PyTorch, trilby or not
def test_vmap_and_grad_of_torch_func():
    query, key, value = (torch.randn(3, 1, 4, 128, 32) for _ in range(3))

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.layer_norm(F.scaled_dot_product_attention(query, key, value, is_causal=True), (32,)).square().sum()

    expected = torch.func.vmap(torch.func.grad(loss))(query, key, value)
    with activated():
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(query, key, value), expected)


def test_second_derivatives_of_layer_norm_are_pytorchs():
    inputs = tuple(torch.randn(size, dtype=torch.float32, requires_grad=True) for size in ((5, 16), (16,), (16,)))

    def second() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(F.layer_norm(inputs[0], (16,), *inputs[1:]).pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs[:2])

    expected = second()
    with activated():
        for ours, theirs in zip(second(), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_export_and_run():
    model = MODELS["a GPT"]().eval()
    x = torch.randn(4, 64, 128)
    with activated():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("functions", [F, trilby.kernels], ids=["activated", "explicit"])
def test_another_length_compiles_at_most_once_more(functions):
    """And what was compiled is what is computed eagerly."""

    def layer(x: Tensor) -> Tensor:
        heads = functions.layer_norm(x, (128,)).view(*x.shape[:2], 4, 32).transpose(1, 2)
        return functions.scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with activated():
        for T in (96, 112, 80, 130, 101):
            x = torch.randn(4, T, 128)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 2


FURTHER = {
    "forward mode": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "a gradient's gradient": lambda f, x: torch.func.grad(lambda y: torch.func.grad(lambda z: f(z).sum())(y).sum())(x),
}
FLASH = {
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True).square(),
    "layer norm": lambda x: F.layer_norm(x, (32,)).pow(3),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own jvp
@pytest.mark.parametrize("transform", FURTHER.values(), ids=FURTHER)
@pytest.mark.parametrize("function", FLASH.values(), ids=FLASH)
def test_what_autograd_makes_of_an_operator_is_pytorchs_number_or_its_error(function, transform):
    x = torch.randn(1, 4, 64, 32)

    def outcome() -> Tensor | str:
        try:
            return transform(function, x)
        except (NotImplementedError, RuntimeError) as refused:
            return str(refused).splitlines()[0]

    expected = outcome()
    with activated():
        found = outcome()
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
