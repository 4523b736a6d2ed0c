"""A GPT that tells the class of a text: the model with a small head in place of the next token's."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from slm_jax.model import INIT_STD, GPTModel, Params
from slm_jax.nn.lora import Adapter

Pooling = Literal["last", "mean", "first"]


class GPTClassifier(GPTModel):
    """A GPT with a classification head; its params tree is the GPT's, with ``class_head`` for ``out_head``.

    ``GPTClassifier(cfg, n_classes=2).apply({"params": params}, tokens, lengths)`` gives float32 logits
    (batch, n_classes). The head is one linear layer with a bias on what ``pooling`` makes of the hidden states: those
    of the last real token, their mean, or those of the first token. What lies behind a text's length changes nothing.

    Source: the book's chapter 6, which takes the last token.
    """

    n_classes: int = 2
    pooling: Pooling = "last"

    def setup(self) -> None:
        """Create the submodules."""
        super().setup()
        init = nn.initializers.normal(INIT_STD)
        self.class_head = nn.Dense(self.n_classes, kernel_init=init, param_dtype=self.cfg.param_dtype)
        self.class_head_adapter = Adapter()

    def __call__(  # type: ignore[override]
        self, tokens: Int[Array, "batch seq"], lengths: Int[Array, "batch"], *, deterministic: bool = True
    ) -> Float[Array, "batch classes"]:
        """Compute the logits of the classes.

        Args:
            tokens: int32 (batch, seq), padded on the right with any ids.
            lengths: real tokens of each row, at least 1.
            deterministic: False applies dropout.

        Returns:
            float32 (batch, n_classes).

        Raises:
            InputError: more tokens than ``context_length``.
        """
        hidden = self.hidden(tokens, deterministic=deterministic)
        pooled = pool(hidden.astype(jnp.float32), lengths, self.pooling)
        return self.class_head_adapter(self.class_head(pooled), pooled, deterministic)


def init_classifier(model: GPTClassifier, key: jax.Array) -> Params:
    """Return new parameters."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))["params"]


def pool(hidden: Float[Array, "batch seq emb"], lengths: Int[Array, "batch"], pooling: Pooling) -> Any:
    """Make one vector (batch, emb) of the hidden states of each text."""
    lengths = jnp.maximum(lengths, 1)  # a row that only fills a batch has none
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    real = jnp.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    return jnp.where(real, hidden, 0).sum(1) / lengths[:, None].astype(hidden.dtype)
