"""SentencePiece model files: the library's own ids, pieces and bytes behind the one interface."""

import io
import sys

import pytest
from trilby.gpt import SentencePieceTokenizer, decode, encode_documents
from trilby.gpt.tokenizers import make_tokenizer, tokenizer_from_dict

sentencepiece = pytest.importorskip("sentencepiece")
TEXT = ["Hello World, hello words", "the world of words is wide and the words are worldly"] * 10


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model():
    return train(vocab_size=60, model_type="bpe")


@pytest.fixture(scope="module")
def model_with_bytes():
    return train(vocab_size=320, model_type="bpe", byte_fallback=True, user_defined_symbols=["<|endoftext|>"])


def test_ids_are_those_of_the_library(model):
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.vocab_size == library.vocab_size()
    assert tokenizer.encode("Hello World") == library.encode("Hello World")
    assert decode(tokenizer, tokenizer.encode("Hello World")) == " Hello World"


def test_documents_start_with_the_beginning_of_a_sentence_or_with_endoftext(model, model_with_bytes):
    for proto, piece in ((model, "<s>"), (model_with_bytes, "<|endoftext|>")):
        tokenizer = SentencePieceTokenizer(proto)
        start = sentencepiece.SentencePieceProcessor(model_proto=proto).piece_to_id(piece)
        assert tokenizer.start == start
        assert encode_documents(tokenizer, ["words"]) == [start, *tokenizer.encode("words")]
    assert SentencePieceTokenizer(train(vocab_size=60, model_type="bpe", bos_id=-1)).start is None


def test_an_unknown_piece_is_named(model):
    with pytest.raises(ValueError, match="'日' is not among the"):
        SentencePieceTokenizer(model).encode("Hello 日")


def test_with_bytes_to_fall_back_on_everything_can_be_written(model_with_bytes):
    tokenizer = SentencePieceTokenizer(model_with_bytes)
    ids = tokenizer.encode("Hello 日")
    assert decode(tokenizer, ids) == " Hello 日"
    assert tokenizer.decode_bytes(ids[-1:]) == "日".encode()[-1:]


def test_an_id_that_there_is_not_is_refused(model):
    with pytest.raises(ValueError, match="id is 1000; this vocabulary has 0 to"):
        decode(SentencePieceTokenizer(model), [1000])


def test_it_is_chosen_by_its_file_and_kept_whole(model, tmp_path):
    (tmp_path / "words.model").write_bytes(model)
    tokenizer = make_tokenizer(str(tmp_path / "words.model"), [])
    assert tokenizer_from_dict(tokenizer.to_dict()).encode("wide world") == tokenizer.encode("wide world")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "words.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"words\.model is not a SentencePiece model file"):
        make_tokenizer(str(tmp_path / "words.model"), [])
    for text in ("bm8gbW9kZWw=", "?"):
        with pytest.raises(ValueError, match=r"."):
            tokenizer_from_dict({"kind": "sentencepiece", "model": text})
    with pytest.raises(FileNotFoundError):
        make_tokenizer(str(tmp_path / "nowhere.model"), [])


def test_without_the_package_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        SentencePieceTokenizer(model)
