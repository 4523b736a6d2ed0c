"""What must hold of every form of attention: masking, sums, agreement between the steps, and with others' code."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from slm_jax.attention import (
    CausalAttention,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    SelfAttention,
    causal_attention,
    simple_attention,
)
from slm_jax.nn.fused_attention import FusedMultiHeadAttention, choose_implementation

BATCH, SEQ, EMB, HEADS = 2, 6, 12, 3
HEAD_DIM = EMB // HEADS

# Every causal form, with an output as wide as its input.
CAUSAL = {
    "causal": CausalAttention(EMB, EMB, SEQ, 0.5),
    "wrapper": MultiHeadAttentionWrapper(EMB, HEAD_DIM, SEQ, 0.5, HEADS),
    "multi": MultiHeadAttention(EMB, EMB, SEQ, 0.5, HEADS),
    "fused-explicit": FusedMultiHeadAttention(EMB, HEADS, drop_rate=0.5, implementation="explicit"),
    "fused-xla": FusedMultiHeadAttention(EMB, HEADS, drop_rate=0.5, implementation="xla"),
}


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (BATCH, SEQ, EMB))


@pytest.fixture(scope="module")
def params(x):
    return {name: jax.jit(module.init)(jax.random.key(2), x) for name, module in CAUSAL.items()}


@cache
def compiled(name, deterministic=True):
    """One compiled program per form and mode: (params, x, rngs=...) -> (output, weights)."""
    return jax.jit(partial(CAUSAL[name].apply, deterministic=deterministic, return_weights=True))


def close(actual, expected, tolerance=1e-5):
    """Difference over the largest magnitude."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def influence(f, x):
    """How much output token t depends on input token s: (seq, seq), from the exact Jacobian of one sequence."""
    jacobian = jax.jit(jax.jacrev(lambda one: f(one[None])[0]))(x[0])  # (seq, emb, seq, emb)
    return np.abs(np.asarray(jacobian)).sum(axis=(1, 3))


# --- by hand ---


def by_hand(q, k, v, scale, causal):
    """Attention as nested loops over numbers, in float64: (context, weights)."""
    seq = len(q)
    weights = np.zeros((seq, seq))
    context = np.zeros((seq, v.shape[1]))
    for t in range(seq):
        seen = range(t + 1) if causal else range(seq)
        exponentials = {s: np.exp(sum(q[t][i] * k[s][i] for i in range(q.shape[1])) * scale) for s in seen}
        total = sum(exponentials.values())
        for s in seen:
            weights[t, s] = exponentials[s] / total
            context[t] += weights[t, s] * v[s]
    return context, weights


# Six tokens of three dimensions, the size of the book's example; the numbers are ours.
SIX = np.array(
    [[0.2, 0.7, 0.1], [0.9, 0.1, 0.4], [0.8, 0.3, 0.5], [0.1, 0.6, 0.3], [0.5, 0.2, 0.9], [0.3, 0.8, 0.6]], np.float64
)
W = {  # (3, 2)
    "query": np.array([[0.5, -0.2], [0.1, 0.9], [-0.4, 0.3]]),
    "key": np.array([[0.2, 0.6], [-0.7, 0.1], [0.3, 0.8]]),
    "value": np.array([[1.0, 0.0], [0.5, -0.5], [0.2, 0.4]]),
}


def test_simple_attention_by_hand():
    context, weights = simple_attention(jnp.asarray(SIX, jnp.float32), return_weights=True)
    expected_context, expected_weights = by_hand(SIX, SIX, SIX, scale=1.0, causal=False)
    close(weights, expected_weights)
    close(context, expected_context)
    # One score worked out on paper, token 1 with token 4: 0.9·0.5 + 0.1·0.2 + 0.4·0.9 = 0.83; with itself: 0.98.
    assert float(weights[1, 4] / weights[1, 1]) == pytest.approx(np.exp(0.83 - 0.98), rel=1e-5)


@pytest.mark.parametrize(("module", "causal"), [(SelfAttention(3, 2), False), (CausalAttention(3, 2, 6, 0.0), True)])
def test_projections_scale_and_mask_by_hand(module, causal):
    params = {name: {"kernel": jnp.asarray(kernel, jnp.float32)} for name, kernel in W.items()}
    context, weights = module.apply({"params": params}, jnp.asarray(SIX, jnp.float32), return_weights=True)
    expected = by_hand(SIX @ W["query"], SIX @ W["key"], SIX @ W["value"], scale=2**-0.5, causal=causal)
    close(context, expected[0])
    close(weights, expected[1])


