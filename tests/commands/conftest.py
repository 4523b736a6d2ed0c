"""A small model with its tokenizer, as a folder that any command takes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.model import GPTConfig, param_shapes
from slm_jax.tokenizer import CharTokenizer
from slm_jax.weights import save_gpt2

TEXT = "the cat sat on the mat, and the dog sat on the log. User: Assistant:\n"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough to write varied text."""
    tokenizer = CharTokenizer().build_vocab(TEXT)
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=128, emb_dim=16, n_heads=2, n_layers=2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(cfg))
    return save_gpt2(cfg, params, tmp_path_factory.mktemp("weights") / "tiny", tokenizer=tokenizer)
