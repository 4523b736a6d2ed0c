"""What must hold of ``import slm_jax``: every public name is there, and nothing is imported before it is needed."""

import subprocess
import sys

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


@pytest.mark.parametrize(
    "script", ["import slm_jax", "from slm_jax import cli; cli.main(['--help']); cli.main(['--version'])"]
)
def test_the_import_and_the_help_need_no_jax(script: str) -> None:
    listed = run_python(f"{script}; import sys; print(*sys.modules)").split()
    assert not {"jax", "numpy", "flax", "slm_jax.model"} & set(listed)
