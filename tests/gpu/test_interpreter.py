"""What Triton's interpreter may be trusted with: each of its known faults is looked for, and repaired if found."""

import pytest

KNOWN_FAULTS = {
    "tl.dot of torch.bfloat16",  # multiplies the bits as integers (triton#11584)
    "the cast from float32 to torch.bfloat16",  # cuts off instead of rounding to nearest even
}


def test_no_fault_but_the_known_ones(interpreter):
    assert set(interpreter.faults["before"]) <= KNOWN_FAULTS


def test_no_fault_is_left_after_the_repair(interpreter):
    assert interpreter.faults["after"] == []


def test_an_error_in_the_process_arrives_here(interpreter):
    with pytest.raises(AttributeError, match="no_such_kernel"):
        interpreter.no_such_kernel()
