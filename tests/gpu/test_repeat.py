"""A call that is repeated gives the bits that it gives when everything is found out anew, wherever its tensors lie."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton
from trilby.kernels import gpu
from trilby.kernels.gpu.attention_tiles import AttentionTiles, DecodeTiles
from trilby.kernels.gpu.targets import TARGETS, Device
from trilby.kernels.options import AttentionOptions
from triton.backends.compiler import GPUTarget

SMALL = AttentionTiles(block_m=16, block_n=16, num_warps=4, num_stages=1)
SPLIT = DecodeTiles(SMALL, split_keys=16)
H, D = 2, 16


def heads(T, seed, count=H):
    """[1, count, T, D], as a projection leaves it in memory."""
    return torch.randn(1, T, count, D, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)


def options_of(feature, T, seed):
    generator = torch.Generator().manual_seed(seed)
    if feature == "mask":
        return AttentionOptions(mask=torch.rand(1, H, T, T, generator=generator) < 0.5)
    if feature == "dropout, ALiBi":
        slopes = torch.rand(1, H, generator=generator)
        return AttentionOptions(seed=torch.tensor([seed]), dropout_p=0.5, alibi_slopes=slopes, window_right=0)
    if feature == "packed":
        starts = torch.tensor([0, 5 + seed, T - 2], dtype=torch.int32)
        return AttentionOptions(query_starts=starts, key_starts=starts.clone(), longest_query=T, window_right=0)
    return AttentionOptions(window_right=0, softcap=0.0 if feature == "plain" else 2.0)


def attention(feature, T=24):
    def arguments(seed):
        query, key, value = heads(T, seed), heads(T, seed + 100, 1), heads(T, seed + 200, 1)
        return query, key, value, *options_of(feature, T, seed)

    return "attention", arguments, SMALL


def decode(seed):
    return heads(1, seed), heads(40, seed + 100), heads(40, seed + 200), *AttentionOptions()


def backward(feature, T=24):
    def arguments(seed):
        query, key, value, *options = attention(feature, T)[1](seed)
        logsumexp = torch.randn(1, H, T, generator=torch.Generator().manual_seed(seed)) + 4
        return heads(T, seed + 300), query, key, value, heads(T, seed + 400), logsumexp, *options

    return "attention_backward", arguments, SMALL


def rows(seed, count=1):
    return torch.randn(count, 6, 48, generator=torch.Generator().manual_seed(seed)).unbind()


def parameters(seed):
    return torch.randn(2, 48, generator=torch.Generator().manual_seed(seed)).unbind()


def norm(seed):
    return *rows(seed), *parameters(seed), 1, True, 1e-5


def norm_of_halves(seed):
    return rows(seed)[0].half(), parameters(seed)[0], None, 1, False, 1e-5


def add_norm(seed):
    return *rows(seed, 2), *parameters(seed), torch.tensor([seed]), 1, True, 1e-5, 0.5


def norm_backward(seed):
    grad_normalized, grad_summed, summed = rows(seed, 3)
    mean, rstd = summed.mean(-1), summed.var(-1).rsqrt()
    return grad_normalized, grad_summed, summed, mean, rstd, *parameters(seed), torch.tensor([seed]), 1, True, 0.5


def norm_backward_of_nothing_else(seed):
    grad_normalized, summed = rows(seed, 2)
    return grad_normalized, None, summed, summed.mean(-1), summed.var(-1).rsqrt(), None, None, None, 1, True, 0.0


CASES = {
    **{feature: attention(feature) for feature in ("plain", "softcap", "mask", "dropout, ALiBi", "packed")},
    "decode": ("attention", decode, SPLIT),
    **{f"{feature}, backward": backward(feature) for feature in ("plain", "mask", "dropout, ALiBi", "packed")},
    **{one.__name__: (one.__name__, one, None) for one in (norm, add_norm, norm_backward)},
    "norm of halves": ("norm", norm_of_halves, None),
    "norm's backward of nothing else": ("norm_backward", norm_backward_of_nothing_else, None),
}


def call(kernels, name, arguments, tiles):
    return getattr(kernels, name)(*arguments, tiles=tiles)


@pytest.mark.parametrize("case", CASES)
def test_a_repeated_call_gives_the_same_bits(kernels, case):
    name, arguments, tiles = CASES[case]
    kernels.forget()
    repeated = [call(kernels, name, arguments(seed), tiles) for seed in range(4)]
    assert kernels.count_repeatable() == 1
    for seed in (2, 3):
        kernels.forget()
        anew = call(kernels, name, arguments(seed), tiles)
        assert all(torch.equal(one, other) for one, other in zip(repeated[seed], anew))
        assert [one.stride() for one in repeated[seed]] == [one.stride() for one in anew]
    assert not torch.equal(repeated[2][0], repeated[3][0])


@pytest.mark.parametrize(
    "other",
    [
        {"eps": 1e-6},
        {"rows": torch.randn(7, 48)},
        {"rows": torch.randn(48, 6).T},
        {"rows": torch.randn(6, 48).half()},
        {"rows": torch.randn(6 * 48 + 1)[1:].view(6, 48)},
        {"weight": None},
        {"centered": False},
    ],
    ids=["a number", "sizes", "strides", "a dtype", "an address that is not aligned", "an absent tensor", "a flag"],
)
def test_what_differs_in_more_than_an_address_is_another_call(kernels, other):
    def ask(rows, weight=None, centered=True, eps=1e-5):
        return kernels.norm(rows, weight, None, 1, centered, eps)

    first = {"rows": torch.randn(6, 48), "weight": torch.randn(48)}
    kernels.forget()
    for _ in range(3):
        ask(**first)
    found = ask(**{**first, **other})
    assert kernels.count_repeatable() == 1
    kernels.forget()
    assert all(torch.equal(one, another) for one, another in zip(found, ask(**{**first, **other})))


def test_one_tensor_as_two_arguments_is_not_repeated(kernels):
    kernels.forget()
    x, weight = torch.randn(6, 48), torch.randn(48)
    for _ in range(4):
        kernels.add_norm(x, x, weight, None, None, 1, True, 1e-5, 0.0)
    assert kernels.count_repeatable() == 0
    y = torch.randn(6, 48)
    summed = kernels.add_norm(x, y, weight, None, None, 1, True, 1e-5, 0.0)[1]
    assert torch.equal(summed, x + y)


def test_a_layout_that_has_to_be_copied_is_not_repeated(kernels):
    kernels.forget()
    for _ in range(3):
        x = torch.randn(2, 48, 3).transpose(1, 2)
        weight = torch.randn(96)[::2]
        normalized = kernels.norm(x, weight, None, 1, True, 1e-5)[0]
        torch.testing.assert_close(normalized, torch.nn.functional.layer_norm(x, (48,), weight))
    assert kernels.count_repeatable() == 0


def test_all_are_forgotten_when_there_are_many(mutant):
    kernels = mutant("repeat", "MOST_KNOWN = 4096", "MOST_KNOWN = 2")

    def ask(rows):
        return kernels.norm(torch.randn(rows, 48), None, None, 1, True, 1e-5)

    for rows in (5, 5, 6, 6):
        ask(rows)
    assert kernels.count_repeatable() == 2
    ask(7)
    assert kernels.count_repeatable() == 0


def test_a_number_that_does_not_count_is_found(mutant):
    kernels = mutant("repeat", "key = (prepare, numbers, ", "key = (prepare, ")
    x = torch.randn(6, 48)
    near, _, repeated = (kernels.norm(x, None, None, 1, True, eps)[0] for eps in (1e-5, 1e-5, 1.0))
    kernels.forget()
    far = kernels.norm(x, None, None, 1, True, 1.0)[0]
    assert torch.equal(repeated, near)
    assert not torch.equal(repeated, far)


class PretendedDriver:
    """A GPU that compiles for sm_90 and only writes down what it should launch."""

    def __init__(self):
        self.launched = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 64, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": TARGETS["sm_90"].shared_memory},
        )

    def launcher_cls(self, _source, _metadata):
        def launch(x, y, z, stream, function, metadata, _of_hooks, _before, _after, *arguments):
            self.launched.append(((x, y, z), stream, function, metadata, *arguments))

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


DRIVER = PretendedDriver()  # kernels that were compiled for one driver are launched by it ever after


@pytest.fixture
def pretended(monkeypatch):
    """What is launched on a GPU that is not here, by tensors of the CPU."""
    driver = DRIVER
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    for module in ("norm", "attention"):
        where = sys.modules[f"trilby.kernels.gpu.{module}"]
        monkeypatch.setattr(where, "device_of", lambda *_: Device(TARGETS["sm_90"], 132))
    gpu.forget()
    yield driver
    driver.launched.clear()
    gpu.forget()
    triton.runtime.driver._active = before


def described(arguments, known):
    """Arguments of a launch: known tensors by name, others by what Triton compiles in."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield tuple(described(argument, known))
        elif isinstance(argument, torch.Tensor):
            yield known.get(argument.data_ptr(), (argument.dtype, argument.data_ptr() % 16))
        else:
            yield argument


