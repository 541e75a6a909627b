"""Encoders in inference: PyTorch's one operator of attention and its projections, with trilby in its place."""

from collections.abc import Callable

import pytest
import torch
from activation import DTYPES
from tolerance import assert_as_exact_as
from torch import Tensor, nn
from trilby.kernels import activated, explain, strict
from trilby.kernels.ops import NATIVE

pytestmark = [
    pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to run: {NATIVE.reason}"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
B, T, C, H = 3, 70, 64, 4
OPERATOR = "aten::_native_multi_head_attention"


def encoder(dtype: torch.dtype = torch.float32, **options: object) -> nn.TransformerEncoderLayer:
    """The same weights in every dtype."""
    torch.manual_seed(5)
    return nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True, **options).eval().to(dtype)


def text(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(6)).to(dtype)


def padding(length: int = T) -> Tensor:
    """[B, length], true where there is nothing to see: nowhere, at the end, at the beginning."""
    place = torch.arange(length)
    return torch.stack([place < 0, place >= length - 20, place < 9])


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "of padding": {"src_key_padding_mask": padding()},
    "for all": {"src_mask": CAUSAL},
    "for all, in numbers": {"src_mask": torch.zeros(T, T).masked_fill(CAUSAL, -torch.inf)},
    "of each head": {"src_mask": CAUSAL.repeat(B * H, 1, 1)},
    "for all and of padding": {"src_mask": CAUSAL, "src_key_padding_mask": padding()[:2].repeat(2, 1)[:B].flip(0)},
}
KINDS = {"relu": {}, "gelu, norms first": {"activation": "gelu", "norm_first": True}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_an_encoder_is_as_exact_as_pytorchs(dtype, mask, kind):
    def run(dtype_of_run: torch.dtype) -> Tensor:
        layer = encoder(dtype, **kind).to(dtype_of_run)
        given = {name: m.to(dtype_of_run) if m.is_floating_point() else m for name, m in mask.items()}
        return layer(text(dtype).to(dtype_of_run), **given)

    rival, truth = run(dtype), run(torch.float64)
    with activated():
        ours = run(dtype)
        first = explain(run, dtype)[int(kind != {})]
    assert (first.operator, first.is_trilbys) == (OPERATOR, True)
    assert (ours.dtype, ours.stride()) == (rival.dtype, rival.stride())
    seen = ~torch.isnan(truth)  # PyTorch's operator has no number where no key is seen
    assert_as_exact_as(ours[seen], rival[seen], truth[seen], "encoder")


def masks_of(length: int) -> dict[str, dict[str, Tensor]]:
    """None, that of padding, and that with what follows."""
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "of padding": {"key_padding_mask": padding(length)},
        "both": {"attn_mask": causal, "key_padding_mask": padding(length)},
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize("mask", ["none", "of padding", "both"])
@torch.no_grad()
def test_weights_are_as_exact_as_pytorchs(level, dtype, averaged, length, mask):
    """Of each head, and the mean of all, on every level; so is the output beside them."""

    def run(dtype_of_run: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        layer = nn.MultiheadAttention(C, H, batch_first=True).eval().to(dtype).to(dtype_of_run)
        x = torch.randn(B, length, C).to(dtype).to(dtype_of_run)
        return layer(x, x, x, average_attn_weights=averaged, **masks_of(length)[mask])

    rivals, truths = run(dtype), run(torch.float64)
    with activated():
        ours = run(dtype)
        (found,) = explain(run, dtype)
    assert found.is_trilbys, str(found)
    for name, our, rival, truth in zip(("output", "weights"), ours, rivals, truths):
        assert (our.dtype, our.shape, our.stride()) == (rival.dtype, rival.shape, rival.stride())
        seen = ~torch.isnan(truth)  # PyTorch's operator has no number where no key is seen
        assert_as_exact_as(our[seen], rival[seen], truth[seen], name)
    assert (ours[1][torch.isnan(truths[1])] == 0).all()


@pytest.mark.usefixtures("threads")
@torch.no_grad()
def test_weights_are_the_same_bits_for_any_number_of_threads():
    layer, x = nn.MultiheadAttention(C, H, batch_first=True).eval(), text()
    with activated():
        for averaged in (True, False):
            results = []
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                results.append(layer(x, x, x, average_attn_weights=averaged)[1])
            assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_the_exactness_of_weights_can_fail():
    """Scores that are a hundredth too large are an error too large."""
    rival, truth = attend()()[1], attend(torch.float64)()[1]
    wrong = attend(scale=1.01)
    with activated(), pytest.raises(AssertionError, match="error"):
        assert_as_exact_as(wrong()[1], rival, truth, "weights")


@pytest.mark.parametrize("need_weights", [True, False])
@torch.no_grad()
def test_slices_of_larger_tensors_are_read_where_they_begin(need_weights):
    """Input, parameters and mask: each begins within its memory, and the input and a weight have gaps."""
    x = torch.randn(B, T + 3, C)[:, 2:-1]
    parameters = (
        torch.randn(4, 3 * C, C)[1],
        torch.randn(5, 3 * C)[2],
        torch.randn(C, 3 * C)[:, C:-C],
        torch.randn(3, C)[1],
    )
    mask = torch.rand(B, 2 * T)[:, 11 : 11 + T] > 0.7

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = x if dtype == x.dtype else x.to(dtype)  # a copy would begin at 0
        own = parameters if dtype == x.dtype else [parameter.to(dtype) for parameter in parameters]
        return torch._native_multi_head_attention(
            given, given, given, C, H, *own, mask, need_weights=need_weights, mask_type=1
        )

    rivals, truths = run(torch.float32), run(torch.float64)
    with activated():
        ours = run(torch.float32)
        assert explain(run, torch.float32)[0].is_trilbys
    for our, rival, truth in zip(ours[: 1 + need_weights], rivals, truths):
        assert_as_exact_as(our, rival, truth, "of slices")


@torch.no_grad()
def test_the_exactness_of_an_encoder_can_fail():
    """A scale of the scores that is a hundredth too large is an error too large."""
    rival, truth = encoder()(text()), encoder(torch.float64)(text().double())
    wrong = encoder()
    wrong.self_attn.in_proj_weight[:C] *= 1.01
    wrong.self_attn.in_proj_bias[:C] *= 1.01
    with activated(), pytest.raises(AssertionError, match="error"):
        assert_as_exact_as(wrong(text()), rival, truth, "encoder")


@torch.no_grad()
def test_a_query_that_sees_no_key_gets_the_bias_as_in_training():
    layer = nn.MultiheadAttention(C, H, batch_first=True).eval()
    nn.init.normal_(layer.out_proj.bias)
    hidden = torch.tensor([[False], [True], [False]]).expand(B, T)
    x = text()
    assert layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0][1].isnan().all()
    with activated(), strict():
        output = layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    assert torch.equal(output[1], layer.out_proj.bias.expand(T, C))
    assert not output.isnan().any()


def attend(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call with weights, whose scores are multiplied by `scale`."""
    torch.manual_seed(5)
    layer, x = nn.MultiheadAttention(C, H, batch_first=True).eval(), text()
    with torch.no_grad():
        layer.in_proj_weight[:C] *= scale
    layer, x = layer.to(dtype), x.to(dtype)
    return lambda: layer(x, x, x)


def operator(x: Tensor, *, key: Tensor | None = None, **options: object) -> Callable[[], object]:
    layer = nn.MultiheadAttention(C, H).to(x.dtype)
    parameters = layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias
    given = {"need_weights": False} | options
    keys = x if key is None else key
    return lambda: torch._native_multi_head_attention(x, keys, keys, C, H, *parameters, **given)


LEFT = {
    "float64": (operator(text().double()), "dtypes are torch.float64"),
    "other keys": (operator(text(), key=text() + 1), "not one tensor"),
}


@pytest.mark.parametrize(("function", "reason"), LEFT.values(), ids=LEFT)
@torch.no_grad()
def test_what_is_not_covered_is_pytorchs_bit_by_bit_and_says_why(function, reason):
    expected = function()
    with activated():
        (found,) = explain(function)
        results = function()
    assert any(reason in each for each in found.reasons), found
    for ours, theirs in zip(results, expected):
        assert theirs is None or torch.equal(ours, theirs)


REFUSED = {
    "a mask of no type": operator(text(), mask=padding()),
    "a mask of other sizes": operator(text(), mask=padding()[:, 1:], mask_type=1),
    "an input of two dimensions": operator(text()[0]),
    "another width": operator(text()[..., 1:]),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_what_pytorch_refuses_is_refused_in_its_words(function):
    with pytest.raises(RuntimeError) as theirs:
        function()
    with activated(), pytest.raises(RuntimeError) as ours:
        function()
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


@torch.no_grad()
def test_nested_sequences_are_pytorchs():
    """`nn.TransformerEncoder` packs padded batches, by default, into nested tensors."""
    model = nn.TransformerEncoder(encoder(), 2).eval()
    mask = torch.arange(T) >= torch.tensor([[T], [T - 20], [T - 9]])
    expected = model(text(), src_key_padding_mask=mask)
    with activated():
        torch.testing.assert_close(model(text(), src_key_padding_mask=mask), expected)


@torch.no_grad()
def test_compiled_and_exported_it_is_trilbys_too():
    layer, x = encoder(), text()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(layer, (x,)).module()
    with activated():
        eager = layer(x)
        for run in (compiled, exported):
            assert explain(run, x)[0].is_trilbys
            torch.testing.assert_close(run(x), eager)


def test_a_gradient_is_refused_as_by_pytorchs():
    """The operator has none, and modules do not call it where one is wanted."""
    x = text().requires_grad_()
    with activated(), pytest.raises(RuntimeError, match="derivative for aten::_native_multi_head_attention"):
        operator(x)()[0].sum().backward()
