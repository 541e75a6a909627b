"""What the kernels' source must not say, so that every triton that PyTorch comes with compiles it."""

import ast
from pathlib import Path

import pytest
import trilby.kernels.gpu

FILES = sorted(Path(trilby.kernels.gpu.__file__).parent.glob("*.py"))


def returned_none(source: str) -> list[str]:
    """Names that may be None of which a Triton function returns something: before triton 3.7 no tuple may hold it."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in function.decorator_list):
            assigned = (each for each in ast.walk(function) if isinstance(each, ast.Assign))
            absent = {
                target.id
                for each in assigned
                if isinstance(each.value, ast.Constant) and each.value.value is None
                for target in each.targets
                if isinstance(target, ast.Name)
            }
            for statement in ast.walk(function):
                if isinstance(statement, ast.Return):
                    names = {each.id for each in ast.walk(statement) if isinstance(each, ast.Name)}
                    found += [f"{function.name}: {name}" for name in sorted(absent & names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_triton_function_returns_a_tuple_that_holds_none(path):
    assert returned_none(path.read_text()) == []


def test_one_that_does_is_seen():
    source = "@triton.jit\ndef band(rule):\n    last = None\n    if rule:\n        last = 1\n    return Band(last)\n"
    assert returned_none(source) == ["band: last"]
    assert returned_none(source.replace("last = None", "last = 0")) == []
