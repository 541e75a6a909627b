"""The rows about generation: the same tokens asked of both, errors against float64, and what generating must move."""

import sys

import pytest
import torch
from trilby.bench.generation import DESK, QUICK_DESK, Request, generation_rows, ours, rival, work_of
from trilby.bench.machine import Ceilings, Copy
from trilby.bench.report import cells
from trilby.bench.results import OURS, RIVAL
from trilby.gpt import GPT, GPTConfig

CEILINGS = Ceilings({"float32": 1e11, "bfloat16": 2e11}, (Copy(2**20, 5e10),))
LONGEST_CASE = 62
CONFIG = GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=2, n_embd=32)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_request_becomes_an_exact_row_and_advances():
    steps = []
    rows = list(generation_rows(QUICK_DESK, CEILINGS, lambda: steps.append(1)))
    assert len(rows) == len(steps) == len(QUICK_DESK.requests)
    for row, request in zip(rows, QUICK_DESK.requests):
        assert row.is_exact, row.errors
        assert (row.operation, row.dtype) == ("GPT generation", request.weights)
        assert row.shape == f"2x64 B={request.batch_size} {request.prompt}+{request.new}"
        assert len(cells(row)[0]) <= LONGEST_CASE, "it would not fit on a line"
        assert set(row.seconds) == {RIVAL, OURS}
        assert ("logits off" in row.setting) == (request.weights == "int8")


@pytest.mark.parametrize("with_transformers", [True, False])
def test_both_are_asked_for_the_same(with_transformers, monkeypatch):
    if with_transformers:
        pytest.importorskip("transformers")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    model = GPT(CONFIG).eval()
    sides = [ours(model, "float32"), rival(model, "float32")]
    texts = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [side.generate(texts, 6) for side in sides]
        assert torch.equal(*found)
        assert found[0].shape == (2, 11)
        logits = [side.logits(found[0], 4) for side in sides] + [side.truth(found[0], 4).float() for side in sides]
    assert all(each.shape == (2, 4, 64) for each in logits)
    for each in logits[1:]:
        torch.testing.assert_close(logits[0], each)


def test_a_token_reads_all_weights_and_a_prompt_multiplies_with_them():
    blocks, decoder, norms = 12 * 32 * 32 + 13 * 32, 64 * 32, 5 * 2 * 32 - 2 * 32 - 2 * 32
    parameters = blocks + decoder + norms
    reading = work_of(CONFIG, Request(1, 1, 10, "int8", ""), CEILINGS)
    assert (reading.unit, reading.amount) == ("byte", pytest.approx(10 * parameters, rel=0.01))
    prompt = work_of(CONFIG, Request(1, 30, 1, "float32", ""), CEILINGS)
    multiplied = 30 * (parameters - decoder) + decoder  # only of the last token are there logits
    assert (prompt.unit, prompt.amount) == ("flop", pytest.approx(2 * multiplied, rel=0.01))


def test_the_requests_are_those_of_the_floors():
    kinds = [(request.batch_size, request.weights) for request in DESK.requests]
    assert kinds[:4] == [(1, "float32"), (1, "bfloat16"), (1, "int8"), (32, "float32")]
    assert DESK.requests[-1].prompt > DESK.requests[-1].new
