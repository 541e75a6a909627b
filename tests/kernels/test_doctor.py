"""The doctor's table names what truly runs."""

import pytest
from trilby.kernels import doctor
from trilby.kernels.doctor import report, services
from trilby.kernels.ops import NATIVE, OPERATORS


def test_every_operator_is_listed_for_both_kinds_of_device() -> None:
    listed = {(service.operator, service.device) for service in services()}
    assert listed == {(operator.name, device) for operator in OPERATORS for device in ("cpu", "cuda")}


def test_what_trilby_does_not_serve_has_a_reason() -> None:
    assert all(service.reason for service in services() if service.served_by == "PyTorch")


def test_the_level_in_use_is_named(level: str) -> None:
    assert f"C++ extension: running {level}; this machine can run {', '.join(NATIVE.levels)}" in report()
    assert all(service.served_by == f"C++ ({level})" for service in services() if service.device == "cpu")


@pytest.mark.parametrize("is_slow", [False, True])
def test_slow_products_of_bfloat16_are_named(is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BFLOAT16_IS_SLOW", is_slow)
    assert ("multiplied in float32" in report()) == is_slow
