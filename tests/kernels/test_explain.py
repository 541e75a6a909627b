"""`explain` says what PyTorch's profiler and the kernels' own count say; `strict` lets no call slip to PyTorch."""

import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from activation import OPERATORS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from trilby.kernels import (
    activated,
    attend,
    explain,
    gelu,
    layer_norm,
    linear,
    quantize_rows,
    rms_norm,
    scaled_dot_product_attention,
    strict,
    varlen_attn,
)
from trilby.kernels.explain import NOT_ACTIVATED, Explanations
from trilby.kernels.observer import OBSERVED, OBSERVERS
from trilby.kernels.ops import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to run: {NATIVE.reason}")


def attention_inputs(T: int = 128, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, length, 32, dtype=dtype) for length in (T, 128, 128))


def attention(**options) -> Callable[[], Tensor]:
    inputs = attention_inputs(options.pop("T", 128), options.pop("dtype", torch.float32))
    return lambda: F.scaled_dot_product_attention(*inputs, **options)


def normalize(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    x = torch.randn(shape, dtype=dtype)
    return lambda: F.layer_norm(x, shape[-1:])


class Model(nn.Module):
    """Everything that is observed, and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(128, 4, dropout=0.1, batch_first=True)
        self.norms = nn.Sequential(nn.RMSNorm(128), nn.LayerNorm(128))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.norms(self.attention(x, x, x, need_weights=False)[0])


def model_step(training: bool) -> Callable[[], object]:
    model, x = Model().train(training), torch.randn(4, 64, 128)
    if training:
        return lambda: model(x).sum().backward()
    return torch.no_grad()(lambda: model(x))


FUNCTIONS = {
    "attention": attention(is_causal=True),
    "few queries": attention(T=8),
    "dropout": attention(dropout_p=0.1),
    "float64": attention(dtype=torch.float64),
    "a mask": attention(attn_mask=torch.zeros(128, 128)),
    "layer norm": normalize(4, 64),
    "float64 layer norm": normalize(4, 64, dtype=torch.float64),
    "rms norm": lambda: F.rms_norm(torch.ones(2048, 512), (512,)),
    "small rms norm": lambda: F.rms_norm(torch.ones(4, 64), (64,)),
    "trilby's own": lambda: layer_norm(torch.ones(2048, 512), (512,)),
    "trilby's own, small": lambda: layer_norm(torch.ones(4, 64), (64,)),
    "a model in training": model_step(True),
    "a model in inference": model_step(False),
}


def operators_seen_by_pytorch(function: Callable[[], object]) -> Counter:
    """How often PyTorch's profiler saw each observed operator, parts of others left out."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function()
    seen = Counter()
    for event in trace.events():
        parent = event.cpu_parent
        while parent is not None and parent.name not in OBSERVED:
            parent = parent.cpu_parent
        if event.name in OBSERVED and parent is None:
            seen[event.name] += 1
    return seen


def counted(explanations: Explanations) -> list[int]:
    """How many of the calls trilby's kernels in PyTorch's place served, in the order of their own count."""
    return [sum(e.is_trilbys for e in explanations if e.operator == operator) for operator in OPERATORS]


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's own
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("active", [False, True], ids=["not activated", "activated"])
def test_explain_says_what_the_profiler_and_the_kernels_count(function, active):
    def check() -> None:
        before = torch.ops.trilby.served_calls()
        found = explain(function)
        served = [after - count for after, count in zip(torch.ops.trilby.served_calls(), before)]
        assert counted(found) == served
        seen = operators_seen_by_pytorch(function)
        of_pytorch = Counter(e.operator for e in found if e.operator.startswith("aten::"))
        assert of_pytorch == Counter({name: n for name, n in seen.items() if name.startswith("aten::")})
        for explanation in found:
            assert explanation.is_trilbys == (not explanation.reasons), str(explanation)
            assert (NOT_ACTIVATED in explanation.reasons) == (
                not active and explanation.operator.startswith("aten::") and "small" not in case
            ), str(explanation)

    case = next(name for name, each in FUNCTIONS.items() if each is function)
    case = case if case.startswith("trilby's own") else ""
    if active:
        with activated():
            check()
    else:
        check()


def test_every_reason_is_named():
    inputs = tuple(torch.randn(1, 1, 3, 300, dtype=torch.float64) for _ in range(3))
    (found,) = explain(F.scaled_dot_product_attention, *inputs)
    assert found.operator == "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert found.function == "scaled_dot_product_attention"
    reasons = "; ".join(found.reasons)
    for part in ("not activated", "torch.float64", "300, above 256", "3 queries, fewer than 24, in training"):
        assert part in reasons
    assert str(found).startswith("scaled_dot_product_attention [1, 1, 3, 300]")


def test_the_reasons_of_the_explicit_functions_are_their_own():
    (found,) = explain(layer_norm, torch.randn(4, 64), (64,))
    assert found.reasons == ("input has 256 elements, fewer than 786432",)
    (found,) = explain(rms_norm, torch.randn(4, 10, dtype=torch.float64), (10,))
    assert found.reasons == ("input's dtype is torch.float64, not float32, bfloat16 or float16",)
    (found,) = explain(scaled_dot_product_attention, *attention_inputs(), is_causal=True)
    assert (found.operator, found.is_trilbys) == ("trilby::attention_output", True)


def test_a_model_gives_a_line_for_each_call():
    with activated():
        found = explain(nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True), torch.randn(4, 64, 128))
    assert [e.function for e in found] == ["scaled_dot_product_attention", "layer_norm", "layer_norm"]
    assert len(str(found).splitlines()) == 3
    assert all(e.is_trilbys for e in found)
    assert str(explain(torch.sin, torch.ones(3))) == "no attention, norm or other function of trilby's was called"


