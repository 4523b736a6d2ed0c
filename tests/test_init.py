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


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("slm_jax", ["jax", "numpy", "flax", "slm_jax.model"]),
        (
            "slm_jax.evaluation.classes, slm_jax.training.loop, slm_jax.tasks.pretraining",
            ["matplotlib", "tensorflow", "tensorflow_datasets", "torch"],
        ),
    ],
)
def test_what_an_import_does_not_import(modules, absent):
    script = f"import {modules}, sys; print(*sys.modules)"
    listed = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert not set(absent) & set(listed)
