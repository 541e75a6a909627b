"""The blocks of a GPT for the token that is generated: what their layers compute one by one, in one call."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_case import DTYPES
from tolerance import assert_as_exact_as
from torch import Tensor
from torch.nn import functional as F
from trilby.kernels import Affine, BlockWeights, DecoderWeights, decode_blocks, quantize_rows, reference
from trilby.kernels.linear import MOST_ROWS

H, D, S = 3, 8, 12
C = H * D


def draw_weights(dtype: torch.dtype, *, bias: bool = True, quantized: bool = False, blocks: int = 2) -> DecoderWeights:
    """Normal ones, scaled so that a layer keeps the size of what it is given."""

    def affine(*sizes: int) -> Affine:
        weight = (torch.randn(sizes) / (sizes[-1] if len(sizes) > 1 else 1) ** 0.5).to(dtype)
        of_bias = torch.randn(sizes[0]).to(dtype) if bias else None
        return Affine(quantize_rows(weight) if quantized and len(sizes) > 1 else weight, of_bias)

    sizes = ((C,), (3 * C, C), (C, C), (C,), (40, C), (C, 40))
    return DecoderWeights(tuple(BlockWeights(*(affine(*each) for each in sizes)) for _ in range(blocks)), affine(C))


def draw(B: int, weights: DecoderWeights) -> tuple[Tensor, Tensor]:
    """Stream and memory."""
    memory = torch.randn(len(weights.blocks), 2, B, H, S, D)
    return torch.randn(B, 1, C).to(weights.dtype), memory.to(weights.dtype)


def by_pytorch(stream: Tensor, memory: Tensor, lengths: list[int], weights: DecoderWeights) -> Tensor:
    """The same in PyTorch's functions, in the dtype of stream; memory is changed likewise."""

    def apply(function: Callable[..., Tensor], input: Tensor, affine: Affine) -> Tensor:
        weight = affine.weight if isinstance(affine.weight, Tensor) else affine.weight.dequantized(stream.dtype)
        return function(input, weight.to(stream.dtype), None if affine.bias is None else affine.bias.to(stream.dtype))

    def norm(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(input, (C,), weight, bias)

    for block, remembered in zip(weights.blocks, memory):
        heads = apply(F.linear, apply(norm, stream, block.norm_1), block.attention_in).view(-1, 3, H, D)
        attended = []
        for b, length in enumerate(lengths):
            remembered[:, b, :, length - 1] = heads[b, 1:]
            key, value = remembered[:, b : b + 1, :, :length]
            attended.append(F.scaled_dot_product_attention(heads[b : b + 1, 0].unsqueeze(2), key, value))
        stream = stream + apply(F.linear, torch.cat(attended).reshape(-1, 1, C), block.attention_out)
        expanded = apply(F.linear, apply(norm, stream, block.norm_2), block.expand)
        stream = stream + apply(F.linear, F.gelu(expanded, approximate="tanh"), block.contract)
    return apply(norm, stream, weights.last_norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3, MOST_ROWS[torch.float32]])
@pytest.mark.parametrize("form", ["plain", "no bias", "quantized"])
def test_as_exact_as_pytorchs_functions(form: str, B: int, dtype: torch.dtype, level: str) -> None:
    weights = draw_weights(dtype, bias=form != "no bias", quantized=form == "quantized")
    stream, memory = draw(B, weights)
    for key_lengths in (None, torch.randint(1, S, (B,), dtype=torch.int32)):
        lengths = [S - 1] * B if key_lengths is None else key_lengths.tolist()
        ours, rivals, exact = memory.clone(), memory.clone(), memory.double()
        output = decode_blocks(stream, weights, ours, S - 1, key_lengths)
        rival = by_pytorch(stream, rivals, lengths, weights)
        truth = by_pytorch(stream.double(), exact, lengths, weights)
        assert_as_exact_as(output, rival, truth, "output")
        assert_as_exact_as(ours, rivals, exact, "memory")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_operators_one_by_one_give_the_same_bits(quantized: bool, dtype: torch.dtype, level: str) -> None:
    weights = draw_weights(dtype, quantized=quantized, blocks=1)
    (block,), operators = weights.blocks, torch.ops.trilby
    stream, memory = draw(2, weights)
    output = decode_blocks(stream, weights, together := memory.clone(), S)

    def linear(input: Tensor, affine: Affine) -> Tensor:
        return operators.linear(input, affine.values, affine.bias, affine.scales)

    normalized = operators.norm(stream, *block.norm_1, 1, True, 1e-5)[0]
    heads = linear(normalized, block.attention_in).view(2, 1, 3, H, D).permute(2, 0, 3, 1, 4)
    memory[0, :, :, :, S - 1 :] = heads[1:]
    options = reference.AttentionOptions(scale=D**-0.5)
    attended = operators.attention(heads[0], *memory[0], *options)[0].transpose(1, 2).reshape(2, 1, C)
    branch = linear(attended, block.attention_out)
    normalized, stream, *_ = operators.add_norm(stream, branch, *block.norm_2, None, 1, True, 1e-5, 0.0)
    branch = linear(operators.gelu(linear(normalized, block.expand)), block.contract)
    assert torch.equal(output, operators.add_norm(stream, branch, *weights.last_norm, None, 1, True, 1e-5, 0.0)[0])
    assert torch.equal(together, memory)


