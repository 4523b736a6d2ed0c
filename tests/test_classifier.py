"""What must hold of the classifier: what lies behind a text's end changes nothing, and pooling is what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import InputError
from slm_jax.model import GPTClassifier, GPTConfig, GPTModel
from slm_jax.nn.heads import pool

CFG = GPTConfig(vocab_size=29, context_length=32, emb_dim=16, n_heads=2, n_layers=2, unroll=False)
POOLINGS = ("last", "mean", "first")
LENGTHS = np.array([1, 5, 9, 12], np.int32)
TEXTS = [np.random.default_rng(i).integers(1, CFG.vocab_size, n).astype(np.int32) for i, n in enumerate(LENGTHS)]


def padded(width, pad_id):
    rows = np.full((len(TEXTS), width), pad_id, np.int32)
    for row, ids in zip(rows, TEXTS, strict=True):
        row[: ids.size] = ids
    return jnp.asarray(rows)


def make_params():
    """Random parameters in which every one matters; the logits are of order 1."""
    model = GPTClassifier(CFG, n_classes=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), padded(12, 0), jnp.asarray(LENGTHS))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.1, 0.3, leaf.shape)), shapes)


PARAMS = make_params()


@functools.cache
def apply(pooling):
    model = GPTClassifier(CFG, n_classes=3, pooling=pooling)
    return jax.jit(lambda tokens, lengths: model.apply({"params": PARAMS}, tokens, lengths))


@jax.jit
def hidden(tokens):
    return GPTModel(CFG).apply({"params": PARAMS}, tokens, method="hidden")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing_however_much_and_whatever_it_is(pooling):
    expected = np.asarray(apply(pooling)(padded(12, 0), jnp.asarray(LENGTHS)))
    assert expected.shape == (4, 3)
    assert expected.dtype == np.float32
    assert np.ptp(expected, axis=0).min() > 0.05  # the texts differ
    for width, pad_id in ((12, 28), (16, 0), (16, 7), (32, 0), (32, 28)):
        found = np.asarray(apply(pooling)(padded(width, pad_id), jnp.asarray(LENGTHS)))
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_head_sees_what_pooling_says(pooling):
    """By hand, each text alone and without padding."""
    kernel, bias = (np.float64(PARAMS["class_head"][name]) for name in ("kernel", "bias"))
    found = apply(pooling)(padded(16, 3), jnp.asarray(LENGTHS))
    for i, ids in enumerate(TEXTS):
        states = np.float64(hidden(jnp.asarray(ids)[None])[0])
        vector = {"last": states[-1], "mean": states.mean(0), "first": states[0]}[pooling]
        expected = vector @ kernel + bias
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_that_only_fills_a_batch_is_finite(pooling):
    states = jnp.full((2, 4, 3), 5.0).at[1, 1:].set(jnp.nan)  # whatever comes of padding
    pooled = pool(states, jnp.int32([4, 0]), pooling)
    assert np.isfinite(pooled).all()


def test_the_params_tree_is_the_gpts_with_another_head():
    gpt = jax.eval_shape(lambda: GPTModel(CFG).init(jax.random.key(0), padded(4 + 8, 0))["params"])
    ours = dict(PARAMS)
    head = ours.pop("class_head")
    assert {name: leaf.shape for name, leaf in head.items()} == {"kernel": (16, 3), "bias": (3,)}
    assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, gpt)


def test_an_untied_model_has_no_head_of_tokens():
    cfg = GPTConfig(vocab_size=9, context_length=4, emb_dim=4, n_heads=1, n_layers=1, tie_weights=False)
    init = GPTClassifier(cfg).init
    tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32))["params"]
    assert set(tree) == {"tok_emb", "pos_emb", "blocks", "final_norm", "class_head"}


def test_dropout_is_for_training_only():
    cfg = GPTConfig(vocab_size=9, context_length=4, emb_dim=4, n_heads=1, n_layers=1, drop_rate=0.5, unroll=False)
    model = GPTClassifier(cfg)
    tokens, lengths = jnp.int32([[1, 2, 3, 4]]), jnp.int32([4])
    variables = jax.jit(model.init)(jax.random.key(0), tokens, lengths)

    @functools.partial(jax.jit, static_argnums=1)
    def logits(key, deterministic):
        return model.apply(variables, tokens, lengths, deterministic=deterministic, rngs={"dropout": key})

    one, two = jax.random.key(1), jax.random.key(2)
    assert np.array_equal(logits(one, True), logits(two, True))
    assert not np.array_equal(logits(one, False), logits(two, False))


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(InputError, match=r"33 tokens.*32"):
        apply("last")(jnp.zeros((1, 33), jnp.int32), jnp.int32([33]))
