"""The model is a pre-norm GPT of GPT-2's shape, under nanoGPT's names, and never looks ahead."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from torch.utils._python_dispatch import TorchDispatchMode
from trilby.gpt import GPT, PYTORCH, TRILBY, GPTConfig
from trilby.kernels.ops import NATIVE


def test_parameters_have_the_names_of_nanogpts_checkpoints(config):
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    modules = [f"transformer.h.{layer}.{name}" for layer in range(config.n_layer) for name in block]
    modules.append("transformer.ln_f")
    names = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    names |= {f"{module}.weight" for module in modules}
    assert set(GPT(dataclasses.replace(config, bias=False)).state_dict()) == names
    assert set(GPT(config).state_dict()) == names | {f"{module}.bias" for module in modules}


def test_the_decoder_is_the_embedding(config):
    model = GPT(config)
    assert model.lm_head.weight is model.transformer.wte.weight


def plain_forward(state: dict[str, torch.Tensor], config: GPTConfig, tokens: torch.Tensor) -> torch.Tensor:
    """The logits by the formulas of the GPT-2 paper, from nothing but the tensors of a checkpoint."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        deviation = (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centered / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(x, name):
        T, D = x.shape[1], config.n_embd // config.n_head
        query, key, value = linear(x, f"{name}.c_attn").split(config.n_embd, dim=2)
        heads = []
        for part in range(0, config.n_embd, D):
            q, k, v = (tensor[:, :, part : part + D] for tensor in (query, key, value))
            scores = q @ k.transpose(1, 2) / math.sqrt(D)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        return linear(torch.cat(heads, dim=2), f"{name}.c_proj")

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][: tokens.shape[1]]
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        x = x + attention(norm(x, f"{block}.ln_1"), f"{block}.attn")
        x = x + linear(gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


@pytest.mark.parametrize("T", [1, 7, 64])
def test_logits_and_loss_are_those_of_the_formulas(wide, T):
    config = wide
    model, rival = make_twins(config)
    tokens, targets = torch.randint(config.vocab_size, (2, 8, T))
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    truth = plain_forward(state, config, tokens)
    assert_as_exact_as(model(tokens), rival(tokens), truth, "logits")
    true_loss = F.cross_entropy(truth.flatten(0, 1), targets.flatten())
    assert_as_exact_as(model.loss(tokens, targets), rival.loss(tokens, targets), true_loss, "loss")


def test_every_gradient_is_as_exact_as_pytorchs(wide):
    model, rival = make_twins(wide)
    truth = GPT(wide, PYTORCH).double()
    truth.load_state_dict(model.state_dict())
    tokens, targets = torch.randint(wide.vocab_size, (2, 8, wide.block_size))
    for each in (model, rival, truth):
        each.loss(tokens, targets).backward()
    for (name, ours), theirs, true in zip(model.named_parameters(), rival.parameters(), truth.parameters()):
        assert_as_exact_as(ours.grad, theirs.grad, true.grad, name)


@pytest.mark.skipif(not NATIVE.loaded, reason=f"trilby has no kernels here: {NATIVE.reason}")
def test_it_is_made_of_the_layers_that_it_is_given(wide):
    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name().split("::")[0])
            return func(*args, **(kwargs or {}))

    tokens = torch.randint(wide.vocab_size, (8, wide.block_size))
    for layers, expected in ((TRILBY, 4 * wide.n_layer + 1), (PYTORCH, 0)):
        names: list[str] = []
        with Called(), torch.no_grad():
            GPT(wide, layers)(tokens)
        assert names.count("trilby") == expected  # per block attention, GELU and two norms; the norm after the last


@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_the_past_does_not_see_the_future(config, layers):
    model = GPT(config, layers).eval()
    tokens = torch.randint(config.vocab_size, (2, config.block_size))
    logits = model(tokens)
    for t in range(1, config.block_size):
        changed = tokens.clone()
        changed[:, t:] = torch.randint(config.vocab_size, changed[:, t:].shape)
        assert torch.equal(model(changed)[:, :t], logits[:, :t])


def test_the_past_is_seen(config):
    model = GPT(config).eval()
    tokens = torch.randint(config.vocab_size, (1, config.block_size))
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % config.vocab_size
    assert (model(changed) != model(tokens)).any(dim=2).all()


def test_a_new_model_expects_every_token_about_equally(config):
    tokens, targets = torch.randint(config.vocab_size, (2, 8, config.block_size))
    loss = GPT(config).loss(tokens, targets).item()
    # Logits of a new model have a standard deviation of about 0.02·√C, and the loss is ln V plus half their variance,
    # with a sampling error of their deviation over √(B·T): together below 0.02 here.
    assert loss == pytest.approx(math.log(config.vocab_size), abs=0.02)


@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_dropout_is_for_training_only(config, layers):
    model = GPT(dataclasses.replace(config, dropout=0.2), layers)
    tokens = torch.randint(config.vocab_size, (2, config.block_size))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_bfloat16_autocast_trains_float32_weights(config, layers):
    model = GPT(config, layers)
    tokens, targets = torch.randint(config.vocab_size, (2, 3, config.block_size))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    # Eight bits of bfloat16 in every product: 2^-8 of what the logits, about 0.1 in size, add to the loss.
    assert loss.item() == pytest.approx(model.loss(tokens, targets).item(), abs=2**-8)


def test_tokens_that_do_not_fit_are_named(config):
    with pytest.raises(ValueError, match=r"tokens is \(1, 17\).*at most 16"):
        GPT(config)(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens is \(5,\)"):
        GPT(config)(torch.zeros(5, dtype=torch.int64))


def make_twins(config):
    """The same weights under trilby's layers and under PyTorch's, none of them zero or one."""
    model, rival = GPT(config, TRILBY), GPT(config, PYTORCH)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rival.load_state_dict(model.state_dict())
    return model, rival
