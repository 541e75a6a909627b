"""`layer_norm`, `rms_norm` and their residual forms are PyTorch's functions: results, gradients, errors, modules."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_as_exact_as
from torch import Tensor, nn
from torch.nn import functional as F
from trilby.kernels import LayerNorm, RMSNorm, add_layer_norm, add_rms_norm, layer_norm, norm_rules, rms_norm
from trilby.kernels.ops import NATIVE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.reason or "loaded")


@dataclass(frozen=True)
class Function:
    """One public function, and the same from PyTorch alone; both `(stream, branch, shape, weight, bias) -> outputs`."""

    name: str
    ours: Callable[..., tuple[Tensor, ...]]
    pytorch: Callable[..., tuple[Tensor, ...]]
    adds: bool
    biased: bool


def _added(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def call(stream: Tensor, branch: Tensor, *arguments: object) -> tuple[Tensor, ...]:
        summed = stream + branch
        return function(summed, *arguments), summed

    return call


FUNCTIONS = (
    Function(
        "layer_norm",
        lambda x, _, shape, w, b: (layer_norm(x, shape, w, b),),
        lambda x, _, shape, w, b: (F.layer_norm(x, shape, w, b),),
        adds=False,
        biased=True,
    ),
    Function(
        "rms_norm",
        lambda x, _, shape, w, b: (rms_norm(x, shape, w),),
        lambda x, _, shape, w, b: (F.rms_norm(x, shape, w, None if x.dtype != torch.float64 else EPS32),),
        adds=False,
        biased=False,
    ),
    Function("add_layer_norm", add_layer_norm, _added(F.layer_norm), adds=True, biased=True),
    Function(
        "add_rms_norm",
        lambda x, y, shape, w, b: add_rms_norm(x, y, shape, w),
        _added(lambda x, shape, w, b: F.rms_norm(x, shape, w, None if x.dtype != torch.float64 else EPS32)),
        adds=True,
        biased=False,
    ),
)
EPS32 = torch.finfo(torch.float32).eps
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Call:
    """Arguments of a call and the gradients of its outputs."""

    stream: Tensor
    branch: Tensor
    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    gradients: tuple[Tensor, Tensor]

    def results(self, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs, and gradients of whatever takes part, computed in `dtype`."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            # A clone keeps strides, as long as no dtype changes them.
            return (tensor.detach() if dtype is None else tensor.detach().to(dtype)).requires_grad_()

        leaves = [leaf(tensor) for tensor in (self.stream, self.branch, self.weight, self.bias)]
        outputs = function(leaves[0], leaves[1], self.shape, leaves[2], leaves[3])
        wanted = [tensor for tensor in leaves if tensor is not None]
        given = [gradient.to(output.dtype) for gradient, output in zip(self.gradients, outputs)]
        gradients = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
        return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def random_call(
    size: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype | None, biased: bool
) -> Call:
    stream, branch, first, second = (torch.randn(size).to(dtype) for _ in range(4))
    weight = torch.randn(shape).to(parameters) if parameters is not None else None
    bias = torch.randn(shape).to(parameters) if parameters is not None and biased else None
    return Call(stream, branch, shape, weight, bias, (first, second))


def assert_exact(function: Function, call: Call, what: str = "") -> None:
    ours, rival = call.results(function.ours), call.results(function.pytorch)
    truth = call.results(function.pytorch, torch.float64)
    assert len(ours) == len(rival) == len(truth)
    for i, tensors in enumerate(zip(ours, rival, truth)):
        assert tensors[0].dtype == tensors[1].dtype
        assert tensors[0].is_contiguous()
        assert_as_exact_as(*tensors, f"{function.name} {what} result {i}")


@each_function
@each_dtype
@pytest.mark.parametrize(
    ("leading", "width"),
    [((256,), 1), ((256,), 2), ((16, 16), 7), ((4, 8, 8), 96), ((2, 4, 2, 4), 1000), ((64,), 768)],
    ids=str,
)
@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_ranks_and_widths(
    function: Function, dtype: torch.dtype, leading: tuple[int, ...], width: int, level: str
) -> None:
    if width == 1 and function.name.endswith("layer_norm"):
        # x - mean is 0: the gradient is the cancellation of two equal numbers and nothing else.
        call = random_call((*leading, 1), (1,), dtype, None, function.biased)
    else:
        call = random_call((*leading, width), (width,), dtype, dtype, function.biased)
    assert_exact(function, call, level)


@each_function
@each_dtype
@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_one_row_and_wide_rows(function: Function, dtype: torch.dtype, level: str) -> None:
    for size in ((768,), (1, 768), (3, 65537), (65537,)):
        assert_exact(function, random_call(size, size[-1:], dtype, dtype, function.biased), f"{size}")


@each_dtype
@needs_kernels
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("rows", [5, 129])
def test_wide_rows_of_an_odd_number(rows: int, dtype: torch.dtype, level: str) -> None:
    """Wide rows are computed two at a time, and chunks of rows share a sum of the weights' gradients."""
    function = FUNCTIONS[0]
    assert_exact(function, random_call((rows, 4160), (4160,), dtype, dtype, function.biased))


