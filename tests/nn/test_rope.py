"""Rotary positions: only distances count, and long contexts are stretched as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig
from slm_jax.nn.rope import frequencies, rotate, rotation

CFG = GPTConfig(vocab_size=7, context_length=4096, emb_dim=32, n_heads=2, positions="rope")


def score(query_at, key_at):
    """The dot products of one query and one key, rotated to their positions."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 16))
    q, k = (rotate(x, rotation(CFG, jnp.array([[at]]))) for x, at in ((q, query_at), (k, key_at)))
    return (q * k).sum(-1)


def test_a_score_depends_on_the_distance_only():
    np.testing.assert_allclose(score(7, 3), score(1007, 1003), rtol=1e-3)
    assert np.abs(score(7, 3) - score(7, 4)).max() > 0.1


def test_the_pairs_are_those_half_a_head_apart_and_turn_by_powers_of_theta():
    x = jnp.zeros((1, 1, 1, 16)).at[..., 1].set(1.0)
    turned = rotate(x, rotation(CFG, jnp.array([[5]])))[0, 0, 0]
    angle = 5 * CFG.rope_theta ** (-2 / 16)
    np.testing.assert_allclose(turned, np.eye(16)[1] * np.cos(angle) + np.eye(16)[9] * np.sin(angle), atol=1e-6)


def test_linear_scaling_divides_every_frequency():
    scaled = GPTConfig(**{**vars(CFG), "rope_scaling": "linear", "rope_factor": 4.0})
    np.testing.assert_allclose(frequencies(scaled), frequencies(CFG) / 4)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    changes = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 256}
    scaled, plain = frequencies(GPTConfig(**{**vars(CFG), **changes})), frequencies(CFG)
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 256 / 4, wavelengths > 256
    np.testing.assert_allclose(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 5}, "head_dim is 5; expected an even number"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3; expected a divisor of model.n_heads 2"),
        ({"rope_factor": 0}, "rope_factor is 0; expected a number above 0"),
        ({"rope_scaling": "llama3", "rope_low_freq_factor": 4.0}, "rope_low_freq_factor is 4.0; expected less than 4"),
        ({"hidden_dim": 0}, "hidden_dim is 0; expected a whole number of at least 1"),
    ],
)
def test_an_impossible_architecture_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        GPTConfig(**{**vars(CFG), **changes})
