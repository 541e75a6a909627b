"""Launch parameters are data: pure functions choose them, and a new length or batch compiles nothing new."""

import itertools
import subprocess
import sys

import pytest
import torch
import triton
from trilby.kernels.gpu import attention_launch, norm_launch
from trilby.kernels.gpu.attention import attention_tiles, dot_precision
from trilby.kernels.gpu.attention_backward import BackwardInputs, attention_backward_rows_call
from trilby.kernels.gpu.attention_backward_key_value import attention_backward_key_value_call
from trilby.kernels.gpu.attention_backward_query import attention_backward_query_call
from trilby.kernels.gpu.attention_decode import attention_decode_calls, attention_decode_parts
from trilby.kernels.gpu.attention_forward import attention_forward_call
from trilby.kernels.gpu.attention_inputs import AttentionInputs
from trilby.kernels.gpu.compile import source_of
from trilby.kernels.gpu.matrix import AttentionShape
from trilby.kernels.gpu.norm_backward import NormGradients, NormInputs, column_sums_call, norm_backward_calls
from trilby.kernels.gpu.norm_forward import Dropout, NormResults, norm_forward_call
from trilby.kernels.gpu.targets import NEAREST, TARGETS, Device, device_of, target_of
from trilby.kernels.options import AttentionOptions
from triton.backends.compiler import GPUTarget

HALF, SINGLE = torch.bfloat16, torch.float32
TABLES = (
    attention_launch.FORWARD,
    attention_launch.DECODE,
    attention_launch.BACKWARD_KEY_VALUE,
    attention_launch.BACKWARD_QUERY,
)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 80, 96, 128, 160, 256])
def test_every_call_has_its_launch_parameters(target, head_dim):
    precisions = ["ieee", "tf32"] if target.backend == "cuda" else ["ieee"]
    for dtype, precision in [(HALF, "ieee"), *((SINGLE, precision) for precision in precisions)]:
        for is_plain in (False, True):
            attention_launch.attention_backward_tiles(target, precision, dtype, head_dim, is_plain)
            for q_len in (0, 1, 16, 17, 64, 65, 512, 10**6):
                attention_launch.attention_forward_tiles(target, precision, dtype, head_dim, q_len, is_plain)
        for q_len in (0, 1, 16):
            assert attention_launch.attention_decode_tiles(target, precision, dtype, head_dim, q_len, 1, 100)