@each_function
@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_normalized_shape_of_several_dimensions(function: Function, level: str) -> None:
    for dims in (1, 2, 3):
        size = (6, 5, 4, 96)
        assert_exact(function, random_call(size, size[-dims:], torch.float32, torch.float32, function.biased))


@each_function
@needs_kernels
@pytest.mark.usefixtures("every_size")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own rms_norm says so
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_float32_parameters(function: Function, dtype: torch.dtype, level: str) -> None:
    call = random_call((40, 200), (200,), dtype, torch.float32, function.biased)
    assert_exact(function, call)
    gradients = call.results(function.ours)[-1 - function.biased :]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@each_function
@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_without_parameters(function: Function, level: str) -> None:
    assert_exact(function, random_call((40, 200), (200,), torch.float32, None, function.biased))


@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_bias_without_weight(level: str) -> None:
    call = random_call((40, 200), (200,), torch.bfloat16, torch.bfloat16, biased=True)
    assert_exact(FUNCTIONS[0], Call(call.stream, call.branch, (200,), None, call.bias, call.gradients))


@needs_kernels
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("width", [64, 768, 65537])
def test_large_mean_and_tiny_variance(width: int, level: str) -> None:
    x = 1e6 + torch.randint(-2, 3, (64, width)) * 0.0625  # the two ulps around 10⁶
    truth = F.layer_norm(x.double(), (width,))
    assert_as_exact_as(layer_norm(x, (width,)), F.layer_norm(x, (width,)), truth, "layer_norm at mean 10⁶")
    # What is exact of it is exact: to the last few bits, where PyTorch's own loses half of them.
    assert (layer_norm(x, (width,)) - truth).abs().max() < 1e-5


@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_constant_rows_are_zero(level: str) -> None:
    assert torch.equal(layer_norm(torch.full((64, 100), 3.7), (100,)), torch.zeros(64, 100))


@needs_kernels
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@each_dtype
def test_nan_and_infinity_stay_in_their_row(bad: float, dtype: torch.dtype, level: str) -> None:
    x = torch.randn(64, 100).to(dtype)
    x[5, 17] = bad
    ours = layer_norm(x, (100,))
    assert ours[5].isnan().all()
    assert ours[torch.arange(64) != 5].isfinite().all()


