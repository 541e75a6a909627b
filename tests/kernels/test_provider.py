"""trilby in PyTorch's place: models run unchanged and as exactly as before, and it comes and goes without a trace."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from torch import Tensor, nn
from torch.nn import attention as pytorch_attention
from torch.utils.checkpoint import checkpoint
from trilby.kernels import activate, activated, reference, restore, scaled_dot_product_attention
from trilby.kernels.attention import FEWEST_MULTIPLICATIONS, FEWEST_QUERIES, LARGEST_HEAD_DIM
from trilby.kernels.ops import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to activate: {NATIVE.reason}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::native_layer_norm",
    "aten::native_layer_norm_backward",
)
ATTENTION, NORM = OPERATORS[:2], OPERATORS[2:]
aten = torch.ops.aten
needs_registry = pytest.mark.skipif(
    not hasattr(pytorch_attention, "activate_flash_attention_impl"), reason="this torch has no registry"
)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """No test leaves trilby in place."""
    yield
    restore()


def is_trilbys(*operators: str) -> bool:
    """Whether PyTorch's dispatcher enters trilby for all of `operators`; it must be all or none."""
    entered = {"bindings_provider.cpp" in torch._C._dispatch_dump(operator) for operator in operators}
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


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_as_exact_as_pytorchs(level, dtype, layout, is_causal):
    inputs = tuple(layout(2, 4, 100, 32, dtype) for _ in range(3))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    def meaning(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.attention(query, key, value, is_causal, 32**-0.5)[0]

    assert_exact(attend, meaning, inputs)


def test_grouped_heads_a_scale_and_more_keys_than_queries(level):
    query = heads_inside(2, 6, 70, 32, torch.float32)
    key, value = (heads_inside(2, 2, 130, 32, torch.float32) for _ in range(2))
    assert_exact(
        lambda *inputs: F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True),
        lambda *inputs: reference.attention(*inputs, True, 0.3)[0],
        (query, key, value),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["none", "weight", "weight and bias", "float32 weight and bias"])
@pytest.mark.parametrize("shape", [(2, 8), (3, 5, 768), (64, 7, 40)], ids=str)
def test_layer_norm_is_as_exact_as_pytorchs(level, dtype, parameters, shape):
    parameter_dtype = torch.float32 if "float32" in parameters else dtype
    count = {"none": 0, "weight": 1}.get(parameters, 2)
    inputs = [torch.randn(shape).to(dtype), *(torch.randn(shape[-1]).to(parameter_dtype) for _ in range(count))]

    def normalize(input: Tensor, *affine: Tensor) -> Tensor:
        return F.layer_norm(input, shape[-1:], *affine)

    assert_exact(normalize, normalize, tuple(inputs))


def test_layer_norm_over_two_dimensions_of_a_transposed_input(level):
    inputs = (torch.randn(6, 9, 4, 10).transpose(0, 1), torch.randn(4, 10), torch.randn(10, 4).t())
    assert_exact(lambda x, w, b: F.layer_norm(x, (4, 10), w, b), lambda x, w, b: F.layer_norm(x, (4, 10), w, b), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "weight and bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(dtype, frozen):
    sizes = {"input": (30, 64), "weight": (64,), "bias": (64,)}
    tensors = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}

    def gradients(dtype: torch.dtype) -> dict[str, Tensor | None]:
        leaves = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen)
        output = F.layer_norm(leaves["input"], (64,), leaves["weight"], leaves["bias"])
        output.backward(tensors["input"].flip(0).to(dtype))
        return {name: leaf.grad for name, leaf in leaves.items()}

    rivals, truths = gradients(dtype), gradients(torch.float64)
    with activated():
        ours = gradients(dtype)
    for name, gradient in ours.items():
        assert (gradient is None) == (name in frozen)
        if gradient is not None:
            assert_as_exact_as(gradient, rivals[name], truths[name], name)


# ---- what PyTorch's operators promise --------------------------------------------------------------------------------


def description(results: tuple[Tensor | None, ...]) -> list[tuple]:
    """All of results but their numbers."""
    return [() if r is None else (r.shape, r.stride(), r.dtype, r.requires_grad, r.is_inference()) for r in results]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_of_the_attention_operators_are_laid_out_as_pytorchs(dtype, layout):
    query, key, value = (layout(2, 4, 100, 32, dtype) for _ in range(3))

    def run() -> list[tuple]:
        output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            torch.randn_like(output), query, key, value, output, logsumexp, 0.0, True
        )
        return description((output, logsumexp, *gradients))

    expected = run()
    with activated():
        assert run() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("parameters", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, "input's"], ids=str)