def test_threads_change_nothing(threads: None) -> None:
    weights = draw_weights(torch.float32)
    stream, memory = draw(2, weights)
    outputs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outputs.append(decode_blocks(stream, weights, memory.clone(), S))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_nothing_but_the_new_places_is_written_and_nothing_past_the_last_is_read() -> None:
    weights = draw_weights(torch.float32)
    stream, memory = draw(2, weights)
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    poisoned = memory.clone()
    for b, length in enumerate(lengths):
        poisoned[:, :, b, :, length:] = float("nan")
    expected = decode_blocks(stream, weights, memory.clone(), 7, lengths)
    output = decode_blocks(stream, weights, changed := poisoned.clone(), 7, lengths)
    assert torch.equal(output, expected)
    for b, length in enumerate(lengths):
        changed[:, :, b, :, length - 1] = poisoned[:, :, b, :, length - 1]
    assert torch.equal(changed.nan_to_num(7.0), poisoned.nan_to_num(7.0))


@pytest.mark.parametrize("rows", [MOST_ROWS[torch.float32] + 1, 0])
def test_rows_that_no_kernel_takes_are_computed_by_what_the_operator_means(rows: int) -> None:
    weights = draw_weights(torch.float32)
    stream, memory = draw(rows, weights)
    assert any("rows" in reason for reason in weights.reasons_for_reference(rows))
    output = decode_blocks(stream, weights, ours := memory.clone(), S)
    meant = reference.decode_blocks(stream, theirs := memory.clone(), None, S, 1e-5, weights.operands)
    assert torch.equal(output, meant)
    assert torch.equal(ours, theirs)


def test_autocast_is_a_reason() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert any("autocast" in reason for reason in draw_weights(torch.float32).reasons_for_reference(1))


def test_the_operator_meets_pytorchs_own_checks() -> None:
    weights = draw_weights(torch.float32)
    stream, memory = draw(2, weights)
    arguments = (stream, memory, torch.tensor([2, 5], dtype=torch.int32), 5, 1e-5, weights.operands)
    torch.library.opcheck(
        torch.ops.trilby.decode_blocks.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": torch.zeros(2, 2, C)}, "stream is"),
        ({"memory": torch.zeros(2, 2, 3, H, S, D)}, "memory is"),
        ({"memory": torch.zeros(2, 2, 2, H, S, D).half()}, "stream is torch.float32, memory torch.float16"),
        ({"length": 0}, "length is 0"),
        ({"length": S + 1}, f"length is {S + 1}"),
        ({"key_lengths": torch.ones(3, dtype=torch.int32)}, r"key_lengths is \[3\]"),
        ({"key_lengths": torch.ones(2)}, "key_lengths is"),
    ],
)
def test_what_does_not_agree_is_named(change: dict[str, object], message: str) -> None:
    weights = draw_weights(torch.float32)
    stream, memory = draw(2, weights)
    arguments = {"stream": stream, "memory": memory, "length": S} | change
    with pytest.raises(ValueError, match=message):
        decode_blocks(weights=weights, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, S + 1])
def test_a_length_that_is_none_is_refused_before_anything_is_written(length: int) -> None:
    weights = draw_weights(torch.float32)
    stream, memory = draw(1, weights)
    with pytest.raises(RuntimeError, match=r"key_lengths\[0\] is"):
        decode_blocks(stream, weights, memory, S, torch.tensor([length], dtype=torch.int32))


def test_weights_that_do_not_agree_are_named() -> None:
    weights = draw_weights(torch.float32)
    first, second = weights.blocks
    wrong = second._replace(expand=Affine(torch.zeros(40, C + 1)))
    with pytest.raises(ValueError, match="expand of block 1 is"):
        replace(weights, blocks=(first, wrong))
    half = second._replace(norm_2=Affine(torch.zeros(C).half()))
    with pytest.raises(ValueError, match="norm_2 of block 1 has"):
        replace(weights, blocks=(first, half))


def test_a_gradient_is_refused() -> None:
    weights = draw_weights(torch.float32)
    stream, memory = draw(1, weights)
    with pytest.raises(ValueError, match="gradient"):
        decode_blocks(stream.requires_grad_(), weights, memory, S)


@pytest.mark.parametrize("mutant", ["no causal end", "branch forgotten", "wrong norm"])
def test_a_wrong_block_is_found(mutant: str) -> None:
    """The tolerance tells a block that is wrong from one that rounds."""
    weights = draw_weights(torch.float32)
    stream, memory = draw(2, weights)
    first, last = weights.blocks
    wrong, length = weights, S - 1
    if mutant == "no causal end":
        length = S
    elif mutant == "branch forgotten":
        silent = Affine(torch.zeros_like(last.contract.values), last.contract.bias)
        wrong = replace(weights, blocks=(first, last._replace(contract=silent)))
    else:
        wrong = replace(weights, last_norm=Affine(weights.last_norm.values * 1.0001, weights.last_norm.bias))
    output = decode_blocks(stream, wrong, memory.clone(), length)
    rival = by_pytorch(stream, memory.clone(), [S - 1] * 2, weights)
    truth = by_pytorch(stream.double(), memory.double(), [S - 1] * 2, weights)
    with pytest.raises(AssertionError):
        assert_as_exact_as(output, rival, truth, "output")
