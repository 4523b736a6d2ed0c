"""Rotary position embeddings: queries and keys are rotated, so that their dot product depends on their distance only.

Source: Su et al. 2021 (RoFormer); ``llama3``: Grattafiori et al. 2024 (Llama 3) and the release of Llama 3.1.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slm_jax.nn.architecture import GPTConfig, axis_sizes


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, float32 (batch or 1, seq, head_dim / 2)."""

    cos: Array
    sin: Array


def rotation(cfg: GPTConfig, positions: Int[Array, "batch seq"]) -> Rotation:
    """Return the angles by which a model rotates its queries and keys at ``positions``."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(cfg))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def frequencies(cfg: GPTConfig) -> np.ndarray:
    """Return the angle per token of each pair of a head's numbers, float32 (head_dim / 2,)."""
    width = axis_sizes(cfg)["head_dim"]
    plain = cfg.rope_theta ** -(np.arange(0, width, 2) / width)
    if cfg.rope_scaling == "none":
        return plain.astype(np.float32)
    stretched = plain / cfg.rope_factor
    if cfg.rope_scaling == "linear":
        return stretched.astype(np.float32)
    turns = cfg.rope_original_context * plain / (2 * math.pi)  # within the original context
    low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept * plain + (1 - kept) * stretched).astype(np.float32)


def rotate(x: Float[Array, "batch seq heads head_dim"], angles: Rotation) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (i, i + head_dim / 2) of every head by each token's angles; computed in float32."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = angles.cos[:, :, None], angles.sin[:, :, None]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
