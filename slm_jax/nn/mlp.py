"""The feed-forward part of a block, GELU and SwiGLU."""

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

    ``gated`` multiplies the features by SiLU of as many others instead, the gate: SwiGLU.

    Source: Radford et al. 2019 (GPT-2), with four times the width inside; Shazeer 2020 (SwiGLU).
    """

    hidden: int
    use_bias: bool = True
    exact_gelu: bool = False
    gated: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq emb"], deterministic: bool = True) -> Float[Array, "batch seq emb"]:
        """Map (batch, seq, emb) to the same shape."""
        dense = partial(Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        proj = dense((x.shape[-1],), kernel_init=self.out_kernel_init, name="proj")
        rows = x.reshape(-1, x.shape[-1])  # once, or the backward pass would keep them for each product

        def widen(*names: str) -> list[Array]:
            together = "_".join(names)  # side by side as slm_jax.nn.int8.quantize makes them
            if len(names) > 1 and not self.has_variable("params", together):
                return [product for name in names for product in widen(name)]
            widths = (self.hidden * len(names),)
            product = dense(widths, kernel_init=self.kernel_init, name=together)(rows).reshape(*x.shape[:-1], -1)
            return [
                constrain(Adapter(name=f"{name}_adapter")(part, x, deterministic), "batch", None, "mlp")
                for name, part in zip(names, jnp.split(product, len(names), axis=-1), strict=True)
            ]

        hidden = swiglu(*widen("gate", "fc")) if self.gated else gelu(*widen("fc"), self.exact_gelu)
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


@jax.custom_jvp
def swiglu(gate: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Multiply by SiLU of the gate (Shazeer 2020). The backward pass needs only its two slopes."""
    return nn.silu(gate) * x


@swiglu.defjvp
def _swiglu_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    gate, x = primals
    opened, slope = jax.jvp(nn.silu, (gate,), (jnp.ones_like(gate),))
    return opened * x, (slope * x) * tangents[0] + opened * tangents[1]
