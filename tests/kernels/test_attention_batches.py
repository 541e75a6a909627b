"""What else is in the batch changes no bit of a sequence's results: of each alone they are the same.

It holds because nothing that a sum is cut by, tiles, blocks, splits and the kernel itself, is chosen by more than a
sequence's own length.
"""

import pytest
import torch
from attention_case import DTYPES, gradients
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest
from trilby.kernels import varlen_attn
from trilby.kernels.attention_rules import MOST_DECODED
from trilby.kernels.options import AttentionOptions

OPERATOR = torch.ops.trilby.attention
H, Hkv, D, Dv = 4, 2, 24, 40
# Queries and keys: decoded in one split and in two, at the bound of decoding and one past it, and in tiles of one panel
# and of several; empty on either side; and again, in another order, behind others.
DECODED = ((1, 700), (3, 3), (MOST_DECODED, 90), (1, 1))
TILED = ((MOST_DECODED + 1, 70), (33, 33), (150, 330), (70, 5))
EMPTY = ((0, 4), (5, 0), (0, 0))
LENGTHS = (*TILED[:2], *DECODED[:2], *EMPTY, *TILED[2:], *DECODED[2:], TILED[0], DECODED[0])
BATCHES = {"all": LENGTHS, "few queries": DECODED, "many queries": TILED, "long first": TILED[2:] + DECODED}
ASKED = {
    "all keys": {},
    "causal": {"window_right": 0},
    "window, softcap and slopes": {"window_left": 40, "window_right": 5, "softcap": 1.5, "alibi_slopes": None},
}
Inputs = tuple[Tensor, Tensor, Tensor]


def starts(lengths: list[int], first: int = 0) -> Tensor:
    """[N + 1] int32, of sequences one after the other from row `first` on."""
    return torch.tensor([first, *lengths]).cumsum(0, dtype=torch.int32)


def results(inputs: Inputs, grad_output: Tensor | None, options: AttentionOptions) -> tuple[Tensor, ...]:
    """Output, logsumexp and, where there is a gradient of the output, those of the inputs."""
    leaves = tuple(tensor.detach().requires_grad_(grad_output is not None) for tensor in inputs)
    output, logsumexp = OPERATOR(*leaves, *options)
    return output, logsumexp[..., None], *(() if grad_output is None else gradients(output, leaves, grad_output))


def assert_each_alone_is_the_same(
    inputs: Inputs, grad_output: Tensor | None, options: AttentionOptions, of_keys: Tensor | None
) -> None:
    """Of packed sequences: each, cut out, gives the bits that it has within the batch."""
    assert options.query_starts is not None
    together, slopes = results(inputs, grad_output, options), options.alibi_slopes
    for n in range(options.query_starts.numel() - 1):
        rows = slice(*options.query_starts[n : n + 2].tolist())
        keys = slice(None) if of_keys is None else slice(*of_keys[n : n + 2].tolist())
        mine = inputs[0][:, :, rows], inputs[1][:, :, keys], inputs[2][:, :, keys]
        alone = options._replace(
            query_starts=starts([mine[0].shape[2]]),
            key_starts=None if of_keys is None else starts([mine[1].shape[2]]),
            key_lengths=None if options.key_lengths is None else options.key_lengths[n : n + 1],
            block_table=None if options.block_table is None else options.block_table[n : n + 1],
            alibi_slopes=None if slopes is None else slopes[n : n + 1],
        )
        grad = None if grad_output is None else grad_output[:, :, rows]
        for whole, single, where in zip(together, results(mine, grad, alone), (rows, rows, rows, keys, keys)):
            assert torch.equal(whole[:, :, where], single), (n, mine[0].shape, mine[1].shape)


