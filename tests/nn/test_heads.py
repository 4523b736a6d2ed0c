"""What must hold of the logits' product: float32 results, and the gradients of the same product of float32 copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.nn.heads import float32_logits
from slm_jax.nn.target import compiling_for

EPS = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}  # of one rounding


@pytest.fixture
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 16, 32), (32, 101), (2, 16, 101))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def gradients(product, hidden, kernel, weights):
    return jax.value_and_grad(lambda h, k: jnp.sum(product(h, k) * weights), (0, 1))(hidden, kernel)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # both ways run on a CPU of this jax
def test_logits_and_gradients_are_those_of_float32_copies(operands, dtype, platform):
    hidden, kernel, weights = operands
    hidden = hidden.astype(dtype)

    def of_copies(hidden, kernel):
        return hidden.astype(jnp.float32) @ kernel.astype(dtype).astype(jnp.float32)

    expected, (hidden_grad, kernel_grad) = gradients(of_copies, hidden, kernel, weights)
    with compiling_for(platform):
        logits = float32_logits(hidden, kernel)
        total, found = gradients(float32_logits, hidden, kernel, weights)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert found[0].dtype == dtype
    assert found[1].dtype == jnp.float32  # not rounded on its way to a float32 parameter
    for ours, theirs, roundings in zip(found, (hidden_grad, kernel_grad), (2, 1), strict=True):
        error = jnp.abs(ours.astype(jnp.float32) - theirs.astype(jnp.float32)).max() / jnp.abs(theirs).max()
        assert error <= roundings * EPS[dtype]
    if dtype == "float32":  # forward mode goes through, too
        _, along = jax.jvp(jax.grad(lambda h: jnp.sum(float32_logits(h, kernel) ** 2)), (hidden,), (hidden,))
        np.testing.assert_allclose(along, 2 * hidden @ kernel @ kernel.T, rtol=1e-4, atol=1e-3)