@pytest.mark.parametrize("case", ["norm", "add_norm", "norm_backward", "plain", "dropout, ALiBi", "decode"])
def test_what_is_launched_again_is_what_was_launched(pretended, case):
    name, arguments, _ = CASES[case]
    launches = []
    for seed in range(4):
        inputs = arguments(seed)
        results = getattr(gpu, name)(*inputs)
        tensors = [tensor for tensor in (*inputs, *results) if isinstance(tensor, torch.Tensor) and tensor.numel()]
        known = {tensor.data_ptr(): f"tensor {i}" for i, tensor in enumerate(tensors)}
        launches.append([tuple(described(launch, known)) for launch in pretended.launched])
        pretended.launched.clear()
    assert gpu.count_repeatable() == 1
    assert launches[0]
    assert launches[0] == launches[1] == launches[2] == launches[3]


def test_no_tensor_is_kept(pretended):
    kept = []
    for seed in range(4):
        inputs = attention("dropout, ALiBi")[1](seed)
        results = gpu.attention(*inputs)
        tensors = [tensor for tensor in (*inputs, *results) if isinstance(tensor, torch.Tensor)]
        kept += [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        pretended.launched.clear()
    del inputs, results, tensors
    gc.collect()
    assert gpu.count_repeatable() == 1
    assert not [storage for storage in kept if storage() is not None]
