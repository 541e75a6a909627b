"""Launch parameters measured on a user's GPU: asked for, found, written, read, and chosen only where one says so.

The measuring is injected: a call tells which launch parameters it would have run with, and a table how fast those are.
"""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trilby.kernels.gpu import __main__ as command
from trilby.kernels.gpu import attention_launch, measured, tune
from trilby.kernels.gpu.attention import attention_tiles
from trilby.kernels.gpu.attention_inputs import AttentionInputs
from trilby.kernels.gpu.attention_launch import (
    FORWARD,
    TABLES,
    attention_backward_tiles,
    attention_forward_tiles,
    place_of,
)
from trilby.kernels.gpu.measured import VARIABLE, Measured, Place, measured_numbers, read, trying, write
from trilby.kernels.gpu.norm_launch import norm_backward_tiles, norm_forward_tiles
from trilby.kernels.gpu.targets import TARGETS, Device
from trilby.kernels.gpu.tune import Question, answer, attention_candidates, attention_choices, questions
from trilby.kernels.options import AttentionOptions

SM_90 = TARGETS["sm_90"]
HOPPER = Device(SM_90, 132)
ROW = next(row for row in FORWARD if "sm_90" in row.targets and row.arithmetic == "half" and row.q_len > 4096)


def chosen(head_dim=ROW.head_dim, q_len=4096):
    """What the forward would be launched with."""
    return vars(attention_forward_tiles(SM_90, "ieee", torch.bfloat16, head_dim, q_len))


