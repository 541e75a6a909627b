"""Hugging Face's models with `attn_implementation="trilby"`: as exact as with "sdpa", and truly trilby's."""

import pytest
import torch
from tolerance import assert_as_exact_as
from torch import Tensor
from trilby.kernels.ops import NATIVE

transformers = pytest.importorskip("transformers", reason="these need Hugging Face's models: pip install transformers")
from trilby.kernels import activated, huggingface  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to run: {NATIVE.reason}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
B, T, VOCABULARY = 4, 80, 97
NEW = 20  # tokens


def gpt2() -> transformers.PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=160, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip


def llama() -> transformers.PretrainedConfig:
    """With grouped heads."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


CONFIGS = (gpt2, llama)
# In the oldest transformers GPT-2 adds a causal mask of its own to the scores, whatever computes attention.
GPT2_ADDS_ITS_MASK = hasattr(transformers.models.gpt2.modeling_gpt2.GPT2Model, "_update_causal_mask")


def left_to_trilby(config, queries: list[int]) -> list[int]:
    """Which of these calls, without dropout, have no mask of numbers; those that do are over sooner in PyTorch."""
    return [] if config is gpt2 and GPT2_ADDS_ITS_MASK else queries


def model(config, implementation: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The same random weights whatever computes attention."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(), attn_implementation=implementation).to(dtype)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many queries each call had that trilby computed."""
    queries = []
    attention = huggingface.scaled_dot_product_attention

    def counting(query: Tensor, *arguments, **options) -> Tensor:
        queries.append(query.shape[2])
        return attention(query, *arguments, **options)

    monkeypatch.setattr(huggingface, "scaled_dot_product_attention", counting)
    return queries


def losses_and_gradients(config, implementation: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens = torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))
    net = model(config, implementation, dtype)
    results = net(tokens, labels=tokens)
    results.loss.backward()
    return results.loss.detach(), results.logits.detach(), *(p.grad for p in net.parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_training_is_as_exact_as_with_sdpa(config, computed):
    ours = losses_and_gradients(config, "trilby", torch.float32)
    assert computed == left_to_trilby(config, [T, T])
    rivals = losses_and_gradients(config, "sdpa", torch.float32)
    truths = losses_and_gradients(config, "sdpa", torch.float64)
    for i, (our, rival, truth) in enumerate(zip(ours, rivals, truths)):
        assert_as_exact_as(our, rival, truth, f"result {i}")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_that_of_sdpa(config, side, computed):
    tokens, mask = torch.randint(3, VOCABULARY, (B, T)), torch.ones(B, T, dtype=torch.int64)
    for row in range(1, B):
        mask[row, slice(0, row * 7) if side == "left" else slice(T - row * 7, T)] = 0
    with torch.no_grad():
        expected = model(config, "sdpa").eval()(tokens, attention_mask=mask).logits
        found = model(config, "trilby").eval()(tokens, attention_mask=mask).logits
    assert computed == []
    assert torch.equal(found, expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_tokens_of_sdpa(config, cache, computed):
    prompt = torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))

    def generate(implementation: str) -> Tensor:
        net = model(config, implementation).eval()
        return net.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            pad_token_id=0,
        )

    found = generate("trilby")
    steps = [1] * (config().num_hidden_layers * (NEW - 1))
    assert computed == (left_to_trilby(config, [T, T, *steps]) if cache == "dynamic" else computed)
    assert torch.equal(found, generate("sdpa"))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_steps_with_a_cache_are_those_of_the_whole(config):
    tokens = torch.randint(3, VOCABULARY, (B, T + 3))
    with torch.no_grad():
        net = model(config, "trilby").eval()
        whole = net(tokens).logits
        part = net(tokens[:, :T], use_cache=True)
        pieces, cache = [part.logits], part.past_key_values
        for position in range(T, T + 3):
            part = net(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            pieces.append(part.logits)
            cache = part.past_key_values
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_what_comes_later_changes_nothing_before(config, padded):
    tokens, mask = torch.randint(3, VOCABULARY, (B, T)), torch.ones(B, T, dtype=torch.int64)
    mask[1:, : 9 * padded] = 0
    changed = tokens.clone()
    changed[:, 60:] = torch.randint(3, VOCABULARY, (B, T - 60))
    net = model(config, "trilby").eval()
    with torch.no_grad():
        first, second = (net(each, attention_mask=mask).logits for each in (tokens, changed))
    real = mask[:, :60] > 0  # what padding sees is nobody's concern
    assert torch.equal(first[:, :60][real], second[:, :60][real])
    assert not torch.equal(first[:, 60:], second[:, 60:])


def test_dropout_is_trilbys_and_repeats_with_torchs_seed(computed):
    def dropping() -> transformers.PretrainedConfig:
        config = gpt2()
        config.attn_pdrop = 0.5
        return config

    first, again = (losses_and_gradients(dropping, "trilby", torch.float32) for _ in range(2))
    assert computed == [T] * 4
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[1], losses_and_gradients(gpt2, "trilby", torch.float32)[1])


@pytest.mark.parametrize("config", CONFIGS)
def test_an_unchanged_model_while_trilby_is_activated(config):
    rivals = losses_and_gradients(config, "sdpa", torch.float32)
    truths = losses_and_gradients(config, "sdpa", torch.float64)
    with activated():
        ours = losses_and_gradients(config, "sdpa", torch.float32)
    assert not torch.equal(ours[1], rivals[1])
    for i, (our, rival, truth) in enumerate(zip(ours, rivals, truths)):
        assert_as_exact_as(our, rival, truth, f"result {i}")
