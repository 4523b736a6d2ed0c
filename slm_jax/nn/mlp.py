"""The feed-forward part of a block, and GELU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jaxtyping import Array, Float

from slm_jax.nn.dense import Dense
from slm_jax.nn.lora import Adapter
from slm_jax.nn.sharding import constrain


class FeedForward(nn.Module):
    """Widen to ``hidden`` features, apply GELU, and project back to the input's width; each position by itself.

    Source: Radford et al. 2019 (GPT-2), with four times the width inside.
    """

    hidden: int
    use_bias: bool = True
    exact_gelu: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq emb"], deterministic: bool = True) -> Float[Array, "batch seq emb"]:
        """Map (batch, seq, emb) to the same shape."""
        dense = partial(Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        fc = dense(self.hidden, kernel_init=self.kernel_init, name="fc")
        proj = dense(x.shape[-1], kernel_init=self.out_kernel_init, name="proj")
        hidden = constrain(Adapter(name="fc_adapter")(fc(x), x, deterministic), "batch", None, "mlp")
        hidden = gelu(hidden, self.exact_gelu)
        return Adapter(name="proj_adapter")(proj(hidden), hidden, deterministic)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: Float[Array, "*shape"], exact: bool = False) -> Float[Array, "*shape"]:
    """Apply GELU (Hendrycks & Gimpel 2016): GPT-2's tanh form, or ``exact``. The backward pass needs only its slope."""
    return nn.gelu(x, approximate=not exact)


@gelu.defjvp
def _gelu_jvp(exact: bool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,) = primals
    y, slope = jax.jvp(partial(nn.gelu, approximate=not exact), (x,), (jnp.ones_like(x),))
    return y, slope * tangents[0]
