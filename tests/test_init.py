"""What must hold of ``import slm_jax``: every public name is there, and nothing is imported before it is needed."""

import subprocess
import sys

import pytest

import slm_jax


def test_every_public_name_is_there():
    assert set(slm_jax.__all__) <= set(dir(slm_jax))
    for name in slm_jax.__all__:
        assert getattr(slm_jax, name) is not None
    assert slm_jax.tokenizer.BPETokenizer
    assert slm_jax.tasks.instruction.format_prompt
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        slm_jax.nothing  # noqa: B018


def test_the_import_needs_no_jax():
    script = "import slm_jax, sys; print(*sys.modules)"
    listed = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert not {"jax", "numpy", "flax", "slm_jax.model"} & set(listed)
