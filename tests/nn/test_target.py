"""What must hold of the target: it is this machine's device unless another is named, and no trace outlives its own."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp

from slm_jax.nn.target import Target, compiling_for, target, target_of
from slm_jax.training.hardware import best_dtype


def test_the_default_is_the_device_that_computes_and_only_nvidias_have_a_capability():
    device = jax.local_devices()[0]
    assert target() == target_of(device)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        assert target() == Target("cpu", None)
    for capability, expected in (("7.5", 7.5), ("gfx942", None)):
        gpu = Mock(spec=jax.Device, platform="gpu", compute_capability=capability)
        assert target_of(gpu) == Target("gpu", expected)


def test_a_named_target_holds_within_its_context_only():
    here = target()
    with compiling_for("cuda", 9.0):
        assert target() == Target("cuda", 9.0)
        assert best_dtype() == "bfloat16"
        with compiling_for("cuda", 7.5):
            assert best_dtype() == "float32"
        assert target() == Target("cuda", 9.0)
    assert target() == here


def test_what_was_traced_for_one_target_is_not_taken_for_another():
    traced = []

    @jax.jit
    def program(x):
        traced.append(target().platform)
        return x

    for platform in ("tpu", "cuda", "tpu"):
        with compiling_for(platform):
            program.trace(jnp.ones(3))
    program(jnp.ones(3))
    assert traced == ["tpu", "cuda", jax.default_backend()]
