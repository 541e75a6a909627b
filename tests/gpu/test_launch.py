"""Launch parameters are data: pure functions choose them, and a new length or batch compiles nothing new."""

import subprocess
import sys

import pytest
import torch
from trilby.kernels.gpu import attention_launch, norm_launch
from trilby.kernels.gpu.attention import dot_precision
from trilby.kernels.gpu.attention_forward import attention_forward_call
from trilby.kernels.gpu.compile import source_of
from trilby.kernels.gpu.matrix import AttentionShape
from trilby.kernels.gpu.norm_forward import Dropout, NormResults, norm_forward_call
from trilby.kernels.gpu.targets import NEAREST, TARGETS, Device, device_of, target_of

HALF, SINGLE = torch.bfloat16, torch.float32
TABLES = (attention_launch.FORWARD, attention_launch.BACKWARD_KEY_VALUE, attention_launch.BACKWARD_QUERY)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 80, 96, 128, 160, 256])
def test_every_call_has_its_launch_parameters(target, head_dim):
    precisions = ["ieee", "tf32"] if target.backend == "cuda" else ["ieee"]
    for dtype, precision in [(HALF, "ieee"), *((SINGLE, precision) for precision in precisions)]:
        attention_launch.attention_backward_tiles(target, precision, dtype, head_dim)
        for q_len in (0, 1, 16, 17, 64, 65, 512, 10**6):
            attention_launch.attention_forward_tiles(target, precision, dtype, head_dim, q_len)


@pytest.mark.parametrize("row", [row for table in TABLES for row in table], ids=lambda row: row.reason[:40])
def test_every_row_says_why_and_names_targets(row):
    assert row.reason
    assert set(row.targets) <= set(TARGETS)
    assert row.arithmetic in ("half", "ieee", "tf32")


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_reached(table):
    reached = {
        (name, arithmetic, head_dim, q_len): next(
            row
            for row in table
            if name in row.targets and arithmetic == row.arithmetic and head_dim <= row.head_dim and q_len <= row.q_len
        )
        for name in TARGETS
        for arithmetic in (("half", "ieee", "tf32") if TARGETS[name].backend == "cuda" else ("half", "ieee"))
        for head_dim in (64, 128, 256)
        for q_len in (1, 64, 512)
    }
    assert set(table) == set(reached.values())


def variants(calls):
    """The distinct compilations that a series of launches takes, as Triton's own cache counts them."""
    return {(source_of(call).hash(), tuple(call.options.items())) for call in calls}


@pytest.mark.parametrize("head_dim", [64, 80, 40])
def test_lengths_1_to_512_take_at_most_4_compilations(head_dim):
    def forward(T):
        heads = torch.empty(2, T, 12, head_dim, dtype=HALF, device="meta").transpose(1, 2)
        tiles = attention_launch.attention_forward_tiles(TARGETS["sm_90"], "ieee", HALF, head_dim, T)
        logsumexp = torch.empty(2, 12, T, device="meta")
        return attention_forward_call(heads, heads, heads, heads, logsumexp, True, 0.125, tiles, "ieee")

    assert len(variants(map(forward, range(1, 513)))) <= 4


def test_a_new_batch_compiles_no_new_norm():
    def forward(rows):
        batch = torch.empty(rows, 768, dtype=HALF, device="meta")
        statistics = torch.empty(rows, device="meta")
        tiles = norm_launch.norm_forward_tiles(Device(TARGETS["sm_90"], 132), 768)
        results = NormResults(batch, None, statistics, statistics)
        return norm_forward_call(batch, None, (None, None), Dropout(None, 0.0), 1e-5, results, tiles)

    assert len(variants(map(forward, (1, 2, 15, 16, 1000, 10**6)))) == 1


@pytest.mark.parametrize("width", [1, 64, 65, 768, 1000, 8192, 8193, 16384, 16385, 65536])
def test_norm_programs_fill_the_device(width):
    device = Device(TARGETS["sm_90"], 132)
    for tiles in (norm_launch.norm_forward_tiles(device, width), norm_launch.norm_backward_tiles(device, width)):
        assert tiles.block_n % 64 == 0
        assert tiles.programs % device.processors == 0
        assert tiles.num_warps * 32 <= 1024


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
