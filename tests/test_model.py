"""What must hold of GPTModel: its tree, its numbers, and that no way of running it changes them."""

import copy
import dataclasses
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.errors import InputError
from slm_jax.model import (
    PRESETS,
    GPTConfig,
    GPTModel,
    TransformerBlock,
    count_params,
    get_gpt_config,
    init_params,
    param_shapes,
)
from slm_jax.nn.blocks import join_blocks, split_blocks
from slm_jax.nn.mlp import FeedForward
from slm_jax.nn.norms import LayerNorm

# As a loop, which compiles faster than the unrolled stack; that both give the same numbers is a test below.
SMALL = GPTConfig(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=3, unroll=False)
IDS = np.random.default_rng(7).permutation(61)[:32].reshape(2, 16)  # no id twice
TOKENS = jnp.asarray(IDS, jnp.int32)


def random_params(cfg, seed=0, std=0.2):
    """Parameters of which none is zero or one, so that each one shows in the output."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.normal(0, std, shape.shape) + (path[-1].key == "scale")
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(cfg))


def flat(tree):
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def close(actual, expected, tolerance=1e-5):
    """Difference over the largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def gradients_close(actual, expected, tolerance=1e-5):
    """Difference of two gradients, each leaf, relative to the global norm."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    bound = tolerance * math.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(expected)))
    assert bound > 0
    for name, leaf in flat(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), actual, expected)).items():
        assert leaf <= bound, name


def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@cache
def forward(cfg):
    """One compiled forward pass a configuration."""
    return jax.jit(GPTModel(cfg).apply)


# Sizes and the tree


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("gpt2-small", {}, 124_439_808),
        ("gpt2-small", {"tie_weights": False, "qkv_bias": False}, 163_009_536),  # the book's chapter 4
        ("gpt2-medium", {}, 354_823_168),
        ("gpt2-large", {}, 774_030_080),
        ("gpt2-xl", {}, 1_557_611_200),
    ],
)
def test_the_published_parameter_counts(name, overrides, expected):
    assert count_params(get_gpt_config(name, **overrides)) == expected


def contract(cfg):
    """DESIGN.md's table of the params tree."""
    L, D, H, V, T = cfg.n_layers, cfg.emb_dim, cfg.n_heads, cfg.vocab_size, cfg.context_length
    shapes = {
        "tok_emb/embedding": (V, D),
        "pos_emb/embedding": (T, D),
        **{f"blocks/{norm}/{leaf}": (L, D) for norm in ("norm1", "norm2") for leaf in ("scale", "bias")},
        **{f"blocks/attn/{name}/kernel": (L, D, H, D // H) for name in "qkv"},
        **{f"blocks/attn/{name}/bias": (L, H, D // H) for name in "qkv"},
        "blocks/attn/out_proj/kernel": (L, H, D // H, D),
        "blocks/attn/out_proj/bias": (L, D),
        "blocks/ff/fc/kernel": (L, D, 4 * D),
        "blocks/ff/fc/bias": (L, 4 * D),
        "blocks/ff/proj/kernel": (L, 4 * D, D),
        "blocks/ff/proj/bias": (L, D),
        "final_norm/scale": (D,),
        "final_norm/bias": (D,),
        "out_head/kernel": (D, V),
    }
    absent = {"out_head/kernel"} if cfg.tie_weights else set()
    absent |= set() if cfg.qkv_bias else {f"blocks/attn/{name}/bias" for name in "qkv"}
    absent |= set() if cfg.bias else {name for name in shapes if name.endswith("/bias")}
    return {name: shape for name, shape in shapes.items() if name not in absent}


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_params_tree_is_the_contract(tie_weights, qkv_bias, bias):
    cfg = dataclasses.replace(SMALL, tie_weights=tie_weights, qkv_bias=qkv_bias, bias=bias)
    params = param_shapes(cfg)
    assert {name: leaf.shape for name, leaf in flat(params).items()} == contract(cfg)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert type(params) is dict
    assert count_params(cfg) == sum(math.prod(shape) for shape in contract(cfg).values())


# GPT-2's initialisation


@pytest.fixture(scope="module")
def initialised():
    cfg = GPTConfig(
        vocab_size=512, context_length=256, emb_dim=64, n_heads=4, n_layers=4, tie_weights=False, unroll=False
    )
    return cfg, flat(jax.jit(partial(init_params, cfg))(jax.random.key(3)))


def test_weights_start_as_gpt2s(initialised):
    cfg, params = initialised
    for name, leaf in params.items():
        values = np.asarray(leaf, np.float64)
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif name.endswith("scale"):
            assert (values == 1).all(), name
        else:
            residual = name in ("blocks/attn/out_proj/kernel", "blocks/ff/proj/kernel")
            std = 0.02 / math.sqrt(2 * cfg.n_layers) if residual else 0.02
            error = 5 / math.sqrt(2 * values.size)  # five standard errors of an estimated standard deviation
            assert values.std() == pytest.approx(std, rel=error), name
            assert abs(values.mean()) <= 5 * std / math.sqrt(values.size), name
            assert np.abs(values).max() > 3.5 * std, f"{name} is not a normal distribution's"


def test_no_two_blocks_start_alike(initialised):
    cfg, params = initialised
    for name, leaf in params.items():
        if name.startswith("blocks") and name.endswith("kernel"):
            blocks = np.asarray(leaf).reshape(cfg.n_layers, -1)
            correlation = np.corrcoef(blocks) - np.eye(cfg.n_layers)
            assert np.abs(correlation).max() < 6 / math.sqrt(blocks.shape[1]), name


def test_the_key_decides_the_weights():
    init = jax.jit(partial(init_params, dataclasses.replace(SMALL, unroll=False)))
    one, again, other = (flat(init(jax.random.key(seed))) for seed in (0, 0, 1))
    assert all((one[name] == again[name]).all() for name in one)
    assert not (one["blocks/ff/fc/kernel"] == other["blocks/ff/fc/kernel"]).any()


# The parts, against numpy


def numpy_layer_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_gpt2(params, tokens, n_heads):
    """Log-probabilities in float64, from the papers' formulas: one sequence, one head, one position at a time."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in flat(params).items()}
    x = p["tok_emb/embedding"][tokens] + p["pos_emb/embedding"][: len(tokens)]
    emb = x.shape[1]
    size = emb // n_heads
    for layer in range(len(p["blocks/norm1/scale"])):
        b = {name.removeprefix("blocks/"): leaf[layer] for name, leaf in p.items() if name.startswith("blocks/")}
        normed = numpy_layer_norm(x, b["norm1/scale"], b["norm1/bias"])
        context = np.zeros_like(x)
        for head in range(n_heads):
            q, k, v = (normed @ b[f"attn/{n}/kernel"][:, head] + b[f"attn/{n}/bias"][head] for n in "qkv")
            for t in range(len(tokens)):
                scores = np.exp(q[t] @ k[: t + 1].T / np.sqrt(size))
                context[t, head * size :][:size] = scores / scores.sum() @ v[: t + 1]
        x = x + context @ b["attn/out_proj/kernel"].reshape(emb, emb) + b["attn/out_proj/bias"]
        wide = numpy_layer_norm(x, b["norm2/scale"], b["norm2/bias"]) @ b["ff/fc/kernel"] + b["ff/fc/bias"]
        x = x + numpy_gelu(wide) @ b["ff/proj/kernel"] + b["ff/proj/bias"]
    x = numpy_layer_norm(x, p["final_norm/scale"], p["final_norm/bias"])
    logits = x @ p.get("out_head/kernel", p["tok_emb/embedding"].T)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_forward_pass_is_gpt2s(tie_weights):
    cfg = dataclasses.replace(SMALL, tie_weights=tie_weights)
    params = random_params(cfg)
    ours = np.asarray(jax.nn.log_softmax(forward(cfg)({"params": params}, TOKENS)))
    for row, tokens in zip(ours, IDS, strict=True):
        expected = numpy_gpt2(params, tokens, cfg.n_heads)
        assert np.exp(expected).sum(-1) == pytest.approx(1)
        assert np.abs(row - expected).max() <= 1e-4


@pytest.mark.parametrize("spread", [1.0, 1e-3])  # at 1e-3 the variance is 1e-6, and an eps of 1e-6 would show
def test_layer_norm_is_the_papers_with_gpt2s_eps(spread):
    rng = np.random.default_rng(0)
    x = (3 + spread * rng.normal(size=(2, 5, 24))).astype(np.float32)
    scale, bias = rng.normal(size=(2, 24)).astype(np.float32)
    ours = LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    close(ours, numpy_layer_norm(x.astype(np.float64), scale, bias), 1e-5 if spread == 1 else 1e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_the_feed_forward_is_gelu_between_two_products(exact):
    ff = jax.tree.map(lambda leaf: leaf[0], random_params(SMALL)["blocks"]["ff"])
    x = np.random.default_rng(2).normal(0, 2, (2, 5, 24)).astype(np.float32)
    p = flat(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), ff))
    wide = x @ p["fc/kernel"] + p["fc/bias"]
    forms = {False: numpy_gelu(wide), True: 0.5 * wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))}
    ours = FeedForward(96, exact_gelu=exact).apply({"params": ff}, jnp.asarray(x))
    close(ours, forms[exact] @ p["proj/kernel"] + p["proj/bias"])
    with pytest.raises(AssertionError):  # the tolerance distinguishes the two forms
        close(ours, forms[not exact] @ p["proj/kernel"] + p["proj/bias"])


def test_no_logit_depends_on_a_later_token():
    cfg = dataclasses.replace(SMALL, tie_weights=False)
    params = random_params(cfg)
    direction = np.random.default_rng(2).normal(size=cfg.vocab_size).astype(np.float32)

    def projected(embedding):
        logits = GPTModel(cfg).apply({"params": {**params, "tok_emb": {"embedding": embedding}}}, TOKENS[:1])
        return logits[0] @ direction

    jacobian = jax.jit(jax.jacrev(projected))(params["tok_emb"]["embedding"])  # (position, token id, emb)
    influence = np.abs(np.asarray(jacobian)[:, IDS[0]]).max(-1)  # each id stands at one position only
    assert (influence[np.triu_indices(16, 1)] == 0).all()
    assert (influence[np.tril_indices(16)] > 1e-6).all()


# However the stack is executed


EXECUTIONS = [(False, "none"), (False, "dots"), (False, "full"), (True, "none"), (True, "full")]


@cache
def executed(unroll, remat):
    """Logits and gradients, under dropout, whose draws must not change either."""
    cfg = dataclasses.replace(SMALL, n_layers=2, drop_rate=0.2, unroll=unroll, remat=remat)
    model, params = GPTModel(cfg), random_params(cfg)

    def loss(params):
        rngs = {"dropout": jax.random.key(5)}
        logits = model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)
        return cross_entropy(logits, TOKENS), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, grads


@pytest.mark.parametrize(
    ("unroll", "remat"),
    [(False, "dots"), (True, "full"), *(pytest.param(*each, marks=pytest.mark.slow) for each in EXECUTIONS[2:4])],
)
def test_execution_changes_neither_numbers_nor_tree(unroll, remat):
    logits, grads = executed(False, "none")
    other_logits, other_grads = executed(unroll, remat)
    close(other_logits, logits)
    gradients_close(other_grads, grads)
    shapes = param_shapes(dataclasses.replace(SMALL, unroll=unroll, remat=remat))
    assert {name: leaf.shape for name, leaf in flat(shapes).items()} == contract(SMALL)


@pytest.mark.parametrize(("remat", "products"), [("none", 0), ("dots", 2), ("full", 6)])
def test_remat_computes_again_what_it_says(remat, products):
    """Products of one block (qkv, scores, context, out_proj, fc, proj) that appear again in the backward pass."""
    cfg = dataclasses.replace(SMALL, n_layers=1, unroll=False, remat=remat, attention="explicit")
    shapes = param_shapes(cfg)

    def loss(params):
        return cross_entropy(GPTModel(cfg).apply({"params": params}, TOKENS), TOKENS)

    base = 3 * (6 + 1)  # six products and the head: once forward, twice backward
    assert str(jax.make_jaxpr(jax.grad(loss))(shapes)).count("dot_general[") - base in (products, products - 1)


# Segments


@pytest.mark.parametrize("first", [1, 2])
def test_a_split_stack_computes_the_same(first):
    params = random_params(SMALL)
    split = split_blocks(params, first)
    assert set(split) == {*params, "blocks_0", "blocks_1"} - {"blocks"}
    assert jax.tree.leaves(split["blocks_0"])[0].shape[0] == first
    close(forward(SMALL)({"params": split}, TOKENS), forward(SMALL)({"params": params}, TOKENS))
    joined = join_blocks(split)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), joined, params))


def test_a_cut_outside_the_stack_is_refused():
    for first in (0, 3, -1):
        with pytest.raises(InputError, match=rf"\[{first}\].*1 to 2"):
            split_blocks(random_params(SMALL), first)


TAIL = ("blocks_1", "final_norm", "out_head")


def tail_gradient(cfg, frozen, trainable):
    def loss(trainable):
        return cross_entropy(GPTModel(cfg).apply({"params": {**frozen, **trainable}}, TOKENS), TOKENS)

    return jax.grad(loss)(trainable)


def test_the_tails_gradient_is_that_of_the_whole():
    cfg = dataclasses.replace(SMALL, tie_weights=False)
    params = random_params(cfg)
    whole = jax.jit(lambda params: tail_gradient(cfg, {}, params))(params)
    split = split_blocks(params, 2)
    trainable = {name: split.pop(name) for name in TAIL}
    tail = jax.jit(partial(tail_gradient, cfg))(split, trainable)
    gradients_close(tail, {name: split_blocks(whole, 2)[name] for name in TAIL})


# Dropout


DROPPED = dataclasses.replace(SMALL, drop_rate=0.25)


def test_dropout_is_a_function_of_its_key_and_off_by_default():
    params = random_params(SMALL)
    assert (forward(DROPPED)({"params": params}, TOKENS) == forward(SMALL)({"params": params}, TOKENS)).all()
    apply = jax.jit(lambda key: GPTModel(DROPPED).apply(
        {"params": params}, TOKENS, deterministic=False, rngs={"dropout": key}
    ))  # fmt: skip
    one, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one == again).all()
    assert not np.allclose(one, other)
    assert not np.allclose(one, forward(SMALL)({"params": params}, TOKENS))
    assert not np.allclose(one[0, 0], apply(jax.random.key(2))[0, 0])  # at the first position, too


def test_embeddings_are_dropped_out():
    """Blocks that add nothing leave the embedding, of ones: after dropout 0 or 1/(1 - rate)."""
    params = jax.tree.map(jnp.zeros_like, random_params(SMALL))
    params["tok_emb"]["embedding"] += 1
    params["final_norm"]["scale"] += 1
    rngs = {"dropout": jax.random.key(0)}
    tokens = jnp.zeros((64, 16), jnp.int32)
    apply = jax.jit(partial(GPTModel(DROPPED).apply, deterministic=False, method="hidden"))
    hidden = apply({"params": params}, tokens, rngs=rngs)
    hidden = np.asarray(hidden).reshape(-1, 24)
    low, high = hidden.min(-1, keepdims=True), hidden.max(-1, keepdims=True)
    assert (np.isclose(hidden, low) | np.isclose(hidden, high)).all()
    share = (hidden < (low + high) / 2).mean()
    assert share == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / hidden.size))


def one_block(**replaced):
    """A block's parameters: all zero, but norms that give ones whatever they get, and what is replaced."""
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), random_params(SMALL)["blocks"])
    for norm in ("norm1", "norm2"):
        params[norm]["bias"] += 1
    for path, value in replaced.items():
        *sections, leaf = path.split("__")
        section = params
        for name in sections:
            section = section[name]
        section[leaf] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), section[leaf].shape)
    return params


def branch(params, batch=64):
    """What a block adds to its input, with dropout."""
    x, rngs = jnp.zeros((batch, 16, 24)), {"dropout": jax.random.key(1)}
    options = {"cache": None, "start": None, "angles": None, "segment_ids": None, "deterministic": False}
    apply = jax.jit(partial(TransformerBlock(DROPPED).apply, **options))
    added, _ = apply({"params": params}, x, rngs=rngs)
    return np.asarray(added)


def test_the_feed_forward_branch_is_dropped_out():
    added = branch(one_block(ff__proj__bias=3.0))
    assert (np.isclose(added, 0) | np.isclose(added, 3 / 0.75)).all()
    assert (added == 0).mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / added.size))


