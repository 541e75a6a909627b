"""What a training is asked for: a TOML file, flags over it, and names that are checked."""

import dataclasses

import pytest
from trilby.gpt import TrainConfig
from trilby.gpt.settings import DataConfig, Settings, make_settings, to_toml

FILE = """
preset = "gpt2"
[data]
text = ["a.txt", "b \\u00fc.txt"]
tokenizer = "byte-pair"
vocab_size = 4096
[model]
n_layer = 2
bias = false
[train]
learning_rate = 1e-4
sampler = "packed"
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "config.toml").write_text(FILE)
    return tmp_path / "config.toml"


def test_a_file_says_what_is_asked_for(file):
    settings = make_settings(file, {})
    assert settings.data == DataConfig(("a.txt", "b ü.txt"), "byte-pair", 4096)
    assert settings.train == TrainConfig(learning_rate=1e-4, sampler="packed")
    model = settings.make_model(4000)
    assert (model.n_layer, model.bias, model.n_embd, model.vocab_size) == (2, False, 768, 4000)


def test_flags_come_before_the_file(file):
    flags = {"": {"preset": "character"}, "model": {"n_layer": 3}, "train": {"max_steps": 7}, "data": {"text": ["c"]}}
    settings = make_settings(file, flags)
    assert (settings.make_model(65).n_layer, settings.make_model(65).n_embd) == (3, 128)
    assert (settings.train.max_steps, settings.train.learning_rate) == (7, 1e-4)
    assert settings.data == DataConfig(("c",), "byte-pair", 4096)


def test_without_a_file_it_is_the_defaults():
    assert make_settings(None, {}) == Settings()


@pytest.mark.parametrize("settings", [Settings(), Settings(DataConfig(('a "b"\n.txt',)), "gpt2-xl", {"n_layer": 1})])
def test_what_is_written_is_read_again(settings, tmp_path):
    settings = dataclasses.replace(settings, train=TrainConfig(learning_rate=1e-05, compile=True))
    (tmp_path / "written.toml").write_text(to_toml(settings), encoding="utf-8")
    assert make_settings(tmp_path / "written.toml", {}) == settings


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("[trian]\n", ValueError, "'trian'; did you mean train?"),
        ("presets = 'gpt2'", ValueError, "'presets'; did you mean preset?"),
        ("[train]\nmax_step = 3", ValueError, "'max_step'; did you mean max_steps?"),
        ("[model]\nlayers = 3", ValueError, r"'layers'; did you mean n_layer\?"),
        ("[data]\ntexts = []", ValueError, "'texts'; did you mean text?"),
        ("[model]\nvocab_size = 3", ValueError, "model has a vocab_size"),
        ("[model]\nn_layer = '3'", TypeError, "n_layer is '3'"),
        ("[data]\ntext = 'a.txt'", TypeError, "text is 'a.txt'; it must be a list of file names"),
        ("[data]\nvocab_size = true", TypeError, "vocab_size is True"),
        ("[data]\ntokenizer = 3", TypeError, "tokenizer is 3"),
        ("preset = 'gpt5'", ValueError, "preset is 'gpt5'; allowed are gpt2, "),
        ("data = 3", TypeError, r"data is 3; it must be a table, \[data\]"),
        ("[train", ValueError, "config.toml is not TOML"),
        ("\xff", ValueError, "config.toml is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(content, error, message, tmp_path):
    (tmp_path / "config.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(error, match=message):
        make_settings(tmp_path / "config.toml", {})
