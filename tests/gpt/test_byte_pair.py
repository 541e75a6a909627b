"""Byte-pair encoding of one's own: the algorithm of the course, the library that trains, and the one that encodes."""

from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trilby.gpt import BytePairTokenizer, decode, encode_documents
from trilby.gpt.data import default_text
from trilby.gpt.tokenizers import byte_pair, tokenizer_from_dict

tiktoken = pytest.importorskip("tiktoken")
tokenizers = pytest.importorskip("tokenizers")
TEXT = "unlikeliest likely unlike: the likeliest thing is a thing.\n\n  The 1234 things, it's 12 likes!\n" * 3


@pytest.fixture(scope="module")
def trained():
    return BytePairTokenizer.train([TEXT], vocab_size=280)


def words(text):
    """The words of `text`, each as a list of byte ids, by the pattern that tiktoken is given."""
    alone = tiktoken.Encoding(
        "bytes",
        pat_str=byte_pair.WORDS,
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={},
    )
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    byte_of = {character: byte for byte, character in enumerate(byte_pair.byte_characters())}
    split = [[byte_of[character] for character in piece] for piece, _ in pieces]
    assert list(chain.from_iterable(split)) == alone.encode_ordinary(text)
    return split


def join(word, pair, token):
    """`word` with every occurrence of `pair` made one `token`, from left to right."""
    joined = []
    for part in word:
        joined.append(part)
        if tuple(joined[-2:]) == pair:
            joined[-2:] = [token]
    return joined


def test_every_merge_joins_what_stands_together_most_often(trained):
    corpus = words(TEXT)
    for number, merge in enumerate(trained.merges):
        pairs = Counter(pair for word in corpus for pair in pairwise(word))
        assert pairs[merge] == max(pairs.values()), f"merge {number}"
        corpus = [join(word, merge, 256 + number) for word in corpus]
    assert list(chain.from_iterable(corpus)) == trained.encode(TEXT)


def test_it_has_every_byte_the_merges_and_the_start_of_a_document(trained):
    assert trained.vocab_size == 280
    assert len(trained.merges) == 280 - 256 - 1
    assert [trained.decode_bytes([byte]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert encode_documents(trained, ["a", "b"]) == [279, 97, 279, 98]
    assert trained.decode_bytes([279]) == b"<|endoftext|>"


def test_frequent_words_become_one_token(trained):
    assert [trained.decode_bytes([token]) for token in trained.encode("a thing")] == [b"a", b" thing"]


def test_a_longer_text_is_encoded_as_by_the_library_that_trained():
    text = default_text().content[:200_000]
    tokenizer = BytePairTokenizer.train([text[:100_000], text[100_000:]], vocab_size=1000)
    assert tokenizer.vocab_size == 1000
    ids = tokenizer.encode(text)
    assert decode(tokenizer, ids) == text
    assert len(ids) < 0.5 * len(text.encode())
    written = byte_pair.byte_characters()
    named = ["".join(written[byte] for byte in tokenizer.decode_bytes([token])) for token in range(999)]
    merges = [(named[left], named[right]) for left, right in tokenizer.merges]
    rival = tokenizers.Tokenizer(tokenizers.models.BPE({name: token for token, name in enumerate(named)}, merges))
    rival.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ids == rival.encode(text).ids


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_any_text_can_be_written_and_read(trained, text):
    text = text.encode("utf-8", "replace").decode("utf-8")
    assert decode(trained, trained.encode(text)) == text


def test_what_looks_like_a_special_token_is_text(trained):
    assert trained.start not in trained.encode("<|endoftext|>")


def test_its_description_gives_it_back(trained):
    again = tokenizer_from_dict(trained.to_dict())
    assert again.encode(TEXT) == trained.encode(TEXT)
    assert again.vocab_size == 280


def test_a_text_with_fewer_pairs_gives_a_smaller_vocabulary():
    assert BytePairTokenizer.train(["ab"], vocab_size=300).vocab_size == 258


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 256; a byte-pair vocabulary has at least 257"):
        BytePairTokenizer.train([TEXT], vocab_size=256)


@pytest.mark.parametrize(
    "merges",
    [
        [[97]],
        [[97, 98, 99]],
        [[97, 256]],
        [[-1, 97]],
        [[97, "b"]],
        [[97, True]],
        [[97, 98], [97, 98]],
        [[256 + i - 1 if i else 97] * 2 for i in range(60)],  # 2^60 bytes, if it were believed
    ],
    ids=lambda merges: str(merges)[:24],
)
def test_merges_that_cannot_be_are_refused(merges):
    with pytest.raises(ValueError, match="merge"):
        tokenizer_from_dict({"kind": "byte-pair", "merges": merges})


@pytest.mark.parametrize("missing", ["tiktoken", "tokenizers"])
def test_a_missing_package_is_named(missing, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(ImportError, match=f"needs {missing}: pip install 'trilby"):
        BytePairTokenizer.train([TEXT], vocab_size=280)