def test_simple_and_self_attention_take_leading_batch_dimensions(x):
    close(simple_attention(x)[1], simple_attention(x[1]))
    module = SelfAttention(EMB, 4, qkv_bias=True)
    params = jax.jit(module.init)(jax.random.key(0), x)
    close(module.apply(params, x)[1], module.apply(params, x[1]))


# --- weights ---


@pytest.mark.parametrize("name", CAUSAL)
def test_weights_sum_to_one_and_look_back_only(name, x, params):
    output, weights = compiled(name)(params[name], x)
    assert weights.shape == ((BATCH, SEQ, SEQ) if name == "causal" else (BATCH, HEADS, SEQ, SEQ))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert np.all(np.triu(np.asarray(weights), k=1) == 0)
    assert np.all(np.asarray(weights)[..., np.tril_indices(SEQ)[0], np.tril_indices(SEQ)[1]] > 0)
    close(output, CAUSAL[name].apply(params[name], x))


def test_weights_without_a_mask_sum_to_one(x):
    for _, weights in (
        simple_attention(x, return_weights=True),
        SelfAttention(EMB, 4).init_with_output(jax.random.key(0), x, return_weights=True)[0],
    ):
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert np.all(np.asarray(weights) > 0)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("deterministic", [True, False])
def test_returned_weights_reproduce_the_output(name, deterministic, x, params):
    rngs = {"dropout": jax.random.key(3)}
    output, weights = compiled(name, deterministic)(params[name], x, rngs=rngs)
    p, x, weights = jax.tree.map(np.asarray, (params[name]["params"], x, weights))
    if name == "causal":
        expected = weights @ (x @ p["value"]["kernel"])
    elif name == "wrapper":
        heads = [weights[:, h] @ (x @ p[f"heads_{h}"]["value"]["kernel"]) for h in range(HEADS)]
        expected = np.concatenate(heads, axis=-1)
    else:
        value = p["value" if name == "multi" else "v"]["kernel"].reshape(EMB, HEADS, HEAD_DIM)
        heads = [weights[:, h] @ (x @ value[:, h]) for h in range(HEADS)]
        mixing = p["out_proj"]["kernel"].reshape(EMB, EMB)
        expected = np.concatenate(heads, axis=-1) @ mixing + p["out_proj"]["bias"]
    close(output, expected)


# --- causality ---


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token(name, deterministic, x, params):
    apply = partial(CAUSAL[name].apply, params[name], deterministic=deterministic, rngs={"dropout": jax.random.key(5)})
    depends = influence(apply, x)
    assert np.all(depends[np.triu_indices(SEQ, k=1)] == 0)
    if deterministic:  # and every earlier one counts
        assert np.all(depends[np.tril_indices(SEQ)] > 0)


@pytest.mark.parametrize("implementation", ["explicit", "xla"])
def test_extra_mask_keeps_segments_apart(implementation, x):
    module = FusedMultiHeadAttention(EMB, HEADS, implementation=implementation)
    params = jax.jit(module.init)(jax.random.key(0), x)
    segments = jnp.array([[1, 1, 1, 2, 2, 3]])
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    depends = influence(lambda one: module.apply(params, one, mask=mask), x)
    allowed = np.tril(np.asarray(mask[0, 0]))
    assert np.all(depends[~allowed] == 0)
    assert np.all(depends[allowed] > 0)
    # A packed document gives what it gives alone.
    apply = jax.jit(module.apply)
    close(apply(params, x[:1], mask=mask)[:, 3:5], apply(params, x[:1, 3:5]))


@pytest.mark.parametrize("implementation", ["explicit", "xla"])
def test_a_row_that_the_mask_empties_attends_to_itself(implementation, x):
    module = FusedMultiHeadAttention(EMB, HEADS, implementation=implementation)
    params = jax.jit(module.init)(jax.random.key(0), x)
    mask = jnp.ones((BATCH, 1, SEQ, SEQ), bool).at[:, :, 2].set(False)

    def loss(params, x):
        return module.apply(params, x, mask=mask).sum()

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params, x)))
    depends = influence(lambda one: module.apply(params, one, mask=mask[:1]), x)
    assert np.flatnonzero(depends[2]).tolist() == [2]


# --- agreement ---


