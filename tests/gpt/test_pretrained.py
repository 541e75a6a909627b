"""Published weights: the same logits as transformers gives, there and back, and a clear error for any other file."""

import json
import shutil

import pytest
import torch
from tolerance import assert_as_exact_as
from trilby.gpt import GPT, GREEDY, GPTConfig, generate
from trilby.gpt.pretrained import PretrainedError, load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def theirs():
    """Weights large enough that every one of them shows in the logits."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 29, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def written(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained")
    theirs.save_pretrained(path)
    return path


@pytest.fixture
def folder(written, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(written, tmp_path / "folder")


def rewrite(folder, change):
    """Change the tensors, by name, in the file in `folder`."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder, **values):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | values))


def assert_same_logits(ours, theirs, what):
    tokens = torch.randint(29, (3, 16))
    truth = theirs.double()(tokens).logits
    assert_as_exact_as(ours(tokens), theirs.float()(tokens).logits, truth, what)


def test_logits_are_those_of_transformers(theirs, written):
    ours = load_pretrained(written)
    assert ours.config == GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=4, n_embd=32)
    with torch.no_grad():
        assert_same_logits(ours, theirs, "logits")


def test_tokens_are_those_of_transformers(theirs, written):
    prompt = torch.randint(29, (1, 4))
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generate(load_pretrained(written), prompt, 12, GREEDY), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_reads_what_is_written(config, tmp_path, bias):
    torch.manual_seed(1)
    ours = GPT(GPTConfig(**vars(config) | {"bias": bias, "dropout": 0.2})).eval().requires_grad_(False)
    save_pretrained(tmp_path / "folder", ours)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder").eval().requires_grad_(False)
    assert (theirs.config.resid_pdrop, theirs.config.attn_pdrop, theirs.config.embd_pdrop) == (0.2, 0.2, 0.2)
    assert_same_logits(ours, theirs, "logits")


def test_there_and_back_is_the_same(written, tmp_path):
    save_pretrained(tmp_path, load_pretrained(written))
    before, after = (safetensors.load_file(folder / "model.safetensors") for folder in (written, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def older(tensors):
    """As the files of 2019 are: without a prefix, with the masks, and the tied decoder."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()


def test_older_files_are_read(theirs, folder):
    rewrite(folder, older)
    assert_same_logits(load_pretrained(folder), theirs, "logits")
    assert_same_logits(load_pretrained(folder / "model.safetensors"), theirs, "logits of the file alone")


def test_weights_in_several_files_are_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(load_pretrained(tmp_path), theirs, "logits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_into_float32(folder, dtype):
    rewrite(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    found = load_pretrained(folder).transformer.wte.weight
    stored = safetensors.load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(found, stored.float())


EMBEDDING = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}" * 30), "not a safetensors file, or a damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors file, or a damaged one"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "does not say 'n_positions'"),
        (lambda folder: configure(folder, model_type="llama"), "model_type is 'llama'; this GPT has 'gpt2'"),
        (lambda folder: configure(folder, activation_function="relu"), "activation_function is 'relu'"),
        (lambda folder: configure(folder, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (lambda folder: configure(folder, tie_word_embeddings=False), "tie_word_embeddings is False"),
        (lambda folder: configure(folder, n_inner=64), "n_inner is 64; this GPT has 128"),
        (lambda folder: configure(folder, n_head=5), "n_embd is 32; it must be a multiple of n_head, 5"),
        (lambda folder: configure(folder, n_embd="many"), "n_embd is 'many'; it must be of type int"),
        (lambda folder: configure(folder, n_embd=2**40), "not the model that config.json describes"),
        (lambda folder: configure(folder, n_layer=10**12), "not the model that config.json describes"),
        (lambda folder: rewrite(folder, lambda t: t.pop(EMBEDDING)), "not the model that config.json describes"),
        (lambda folder: rewrite(folder, lambda t: t.update(a=t.pop(EMBEDDING))), "missing or too many: transformer.a"),
        (
            lambda folder: rewrite(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING].T.contiguous()})),
            r"wte.weight is \[32, 29\] F32; it must be \[29, 32\] and F32 or F16 or BF16",
        ),
        (
            lambda folder: rewrite(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING].long()})),
            r"wte.weight is \[29, 32\] I64; it must be \[29, 32\]",
        ),
        (
            lambda folder: rewrite(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
            "has a decoder of its own",
        ),
    ],
)
def test_another_file_is_an_error_that_says_what(folder, spoil, message):
    spoil(folder)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("names", [["../model.safetensors"], [7], None])
def test_an_index_names_files_beside_it(folder, names):
    (folder / "model.safetensors").unlink()
    weights = names and dict.fromkeys(["a"], names[0])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(PretrainedError, match="is no index of files beside it"):
        load_pretrained(folder)


def test_a_file_alone_must_be_of_a_published_size(folder):
    (folder / "config.json").unlink()
    with pytest.raises(PretrainedError, match=r"has no config.json beside it and is not one of gpt2, gpt2-medium"):
        load_pretrained(folder / "model.safetensors")


def test_a_file_that_is_not_there_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "nowhere.safetensors")