def test_results_of_the_norm_operators_are_laid_out_as_pytorchs(dtype, mask, parameters, parameter_dtype):
    parameter = torch.randn(4, 10).to(dtype if parameter_dtype == "input's" else parameter_dtype)
    weight = parameter if parameters in ("weight", "both") else None
    bias = parameter if parameters in ("bias", "both") else None
    if (weight is None and mask[1]) or (bias is None and mask[2]):
        return  # nobody asks for the gradient of what is not there
    if parameters == "bias" and parameter.dtype != dtype:
        return  # PyTorch's kernel has no backward for it, and it is PyTorch's to compute
    stream = torch.randn(6, 9, 4, 10).to(dtype).transpose(0, 1)

    def run() -> list[tuple]:
        output, mean, rstd = aten.native_layer_norm(stream, (4, 10), weight, bias, 1e-5)
        gradients = aten.native_layer_norm_backward(
            torch.randn_like(output), stream, (4, 10), mean, rstd, weight, bias, mask
        )
        return description((output, mean, rstd, *gradients))

    expected = run()
    with activated():
        assert run() == expected


def test_a_forward_of_pytorchs_may_have_a_backward_of_trilbys_and_the_other_way_round():
    inputs = tuple(heads_inside(2, 4, 100, 32, torch.float32).requires_grad_() for _ in range(3))

    def both(forward: Callable[[], None], backward: Callable[[], None]) -> tuple[Tensor, ...]:
        forward()
        output = F.layer_norm(F.scaled_dot_product_attention(*inputs, is_causal=True), (32,))
        backward()
        return torch.autograd.grad(output.square().sum(), inputs)

    expected = both(restore, restore)
    for forward, backward in ((activate, restore), (restore, activate)):
        for ours, theirs in zip(both(forward, backward), expected):
            torch.testing.assert_close(ours, theirs)


# ---- handing on ------------------------------------------------------------------------------------------------------