def same_weights(bias=False):
    """One random set of weights in the layout of each multi-head form."""
    keys = jax.random.split(jax.random.key(7), 8)
    roles = ("query", "key", "value")
    kernel = {r: jax.random.normal(keys[i], (EMB, EMB)) / EMB**0.5 for i, r in enumerate(roles)}
    vector = {r: jax.random.normal(keys[3 + i], (EMB,)) for i, r in enumerate(roles)}
    out = {"kernel": jax.random.normal(keys[6], (EMB, EMB)) / EMB**0.5, "bias": jax.random.normal(keys[7], (EMB,))}

    def dense(role, columns=slice(None)):
        return {"kernel": kernel[role][:, columns]} | ({"bias": vector[role][columns]} if bias else {})

    cut = [slice(h * HEAD_DIM, (h + 1) * HEAD_DIM) for h in range(HEADS)]
    wrapper = {f"heads_{h}": {r: dense(r, cut[h]) for r in roles} for h in range(HEADS)}
    multi = {r: dense(r) for r in roles} | {"out_proj": out}
    shapes = {"kernel": (EMB, HEADS, HEAD_DIM), "bias": (HEADS, HEAD_DIM)}
    fused = {r[0]: {name: leaf.reshape(shapes[name]) for name, leaf in dense(r).items()} for r in roles}
    fused["out_proj"] = {"kernel": out["kernel"].reshape(HEADS, HEAD_DIM, EMB), "bias": out["bias"]}
    return wrapper, multi, fused


@pytest.mark.parametrize("bias", [False, True])
def test_all_multi_head_forms_agree(bias, x):
    wrapper, multi, fused = same_weights(bias)
    step4 = MultiHeadAttentionWrapper(EMB, HEAD_DIM, SEQ, 0.0, HEADS, qkv_bias=bias)
    step5 = MultiHeadAttention(EMB, EMB, SEQ, 0.0, HEADS, qkv_bias=bias)
    stacked, weights = step4.apply({"params": wrapper}, x, return_weights=True)
    expected = stacked @ multi["out_proj"]["kernel"] + multi["out_proj"]["bias"]
    output, weights5 = step5.apply({"params": multi}, x, return_weights=True)
    close(output, expected)
    close(weights5, weights)
    for implementation in ("auto", "xla", "explicit"):
        step6 = FusedMultiHeadAttention(EMB, HEADS, qkv_bias=bias, implementation=implementation)
        close(step6.apply({"params": fused}, x), expected)
        close(step6.apply({"params": fused}, x, return_weights=True)[1], weights)


def test_gradients_agree_between_implementations(x):
    fused = same_weights()[2]
    segments = jnp.array([[1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
    mask = segments[:, None, :, None] == segments[:, None, None, :]

    def gradient(implementation):
        module = FusedMultiHeadAttention(EMB, HEADS, implementation=implementation)
        return jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x, mask=mask) ** 2)))(fused)

    explicit, xla = gradient("explicit"), gradient("xla")
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(xla)))
    for a, b in zip(jax.tree.leaves(explicit), jax.tree.leaves(xla), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * norm


def test_agrees_with_flax_multi_head_attention(x):
    """Flax's own layer, which we did not write, given the same weights and a causal mask."""
    _, multi, fused = same_weights(bias=True)
    theirs = nn.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=EMB, out_features=EMB)
    params = {{"q": "query", "k": "key", "v": "value", "out_proj": "out"}[name]: tree for name, tree in fused.items()}
    expected = theirs.apply({"params": params}, x, mask=nn.make_causal_mask(x[..., 0]))
    close(MultiHeadAttention(EMB, EMB, SEQ, 0.0, HEADS, qkv_bias=True).apply({"params": multi}, x), expected)
    close(FusedMultiHeadAttention(EMB, HEADS, qkv_bias=True).apply({"params": fused}, x), expected)


