"""The linear layer of few rows: exact at every edge, on every level, and PyTorch's where that is faster."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_case import DTYPES, needs_extension
from tolerance import assert_as_exact_as, error, floor
from torch import Tensor
from torch.nn import functional as F
from trilby.kernels import QuantizedWeight, linear, quantize_rows, reference
from trilby.kernels.linear import MOST_ROWS, fewest_weights, reasons_for_pytorch

# (M, N, K): tiles of 8 streams, registers of 4 to 16 lanes, pairs of them, chunks of 512 columns, groups of 8 rows.
EDGES = (
    (1, 1, 1),
    (1, 7, 3),
    (1, 9, 31),
    (2, 8, 32),
    (3, 17, 33),
    (4, 65, 64),
    (5, 100, 100),
    (6, 30, 511),
    (7, 30, 513),
    (8, 129, 768),
    (9, 40, 96),
    (17, 40, 96),
    (1, 2100, 40),
)


def draw(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias, normal."""
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


def operator(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The operator itself, whatever the rule that chooses between it and PyTorch's says."""
    if isinstance(weight, QuantizedWeight):
        return torch.ops.trilby.linear(x, weight.values, bias, weight.scales)
    return torch.ops.trilby.linear(x, weight, bias, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", EDGES, ids=str)
def test_as_exact_as_pytorch_at_every_edge(sizes: tuple[int, int, int], dtype: torch.dtype, level: str) -> None:
    x, weight, bias = draw(*sizes, dtype)
    truth = reference.linear(x.double(), weight.double(), bias.double(), None)
    assert_as_exact_as(operator(x, weight, bias), F.linear(x, weight, bias), truth, "with bias")
    truth = reference.linear(x.double(), weight.double(), None, None)
    assert_as_exact_as(operator(x, weight), F.linear(x, weight), truth, "without bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", EDGES, ids=str)
def test_integers_are_multiplied_exactly(sizes: tuple[int, int, int], dtype: torch.dtype, level: str) -> None:
    """As exactly as PyTorch multiplies, in float32, the weights that the integers stand for."""
    x, weight, bias = draw(*sizes, dtype)
    quantized = quantize_rows(weight)
    truth = reference.linear(x.double(), quantized.values, bias.double(), quantized.scales)
    rival = F.linear(x.float(), quantized.dequantized(), bias.float())
    ours = operator(x, quantized, bias)
    assert ours.dtype == dtype
    assert_as_exact_as(ours, rival.to(dtype), truth, "quantized")


@needs_extension
@pytest.mark.parametrize("K", [1, 40, 768])
def test_quantizing_moves_an_output_by_no_more_than_it_says(K: int) -> None:
    x, weight, _ = draw(3, 20, K, torch.float32)
    quantized = quantize_rows(weight)
    half_a_level = weight.abs().amax(1) / 254
    assert ((quantized.dequantized() - weight).abs() <= half_a_level.unsqueeze(1) * (1 + 1e-5)).all()
    moved = (operator(x, quantized).double() - x.double() @ weight.double().T).abs()
    allowed = x.double().abs().sum(1, keepdim=True) * half_a_level
    assert (moved <= allowed * (1 + 1e-5) + floor(torch.float32, moved)).all()


def test_integers_use_all_of_their_range_and_zeros_stay_zeros() -> None:
    weight = torch.tensor([[0.0, 0.0], [-2.0, 1.0], [1e-30, 5e-31]])
    quantized = quantize_rows(weight)
    assert quantized.values.tolist() == [[0, 0], [-127, 64], [127, 64]]
    assert torch.equal(quantized.dequantized()[0], torch.zeros(2))
    assert quantized.dequantized(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.randn(4), r"weight was \[4\] torch.float32; it must be \[N, K\]"),
        (torch.ones(2, 2, dtype=torch.int32), "weight was .* torch.int32"),
        (torch.tensor([[1.0, torch.nan]]), "holds an infinity or a NaN"),
        (torch.tensor([[1.0, -torch.inf]]), "holds an infinity or a NaN"),
    ],
)
def test_what_cannot_be_quantized_is_refused(wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rows(wrong)


def test_a_quantized_weight_fits_together() -> None:
    right = quantize_rows(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"values was \[4, 3\] torch.float32; it must be \[N, K\] torch.int8"):
        replace(right, values=right.values.float())
    with pytest.raises(ValueError, match=r"scales was \[3\] torch.float32; it must be \[4\] torch.float32"):
        replace(right, scales=right.scales[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_no_bit(dtype: torch.dtype, level: str) -> None:
    x, weight, bias = draw(6, 50, 70, dtype)
    expected = operator(x, weight, bias)
    wider = torch.cat([weight, torch.full_like(weight, torch.nan)], 1)[:, :70]
    assert torch.equal(operator(x, wider, bias), expected)
    columns_outside = x.T.contiguous().T
    every_second = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    reversed_twice = x.flip(0).flip(0)
    for layout in (columns_outside, every_second, reversed_twice, x.view(6, 1, 70).expand(6, 1, 70)):
        assert torch.equal(operator(layout, weight, bias).view(6, 50), expected)
    uneven = x.view(2, 3, 70).transpose(0, 1)
    assert torch.equal(operator(uneven, weight, bias), expected.view(2, 3, 50).transpose(0, 1))
    assert torch.equal(operator(x[0], weight, bias), expected[0])
    assert torch.equal(operator(x[:1].expand(6, 70), weight, bias), expected[:1].expand(6, 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("threads")
def test_every_number_of_threads_and_of_rows_gives_the_same_bits(dtype: torch.dtype, level: str) -> None:
    x, weight, bias = draw(8, 700, 768, dtype)
    for weights in (weight, quantize_rows(weight)):
        results = []
        for threads in (1, 2, 4, 3):
            torch.set_num_threads(threads)
            results.append(operator(x, weights, bias))
        assert all(torch.equal(results[0], later) for later in results[1:])
        for rows in range(1, 8):
            assert torch.equal(operator(x[:rows], weights, bias), results[0][:rows])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_propagate_as_in_pytorch(bad: float, level: str) -> None:
    x, weight, bias = draw(2, 20, 40, torch.float32)
    for tensor, position in ((x, (0, 39)), (weight, (7, 3)), (bias, (5,))):
        poisoned = tensor.clone()
        poisoned[position] = bad
        given = [poisoned if other is tensor else other for other in (x, weight, bias)]
        ours, theirs = operator(*given), F.linear(*given)
        assert not ours.isfinite().all()
        assert error(ours, theirs.double()) < torch.inf


@needs_extension
@pytest.mark.parametrize("sizes", [(0, 5, 4), (3, 0, 4), (3, 5, 0)], ids=str)
def test_empty_sizes(sizes: tuple[int, int, int]) -> None:
    x, weight, bias = draw(*sizes, torch.float32)
    assert torch.equal(operator(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert linear(x, quantize_rows(weight)).shape == (sizes[0], sizes[1])


# What is PyTorch's by the rule, and what is trilby's.


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_of_many_weights_are_trilbys(dtype: torch.dtype) -> None:
    K = 1024
    for rows in (1, MOST_ROWS[dtype]):
        N = fewest_weights(rows, dtype) // K
        x, weight, bias = (torch.empty(size, dtype=dtype) for size in ((rows, K), (N, K), (N,)))
        assert reasons_for_pytorch(x, weight, bias) == ()
        (reason,) = reasons_for_pytorch(x, weight[1:])
        assert "weights, fewer than" in reason
        (reason,) = reasons_for_pytorch(torch.empty(MOST_ROWS[dtype] + 1, K, dtype=dtype), weight, bias)
        assert "rows, more than" in reason


@needs_extension
def test_autocast_is_pytorchs() -> None:
    x, weight, _ = draw(4, 1024, 1024, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x, weight).dtype == torch.float32


@needs_extension
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w, b: (x.double(), w.double(), b.double()), "dtypes are"),
        (lambda x, w, b: (x.bfloat16(), w, b), "dtypes are"),
        (lambda x, w, b: (x, w, b.half()), "dtypes are"),
        (lambda x, w, b: (x, w, b[:5]), "bias is"),
        (lambda x, w, b: (x, w, torch.stack([b, b], -1)[:, 0]), "are apart"),
        (lambda x, w, b: (x[:, :5], w, b), "input is"),
        (lambda x, w, b: (x[0, 0], w, b), "input is"),
        (lambda x, w, b: (x, w.T, b), "are apart"),
        (lambda x, w, b: (x, w.requires_grad_(), b), "gradients are asked for"),
        (lambda x, w, b: (x.to("meta"), w.to("meta"), b.to("meta")), "no kernel for meta"),
    ],
)
def test_what_is_pytorchs_has_a_reason(change: Callable[..., tuple[Tensor, ...]], reason: str) -> None:
    reasons = reasons_for_pytorch(*change(*draw(4, 1024, 1024, torch.float32)))
    assert any(reason in given for given in reasons), reasons


@needs_extension
@pytest.mark.parametrize("rows", [3, 8, 40])
def test_the_function_computes_what_pytorchs_computes(rows: int, level: str) -> None:
    x, weight, bias = draw(rows, 1024, 1024, torch.float32)
    truth = F.linear(x.double(), weight.double(), bias.double())
    ours = linear(x.view(rows, 1, 1024), weight, bias)
    assert_as_exact_as(ours.view(rows, 1024), F.linear(x, weight, bias), truth, "linear")
    quantized = quantize_rows(weight)
    truth = F.linear(x.double(), quantized.dequantized().double(), bias.double())
    rival = F.linear(x, quantized.dequantized(), bias)
    assert_as_exact_as(linear(x, quantized, bias), rival, truth, "quantized linear")


@needs_extension
def test_errors_are_pytorchs() -> None:
    x, weight, bias = draw(4, 1024, 1024, torch.float32)
    for wrong in ((x[:, :5], weight, bias), (x, weight, bias[:5]), (x.double(), weight, bias)):
        with pytest.raises(RuntimeError) as theirs:
            F.linear(*wrong)
        with pytest.raises(RuntimeError) as ours:
            linear(*wrong)
        assert str(ours.value) == str(theirs.value)


@needs_extension
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input": torch.randn(2, 9)}, "input has 9 columns, and weight 8"),
        ({"weight": torch.randn(8)}, r"weight \[N, K\]"),
        ({"weight": torch.randn(8, 4).T}, "must be adjacent"),
        ({"weight": torch.randn(4, 8).bfloat16()}, "must have input's dtype, or be int8"),
        ({"bias": torch.randn(5)}, r"bias must be \[N\]"),
        ({"bias": torch.randn(4).bfloat16()}, r"bias must be \[N\], contiguous and of input's dtype"),
        ({"scales": torch.randn(4)}, "or be int8 and have scales"),
        ({"weight": torch.ones(4, 8, dtype=torch.int8), "scales": torch.randn(3)}, r"scales must be \[N\]"),
        ({"weight": torch.ones(4, 8, dtype=torch.int8), "scales": torch.randn(4).double()}, "float32"),
        ({"input": torch.randn(2, 8).double(), "weight": torch.randn(4, 8).double()}, "must be float32"),
    ],
)
def test_what_would_be_read_outside_is_refused_by_name(wrong: dict[str, Tensor], message: str) -> None:
    right: dict[str, Tensor | None] = {"input": torch.randn(2, 8), "weight": torch.randn(4, 8)}
    right |= {"bias": None, "scales": None}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.trilby.linear(*(right | wrong).values())


# What torch asks of an operator.


@needs_extension
def test_opcheck() -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in draw(3, 5, 8, torch.float32))
    torch.library.opcheck(torch.ops.trilby.linear.default, (x, weight, bias, None))
    quantized = quantize_rows(weight)
    torch.library.opcheck(torch.ops.trilby.linear.default, (x, quantized.values, bias, quantized.scales))


@needs_extension
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_gradients_are_those_of_the_meaning(leading: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(*leading, 8), torch.randn(5, 8), torch.randn(5)
    leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
    for ours, theirs in zip(
        torch.autograd.grad(operator(*leaves).square().sum(), leaves),
        torch.autograd.grad(F.linear(*leaves).square().sum(), leaves),
    ):
        torch.testing.assert_close(ours, theirs)
    quantized = quantize_rows(weight)
    ours = torch.autograd.grad(operator(x, quantized, bias).square().sum(), (x, bias))
    theirs = torch.autograd.grad(F.linear(x, quantized.dequantized(), bias).square().sum(), (x, bias))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    asked = torch.ones(5, requires_grad=True)
    with pytest.raises(ValueError, match="scales requires a gradient"):
        torch.ops.trilby.linear(x, quantized.values, bias, asked)


@needs_extension
def test_gradients_of_the_function_are_pytorchs() -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in draw(4, 1024, 1024, torch.float32))
    for ours, theirs in zip(
        torch.autograd.grad(linear(*leaves).sum(), leaves), torch.autograd.grad(F.linear(*leaves).sum(), leaves)
    ):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert reasons_for_pytorch(*leaves) == ()


@needs_extension
@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    x, weight, bias = draw(3, 1024, 1024, torch.float32)
    quantized = quantize_rows(weight)

    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, weight, bias), linear(x, quantized, bias)

    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(layer(x), torch.compile(layer, fullgraph=True)(x)))


class TestMutants:
    """Linear layers with one mistake each: if the rule lets one pass, it proves nothing."""

    def judge(self, mistaken: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        x, weight, bias = draw(2, 64, 256, torch.float32)
        truth = F.linear(x.double(), weight.double(), bias.double())
        with pytest.raises(AssertionError, match="mutant: error"):
            assert_as_exact_as(mistaken(x, weight, bias), F.linear(x, weight, bias), truth, "mutant")

    def test_the_bias_dropped(self) -> None:
        self.judge(lambda x, w, b: F.linear(x, w))

    def test_the_last_column_dropped(self) -> None:
        self.judge(lambda x, w, b: F.linear(x[:, :-1], w[:, :-1], b))

    def test_two_rows_of_weights_exchanged(self) -> None:
        self.judge(lambda x, w, b: F.linear(x, w[[1, 0, *range(2, 64)]], b))

    def test_sums_in_bfloat16(self) -> None:
        self.judge(lambda x, w, b: F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).float())

    def test_the_scale_of_another_row(self) -> None:
        def mistaken(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            quantized = quantize_rows(weight)
            return F.linear(x, replace(quantized, scales=quantized.scales.roll(1)).dequantized(), bias)

        self.judge(mistaken)