def test_explain_leaves_no_trace():
    dumps = [torch._C._dispatch_dump(operator) for operator in OBSERVED]
    inputs, state = attention_inputs(), torch.get_rng_state()
    explain(F.scaled_dot_product_attention, *inputs, dropout_p=0.5)
    with pytest.raises(RuntimeError):
        explain(F.layer_norm, torch.ones(3), (4,))
    assert torch.equal(torch.get_rng_state(), state)
    assert [torch._C._dispatch_dump(operator) for operator in OBSERVED] == dumps
    assert not OBSERVERS.holders


def test_explain_sees_what_is_activated_within():
    def activates() -> None:
        with activated():
            F.layer_norm(torch.ones(4, 64), (64,))
        F.layer_norm(torch.ones(4, 64), (64,))

    assert [e.is_trilbys for e in explain(activates)] == [True, False]


def test_explain_hears_its_own_thread_alone():
    def elsewhere() -> None:
        thread = threading.Thread(target=normalize(4, 64))
        thread.start()
        thread.join()

    assert explain(elsewhere) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("row", [(1,), (8,), (4, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_reasons_against_a_layer_norm_are_those_that_its_kernel_goes_by(dtype, row, parameter):
    x = torch.ones(3, 4, 8 if row[-1] == 8 else 1, 1)[..., 0].to(dtype)
    x = x if len(row) < 2 or row[0] != 1 else torch.ones(3, 1, 1).to(dtype)
    weight, bias = torch.ones(row, dtype=parameter), torch.ones(row, dtype=parameter)

    def call() -> None:
        try:
            torch.native_layer_norm(x, row, weight, bias, 1e-5)
        except RuntimeError:
            refused.append(True)

    refused: list[bool] = []
    with activated():
        before = sum(torch.ops.trilby.served_calls())
        call()
        served = sum(torch.ops.trilby.served_calls()) > before
        try:
            with strict():
                torch.native_layer_norm(x, row, weight, bias, 1e-5)
            refuses = False
        except RuntimeError as error:
            refuses = str(error).startswith("strict: ")
    assert refuses == (not served)


# ---- strict ----------------------------------------------------------------------------------------------------------


def test_strict_computes_what_trilby_computes():
    x = torch.randn(4, 64, 128, requires_grad=True)
    layer = nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True)
    with strict():
        layer(x).sum().backward()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        rms_norm(torch.ones(2048, 512), (512,))
        F.rms_norm(torch.ones(2048, 512), (512,))
        layer_norm(torch.ones(4, 64), (64,))  # handed over, and PyTorch's is trilby's here


REFUSED = {
    "float64": (attention(dtype=torch.float64), "float64"),
    "few queries": (attention(T=16), "16 queries, fewer than 32"),
    "a small norm of float64": (normalize(4, 8, dtype=torch.float64), "float64"),
    "a small rms norm": (lambda: F.rms_norm(torch.ones(4, 64), (64,)), "256 elements"),
    "handed over by trilby's own function": (lambda: rms_norm(torch.ones(4, 64), (64,)), "256 elements"),
    "the fast path": (
        lambda: torch.no_grad()(nn.TransformerEncoderLayer(128, 4, batch_first=True).eval().double())(
            torch.ones(2, 128, 128).double()
        ),
        "float64",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_strict_raises_instead_of_handing_over(function, reason):
    function()
    with strict(), pytest.raises(RuntimeError, match=reason):
        function()
    function()


def test_strict_refuses_a_backward_too():
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    loss = F.layer_norm(x, (64,)).sum()
    with strict(), pytest.raises(RuntimeError, match=r"layer_norm, backward.*float64"):
        loss.backward()


def test_strict_holds_in_its_own_thread():
    def elsewhere() -> None:
        function = attention(dtype=torch.float64)
        thread = threading.Thread(target=lambda: results.append(function()))
        thread.start()
        thread.join()

    results: list[Tensor] = []
    with strict():
        elsewhere()
    assert len(results) == 1


# ---- trilby's own functions ------------------------------------------------------------------------------------------


def sequences(*lengths: int) -> tuple[Tensor, int]:
    """Where sequences of these lengths start, and the longest."""
    return torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


def varlen(dtype: torch.dtype = torch.float32) -> object:
    starts, longest = sequences(5, 40)
    packed = torch.randn(45, 4, 32, dtype=dtype)
    return varlen_attn(packed, packed, packed, starts, starts, longest, longest)


@torch.no_grad()
def decode(S: int) -> object:
    query, key = torch.randn(1, 4, 2, 64), torch.randn(1, 4, S, 64)
    return scaled_dot_product_attention(query, key, key)


def matrix(rows: int, dtype: torch.dtype = torch.bfloat16) -> object:
    return linear(torch.ones(rows, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype))


OWN = {
    "linear": (lambda: matrix(4), lambda: matrix(512), "512 rows"),
    "a small linear": (lambda: matrix(4), lambda: linear(torch.ones(4, 8), torch.ones(8, 8)), "64 weights"),
    "quantized": (
        lambda: linear(torch.ones(4, 1024), quantize_rows(torch.ones(1024, 1024))),
        lambda: linear(torch.ones(512, 1024), quantize_rows(torch.ones(1024, 1024))),
        "512 rows",
    ),
    "gelu": (lambda: gelu(torch.ones(2**15), "tanh"), lambda: gelu(torch.ones(2**15)), "approximate is 'none'"),
    "attend": (
        lambda: attend(*attention_inputs(8), softcap=3.0),
        lambda: attend(*attention_inputs(8, torch.float64), softcap=3.0),
        "float64",
    ),
    "varlen_attn": (varlen, lambda: varlen(torch.float64), "float64"),
    "scaled_dot_product_attention": (lambda: decode(4096), lambda: decode(64), "32768 multiplications, fewer"),
}


@pytest.mark.parametrize(("ours", "theirs", "reason"), OWN.values(), ids=OWN)
def test_trilbys_own_functions_are_seen(ours, theirs, reason):
    (found,) = explain(ours)
    assert found.is_trilbys, str(found)
    (found,) = explain(theirs)
    assert not found.is_trilbys
    assert any(reason in each for each in found.reasons), str(found)
    with strict():
        ours()
        with pytest.raises(RuntimeError, match=reason):
            theirs()


def test_explanations_bear_the_names_of_trilbys_own_functions():
    x = torch.ones(2**15, requires_grad=True)
    names = [e.function for e in explain(lambda: (varlen(), matrix(4), gelu(x, "tanh").sum().backward()))]
    assert names == ["varlen_attn", "linear", "gelu", "gelu, backward"]


def test_pytorchs_linear_and_gelu_are_nobodys_to_tell_of():
    assert explain(lambda: F.gelu(F.linear(torch.ones(4, 8), torch.ones(8, 8)))) == ()
