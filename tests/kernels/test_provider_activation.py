"""trilby comes to PyTorch's place and goes without a trace."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from activation import (
    ATTENTION,
    NORM,
    OPERATORS,
    is_trilbys,
)
from torch.nn import attention as pytorch_attention
from trilby.kernels import activate, activated, composed, restore
from trilby.kernels.ops import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to activate: {NATIVE.reason}")
needs_registry = pytest.mark.skipif(
    not hasattr(pytorch_attention, "restore_flash_attention_impl"),
    reason="this torch has no registry of flash attention that can be restored: 2.11 has",
)


def test_activate_and_restore_are_idempotent():
    assert not is_trilbys(*OPERATORS)
    restore()
    for _ in range(2):
        activate()
        activate()
        assert is_trilbys(*OPERATORS)
        restore()
        assert not is_trilbys(*OPERATORS)


def test_activated_leaves_things_as_they_were():
    with activated():
        with activated():
            assert is_trilbys(*OPERATORS)
        assert is_trilbys(*OPERATORS)
    assert not is_trilbys(*OPERATORS)
    activate()
    with activated():
        pass
    assert is_trilbys(*OPERATORS)


def test_activated_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), activated():
        1 / 0  # noqa: B018
    assert not is_trilbys(*OPERATORS)


def test_activated_decorates_a_function():
    assert activated()(lambda: is_trilbys(*OPERATORS))()
    assert not is_trilbys(*OPERATORS)


def test_restore_ends_every_activation():
    with activated():
        activate()
        restore()
        assert not is_trilbys(*OPERATORS)
        with activated():
            assert is_trilbys(*OPERATORS)
        assert not is_trilbys(*OPERATORS)
    assert not is_trilbys(*OPERATORS)


def test_activations_of_several_threads_overlap():
    inside, leave = threading.Barrier(3), threading.Event()

    def stay() -> None:
        with activated():
            inside.wait(timeout=60)
            leave.wait(timeout=60)

    threads = [threading.Thread(target=stay) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(timeout=60)
    with activated():
        pass
    assert is_trilbys(*OPERATORS)
    leave.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not is_trilbys(*OPERATORS)


def test_threads_that_come_and_go_leave_nothing_behind():
    def come_and_go(_: int) -> bool:
        with activated():
            return is_trilbys(*OPERATORS)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(come_and_go, range(200)))
    assert not is_trilbys(*OPERATORS)


@needs_registry
def test_pytorchs_registry_activates_attention_alone():
    assert "trilby" in pytorch_attention.list_flash_attention_impls()
    pytorch_attention.activate_flash_attention_impl("trilby")
    assert pytorch_attention.current_flash_attention_impl() == "trilby"
    assert is_trilbys(*ATTENTION)
    assert not is_trilbys(*NORM)
    with activated():
        assert is_trilbys(*OPERATORS)
    assert is_trilbys(*ATTENTION)
    pytorch_attention.activate_flash_attention_impl("trilby")
    assert is_trilbys(*ATTENTION)
    pytorch_attention.restore_flash_attention_impl()
    assert not is_trilbys(*OPERATORS)


@needs_registry
def test_restore_tells_the_registry():
    pytorch_attention.activate_flash_attention_impl("trilby")
    restore()
    assert pytorch_attention.current_flash_attention_impl() is None
    assert not is_trilbys(*OPERATORS)


# And those that PyTorch composes of others.
OVERRIDDEN = (*OPERATORS, *composed.ATTENTION, *composed.NORM)


def run_python(*lines: str) -> subprocess.CompletedProcess:
    """A process of its own, where every warning is an error."""
    return subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, text=True)


@pytest.mark.parametrize("warn_always", [False, True])
def test_nothing_is_printed_and_nothing_changes_before_activate(warn_always):
    script = run_python(
        "import torch",
        f"torch.set_warn_always({warn_always})",
        f"before = [torch._C._dispatch_dump(operator) for operator in {OVERRIDDEN}]",
        "import trilby.kernels",
        f"assert before == [torch._C._dispatch_dump(operator) for operator in {OVERRIDDEN}]",
        "trilby.kernels.activate()",
        f"assert torch.is_warn_always_enabled() is {warn_always}",
        f"assert before != [torch._C._dispatch_dump(operator) for operator in {OVERRIDDEN}]",
        "trilby.kernels.restore()",
        f"assert before == [torch._C._dispatch_dump(operator) for operator in {OVERRIDDEN}]",
        "with trilby.kernels.activated(): torch.nn.LayerNorm(8)(torch.zeros(2, 8)).sum().backward()",
        "trilby.kernels.activate()",  # and left so, to the end of the process
    )
    assert (script.returncode, script.stdout, script.stderr) == (0, "", "")


def test_without_the_extension_activate_says_so_once():
    script = run_python(
        "import pathlib",
        "exists = pathlib.Path.exists",
        "pathlib.Path.exists = lambda path: not path.name.startswith('_native') and exists(path)",
        "import torch, trilby.kernels, warnings",
        "with warnings.catch_warnings(record=True) as caught:",
        "    warnings.simplefilter('always')",
        "    trilby.kernels.activate()",
        "    with trilby.kernels.activated(): pass",
        "assert [w.category for w in caught] == [RuntimeWarning], caught",
        "assert 'not built' in str(caught[0].message) and caught[0].filename == '<string>', caught",
        "torch.nn.LayerNorm(8)(torch.zeros(2, 8)).sum().backward()",
        "trilby.kernels.restore()",
    )
    assert (script.returncode, script.stderr) == (0, "")


# ---- operators -------------------------------------------------------------------------------------------------------


def operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """PyTorch's operators that trilby stands in for on CPUs, with arguments that it computes."""
    aten = torch.ops.aten
    heads = tuple(torch.randn(2, 4, 128, 32, requires_grad=True) for _ in range(3))
    norm = (torch.randn(64, 768, requires_grad=True), (768,), *(torch.randn(768, requires_grad=True) for _ in range(2)))
    with torch.no_grad():
        attended = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True)
        normalized, *statistics = aten.native_layer_norm(*norm, 1e-5)
    plain_heads, (rows, shape, *affine) = ([leaf.detach() for leaf in heads], norm)
    return {
        "_scaled_dot_product_flash_attention_for_cpu": (*heads, 0.0, True),
        "_scaled_dot_product_flash_attention_for_cpu_backward": (attended[0], *plain_heads, *attended, 0.0, True),
        "native_layer_norm": (*norm, 1e-5),
        "native_layer_norm_backward": (
            *(normalized, rows.detach(), shape, *statistics),
            *(*(parameter.detach() for parameter in affine), [True] * 3),
        ),
    }


@pytest.mark.parametrize("number", range(4))
def test_pytorchs_operators_keep_their_promises(number):
    """Schema, fake kernel, autograd and functionalization, by PyTorch's own check, of each operator by trilby."""
    name, arguments = list(operators().items())[number]
    with activated():
        before = torch.ops.trilby.served_calls()
        torch.library.opcheck(getattr(torch.ops.aten, name).default, arguments)
        assert torch.ops.trilby.served_calls()[number] > before[number]