def test_attention_weights_and_the_attention_branch_are_dropped_out():
    """With values of one and equal weights, a head's output counts the weights kept; out_proj hands it on."""
    out_proj = np.eye(24).reshape(3, 8, 24)
    added = branch(one_block(attn__v__bias=1.0, attn__out_proj__kernel=out_proj), batch=256)
    heads = added.reshape(256, 16, 3, 8)
    per_head = heads.max(-1)
    kept = per_head * 0.75**2 * np.arange(1, 17)[:, None]  # weights of a row are 1/(t+1), over 0.75 twice
    assert np.abs(kept - kept.round()).max() < 1e-4
    # A head that came through shows the share kept: of the branch within a head, and of the weights over all heads.
    alive = per_head[:, 8:] > 0
    assert (heads[:, 8:][alive] == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert (np.isclose(heads, per_head[..., None]) | (heads == 0)).all()
    share = kept[:, 8:].sum() / (256 * 3 * np.arange(9, 17).sum())
    assert share == pytest.approx(0.75, abs=0.01)
    assert len(np.unique(kept[:, 15].round())) > 5  # heads differ: it is not the branch alone that drops


@pytest.mark.parametrize("tie_weights", [True, False])
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters_and_logits(tie_weights):
    cfg = dataclasses.replace(SMALL, tie_weights=tie_weights)
    half = dataclasses.replace(cfg, dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(param_shapes(half)))
    params = random_params(cfg, std=0.1)
    logits, expected = forward(half)({"params": params}, TOKENS), forward(cfg)({"params": params}, TOKENS)
    assert logits.dtype == jnp.float32
    close(logits, expected, 0.03)  # bfloat16 rounds to 2**-9; some thirty roundings follow each other
    assert not np.allclose(logits, expected, rtol=1e-4)
    hidden = jax.eval_shape(partial(GPTModel(half).apply, method="hidden"), {"params": params}, TOKENS)
    assert hidden.dtype == jnp.bfloat16
    # The last product accumulates in float32: rounded to bfloat16, logits would be few distinct values.
    assert (np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16).astype(jnp.float32))).mean() > 0.9


