"""Attention on TPUs that does not write the (seq, seq) weights to memory: JAX's own Pallas kernel, "splash" attention.

Source: Dao et al. 2022 (flash attention); ``jax.experimental.pallas.ops.tpu.splash_attention``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slm_jax.nn.sharding import MESH_AXES, attend_on_each_device, free_axes

_LANES = 128  # sequences are padded to a multiple
_LARGEST_BLOCK = 512


def flash_obstacle(dtype: Any, platform: str) -> str | None:
    """Return why :func:`flash_attention` cannot be used for a dtype on one of JAX's platforms; None if it can."""
    if platform != "tpu":
        return f"it needs a TPU, and this is {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 or float32, and dtype is {jnp.dtype(dtype)}"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.default_backend() == "tpu" and jax.device_count() > 1:
        return f"there are {jax.device_count()} devices, and no mesh; set one with jax.set_mesh"
    if unknown := [name for name in free_axes(mesh.axis_names) if name not in MESH_AXES]:
        return f"it cannot share the work along the mesh's axes {', '.join(unknown)}; it knows {', '.join(MESH_AXES)}"
    return None


def flash_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Compute causal attention on a TPU; scores and softmax are float32 whatever the inputs are.

    Memory grows linearly with ``seq``, forward and backward. Under a mesh (``jax.set_mesh``) each device computes its
    rows and heads; where the devices do not divide them, each computes all.

    Args:
        q: bfloat16 or float32 (batch, seq, heads, head_dim); ``seq`` is filled up to a multiple of 128.
        k, v: likewise, with kv_heads, which divide the heads.
        segment_ids: documents packed into one row; a token attends only within its own.

    Returns:
        The context (batch, seq, heads, head_dim), in the dtype of the inputs.
    """
    return attend_on_each_device(_on_one_device, q, k, v, segment_ids)


def _on_one_device(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes half a second to import

    seq, heads, head_dim = q.shape[1:]
    # The padding lies in every token's future, so no token attends to it.
    padded = math.ceil(seq / _LANES) * _LANES
    rows_of_heads = [
        jnp.pad(x, ((0, 0), (0, padded - seq), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q / math.sqrt(head_dim), k, v)
    ]
    ids = None
    if segment_ids is not None:
        ids = splash.SegmentIds(*[jnp.pad(segment_ids, ((0, 0), (0, padded - seq)))] * 2)
    block = math.gcd(padded, _LARGEST_BLOCK)
    blocks = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks)
    context = jax.vmap(kernel)(*rows_of_heads, ids)
    return context.swapaxes(1, 2)[:, :seq]