COVERED = (2, 4, 128, 32)
CASES = {
    "covered": (COVERED, {}),
    "one query too few": ((8, 8, FEWEST_QUERIES - 1, 64), {}),
    "queries enough": ((8, 8, FEWEST_QUERIES, 64), {}),
    "too little to compute": ((1, 1, 64, FEWEST_MULTIPLICATIONS // 64**2 - 1), {}),
    "just enough to compute": ((2, 1, 128, -(-FEWEST_MULTIPLICATIONS // (2 * 128**2))), {}),
    "the largest head": ((1, 2, 64, LARGEST_HEAD_DIM), {}),
    "a larger head": ((1, 2, 64, LARGEST_HEAD_DIM + 1), {}),
    "a mask": (COVERED, {"attn_mask": torch.randn(128, 128)}),
    "a mask of truths": (COVERED, {"attn_mask": torch.ones(128, 128).tril().bool()}),
}


@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES)
def test_attention_is_trilbys_and_pytorchs_by_the_limits_of_the_explicit_function(shape, options):
    query, key, value = (torch.randn(shape) for _ in range(3))
    expected = scaled_dot_product_attention(query, key, value, **options)
    with activated():
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, **options), expected)


def test_the_limits_are_seen_in_the_bits():
    """So the test above can fail: trilby's result and PyTorch's are two."""
    query, key, value = (torch.randn(COVERED) for _ in range(3))
    theirs = F.scaled_dot_product_attention(query, key, value)
    with activated():
        assert not torch.equal(F.scaled_dot_product_attention(query, key, value), theirs)


ODD_INPUTS = {
    "float64": tuple(torch.randn(COVERED, dtype=torch.float64) for _ in range(3)),
    "few queries": tuple(torch.randn(2, 4, 5, 16) for _ in range(3)),
    "no query": (torch.randn(2, 4, 0, 16), torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)),
    "three dimensions": tuple(torch.randn(4, 128, 32) for _ in range(3)),
    "values wider than keys": (torch.randn(COVERED), torch.randn(COVERED), torch.randn(2, 4, 128, 48)),
    "broadcast batch": (torch.randn(COVERED), torch.randn(1, 4, 128, 32), torch.randn(1, 4, 128, 32)),
    "heads last in memory": tuple(torch.randn(2, 4, 32, 128).transpose(2, 3) for _ in range(3)),
}


@pytest.mark.parametrize("inputs", ODD_INPUTS.values(), ids=ODD_INPUTS)
def test_attention_that_is_not_covered_is_pytorchs_bit_by_bit(inputs):
    expected = with_gradients(F.scaled_dot_product_attention, *inputs)
    with activated():
        for ours, theirs in zip(with_gradients(F.scaled_dot_product_attention, *inputs), expected):
            assert torch.equal(ours, theirs)


def test_dropout_draws_as_pytorch_does():
    inputs = tuple(torch.randn(COVERED) for _ in range(3))

    def dropped() -> Tensor:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(*inputs, dropout_p=0.3)

    expected = dropped()
    with activated():
        assert torch.equal(dropped(), expected)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_norms_that_are_not_covered_are_pytorchs_bit_by_bit(shape, dtype):
    shape = shape if dtype is torch.float32 else (30, 64)
    inputs = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    expected = with_gradients(lambda x, w, b: F.layer_norm(x, shape[-1:], w, b), *inputs)
    with activated():
        for ours, theirs in zip(with_gradients(lambda x, w, b: F.layer_norm(x, shape[-1:], w, b), *inputs), expected):
            assert torch.equal(ours, theirs)


REFUSED = {
    "a norm of another size": lambda: F.layer_norm(torch.randn(2, 3), (4,)),
    "a weight of another size": lambda: aten.native_layer_norm(torch.randn(2, 3), (3,), torch.randn(4), None, 1e-5),
    "no dimension": lambda: F.layer_norm(torch.randn(2, 3), ()),
    "integers": lambda: F.layer_norm(torch.ones(2, 3, dtype=torch.int64), (3,)),
    "mixed dtypes": lambda: F.layer_norm(torch.randn(2, 3), (3,), torch.randn(3).bfloat16()),
    "weight and bias of two dtypes": lambda: F.layer_norm(
        torch.randn(2, 3).bfloat16(), (3,), torch.randn(3), torch.randn(3).bfloat16()
    ),
    "dropout inside the operator": lambda: aten._scaled_dot_product_flash_attention_for_cpu(
        *(torch.randn(COVERED) for _ in range(3)), 0.5
    ),
    "query of other dtype": lambda: F.scaled_dot_product_attention(
        torch.randn(COVERED).bfloat16(), torch.randn(COVERED), torch.randn(COVERED)
    ),
    "keys of another size": lambda: F.scaled_dot_product_attention(
        torch.randn(COVERED), torch.randn(2, 4, 128, 33), torch.randn(COVERED)
    ),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_pytorch_refuses_is_refused_in_its_words(call):
    with pytest.raises(RuntimeError) as theirs:
        call()
    with activated(), pytest.raises(RuntimeError) as ours:
        call()
    assert str(theirs.value) in str(ours.value)


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


# ---- coming and going ------------------------------------------------------------------------------------------------


def test_activate_and_restore_are_idempotent():
    assert not is_trilbys(*OPERATORS)
    restore()
    for _ in range(2):
        activate()
        activate()
        assert is_trilbys(*OPERATORS)
        restore()
        assert not is_trilbys(*OPERATORS)


def test_activated_leaves_things_as_they_were():
    with activated():
        with activated():
            assert is_trilbys(*OPERATORS)
        assert is_trilbys(*OPERATORS)
    assert not is_trilbys(*OPERATORS)
    activate()
    with activated():
        pass
    assert is_trilbys(*OPERATORS)


def test_activated_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), activated():
        1 / 0  # noqa: B018
    assert not is_trilbys(*OPERATORS)


def test_activated_decorates_a_function():
    assert activated()(lambda: is_trilbys(*OPERATORS))()
    assert not is_trilbys(*OPERATORS)


def test_restore_ends_every_activation():
    with activated():
        activate()
        restore()
        assert not is_trilbys(*OPERATORS)
        with activated():
            assert is_trilbys(*OPERATORS)
        assert not is_trilbys(*OPERATORS)
    assert not is_trilbys(*OPERATORS)


def test_activations_of_several_threads_overlap():
    inside, leave = threading.Barrier(3), threading.Event()

    def stay() -> None:
        with activated():
            inside.wait(timeout=60)
            leave.wait(timeout=60)

    threads = [threading.Thread(target=stay) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(timeout=60)
    with activated():
        pass
    assert is_trilbys(*OPERATORS)
    leave.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not is_trilbys(*OPERATORS)


def test_threads_that_come_and_go_leave_nothing_behind():
    def come_and_go(_: int) -> bool:
        with activated():
            return is_trilbys(*OPERATORS)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(come_and_go, range(200)))
    assert not is_trilbys(*OPERATORS)


@pytest.mark.skipif(
    not hasattr(pytorch_attention, "activate_flash_attention_impl"), reason="this torch has no registry"
)
def test_pytorchs_registry_activates_attention_alone():
    assert "trilby" in pytorch_attention.list_flash_attention_impls()
    pytorch_attention.activate_flash_attention_impl("trilby")
    assert pytorch_attention.current_flash_attention_impl() == "trilby"
    assert is_trilbys(*ATTENTION)
    assert not is_trilbys(*NORM)
    with activated():
        assert is_trilbys(*OPERATORS)
    assert is_trilbys(*ATTENTION)
    pytorch_attention.activate_flash_attention_impl("trilby")
    assert is_trilbys(*ATTENTION)
    pytorch_attention.restore_flash_attention_impl()
    assert not is_trilbys(*OPERATORS)


@pytest.mark.skipif(
    not hasattr(pytorch_attention, "activate_flash_attention_impl"), reason="this torch has no registry"
)
def test_restore_tells_the_registry():
    pytorch_attention.activate_flash_attention_impl("trilby")
    restore()
    assert pytorch_attention.current_flash_attention_impl() is None
    assert not is_trilbys(*OPERATORS)


def run_python(*lines: str) -> subprocess.CompletedProcess:
    """A process of its own, where every warning is an error."""
    return subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, text=True)


