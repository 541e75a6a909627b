"""PyTorch's own tests of attention and norms, with trilby in PyTorch's place: its samples, and its gradcheck.

Its samples are small, and small calls are PyTorch's. So they are run twice: as they are, and with the sizes from which
on a call is trilby's lowered to nothing, so that trilby's kernels compute every sample that they can.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from tolerance import assert_as_exact_as
from torch import Tensor
from trilby.kernels import activated, attention_rules, explain
from trilby.kernels.ops import NATIVE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to activate: {NATIVE.reason}"),
]
# How many samples trilby's kernels compute, at least, when small ones are theirs, too. The others are empty, or have
# rows of one element, or are attention that is not [B, H, T, D].
COMPUTED = {
    "native_layer_norm": 12,
    "nn.functional.layer_norm": 4,
    "nn.functional.multi_head_attention_forward": 1,
    "nn.functional.rms_norm": 3,
    "nn.functional.scaled_dot_product_attention": 4,
}


@pytest.fixture(scope="module")
def opinfos() -> dict[str, object]:
    pytest.importorskip("expecttest", reason="PyTorch's tests need expecttest (pip install expecttest)")
    from torch.testing._internal.common_methods_invocations import op_db

    return {info.name: info for info in op_db if info.name in COMPUTED}


@pytest.fixture
def any_size(every_size, monkeypatch) -> Iterator[None]:
    """No call is too small for trilby."""
    for limit in ("FEWEST_QUERIES", "FEWEST_MULTIPLICATIONS", "FEWEST_MASKED_MULTIPLICATIONS"):
        monkeypatch.setattr(attention_rules, limit, 1)
    monkeypatch.setattr(attention_rules, "MOST_DECODED", 0)
    monkeypatch.setattr(attention_rules, "FEWEST_IN_PLACE", dict.fromkeys(attention_rules.FEWEST_IN_PLACE, (1, 1)))
    remembered = attention_rules._remembered_reasons, attention_rules.is_trilbys_inference
    for rule in remembered:
        rule.cache_clear()
    yield
    for rule in remembered:
        rule.cache_clear()


def tensors_of(results: object) -> list[Tensor]:
    """The tensors among what an operator returned."""
    several = results if isinstance(results, tuple | list) else (results,)
    return [result for result in several if isinstance(result, Tensor)]


def run(op: Callable, sample: object, seed: int = 0) -> list[Tensor]:
    """The results of `op`, and all gradients of the sum of their squares."""
    torch.manual_seed(seed)
    arguments = [sample.input, *sample.args]
    leaves = [t for t in [*arguments, *sample.kwargs.values()] if isinstance(t, Tensor) and t.requires_grad]
    outputs = tensors_of(op(*arguments, **sample.kwargs))
    loss = sum(output.float().square().sum() for output in outputs if output.requires_grad)
    return [*outputs, *(g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None)]


def is_repeatable(sample: object) -> bool:
    """Whether nothing is dropped: who computes dropout draws a mask of his own."""
    return not sample.kwargs.get("dropout_p", 0.0)


def in_float64(argument: object) -> object:
    """The same numbers in float64, if it is a tensor of numbers."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return argument
    return argument.detach().double().requires_grad_(argument.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPUTED)
def test_the_samples_agree_with_pytorch_to_its_tolerance(opinfos, name, dtype):
    op, samples = opinfos[name].op, list(opinfos[name].sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in filter(is_repeatable, samples):
        expected = run(op, sample)
        with activated():
            found = run(op, sample)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPUTED)
def test_the_samples_that_trilbys_kernels_compute_are_as_exact_as_pytorchs(opinfos, any_size, name, dtype):
    """PyTorch's tolerance would not do: in some of its samples its own error is beyond it."""
    computed = 0
    op, samples = opinfos[name].op, list(opinfos[name].sample_inputs("cpu", dtype, requires_grad=True))
    for number, sample in enumerate(samples):
        rivals = run(op, sample)
        with activated():
            results: list[list[Tensor]] = []
            calls = explain(lambda op, sample, results: results.append(run(op, sample)), op, sample, results)
            computed += all(call.is_trilbys for call in calls)
        (ours,) = results
        if not is_repeatable(sample):
            continue
        truths = run(op, sample.transform(in_float64))
        assert len(ours) == len(rivals)
        for i, (our, rival, truth) in enumerate(zip(ours, rivals, truths)):
            assert_as_exact_as(our, rival, truth.double(), f"result {i} of sample {number}")
    assert computed >= COMPUTED[name], f"trilby computed {computed} of {len(samples)} samples"


@pytest.mark.parametrize("name", COMPUTED)
def test_pytorchs_gradcheck(opinfos, name):
    info = opinfos[name]
    with activated():
        for sample in list(info.sample_inputs("cpu", torch.float64, requires_grad=True))[:4]:

            def function(input: Tensor, sample: object = sample) -> Tensor:
                torch.manual_seed(0)
                return tensors_of(info.op(input, *sample.args, **sample.kwargs))[0]

            if isinstance(sample.input, Tensor):
                assert torch.autograd.gradcheck(function, (sample.input,), fast_mode=True, nondet_tol=0.0)