@needs_kernels
@pytest.mark.usefixtures("every_size")
@each_dtype
def test_any_nan_in_a_parameter_is_a_nan_in_its_column(dtype: torch.dtype, level: str) -> None:
    weight = torch.ones(100)
    weight[3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN with every bit set
    assert layer_norm(torch.randn(64, 100).to(dtype), (100,), weight, None).isnan().any(0).nonzero().tolist() == [[3]]


def _layouts(like: Tensor) -> dict[str, Tensor]:
    """The numbers of `like` [8, 6, 96] in other layouts."""
    sliced = torch.empty(8, 6, 3 * 96)[..., 96:192]
    wide = torch.empty(8, 6, 2 * 96)[..., ::2]
    turned = torch.empty(6, 8, 96).transpose(0, 1)
    columns = torch.empty(8, 96, 6).transpose(1, 2)
    return {
        name: layout.copy_(like)
        for name, layout in {"sliced": sliced, "stride 2": wide, "turned": turned, "columns": columns}.items()
    }


@each_function
@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_layouts_of_inputs_and_gradients(function: Function, level: str) -> None:
    plain = random_call((8, 6, 96), (96,), torch.float32, torch.float32, function.biased)
    expected = plain.results(function.ours)
    streams, branches = _layouts(plain.stream), _layouts(plain.branch)
    first, second = _layouts(plain.gradients[0]), _layouts(plain.gradients[1])
    for name in streams:
        call = Call(streams[name], branches[name], (96,), plain.weight, plain.bias, (first[name], second[name]))
        for ours, same in zip(call.results(function.ours), expected):
            assert torch.equal(ours, same), f"{function.name}, {name}"


@each_function
@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_gradients_of_a_sum_have_no_strides(function: Function, level: str) -> None:
    plain = random_call((40, 96), (96,), torch.float32, torch.float32, function.biased)
    ones = torch.ones(()).expand(40, 96)
    expanded = Call(plain.stream, plain.branch, (96,), plain.weight, plain.bias, (ones, ones))
    dense = Call(plain.stream, plain.branch, (96,), plain.weight, plain.bias, (ones.clone(), ones.clone()))
    assert ones.stride() == (0, 0)
    for ours, same in zip(expanded.results(function.ours), dense.results(function.ours)):
        assert torch.equal(ours, same)


@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_parameters_with_strides(level: str) -> None:
    x, weight = torch.randn(40, 96), torch.randn(192)[::2]
    assert torch.equal(layer_norm(x, (96,), weight), layer_norm(x, (96,), weight.contiguous()))


@each_function
@each_dtype
@needs_kernels
@pytest.mark.usefixtures("every_size")
def test_nothing_given_is_written_and_backward_repeats(function: Function, dtype: torch.dtype, level: str) -> None:
    call = random_call((70, 200), (200,), dtype, dtype, function.biased)
    given = [t for t in (call.stream, call.branch, call.weight, call.bias, *call.gradients) if t is not None]
    before = [tensor.clone() for tensor in given]
    leaves = [t.detach().requires_grad_() for t in given[: len(given) - 2]]
    stream, branch, weight = leaves[:3]
    outputs = function.ours(stream, branch, (200,), weight, leaves[3] if function.biased else None)
    wanted = leaves if function.adds else [leaves[0], *leaves[2:]]
    kept = [output.detach().clone() for output in outputs]
    first = torch.autograd.grad(outputs, wanted, call.gradients[: len(outputs)], retain_graph=True)
    second = torch.autograd.grad(outputs, wanted, call.gradients[: len(outputs)])
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(given, before))
    assert all(torch.equal(a, b) for a, b in zip(outputs, kept))


@each_function
@each_dtype
@needs_kernels
@pytest.mark.usefixtures("every_size", "threads")
def test_same_bits_for_every_number_of_threads(function: Function, dtype: torch.dtype, level: str) -> None:
    call = random_call((300, 96), (96,), dtype, dtype, function.biased)
    expected = call.results(function.ours)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for _ in range(30):
            assert all(torch.equal(a, b) for a, b in zip(call.results(function.ours), expected))


@each_dtype
@needs_kernels
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("width", [33, 64, 256, 257, 768])
def test_a_row_does_not_depend_on_its_batch(width: int, dtype: torch.dtype, level: str) -> None:
    """Wherever it lies: narrow rows are computed several at a time, and of each pass some are left."""
    x = torch.randn(300, width).to(dtype)
    x[121] += 1000.0  # a mean that takes another pass, beside rows that take none
    normalized = layer_norm(x, (width,))
    for row in (0, 120, 121, 122, 123, 299):
        assert torch.equal(normalized[row : row + 1], layer_norm(x[row : row + 1], (width,)))


@each_dtype
@pytest.mark.parametrize("mebibytes", [9, 40])  # past every level's threshold; memory that glibc always maps anew
@needs_kernels
def test_streamed_and_stored_results_are_the_same(mebibytes: int, dtype: torch.dtype, level: str) -> None:
    rows = mebibytes * 2**20 // (256 * dtype.itemsize)
    x, weight, bias = torch.randn(rows, 256).to(dtype), torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    few = torch.ops.trilby.norm(x[:64], weight, bias, 1, True, 1e-5)
    many = torch.ops.trilby.norm(x, weight, bias, 1, True, 1e-5)
    assert all(torch.equal(a, b[:64]) for a, b in zip(few, many))
    gradients = [
        torch.ops.trilby.norm_backward(x[:n], None, x[:n], mean[:n], rstd[:n], weight, bias, None, 1, True, 0.0)[0]
        for n, (_, mean, rstd) in ((64, few), (rows, many))
    ]
    assert torch.equal(gradients[0], gradients[1][:64])


@needs_kernels
def test_zero_rows_have_zero_weight_gradients(level: str) -> None:
    x, weight = torch.empty(0, 96), torch.ones(96)
    normalized, mean, rstd = torch.ops.trilby.norm(x, weight, weight, 1, True, 1e-5)
    assert normalized.shape == (0, 96)
    _, _, *gradients = torch.ops.trilby.norm_backward(
        normalized, None, x, mean, rstd, weight, weight, None, 1, True, 0.0
    )
    assert all(torch.equal(gradient, torch.zeros(96)) for gradient in gradients)


