"""What must hold of matrices in 8 bits: each weight within half a step, and the model that of the rounded weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from slm_jax import generate, quantize
from slm_jax.model import GPTConfig, GPTModel, param_shapes
from slm_jax.nn.axes import find_axes
from slm_jax.nn.blocks import split_blocks, unstack_blocks
from slm_jax.nn.int8 import Int8, times_int8
from slm_jax.nn.lora import add_adapters, init_adapters
from slm_jax.nn.target import compiling_for

GPT2 = GPTConfig(vocab_size=61, context_length=12, emb_dim=24, n_heads=4, n_layers=2, unroll=False, qkv_bias=True)
QWEN3 = dataclasses.replace(
    GPT2, norm="rmsnorm", positions="rope", mlp="swiglu", hidden_dim=40, n_kv_heads=2, head_dim=10, qk_norm=True,
    bias=False, tie_weights=False,
)  # fmt: skip
MODELS = pytest.mark.parametrize("cfg", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
TOKENS = jnp.int32(np.random.default_rng(7).permutation(61)[:24].reshape(2, 12))


@functools.cache
def weights(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.1, 0.3, leaf.shape)), param_shapes(cfg))


def rounded(params):
    """Round each output of every matrix to 127 steps up and down, by itself."""
    flat = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        axes = find_axes(path)
        if not axes.is_matrix or axes.inputs == ("positions",):
            continue
        summed = tuple(axes.names.index(name) for name in (axes.outputs if axes.is_table else axes.inputs))
        step = np.abs(leaf).max(summed, keepdims=True) / 127
        flat[path] = np.float32(np.round(leaf / step) * step)
    return unflatten_dict(flat, sep="/")


@MODELS
def test_it_is_the_model_of_the_rounded_weights(cfg):
    logits = jax.jit(GPTModel(cfg).apply)
    expected, exact = (np.asarray(logits({"params": tree}, TOKENS)) for tree in (rounded(weights(cfg)), weights(cfg)))
    found = np.asarray(logits({"params": quantize(weights(cfg))}, TOKENS))
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    assert np.abs(found - exact).max() > 2 * np.abs(found - expected).max()  # the test sees the rounding


@MODELS
def test_what_is_generated_from_a_cache_is_what_the_whole_text_gives(cfg):
    model, params = GPTModel(cfg), quantize(weights(cfg))
    ids = np.asarray(generate(model, params, TOKENS[:, :4], max_new_tokens=8, temperature=0.0))
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(ids))
    assert (ids[:, 4:] == np.asarray(logits).argmax(-1)[:, 3:-1]).all()


def test_the_form_of_the_stack_and_adapters_stay_possible():
    cfg, params = QWEN3, weights(QWEN3)
    adapters = init_adapters(jax.random.key(1), params, ("attn/*", "ff/*"), rank=2, alpha=8)
    adapters = jax.tree.map(lambda leaf: leaf + 0.05, adapters)
    logits = jax.jit(GPTModel(cfg).apply)
    expected = np.asarray(logits({"params": add_adapters(rounded(params), adapters)}, TOKENS))
    whole = add_adapters(params, adapters)
    for tree in (unstack_blocks(quantize(whole)), quantize(unstack_blocks(whole)), quantize(split_blocks(whole, 1))):
        found = np.asarray(logits({"params": tree}, TOKENS))
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_it_takes_little_more_than_a_quarter_of_the_memory():
    cfg = dataclasses.replace(GPT2, emb_dim=128, vocab_size=1000)
    params = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), param_shapes(cfg)))
    small = jax.eval_shape(quantize, params)
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (small, params)]
    assert sizes[0] < 0.28 * sizes[1]


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e20])
def test_activations_of_any_size_lose_less_than_the_weights(scale):
    rng = np.random.default_rng(3)
    x, values = np.float32(rng.normal(size=(3, 64)) * scale), rng.integers(-127, 128, (5, 64), dtype=np.int8)
    found = np.asarray(times_int8(jnp.asarray(x), Int8(jnp.asarray(values), jnp.ones(5))))
    error = np.abs(found - np.float64(x) @ values.T)
    assert error.max() <= np.abs(x).max() / 64_000 * np.abs(values).sum(1).max()


def test_a_matrix_of_zeros_stays_one():
    tree = quantize({"blocks": {"ff": {"fc": {"kernel": jnp.zeros((1, 4, 3))}}}})
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_convert_the_matrix_as_they_read_it(platform):
    def product(x, matrix):
        return times_int8(x, matrix)

    with compiling_for(platform, 9.0 if platform == "cuda" else None):
        traced = jax.jit(product).trace(jnp.zeros((2, 8), "bfloat16"), Int8(jnp.zeros((4, 8), "int8"), jnp.ones(4)))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "tensor<4x8xi8>) -> tensor<4x8xbf16>" in text
    assert text.count("dot_general") == 1