# Packed rows


LENGTHS = (5, 7, 4)
STARTS = np.cumsum((0, *LENGTHS))[:-1]
PACKED = {
    "positions": jnp.asarray(np.concatenate([np.arange(n) for n in LENGTHS])[None], jnp.int32),
    "segment_ids": jnp.asarray(np.repeat(np.arange(3), LENGTHS)[None], jnp.int32),
}


@pytest.mark.parametrize("attention", ["explicit", "xla"])
def test_packed_documents_are_computed_as_if_alone(attention):
    cfg = dataclasses.replace(SMALL, attention=attention)
    params = random_params(cfg)
    packed = forward(cfg)({"params": params}, TOKENS[:1], **PACKED)
    for start, length in zip(STARTS, LENGTHS, strict=True):
        alone = forward(SMALL)({"params": params}, TOKENS[:1, start : start + length])
        close(packed[:, start : start + length], alone)


def test_no_gradient_leaks_between_packed_documents():
    cfg = dataclasses.replace(SMALL, tie_weights=False)
    params = random_params(cfg)

    def second_document(embedding):
        tree = {**params, "tok_emb": {"embedding": embedding}}
        logits = GPTModel(cfg).apply({"params": tree}, TOKENS[:1], **PACKED)
        return jnp.square(logits[0, 5:12]).sum()

    gradient = np.abs(np.asarray(jax.jit(jax.grad(second_document))(params["tok_emb"]["embedding"]))).max(-1)
    assert (gradient[IDS[0, 5:12]] > 0).all()
    others = np.setdiff1d(np.arange(61), IDS[0, 5:12])
    assert (gradient[others] == 0).all()


