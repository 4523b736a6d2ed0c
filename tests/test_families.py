"""What must hold of every architecture, from GPT-2 to Qwen3, one key at a time and all together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import slm_jax
from slm_jax.model import GPTConfig, GPTModel, count_params, get_gpt_config, init_cache, param_shapes
from slm_jax.nn.axes import TABLE, find_axes
from slm_jax.nn.blocks import merge_params, split_blocks, unstack_blocks
from slm_jax.nn.lora import find_targets, init_adapters, merge_adapters

GPT2 = GPTConfig(vocab_size=61, context_length=12, emb_dim=24, n_heads=4, n_layers=2, tie_weights=False, unroll=False)
KEYS = {
    "norm": {"norm": "rmsnorm"},
    "positions": {"positions": "rope"},
    "mlp": {"mlp": "swiglu", "hidden_dim": 40},
    "n_kv_heads": {"n_kv_heads": 2},
    "bias": {"bias": False},
    "head_dim": {"head_dim": 10, "qk_norm": True},
}
LADDER = {
    "llama": {key: value for name in list(KEYS)[:5] for key, value in KEYS[name].items()},
    "qwen3": {key: value for changes in KEYS.values() for key, value in changes.items()},
}
FAMILIES = pytest.mark.parametrize("family", [*KEYS, *LADDER])
TOKENS = jnp.int32(np.random.default_rng(7).permutation(61)[:24].reshape(2, 12))  # no id twice


@functools.cache
def built(family):
    """A model, and parameters of which none is zero or one."""
    cfg = dataclasses.replace(GPT2, **(KEYS | LADDER)[family])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.1, 0.3, leaf.shape)), param_shapes(cfg))
    return GPTModel(cfg), params


@functools.cache
def logits_of(family):
    model, params = built(family)
    return jax.jit(model.apply)({"params": params}, TOKENS)


def close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("stories260k", 260_032),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
    ],
)
def test_the_published_parameter_counts(preset, published):
    assert count_params(get_gpt_config(preset)) == published


@pytest.mark.parametrize("family", [*LADDER, *(pytest.param(name, marks=pytest.mark.slow) for name in KEYS)])
def test_a_cache_changes_nothing(family):
    """A prompt and then two tokens one by one, from blocks in one stack and apart."""
    model, params = built(family)

    @jax.jit
    def cached(params):
        cache, logits, start = init_cache(model.cfg, params, 2, 12), [], 0
        for end in (9, 10, 11):
            part, cache = model.apply({"params": params}, TOKENS[:, start:end], cache=cache)
            logits, start = [*logits, part], end
        return jnp.concatenate(logits, 1)

    close(cached(unstack_blocks(params)), logits_of(family)[:, :11])


@FAMILIES
def test_no_logit_depends_on_a_later_token_and_every_parameter_counts(family):
    model, params = built(family)
    direction = np.random.default_rng(2).normal(size=61).astype(np.float32)

    def projected(params):
        return model.apply({"params": params}, TOKENS[:1])[0] @ direction

    jacobian = flatten_dict(jax.jit(jax.jacrev(projected))(params), sep="/")
    influence = np.abs(np.asarray(jacobian["tok_emb/embedding"])[:, TOKENS[0]]).max(-1)
    assert (influence[np.triu_indices(12, 1)] == 0).all()
    assert (influence[np.tril_indices(12)] > 1e-6).all()
    for path, gradient in jacobian.items():
        if path != "blocks/attn/k/bias" or model.cfg.positions == "rope":  # else it shifts all scores of a row alike
            assert np.abs(gradient).max() > 1e-6, path


@pytest.mark.parametrize("family", LADDER)
def test_kernels_segments_and_remat_give_the_same(family):
    model, params = built(family)
    for changes, tree in (
        ({"attention": "xla"}, params),
        ({"unroll": True}, split_blocks(params, 1)),
        ({"remat": "full"}, params),
    ):
        other = GPTModel(dataclasses.replace(model.cfg, **changes))
        close(jax.jit(other.apply)({"params": tree}, TOKENS), logits_of(family))


@pytest.mark.parametrize("family", ["positions", "qwen3"])
def test_packed_documents_do_not_see_each_other(family):
    """Each has positions of its own; alone it gets the same logits."""
    model, params = built(family)
    segment_ids, positions = jnp.repeat(jnp.array([[1, 2]]), 6, 1), jnp.tile(jnp.arange(6), 2)[None]
    packed = model.apply({"params": params}, TOKENS[:1], segment_ids=segment_ids, positions=positions)
    close(packed[:, 6:], model.apply({"params": params}, TOKENS[:1, 6:]))


def test_adapters_reach_every_matrix():
    model, params = built("qwen3")
    targets = [path.removesuffix("/kernel") for path, axes in TABLE.items() if axes.stack and axes.is_matrix]
    assert [f"blocks/{target}" for target in find_targets(params, ("attn/*", "ff/*"))] == targets
    adapters = init_adapters(jax.random.key(0), params, ("*",), rank=2, alpha=2.0)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    beside = merge_params(params, adapters)
    logits = jax.jit(model.apply)({"params": beside}, TOKENS)
    close(jax.jit(model.apply)({"params": merge_adapters(beside)}, TOKENS), logits)
    assert np.abs(logits - logits_of("qwen3")).max() > 0.1
    assert all(find_axes(path) for path in flatten_dict(beside, sep="/"))


def test_what_is_captured_adds_up_and_a_head_can_be_ablated():
    model, params = built("qwen3")
    logits, seen = slm_jax.capture(model, params, TOKENS, ("embeddings", "blocks/0", "blocks/0/*", "blocks/0/attn/*"))
    close(logits, logits_of("qwen3"))
    shapes = {name: (2, 12, heads, 10) for name, heads in (("q", 4), ("k", 2), ("v", 2), ("heads", 4))}
    assert {name: seen[f"blocks/0/attn/{name}"].shape for name in shapes} == shapes
    close(seen["embeddings"] + seen["blocks/0/attn"] + seen["blocks/0/ff"], seen["blocks/0"])
    np.testing.assert_allclose(seen["blocks/0/attn/weights"].sum(-1), 1, rtol=1e-5)
    without = slm_jax.ablate(model, params, TOKENS, "blocks/0/attn/heads/1")
    assert np.abs(without - logits).max() > 1e-2