@pytest.fixture(autouse=True)
def _without_a_file(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    measured._file.cache_clear()
    yield
    measured._file.cache_clear()


@pytest.fixture
def question():
    candidates = ({**vars(ROW.tiles), "num_warps": 16}, {**vars(ROW.tiles), "num_stages": 1})
    return Question(place_of(FORWARD, SM_90, ROW), vars(ROW.tiles), candidates, lambda: chosen)


def measuring(seconds):
    """A measure that knows how long launch parameters take, by one of their numbers; others take 2 seconds."""

    def measure(call):
        launched = call()
        return next((took for (name, value), took in seconds.items() if launched[name] == value), 2.0)

    return measure


def test_a_candidate_that_is_clearly_faster_is_the_answer(question):
    best = answer(question, measuring({("num_warps", 16): 1.0}), "a GPU")
    assert best.numbers["num_warps"] == 16
    assert best.reason.startswith("2.00 times as fast as block_m")
    assert best.reason.endswith("on a GPU")


@pytest.mark.parametrize("seconds", [{}, {("num_warps", 16): 1.99}])
def test_noise_is_no_answer(question, seconds):
    assert answer(question, measuring(seconds), "a GPU") is None


def test_a_candidate_that_cannot_run_is_none(question):
    measure = measuring({("num_stages", 1): 0.5})

    def fail_with_sixteen_warps(call):
        if call()["num_warps"] == 16:
            raise RuntimeError("out of resource: shared memory")
        return measure(call)

    assert answer(question, fail_with_sixteen_warps, "a GPU").numbers["num_stages"] == 1


def test_a_row_that_cannot_be_measured_is_an_error(question):
    def fail(call):
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        answer(question, fail, "a GPU")


def test_trying_holds_for_one_row_and_ends(question):
    before, others = chosen(), [chosen(head_dim=256), chosen(q_len=1)]
    with trying(question.trial({**before, "num_warps": 16})):
        assert chosen() == {**before, "num_warps": 16}
        assert [chosen(head_dim=256), chosen(q_len=1)] == others
    assert chosen() == before


def test_what_is_written_is_chosen_where_the_variable_names_it_and_nowhere_else(question, tmp_path, monkeypatch):
    path, before = tmp_path / "deep" / "launch.json", chosen()
    best = question.trial({**before, "block_n": 32}, "measured")
    write(path, "a GPU", [best])
    assert read(path) == [best]
    assert chosen() == before
    monkeypatch.setenv(VARIABLE, str(path))
    assert chosen()["block_n"] == 32
    assert vars(attention_forward_tiles(TARGETS["sm_80"], "ieee", torch.bfloat16, 64, 4096))["block_n"] == 64


def test_norms_are_launched_with_the_warps_that_were_measured(tmp_path, monkeypatch):
    path = tmp_path / "launch.json"
    places = (Place(name, "sm_90", "", 1024, 0, "") for name in ("norm_forward", "norm_backward"))
    rows = [Measured(place, {"num_warps": 8}, "") for place in places]
    write(path, "a GPU", rows)
    before = norm_forward_tiles(HOPPER, 2048)
    monkeypatch.setenv(VARIABLE, str(path))
    assert norm_forward_tiles(HOPPER, 1000).num_warps == norm_backward_tiles(HOPPER, 1000).num_warps == 8
    assert norm_forward_tiles(HOPPER, 1000).programs == 132 * 32 // 8
    assert norm_forward_tiles(HOPPER, 2048) == before


@pytest.mark.parametrize(
    "content", [None, "no json", '{"schema": 99, "rows": []}', '{"schema": 1, "rows": [{"x": 1}]}']
)
def test_a_file_that_is_none_is_an_error_that_names_it(content, tmp_path, monkeypatch):
    path = tmp_path / "launch.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"TRILBY_LAUNCH_TABLE names .*launch\.json, which is no table"):
        chosen()


def test_every_row_that_serves_a_gpu_is_one_question_with_candidates_of_its_own_size():
    asked = list(questions(HOPPER))
    served = [row for table in TABLES.values() for row in table if "sm_90" in row.targets]
    rows = [row for row in served if row.arithmetic != "tf32"]
    assert len({question.place for question in asked}) == len(asked)
    assert len([question for question in asked if question.place.arithmetic]) == len(rows)
    assert {question.place.table for question in asked} == {*TABLES, "norm_forward", "norm_backward"}
    for question in asked:
        assert question.candidates
        assert question.own not in question.candidates
        assert measured_numbers(question.place) is None
    assert {question.place.table for question in questions(HOPPER, ["query"])} == {"query"}


def test_candidates_are_of_the_rows_own_size_or_twice_or_half_of_it():
    found = attention_candidates(ROW)
    assert 10 < len(found) < 60
    assert all(ROW.tiles.block_m / 2 <= each["block_m"] <= ROW.tiles.block_m * 2 for each in found)


def test_choices_keep_the_tile():
    changed = [{name for name in each if each[name] != vars(ROW.tiles)[name]} for each in attention_choices(ROW)]
    assert all(len(one) == 1 for one in changed)
    assert set.union(*changed) == {"num_stages", "products", "prefetch_masked", "compiled_stride", "descriptors"}


@pytest.mark.parametrize(("target", "tables"), [("sm_80", set()), ("sm_90", {"forward"})])
def test_descriptors_are_a_choice_of_the_forward_where_a_target_has_them(target, tables):
    asked = questions(Device(TARGETS[target], 1), candidates=attention_choices)
    offered = {one.place.table for one in asked if any(each.get("descriptors") for each in one.candidates)}
    assert offered == tables


def test_the_answers_so_far_are_written_after_each_question(question, tmp_path, capsys):
    path = tmp_path / "launch.json"

    def stop(call):
        raise KeyboardInterrupt

    measures = iter([measuring({("num_warps", 16): 1.0})] * 3 + [stop])
    with pytest.raises(KeyboardInterrupt):
        command.tune([question, question], lambda call: next(measures)(call), "a GPU", path)
    assert [row.numbers["num_warps"] for row in read(path)] == [16]
    assert "1/2 forward half" in capsys.readouterr().out
    command.tune([question], measuring({}), "a GPU", path)
    assert json.loads(path.read_text())["rows"] == []
    assert "0 of 1 rows are better otherwise here" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    with pytest.raises(SystemExit, match="PyTorch finds none here"):
        command.main(["tune"])


class Recorder(TorchDispatchMode):
    """Notes trilby's operators and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "trilby":
            self.calls.append((function.__name__.partition(".")[0], arguments))
        return function(*arguments, **(options or {}))


def test_what_is_measured_is_the_operator_that_the_table_is_about():
    operators = {"norm_forward": "norm", "norm_backward": "norm_backward"}
    operators |= {"forward": "attention", "decode": "attention"}
    for question in questions(HOPPER, torch_device="meta"):
        table, _, _, size, q_len, _ = question.place
        call = question.run()
        with Recorder() as recorder:
            call()
        ((name, arguments),) = recorder.calls
        shape = arguments[0].shape
        assert name == operators.get(table, "attention_backward")
        assert shape[-1] == size
        if table == "forward":
            assert shape[2] == min(q_len, tune.LONGEST)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_call_that_is_measured_is_served_by_the_row_that_is_asked_about(target, monkeypatch):
    asked_for = []
    monkeypatch.setattr(attention_launch, "measured_numbers", lambda place: asked_for.append(place))
    asked = list(questions(Device(target, 132), tuple(TABLES), torch_device="meta"))
    assert {question.place.scores for question in asked} == {"plain", "rich", "any"}
    for question in asked:
        call = question.run()
        with Recorder() as recorder:
            call()
        ((name, arguments),) = recorder.calls
        asked_for.clear()
        if name == "attention":
            attention_tiles(target, AttentionInputs(*arguments[:3], AttentionOptions(*arguments[3:])))
        else:
            inputs = AttentionInputs(*arguments[1:4], AttentionOptions(*arguments[6:]))
            attention_backward_tiles(target, "ieee", inputs.query.dtype, inputs.head_dim, inputs.is_plain)
        assert question.place in asked_for