def test_positions_default_to_counting_from_zero():
    params = random_params(SMALL)
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    expected = forward(SMALL)({"params": params}, TOKENS)
    close(forward(SMALL)({"params": params}, TOKENS, positions=positions), expected)
    moved = forward(SMALL)({"params": params}, TOKENS, positions=positions[:, ::-1])
    assert not np.allclose(moved, expected, atol=1e-2)


# The two halves, and what is refused


@pytest.mark.parametrize("tie_weights", [True, False])
def test_hidden_then_logits_is_the_whole(tie_weights):
    cfg = dataclasses.replace(SMALL, tie_weights=tie_weights)
    params = {"params": random_params(cfg)}
    hidden = jax.jit(partial(GPTModel(cfg).apply, method="hidden"))(params, TOKENS)
    assert hidden.shape == (2, 16, 24)
    close(GPTModel(cfg).apply(params, hidden, method="logits"), forward(cfg)(params, TOKENS))


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(InputError, match=r"17 tokens.*16"):
        GPTModel(SMALL).apply({"params": random_params(SMALL)}, jnp.zeros((1, 17), jnp.int32))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *((name, value, "at least 1") for name in ("vocab_size", "n_layers") for value in (0, 2.0, "8", True, None)),
        ("emb_dim", 25, "multiple of model.n_heads 3, such as 27"),
        *(("drop_rate", value, "at least 0 and below 1") for value in (-0.1, 1.0, float("nan"), "0.1", True)),
        *(("bias", value, "true or false") for value in ("no", 1, None)),
        ("unroll", "yes", "true or false"),
        ("unpadded_vocab_size", 62, "1 to model.vocab_size 61"),
        ("dtype", "float64", "float32, bfloat16, float16"),
        ("remat", "some", "none, dots, full"),
        ("attention", "fast", "auto, xla, cudnn, flash, explicit"),
    ],
)
def test_a_value_no_model_can_have_is_refused(field, value, expected):
    cfg = copy.copy(SMALL)
    object.__setattr__(cfg, field, value)
    with pytest.raises(InputError, match=rf"model\.{field} is {value!r}.*expected .*{expected}"):
        cfg.__post_init__()  # by itself: in the tests the enforced annotations would refuse a wrong type before it


def test_presets_and_their_other_names():
    for alias, name in {"gpt2": "small", "small": "small", "medium": "medium", "large": "large", "xl": "xl"}.items():
        assert get_gpt_config(alias) == get_gpt_config(f"gpt2-{name}")
    assert get_gpt_config() == get_gpt_config("gpt2-small") == GPTConfig()
    assert get_gpt_config("gpt2-small", context_length=256, drop_rate=0.1) == GPTConfig(
        vocab_size=50_257, context_length=256, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1
    )
    assert count_params(get_gpt_config("tiny")) < count_params(get_gpt_config("mini")) < 10_000_000
    with pytest.raises(InputError, match=f"'gpt3'.*{', '.join(PRESETS)}"):
        get_gpt_config("gpt3")
    with pytest.raises(InputError, match=r"'n_layer'; expected one of .*n_layers"):
        get_gpt_config("tiny", n_layer=3)