def draw(T: int, S: int, dtype: torch.dtype, B: int = 1) -> tuple[Inputs, Tensor]:
    """Normal query, key and value, and the output's gradient."""
    inputs = torch.randn(B, H, T, D), torch.randn(B, Hkv, S, D), torch.randn(B, Hkv, S, Dv)
    query, key, value = (tensor.to(dtype) for tensor in inputs)
    return (query, key, value), torch.randn(B, H, T, Dv).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_packed(batch: str, dtype: torch.dtype, level: str) -> None:
    lengths = BATCHES[batch]
    query_starts, key_starts = (starts([pair[which] for pair in lengths], first=2) for which in range(2))
    inputs, grad_output = draw(int(query_starts[-1]) + 3, int(key_starts[-1]) + 3, dtype)
    for asked in ASKED.values():
        options = AttentionOptions(scale=0.2, lower_right=True, query_starts=query_starts, key_starts=key_starts)
        options = options._replace(**asked)
        if "alibi_slopes" in asked:
            options = options._replace(alibi_slopes=torch.rand(len(lengths), H))
        assert_each_alone_is_the_same(inputs, grad_output, options, key_starts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_queries_of_keys_in_blocks(dtype: torch.dtype, level: str) -> None:
    """Prompts and generated tokens together, as a server has them."""
    queries, keys = [1, 40, 3, 0, 1, 9], [600, 40, 90, 5, 1, 33]
    blocks, size = -(-max(keys) // 16), 16
    (_, key, value), _ = draw(1, size, dtype, B=blocks)
    query = draw(sum(queries), 1, dtype)[0][0]
    options = AttentionOptions(
        scale=0.2,
        lower_right=True,
        window_right=0,
        query_starts=starts(queries),
        key_lengths=torch.tensor(keys, dtype=torch.int32),
        block_table=torch.stack([torch.randperm(blocks, dtype=torch.int32) for _ in keys]),
    )
    assert_each_alone_is_the_same((query, key, value), None, options, None)


@pytest.mark.parametrize("T", [1, MOST_DECODED + 1, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense(dtype: torch.dtype, T: int, level: str) -> None:
    B, S = 5, 600
    inputs, grad_output = draw(T, S, dtype, B)
    mask = torch.randn(B, 1, T, S)
    ragged = torch.tensor([S, 3, 0, 513, 200], dtype=torch.int32)
    for options in (
        AttentionOptions(scale=0.2, mask=mask.masked_fill(mask < -1, -torch.inf).expand(B, H, T, S)),
        AttentionOptions(scale=0.2, lower_right=True, window_right=0, key_lengths=ragged),
    ):
        together = results(inputs, grad_output, options)
        for n in range(B):
            mine = tuple(tensor[n : n + 1] for tensor in inputs)
            alone = options._replace(
                mask=None if options.mask is None else options.mask[n : n + 1],
                key_lengths=None if options.key_lengths is None else options.key_lengths[n : n + 1],
            )
            for whole, single in zip(together, results(mine, grad_output[n : n + 1], alone)):
                assert torch.equal(whole[n : n + 1], single), n


@pytest.mark.parametrize("T", [1, 40])
def test_dropout_goes_by_the_row_and_nothing_else(T: int, level: str) -> None:
    """What is dropped depends on the rows where a sequence lies, and so not on those behind it, nor on their number."""
    before, S, dropped = 9, 130, {"seed": torch.tensor([5]), "dropout_p": 0.3}
    inputs, grad_output = draw(before + T + 70, before + S + 70, torch.float32)
    rows, keys = slice(before, before + T), slice(before, before + S)
    seen = []
    for behind in ([], [1], [70], [30, 40]):
        options = AttentionOptions(
            scale=0.2,
            query_starts=starts([before, T, *behind]),
            key_starts=starts([before, S, *behind]),
            **dropped,
        )
        whole = results(inputs, grad_output, options)
        seen.append([one[:, :, of] for one, of in zip(whole, (rows, rows, rows, keys, keys))])
    for later in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], later))


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_varlen_attn(trains: bool, level: str) -> None:
    """The function, too, which asks one operator in inference and another where a gradient is wanted."""
    query_starts, key_starts = (starts([pair[which] for pair in LENGTHS]) for which in range(2))
    T, S = int(query_starts[-1]), int(key_starts[-1])
    query, key, value = (torch.randn(*sizes).requires_grad_(trains) for sizes in ((T, H, D), (S, H, D), (S, H, Dv)))

    def attend(rows: slice, keys: slice, of: tuple[Tensor, Tensor]) -> Tensor:
        return varlen_attn(query[rows], key[keys], value[keys], *of, T, S, window_size=(-1, 0)).detach()

    together = attend(slice(None), slice(None), (query_starts, key_starts))
    with_statistics, _ = varlen_attn(
        query, key, value, query_starts, key_starts, T, S, window_size=(-1, 0), return_aux=AuxRequest(lse=True)
    )
    assert torch.equal(with_statistics, together)
    for n, (T_of_one, S_of_one) in enumerate(LENGTHS):
        rows, keys = slice(*query_starts[n : n + 2].tolist()), slice(*key_starts[n : n + 2].tolist())
        assert torch.equal(together[rows], attend(rows, keys, (starts([T_of_one]), starts([S_of_one]))))


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads(level: str) -> None:
    """Both kernels in one call, whoever takes which task."""
    query_starts, key_starts = (starts([pair[which] for pair in LENGTHS]) for which in range(2))
    inputs, grad_output = draw(int(query_starts[-1]), int(key_starts[-1]), torch.bfloat16)
    options = AttentionOptions(scale=0.2, query_starts=query_starts, key_starts=key_starts)
    seen = []
    for count in (1, 2, 4, 3, 8):
        torch.set_num_threads(count)
        seen.append(results(inputs, grad_output, options))
    for later in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], later))