def test_causal_attention_agrees_with_jax():
    q, k, v = jax.random.normal(jax.random.key(0), (3, BATCH, SEQ, HEADS, HEAD_DIM))
    mask = jnp.ones((BATCH, 1, SEQ, SEQ), bool).at[0, 0, 3:, :2].set(False)
    close(
        jax.jit(causal_attention)(q, k, v, mask=mask)[0],
        jax.jit(partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla"))(q, k, v, mask=mask),
    )


# --- dropout ---


@pytest.mark.parametrize("name", CAUSAL)
def test_dropout_acts_in_training_only_and_follows_its_key(name, x, params):
    def run(key, deterministic=False):
        return np.asarray(compiled(name, deterministic)(params[name], x, rngs={"dropout": jax.random.key(key)})[1])

    still = run(0, deterministic=True)
    np.testing.assert_array_equal(still, run(1, deterministic=True))
    dropped = run(0)
    np.testing.assert_array_equal(dropped, run(0))
    assert np.any(dropped != run(1))
    kept = dropped > 0
    assert 0 < kept[still > 0].mean() < 1
    np.testing.assert_allclose(dropped[kept], 2 * still[kept], rtol=1e-5)  # what stays is scaled by 1 / (1 - 0.5)


def test_dropout_keeps_the_share_and_the_mean():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 64, 2, 8))
    still = jax.jit(causal_attention)(q, k, v)[1]
    dropped = jax.jit(partial(causal_attention, dropout_rate=0.2))(q, k, v, dropout_key=jax.random.key(1))[1]
    share = np.mean(np.asarray(dropped)[np.asarray(still) > 0] == 0)
    assert share == pytest.approx(0.2, abs=0.02)  # 16,640 draws: a standard deviation of 0.003
    assert float(dropped.sum()) == pytest.approx(float(still.sum()), rel=0.05)


# --- precision and params ---


