"""Token files: the ids of the whole text, whatever it is cut into, and whoever is killed while writing goes on."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trilby.gpt import BytePairTokenizer, CharTokenizer, TiktokenTokenizer, encode_documents
from trilby.gpt.data import TokenFile, TokenFileError, fingerprint, pieces, read_pieces, split, write_token_file
from trilby.gpt.data import token_file as token_file_module

LINES = "First line, it's 12.\nSecond:\n\n  indented\n\tend.\r\nlast, ünicode 日本\u3000\nX\n"


@pytest.fixture
def small_pieces(monkeypatch):
    """Files are read in pieces of a few bytes."""
    monkeypatch.setattr(token_file_module, "read_pieces", lambda path, offset=0: read_pieces(path, offset, 40))


@pytest.fixture
def paths(tmp_path):
    texts = [LINES * 5, "", LINES]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    return [tmp_path / f"{number}.txt" for number in range(3)]


def contents(paths):
    return [text for path in paths if (text := path.read_text(encoding="utf-8"))]


class TestPieces:
    @settings(max_examples=100, deadline=None)
    @given(
        text=st.text(alphabet="ab \n\r\t\u3000ü日.", max_size=60).map(lambda text: text.replace("\r\r", "\r")),
        size=st.integers(1, 20),
    )
    def test_they_make_up_the_text(self, text, size, tmp_path_factory):
        file = tmp_path_factory.mktemp("text") / "text.txt"
        file.write_bytes(text.encode())
        found = list(read_pieces(file, piece_bytes=size))
        assert "".join(piece.text for piece in found) == file.read_text(encoding="utf-8")
        for piece, following in pairwise(found):
            rest = list(read_pieces(file, piece.end, piece_bytes=size))
            assert rest == found[found.index(following) :]

    def test_a_text_of_lines_is_cut_only_after_a_line_break_between_two_characters(self, tmp_path):
        (tmp_path / "text").write_text(LINES * 50, encoding="utf-8")
        found = [piece.text for piece in read_pieces(tmp_path / "text", piece_bytes=100)]
        assert len(found) > 10
        for piece, following in pairwise(found):
            assert piece[-1] == "\n"
            assert not piece[-2].isspace()
            assert not following[0].isspace()

    def test_a_text_without_lines_is_cut_all_the_same(self, tmp_path):
        (tmp_path / "text").write_text("word " * 1000)
        longest = max(len(piece.text) for piece in read_pieces(tmp_path / "text", piece_bytes=100))
        assert longest <= 100 * pieces.LONGEST_PIECE_BYTES // pieces.PIECE_BYTES

    def test_what_is_not_utf8_is_named_with_its_place(self, tmp_path):
        (tmp_path / "text").write_bytes(b"a\nb\n" * 30 + b"\xff")
        with pytest.raises(ValueError, match="text is not UTF-8 text: byte 0xff at 120"):
            list(read_pieces(tmp_path / "text", piece_bytes=10))
        (tmp_path / "text").write_bytes("ü".encode()[:1])
        with pytest.raises(ValueError, match="at 0"):
            list(read_pieces(tmp_path / "text"))


def all_tokenizers(paths):
    yield CharTokenizer.from_texts(contents(paths))
    yield BytePairTokenizer.train(contents(paths), 300)
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        yield TiktokenTokenizer("gpt2")
        yield TiktokenTokenizer("cl100k_base")


@pytest.mark.usefixtures("small_pieces")
def test_ids_are_those_of_the_documents_in_memory(paths, tmp_path):
    for number, tokenizer in enumerate(all_tokenizers(paths)):
        file = write_token_file(tmp_path / f"tokens {number}", paths, tokenizer)
        expected = encode_documents(tokenizer, contents(paths))
        assert file.tokens[torch.arange(len(file.tokens))].tolist() == expected
        second = len(encode_documents(tokenizer, contents(paths)[:1]))
        assert file.documents.starts.tolist() == [0, second]
        assert file.documents.marked == (tokenizer.start is not None)
        assert file.header.itemsize == (2 if tokenizer.vocab_size < 100_000 else 4)
        assert file.header.largest == max(expected)
        again = TokenFile.open(tmp_path / f"tokens {number}")
        assert again.header == file.header


def test_it_is_indexed_and_split_as_a_tensor_is(paths, tmp_path):
    tokenizer = CharTokenizer.from_texts(contents(paths))
    mapped = write_token_file(tmp_path / "tokens", paths, tokenizer).split()
    memory = split(encode_documents(tokenizer, contents(paths)))
    for ours, theirs in zip(mapped[:2], memory[:2]):
        assert len(ours) == len(theirs)
        places = torch.randint(len(theirs), (3, 4))
        assert torch.equal(ours[places], theirs[places])
        assert torch.equal(ours[2:5][torch.tensor([1])], theirs[3:4])
    assert mapped.documents.starts.tolist() == [0, 5 * len(contents(paths)[1])]
    assert fingerprint(mapped) == fingerprint(TokenFile.open(tmp_path / "tokens").split())


def test_the_work_is_done_once(paths, tmp_path):
    tokenizer = CharTokenizer.from_texts(contents(paths))
    done, total = [], sum(path.stat().st_size for path in paths)
    write_token_file(tmp_path / "tokens", paths, tokenizer, on_bytes=lambda *progress: done.append(progress))
    assert done == sorted(done)
    assert done[-1] == (total, total)
    write_token_file(tmp_path / "tokens", paths, tokenizer, on_bytes=pytest.fail)


def test_other_files_or_another_tokenizer_are_written_anew(paths, tmp_path):
    tokenizer = CharTokenizer.from_texts(contents(paths))
    write_token_file(tmp_path / "tokens", paths, tokenizer)
    fewer = write_token_file(tmp_path / "tokens", paths[:1], tokenizer)
    assert len(fewer.tokens) == len(contents(paths)[0])
    paths[0].write_text("X")
    assert len(write_token_file(tmp_path / "tokens", paths[:1], tokenizer).tokens) == 1
    other = CharTokenizer("XY")
    assert write_token_file(tmp_path / "tokens", paths[:1], other).header.tokenizer != fewer.header.tokenizer


WRITE = """
import sys
from trilby.gpt import CharTokenizer
from trilby.gpt.data import read_pieces, token_file, write_token_file
token_file.read_pieces = lambda path, offset=0: read_pieces(path, offset, 40)
folder, *paths = sys.argv[1:]
tokenizer = CharTokenizer.from_texts(open(path, encoding="utf-8").read() for path in paths)
write_token_file(folder, paths, tokenizer, on_bytes=lambda done, total: (print("piece", flush=True), sys.stdin.read(1)))
"""


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_writer_is_gone_on_with(paths, tmp_path, after, small_pieces):
    tokenizer = CharTokenizer.from_texts(contents(paths))
    whole = write_token_file(tmp_path / "whole", paths, tokenizer)
    folder = tmp_path / "parts"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(folder), *map(str, paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        for _ in range(after):
            assert process.stdout.readline() == b"piece\n"
            process.stdin.write(b".")
            process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    with pytest.raises(TokenFileError, match="not a whole token file yet"):
        TokenFile.open(folder)
    with (folder / "ids").open("ab") as file:  # as if it had been killed between the ids and their header
        file.write(b"\x01\x02\x03")
    done = []
    resumed = write_token_file(folder, paths, tokenizer, on_bytes=lambda so_far, _: done.append(so_far))
    assert done[0] > 40 * after / 2, "it began anew"
    assert resumed.header == whole.header
    for name in ("ids", "documents"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"itemsize": 3},
        {"ids": -1},
        {"ids": 5},
        {"documents": 100},
        {"largest": "x"},
        {"surprise": 1},
        {"files": 5},
    ],
    ids=str,
)
def test_a_header_that_does_not_describe_its_files_is_refused(paths, tmp_path, change):
    write_token_file(tmp_path / "tokens", paths, CharTokenizer.from_texts(contents(paths)))
    header = tmp_path / "tokens" / "tokens.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(TokenFileError):
        TokenFile.open(tmp_path / "tokens")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_header_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(TokenFileError, match=r"tokens\.json does not describe a token file"):
        TokenFile.open(tmp_path)


def test_no_text_at_all_is_refused(paths, tmp_path):
    with pytest.raises(ValueError, match=r"there is no text in .*1\.txt"):
        write_token_file(tmp_path / "tokens", paths[1:2], CharTokenizer("a"))


def test_a_character_without_an_id_is_refused(paths, tmp_path):
    with pytest.raises(ValueError, match="character 'F' at position 0"):
        write_token_file(tmp_path / "tokens", paths, CharTokenizer("a"))