@pytest.mark.parametrize("target", TARGETS)
def test_no_row_hides_behind_another(target):
    for table in TABLES:
        rows = [row for row in table if target in row.targets]
        assert len({(row.arithmetic, row.head_dim, row.q_len, row.scores) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("q_len", "group", "rows"),
    [(1, 1, 16), (16, 1, 16), (17, 1, None), (4, 4, 16), (4, 8, 64), (16, 4, 64), (9, 8, None)],
)
def test_decoding_holds_all_queries_of_a_key_head(q_len, group, rows):
    tiles = attention_launch.attention_decode_tiles(TARGETS["sm_90"], "ieee", HALF, 128, q_len, group, 10**4)
    assert (tiles and tiles.attention.block_m) == rows


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kv_len", [0, 1, 256, 257, 10**4, 10**6])
def test_splits_are_few_and_whole_tiles(target, kv_len):
    tiles = attention_launch.attention_decode_tiles(target, "ieee", HALF, 64, 1, 1, kv_len)
    assert tiles.split_keys % tiles.attention.block_n == 0
    assert tiles.split_keys * attention_launch.MOST_SPLITS >= kv_len
    assert tiles.split_keys >= attention_launch.FEWEST_SPLIT_KEYS


@pytest.mark.parametrize("row", [row for table in TABLES for row in table], ids=lambda row: row.reason[:40])
def test_every_row_says_why_and_names_targets(row):
    assert row.reason
    assert set(row.targets) <= set(TARGETS)
    assert row.arithmetic in ("half", "ieee", "tf32")
    assert row.scores in ("plain", "rich", "any")


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_reached(table):
    reached = set()
    for name, arithmetic, head_dim, q_len, scores in itertools.product(
        TARGETS, ("half", "ieee", "tf32"), (64, 128, 256), (1, 32, 64, 512), ("plain", "rich")
    ):
        for row in table:
            serves = name in row.targets and arithmetic == row.arithmetic and row.scores in ("any", scores)
            if serves and head_dim <= row.head_dim and q_len <= row.q_len:
                reached.add(row)
                break
    assert reached == set(table)


class NoGpu:
    """As much of a Triton driver as a launch asks before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compilations(monkeypatch):
    """What Triton's own launcher is about to compile, by kernel and key; each is stopped there."""
    asked = {}

    def stop(*, fn, compile, **_):
        asked[fn.name, str(compile["key"])] = compile
        return True

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", stop)
    return asked


def heads(T, D):
    return torch.empty(1, T, 2, D, dtype=HALF).transpose(1, 2)


def attention_inputs(T, D, feature=""):
    options = AttentionOptions.plain(True, 0.125)
    if feature == "everything":
        mask, slopes, seed = torch.empty(1, 2, T, T), torch.empty(1, 2), torch.empty(1, dtype=torch.int64)
        options = options._replace(
            mask=mask, alibi_slopes=slopes, seed=seed, window_left=99, softcap=1.5, dropout_p=0.1
        )
    if feature == "packed":
        starts = torch.empty(4, dtype=torch.int32)
        options = options._replace(query_starts=starts, key_starts=starts, longest_query=T, lower_right=True)
    return AttentionInputs(heads(T, D), heads(T, D), heads(T, D), options)


def forward_calls(T, D, feature=""):
    inputs, output, logsumexp = attention_inputs(T, D, feature), heads(T, D), torch.empty(1, 2, T)
    tiles = attention_tiles(TARGETS["sm_90"], inputs)
    if isinstance(tiles, attention_launch.DecodeTiles):
        parts = attention_decode_parts(inputs, output, tiles)
        return attention_decode_calls(inputs, output, logsumexp, parts, tiles)
    return (attention_forward_call(inputs, output, logsumexp, tiles),)


def backward_calls(T, D, feature=""):
    forward, statistics = attention_inputs(T, D, feature), torch.empty(1, 2, T)
    launch = attention_launch.attention_backward_tiles(TARGETS["sm_90"], "ieee", HALF, D, forward.is_plain)
    inputs = BackwardInputs(forward, heads(T, D), statistics, statistics)
    return [
        attention_backward_rows_call(heads(T, D), statistics, inputs, launch.rows),
        attention_backward_key_value_call(inputs, heads(T, D), heads(T, D), launch.key_value),
        attention_backward_query_call(inputs, heads(T, D), launch.query),
    ]


def norm_call(rows):
    batch = torch.empty(rows, 768, dtype=HALF)
    tiles = norm_launch.norm_forward_tiles(Device(TARGETS["sm_90"], 132), 768)
    results = NormResults(batch, None, torch.empty(rows), torch.empty(rows))
    return norm_forward_call(batch, None, (None, None), Dropout(None, 0.0), 1e-5, results, tiles)


def norm_backward_launches(rows, width):
    batch, statistics, weight = torch.empty(rows, width), torch.empty(rows), torch.empty(width)
    parts = torch.empty(2, 2, width)
    dropout = Dropout(torch.empty(1, dtype=torch.int64), 0.6)
    inputs = NormInputs(batch, None, batch, statistics, statistics, weight)
    tiles = norm_launch.norm_backward_tiles(Device(TARGETS["sm_90"], 132), width)
    calls = norm_backward_calls(inputs, NormGradients(batch, batch, parts[0], None), dropout, tiles)
    return [*calls, column_sums_call(parts, weight, None)]


LAUNCHES = [
    *forward_calls(100, 64),
    *forward_calls(100, 20),
    *forward_calls(100, 64, "everything"),
    *forward_calls(100, 64, "packed"),
    *forward_calls(1, 64),
    *backward_calls(100, 80),
    *backward_calls(100, 80, "everything"),
    *backward_calls(100, 80, "packed"),
    norm_call(6),
    *norm_backward_launches(6, 1000),
    *norm_backward_launches(6, 10000),
]


@pytest.mark.parametrize("call", LAUNCHES, ids=lambda call: call.kernel.__name__)
def test_the_matrix_compiles_what_a_launch_compiles(compilations, call):
    call.run(torch.device("cpu"))
    (launched,) = compilations.values()
    compiled = source_of(call)
    assert launched["signature"] == compiled.signature
    assert launched["constants"] == compiled.constants
    assert {position: hint for position, hint in launched["configs"][0].items() if hint} == compiled.attrs


@pytest.mark.parametrize(("D", "feature"), [(64, ""), (80, ""), (40, "packed"), (20, "")])
def test_lengths_1_to_512_take_at_most_4_compilations(compilations, D, feature):
    for T in range(1, 513):
        for call in forward_calls(T, D, feature):
            call.run(torch.device("cpu"))
    assert 1 <= len(compilations) <= 4


@pytest.mark.parametrize("D", [64, 40])
def test_the_backward_compiles_once_for_all_lengths(compilations, D):
    for T in (1, 2, 15, 16, 17, 256, 511, 512):
        for call in backward_calls(T, D):
            call.run(torch.device("cpu"))
    assert len(compilations) == 3


def test_a_new_batch_compiles_no_new_norm(compilations):
    for rows in (1, 2, 15, 16, 1000):
        norm_call(rows).run(torch.device("cpu"))
    assert len(compilations) == 1


@pytest.mark.parametrize("width", [1, 64, 65, 768, 1000, 8192, 8193, 16384, 16385, 65536])
def test_norm_programs_fill_the_device(width):
    device = Device(TARGETS["sm_90"], 132)
    for tiles in (norm_launch.norm_forward_tiles(device, width), norm_launch.norm_backward_tiles(device, width)):
        assert tiles.block_n % 64 == 0
        assert tiles.programs % device.processors == 0
        assert tiles.num_warps * 32 <= 1024


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("width", [64, 100, 1024, 4096])
def test_a_backward_thread_has_16_bytes_of_half_precision_and_of_one_row_perhaps_more(target, width):
    tiles = norm_launch.norm_backward_tiles(Device(target, 132), width)
    elements = tiles.block_m * tiles.block_n / (tiles.num_warps * target.warp_size)
    assert elements == 8 or (elements > 8 and tiles.block_m == 1)


@pytest.mark.parametrize("rows", [0, 1, 5, 264, 4096, 5000, 10**6])
@pytest.mark.parametrize("chunks", [1, 3, 500])
def test_norms_have_the_fewest_programs_that_finish_as_early(rows, chunks):
    tiles = norm_launch.NormTiles(block_n=1024, num_warps=16, programs=132, block_m=4)
    blocks, most = -(-rows // 4), max(132 // chunks, 1)
    programs = tiles.programs_of(rows, chunks)
    assert programs <= most
    assert programs * -(-blocks // most) >= blocks
    assert (programs - 1) * -(-blocks // most) < max(blocks, 1)


def test_an_architecture_that_no_row_serves_is_refused_by_name():
    assert target_of("sm_90").name == "sm_90"
    assert all(target_of(name).name == served for name, served in NEAREST.items())
    with pytest.raises(ValueError, match="architecture is sm_75"):
        target_of("sm_75")


def test_a_tensor_on_the_cpu_is_refused_by_name():
    with pytest.raises(ValueError, match="query is on cpu"):
        device_of(torch.empty(1), "query")


@pytest.fixture
def tf32():
    """PyTorch set to multiply float32 matrices in TF32."""
    setting = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = setting


def test_float32_is_exact_by_default():
    assert dot_precision(TARGETS["sm_90"], SINGLE) == "ieee"


@pytest.mark.usefixtures("tf32")
def test_tf32_follows_pytorchs_setting():
    assert dot_precision(TARGETS["sm_90"], SINGLE) == "tf32"
    assert dot_precision(TARGETS["sm_90"], HALF) == "ieee"
    assert dot_precision(TARGETS["gfx942"], SINGLE) == "ieee"


def test_a_call_may_lie_on_the_meta_device():
    call = AttentionShape(HALF, 64).forward(attention_launch.AttentionTiles(128, 64, 8, 2))
    assert call.grid == (2 * 12 * 8,)


def run(program):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_touches_no_device_and_compiles_nothing():
    result = run(
        "import torch, triton\n"
        "def refuse(*arguments, **options): raise AssertionError('compiled')\n"
        "triton.compile = triton.compiler.compile = refuse\n"
        "triton.runtime.driver.__class__.active = property(refuse)\n"
        "import trilby.kernels.gpu\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert result.returncode == 0, result.stderr


def test_trilby_kernels_imports_no_triton():
    result = run("import trilby.kernels, sys; assert 'triton' not in sys.modules, 'triton was imported'")
    assert result.returncode == 0, result.stderr