@pytest.mark.parametrize("implementation", ["explicit", "xla"])
def test_bfloat16_compute_keeps_float32_params(implementation, x):
    module = FusedMultiHeadAttention(EMB, HEADS, qkv_bias=True, dtype=jnp.bfloat16, implementation=implementation)
    params = jax.jit(module.init)(jax.random.key(0), x)
    output, weights = jax.jit(partial(module.apply, return_weights=True))(params, x)
    plain = jax.jit(module.apply)(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert output.dtype == weights.dtype == plain.dtype == jnp.bfloat16
    close(plain, jax.jit(module.clone(dtype=jnp.float32).apply)(params, x), tolerance=0.03)
    gradient = jax.eval_shape(jax.grad(lambda p: module.apply(p, x).astype(jnp.float32).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_scores_and_softmax_are_float32_in_bfloat16():
    """Scores around 20 rounded to bfloat16 would be off by up to 0.06, and so the weights by some 6%."""
    q, k, v = (6 * jax.random.normal(jax.random.key(0), (3, 1, SEQ, 1, 8))).astype(jnp.bfloat16)
    k = k / 4
    _, weights = causal_attention(q, k, v)  # not compiled: XLA would keep more bits than asked for
    expected = by_hand(*(np.asarray(t[0, :, 0], np.float64) for t in (q, k, v)), scale=8**-0.5, causal=True)[1]
    assert np.abs(np.asarray(weights[0, 0], np.float64) - expected).max() <= 2**-8  # the rounding of the result


@pytest.mark.parametrize(("qkv_bias", "out_bias"), [(False, True), (True, True), (False, False)])
def test_params_tree_and_initialisers(qkv_bias, out_bias, x):
    module = FusedMultiHeadAttention(
        EMB, HEADS, qkv_bias=qkv_bias, out_bias=out_bias, out_kernel_init=nn.initializers.zeros
    )
    params = flatten_dict(module.init(jax.random.key(0), x)["params"], sep="/")
    expected = {f"{name}/kernel": (EMB, HEADS, HEAD_DIM) for name in "qkv"}
    expected["out_proj/kernel"] = (HEADS, HEAD_DIM, EMB)
    if qkv_bias:
        expected |= {f"{name}/bias": (HEADS, HEAD_DIM) for name in "qkv"}
    if out_bias:
        expected["out_proj/bias"] = (EMB,)
    assert {path: leaf.shape for path, leaf in params.items()} == expected
    assert not params["out_proj/kernel"].any()
    # lecun_normal's fan-in is the width, not the width of a head: the standard deviation is 1 / sqrt(EMB).
    values = np.concatenate([np.ravel(params[f"{name}/kernel"]) for name in "qkv"])
    assert values.std() == pytest.approx(EMB**-0.5, rel=5 / (2 * values.size) ** 0.5)


# --- which implementation ---

H100, T4, CPU, TPU = ("gpu", 9.0), ("gpu", 7.5), ("cpu", None), ("tpu", None)


@pytest.mark.parametrize(
    ("requested", "dtype", "head_dim", "needs_weights", "odd_mask", "device", "expected"),
    [
        ("auto", "bfloat16", 64, False, False, H100, "cudnn"),
        ("auto", "float16", 128, False, False, ("gpu", 8.0), "cudnn"),
        ("cudnn", "bfloat16", 64, False, False, H100, "cudnn"),
        ("auto", "float32", 64, False, False, H100, "xla"),
        ("auto", "bfloat16", 60, False, False, H100, "xla"),
        ("auto", "bfloat16", 136, False, False, H100, "xla"),
        ("auto", "bfloat16", 64, False, True, H100, "xla"),
        ("auto", "bfloat16", 64, True, False, H100, "explicit"),
        ("auto", "float16", 64, False, False, T4, "xla"),
        ("auto", "bfloat16", 64, False, False, ("gpu", None), "xla"),  # AMD
        ("auto", "bfloat16", 64, False, False, TPU, "flash"),
        ("auto", "float32", 60, False, True, TPU, "flash"),
        ("auto", "float16", 64, False, False, TPU, "xla"),
        ("auto", "bfloat16", 64, True, False, TPU, "explicit"),
        ("flash", "bfloat16", 64, False, False, TPU, "flash"),
        ("auto", "bfloat16", 64, False, False, CPU, "explicit"),
        ("xla", "float32", 64, False, False, CPU, "xla"),
        ("xla", "float32", 64, True, False, H100, "explicit"),
        ("explicit", "bfloat16", 64, False, False, H100, "explicit"),
    ],
)
def test_choice_of_implementation(requested, dtype, head_dim, needs_weights, odd_mask, device, expected):
    assert choose_implementation(requested, jnp.dtype(dtype), head_dim, needs_weights, odd_mask, device) == expected


@pytest.mark.parametrize(
    ("requested", "dtype", "head_dim", "needs_weights", "odd_mask", "device", "words"),
    [
        ("cudnn", "bfloat16", 64, True, False, H100, "dropout"),
        ("cudnn", "bfloat16", 64, False, False, T4, "7.5"),
        ("cudnn", "bfloat16", 64, False, False, CPU, "NVIDIA GPU.*cpu"),
        ("cudnn", "float32", 64, False, False, H100, "bfloat16.*float32"),
        ("cudnn", "bfloat16", 100, False, False, H100, "head_dim.*100"),
        ("cudnn", "bfloat16", 64, False, True, H100, "odd"),
        ("xla", "float16", 64, False, False, CPU, "float16"),
        ("flash", "bfloat16", 64, False, False, H100, "TPU.*gpu"),
        ("flash", "bfloat16", 64, True, False, TPU, "dropout"),
        ("flash", "float16", 64, False, False, TPU, "bfloat16.*float16"),
        ("fast", "float32", 64, False, False, CPU, "'fast'"),
    ],
)
def test_choice_refuses_what_cannot_work(requested, dtype, head_dim, needs_weights, odd_mask, device, words):
    with pytest.raises(ValueError, match=words):
        choose_implementation(requested, jnp.dtype(dtype), head_dim, needs_weights, odd_mask, device)


def test_a_mask_of_ones_own_is_not_for_flash_attention():
    assert choose_implementation("auto", jnp.bfloat16, 64, False, device=TPU, other_mask=True) == "xla"
    with pytest.raises(ValueError, match="segments"):
        choose_implementation("flash", jnp.bfloat16, 64, False, device=TPU, other_mask=True)


def test_float16_works_on_a_cpu(x):
    module = FusedMultiHeadAttention(EMB, HEADS, dtype=jnp.float16)
    output, params = module.init_with_output(jax.random.key(0), x)
    close(output, module.clone(dtype=jnp.float32).apply(params, x), tolerance=0.01)


# --- bad input ---

BAD = [
    (CausalAttention(EMB, 4, SEQ - 1, 0.0), f"{SEQ} tokens.*{SEQ - 1}"),
    (MultiHeadAttentionWrapper(EMB, 4, SEQ - 1, 0.0, 2), "context_length"),
    (MultiHeadAttention(EMB, EMB, SEQ - 1, 0.0, HEADS), "context_length"),
    (MultiHeadAttention(EMB, EMB, SEQ, 0.0, 5), "d_out is 12.*n_heads = 5"),
    (SelfAttention(EMB + 1, 4), "12 features, expected 13"),
    (CausalAttention(EMB, 4, SEQ, 1.5), "drop_rate is 1.5"),
]


@pytest.mark.parametrize(("module", "words"), BAD)
def test_bad_shapes_are_refused(module, words, x):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(module.init, jax.random.key(0), x)