@pytest.mark.parametrize("warn_always", [False, True])
def test_nothing_is_printed_and_nothing_changes_before_activate(warn_always):
    script = run_python(
        "import torch",
        f"torch.set_warn_always({warn_always})",
        f"before = [torch._C._dispatch_dump(operator) for operator in {OPERATORS}]",
        "import trilby.kernels",
        f"assert before == [torch._C._dispatch_dump(operator) for operator in {OPERATORS}]",
        "trilby.kernels.activate()",
        f"assert torch.is_warn_always_enabled() is {warn_always}",
        f"assert before != [torch._C._dispatch_dump(operator) for operator in {OPERATORS}]",
        "trilby.kernels.restore()",
        f"assert before == [torch._C._dispatch_dump(operator) for operator in {OPERATORS}]",
        "with trilby.kernels.activated(): torch.nn.LayerNorm(8)(torch.zeros(2, 8)).sum().backward()",
        "trilby.kernels.activate()",  # and left so, to the end of the process
    )
    assert (script.returncode, script.stdout, script.stderr) == (0, "", "")


def test_without_the_extension_activate_says_so():
    script = run_python(
        "import pathlib",
        "exists = pathlib.Path.exists",
        "pathlib.Path.exists = lambda path: not path.name.startswith('_native') and exists(path)",
        "import torch, trilby.kernels, warnings",
        "with warnings.catch_warnings(record=True) as caught:",
        "    warnings.simplefilter('always')",
        "    trilby.kernels.activate()",
        "    with trilby.kernels.activated(): pass",
        "assert [w.category for w in caught] == [RuntimeWarning] * 2, caught",
        "assert all('not built' in str(w.message) and w.filename == '<string>' for w in caught), caught",
        "torch.nn.LayerNorm(8)(torch.zeros(2, 8)).sum().backward()",
        "trilby.kernels.restore()",
    )
    assert (script.returncode, script.stderr) == (0, "")


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


# ---- PyTorch's own tests ---------------------------------------------------------------------------------------------

OPINFOS = (
    "native_layer_norm",
    "nn.functional.layer_norm",
    "nn.functional.multi_head_attention_forward",
    "nn.functional.rms_norm",
    "nn.functional.scaled_dot_product_attention",
)


def tensors_of(results: object) -> list[Tensor]:
    """The tensors among what an operator returned."""
    several = results if isinstance(results, tuple | list) else (results,)
    return [result for result in several if isinstance(result, Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPINFOS)
def test_the_samples_of_pytorchs_own_tests(name, dtype):
    pytest.importorskip("expecttest", reason="PyTorch's tests need expecttest (pip install expecttest)")
    from torch.testing._internal.common_methods_invocations import op_db

    def run(op: Callable, sample: object) -> list[Tensor]:
        torch.manual_seed(0)
        arguments = [sample.input, *sample.args]
        leaves = [t for t in [*arguments, *sample.kwargs.values()] if isinstance(t, Tensor) and t.requires_grad]
        outputs = tensors_of(op(*arguments, **sample.kwargs))
        loss = sum(output.float().square().sum() for output in outputs if output.requires_grad)
        return [*outputs, *(g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None)]

    (info,) = [info for info in op_db if info.name == name]
    if not info.supports_dtype(dtype, "cpu"):
        pytest.fail(f"{name} has no samples in {dtype}")
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        expected = run(info.op, sample)
        with activated():
            found = run(info.op, sample)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPINFOS)
def test_pytorchs_gradcheck(name):
    pytest.importorskip("expecttest", reason="PyTorch's tests need expecttest (pip install expecttest)")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [info for info in op_db if info.name == name]
    with activated():
        for sample in list(info.sample_inputs("cpu", torch.float64, requires_grad=True))[:4]:

            def function(input: Tensor, sample: object = sample) -> Tensor:
                torch.manual_seed(0)
                return tensors_of(info.op(input, *sample.args, **sample.kwargs))[0]

            if isinstance(sample.input, Tensor):
                assert torch.autograd.gradcheck(function, (sample.input,), fast_mode=True, nondet_tol=0.0)
