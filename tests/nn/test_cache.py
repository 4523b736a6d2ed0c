"""What must hold of the cache: going on from it is the same as computing everything at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, GPTModel, init_cache, param_shapes
from slm_jax.nn.blocks import split_blocks, unstack_blocks
from slm_jax.nn.cache import LayerCache, cached_attention

CFG = GPTConfig(vocab_size=32, context_length=16, emb_dim=12, n_heads=3, n_layers=3, unroll=False)
MODEL = GPTModel(CFG)
TOKENS = jnp.array(np.random.default_rng(1).integers(0, 32, (2, 16)))


@pytest.fixture(scope="module")
def params():
    """Weights large enough that each token depends on all before it."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), param_shapes(CFG))


@functools.cache
def extend(model):
    return jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache))


def log_probs(logits):
    return np.asarray(jax.nn.log_softmax(logits))


def in_pieces(model, params, tokens, sizes, capacity=16):
    """Feed the tokens in pieces of these sizes."""
    cache = init_cache(model.cfg, params, tokens.shape[0], capacity)
    pieces, start = [], 0
    for size in sizes:
        logits, cache = extend(model)(params, tokens[:, start : start + size], cache)
        pieces.append(logits)
        start += size
    assert cache.lengths.tolist() == [start] * tokens.shape[0]
    return jnp.concatenate(pieces, axis=1)


@pytest.mark.parametrize("sizes", [[16], [1] * 16, [5, 1, 1, 7, 2]], ids=["whole", "tokens", "pieces"])
@pytest.mark.parametrize(
    "form", [dict, lambda p: split_blocks(p, 1), unstack_blocks], ids=["stack", "two", "unstacked"]
)
def test_cached_is_uncached_at_every_position(params, sizes, form):
    whole = MODEL.apply({"params": params}, TOKENS)
    assert np.abs(log_probs(in_pieces(MODEL, form(params), TOKENS, sizes)) - log_probs(whole)).max() <= 1e-5


def test_rows_of_different_lengths(params):
    """A short prompt beside a long one: what fills it up is overwritten before anything attends to it."""
    prompts = TOKENS.at[1, 4:].set(7)
    cache = init_cache(CFG, params, 2, 16)
    _, cache = extend(MODEL)(params, prompts[:, :9], cache)
    cache = cache._replace(lengths=jnp.array([9, 4]))
    more = jnp.array([[1, 2, 3], [4, 5, 6]])
    logits, cache = extend(MODEL)(params, more, cache)
    assert cache.lengths.tolist() == [12, 7]
    for row, length in enumerate((9, 4)):
        alone = jnp.concatenate([prompts[row, :length], more[row]])[None]
        expected = MODEL.apply({"params": params}, alone)[:, length:]
        assert np.abs(log_probs(logits[row : row + 1]) - log_probs(expected)).max() <= 1e-5


def test_half_precision_keeps_a_half_precision_cache(params):
    cfg = GPTConfig(**{**CFG.__dict__, "dtype": "bfloat16"})
    cache = init_cache(cfg, params, 2, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.blocks)} == {jnp.dtype("bfloat16")}
    whole = GPTModel(cfg).apply({"params": params}, TOKENS)
    pieces = in_pieces(GPTModel(cfg), params, TOKENS, [4] * 4)
    assert np.abs(log_probs(pieces) - log_probs(whole)).max() < 0.3  # bfloat16 has three digits
    assert pieces.dtype == jnp.float32


def test_what_does_not_fit_is_refused(params):
    with pytest.raises(InputError, match=r"17 tokens.*16"):
        init_cache(CFG, params, 1, 17)
    cache = init_cache(CFG, params, 2, 4)
    with pytest.raises(InputError, match=r"5 tokens.*4"):
        MODEL.apply({"params": params}, TOKENS[:, :5], cache=cache)
    with pytest.raises(InputError, match="no segment_ids"):
        MODEL.apply({"params": params}, TOKENS[:, :4], cache=cache, segment_ids=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(InputError, match=r"1 rows.*2"):
        MODEL.apply({"params": params}, TOKENS[:1, :2], cache=cache)
    with pytest.raises(InputError, match=r"segments blocks.*blocks_0, blocks_1"):
        MODEL.apply({"params": unstack_blocks(params)}, TOKENS[:, :2], cache=cache)
    wider = GPTModel(GPTConfig(**{**CFG.__dict__, "n_heads": 1}))
    with pytest.raises(InputError, match="another shape of model"):
        wider.apply({"params": params}, TOKENS[:, :2], cache=cache)


def test_64_bit_integers_of_jax_change_nothing():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(2, 1, 2, 4))) for _ in range(3))
    cache, start = LayerCache(jnp.zeros((4, 8, 4), jnp.float32), jnp.zeros((4, 8, 4), jnp.float32)), jnp.int32([1, 3])
    expected = cached_attention(q, k, v, cache, start)
    jax.config.update("jax_enable_x64", True)
    try:
        found = cached_attention(q, k, v, cache, start)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
