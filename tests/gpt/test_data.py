"""Data: where a text comes from, how it is split, and which x and y become of it."""

import pytest
import torch
from trilby.gpt import CharTokenizer, default_text, read_text, split
from trilby.gpt.data import ContiguousBatches, RandomBatches, make_batches, tinyshakespeare_path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A user who has named and downloaded nothing."""
    monkeypatch.delenv("TRILBY_TEXT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class TestText:
    @pytest.mark.usefixtures("nowhere")
    def test_every_python_carries_one(self):
        text = default_text()
        assert text.source == "pydoc_data.topics"
        assert len(text.content) > 100_000
        assert "assignment" in text.content

    @pytest.mark.usefixtures("nowhere")
    def test_a_downloaded_tinyshakespeare_comes_first(self):
        tinyshakespeare_path().parent.mkdir()
        tinyshakespeare_path().write_text("First Citizen:")
        assert default_text().content == "First Citizen:"

    @pytest.mark.usefixtures("nowhere")
    def test_the_one_that_the_environment_names_comes_before_all(self, tmp_path, monkeypatch):
        tinyshakespeare_path().parent.mkdir()
        tinyshakespeare_path().write_text("First Citizen:")
        file = tmp_path / "mine.txt"
        file.write_text("mine: ü", encoding="utf-8")
        monkeypatch.setenv("TRILBY_TEXT", str(file))
        assert default_text() == read_text(file)
        assert default_text().content == "mine: ü"

    @pytest.mark.usefixtures("nowhere")
    def test_a_named_text_that_is_not_there_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRILBY_TEXT", str(tmp_path / "typo.txt"))
        with pytest.raises(FileNotFoundError, match=r"typo\.txt"):
            default_text()

    @pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\xff\xfe", "is not UTF-8")])
    def test_a_file_that_is_no_text_is_named(self, content, message, tmp_path):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=f"file {message}"):
            read_text(tmp_path / "file")

    def test_nine_tenths_are_for_training(self):
        tokens = split(list(range(25)))
        assert tokens.train.tolist() == list(range(22))
        assert tokens.validation.tolist() == [22, 23, 24]


class TestRandomBatches:
    def test_places_are_drawn_as_the_course_draws_them(self):
        places = torch.arange(1_003_854)  # as many as nine tenths of tinyshakespeare
        x, y, _ = RandomBatches(places, 4, 8, torch.Generator().manual_seed(1337)).next()
        assert x[:, 0].tolist() == [76049, 234249, 934904, 560986]
        assert torch.equal(x, x[:, :1] + torch.arange(8))
        assert torch.equal(y, x + 1)

    def test_the_batch_of_shakespeare_is_the_one_that_the_course_prints(self, tinyshakespeare, printed_batch):
        tokens = split(CharTokenizer.from_text(tinyshakespeare).encode(tinyshakespeare))
        assert (len(tokens.train), len(tokens.validation)) == (1_003_854, 111_540)
        x, y, _ = RandomBatches(tokens.train, 4, 8, torch.Generator().manual_seed(1337)).next()
        assert [x.tolist(), y.tolist()] == printed_batch

    def test_every_place_comes_up_and_none_beyond_the_end(self):
        batches = RandomBatches(torch.arange(6), 64, 3, torch.Generator().manual_seed(0))
        x, y, _ = batches.next()
        assert set(x[:, 0].tolist()) == {0, 1, 2}
        assert y.max() == 5

    def test_a_text_of_one_block_is_enough_and_less_is_an_error(self):
        RandomBatches(torch.arange(4), 2, 3, torch.Generator()).next()
        with pytest.raises(ValueError, match=r"tokens is \(3,\).*at least 4"):
            RandomBatches(torch.arange(3), 2, 3, torch.Generator())


FIRST_33_IDS = [
    *(100257, 32998, 47976, 374, 279, 9046, 315, 38696, 18815, 13790, 39006, 1778, 439, 271, 262, 264),
    *(220, 16, 865, 220, 16, 489, 2928, 233, 107, 489, 264, 308, 865, 308, 284, 293, 1174),
]


class TestContiguousBatches:
    def test_x_and_y_are_the_matrices_that_the_course_prints(self):
        x, y, _ = ContiguousBatches(torch.tensor(FIRST_33_IDS), batch_size=2, block_size=16).next()
        assert x.tolist() == [
            [100257, 32998, 47976, 374, 279, 9046, 315, 38696, 18815, 13790, 39006, 1778, 439, 271, 262, 264],
            [220, 16, 865, 220, 16, 489, 2928, 233, 107, 489, 264, 308, 865, 308, 284, 293],
        ]
        assert y.tolist() == [
            [32998, 47976, 374, 279, 9046, 315, 38696, 18815, 13790, 39006, 1778, 439, 271, 262, 264, 220],
            [16, 865, 220, 16, 489, 2928, 233, 107, 489, 264, 308, 865, 308, 284, 293, 1174],
        ]

    def test_batches_follow_each_other_and_begin_again(self):
        batches = ContiguousBatches(torch.arange(10), batch_size=2, block_size=2)
        assert [batches.next()[0].flatten().tolist() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]

    def test_too_short_a_text_is_an_error(self):
        with pytest.raises(ValueError, match=r"tokens is \(4,\).*at least 5"):
            ContiguousBatches(torch.arange(4), batch_size=2, block_size=2)

    def test_a_position_outside_of_the_text_is_refused(self):
        batches = ContiguousBatches(torch.arange(10), batch_size=2, block_size=2)
        for state in (torch.tensor([11]), torch.tensor([-1]), torch.tensor([1, 2])):
            with pytest.raises(ValueError, match="state"):
                batches.restore(state)


@pytest.mark.parametrize("sampler", ["random", "contiguous"])
def test_a_supply_goes_on_where_its_state_was_taken(sampler):
    first, second = (make_batches(sampler, split(torch.arange(100)), 2, 4, seed=1) for _ in range(2))
    first.next()
    state = first.state().clone()
    expected = [first.next()[0].tolist() for _ in range(3)]
    second.restore(state)
    assert [second.next()[0].tolist() for _ in range(3)] == expected


def test_an_unknown_supply_is_refused():
    with pytest.raises(ValueError, match="sampler is 'shuffled'; allowed are random, contiguous, packed, padded"):
        make_batches("shuffled", split(torch.arange(100)), 2, 4, seed=1)
