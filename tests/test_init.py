"""What must hold of ``import slm_jax``: every public name is there, and nothing is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import slm_jax


def run_python(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_there() -> None:
    assert set(slm_jax.__all__) <= set(dir(slm_jax))
    for name in slm_jax.__all__:
        assert getattr(slm_jax, name) is not None
    assert slm_jax.tokenizer.BPETokenizer
    assert slm_jax.tasks.instruction.format_prompt
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        slm_jax.nothing  # noqa: B018


def test_editors_and_type_checkers_are_told_the_same_names() -> None:
    tree = ast.parse(Path(slm_jax.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(told) == slm_jax.__all__
    homes = {name: f"slm_jax.{module}" for name, module in slm_jax._MODULES.items()}
    assert told == {**dict.fromkeys(told, "slm_jax"), **homes}


@pytest.mark.parametrize("name", ["generate", "capture"])
def test_a_function_is_not_replaced_by_the_module_of_its_name(name: str) -> None:
    first = f"import slm_jax.{name}; from slm_jax import {name}; from slm_jax.{name} import {name} as inner"
    assert run_python(f"{first}; import slm_jax; print(slm_jax.{name} is {name} is inner)") == "True\n"
    assert run_python(f"import slm_jax; print(callable(slm_jax.{name}))") == "True\n"


@pytest.mark.parametrize(
    "script", ["import slm_jax", "from slm_jax import cli; cli.main(['--help']); cli.main(['--version'])"]
)
def test_the_import_and_the_help_need_no_jax(script: str) -> None:
    listed = run_python(f"{script}; import sys; print(*sys.modules)").split()
    assert not {"jax", "numpy", "flax", "slm_jax.model"} & set(listed)