@pytest.mark.parametrize("size", [(0, 96), (3, 0)])
def test_empty_inputs(size: tuple[int, int]) -> None:
    x = torch.empty(size, requires_grad=True)
    layer_norm(x, size[1:]).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == size


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.randn(4, 8), (4,)), RuntimeError),
        ((torch.randn(4, 8), ()), RuntimeError),
        ((torch.randn(4, 8), 8), TypeError),
        ((torch.randn(4, 8), (8,), torch.ones(7)), RuntimeError),
        ((torch.randn(4, 8), (8,), torch.ones(8, dtype=torch.bfloat16)), RuntimeError),
    ],
)
@pytest.mark.usefixtures("every_size")
def test_what_pytorch_refuses_is_refused_with_its_words(arguments: tuple[object, ...], error: type) -> None:
    messages = []
    for function in (F.layer_norm, layer_norm):
        with pytest.raises(error) as caught:
            function(*arguments)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def reasons(limits: norm_rules.Limits, rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    return norm_rules.reasons_for_pytorch(limits, torch.empty(rows, width, dtype=dtype), (width,))


def test_small_narrow_and_foreign_calls_are_pytorchs() -> None:
    layer = norm_rules.LAYER_NORM
    assert any("elements, fewer than 786432" in reason for reason in reasons(layer, 1023, 768))
    assert any("fewer than 8" in reason for reason in reasons(layer, 2**18, 7))
    assert any("no multiple of 64" in reason for reason in reasons(layer, 2**10, 1000))
    assert any("float64" in reason for reason in reasons(layer, 2**12, 768, torch.float64))
    if NATIVE.loaded:
        assert reasons(layer, 2**10, 768) == ()
        assert reasons(layer, 2**12, 1000) == ()
        assert reasons(layer, 2**10, 1000, torch.bfloat16) == ()


def test_what_pytorch_does_in_several_steps_is_trilbys_sooner() -> None:
    """The more PyTorch's functions pass over memory, the smaller the calls that a kernel is worth entering for."""
    steps = (norm_rules.LAYER_NORM, norm_rules.ADD_LAYER_NORM, norm_rules.ADD_RMS_NORM, norm_rules.RMS_NORM)
    for dtype in DTYPES:
        fewest = [limits.fewest[dtype] for limits in steps]
        assert fewest == sorted(fewest, reverse=True)
        for limits, least in zip(steps, fewest):
            assert any(f"fewer than {least}" in reason for reason in reasons(limits, least // 256 - 1, 256, dtype))
            if NATIVE.loaded:
                assert reasons(limits, least // 256, 256, dtype) == ()


def test_small_calls_are_pytorchs_to_the_bit() -> None:
    x, weight, bias = torch.randn(5, 768), torch.randn(768), torch.randn(768)
    assert torch.equal(layer_norm(x, (768,), weight, bias), F.layer_norm(x, (768,), weight, bias))
    assert torch.equal(rms_norm(x, (768,), weight), F.rms_norm(x, (768,), weight))
    normalized, summed = add_layer_norm(x, x, (768,), weight, bias)
    assert torch.equal(summed, x + x)
    assert torch.equal(normalized, F.layer_norm(x + x, (768,), weight, bias))


def test_float64_is_pytorchs() -> None:
    x = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, (64,)), (x[:2],))
    assert torch.equal(layer_norm(x, (64,)), F.layer_norm(x, (64,)))


@needs_kernels
def test_modules_are_drop_in() -> None:
    x = torch.randn(2048, 768)
    for ours, pytorch in ((LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)):
        mine, theirs = ours(768), pytorch(768)
        nn.init.normal_(mine.weight)
        theirs.load_state_dict(mine.state_dict())
        assert isinstance(mine, pytorch)
        assert repr(mine) == repr(theirs)
        truth = pytorch(768).double()
        truth.load_state_dict(mine.state_dict())
        if ours is RMSNorm:
            truth.eps = EPS32
        assert_as_exact_as(mine(x).detach(), theirs(x).detach(), truth(x.double()).detach(), repr(mine))


@needs_kernels
@each_dtype
def test_cpu_autocast_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2048, 768).to(dtype)
    weight = torch.ones(768)
    with torch.autocast("cpu", torch.bfloat16):
        ours, pytorch = layer_norm(x, (768,), weight, weight), F.layer_norm(x, (768,), weight, weight)
    assert ours.dtype == pytorch.dtype == dtype
