# %% [markdown]
# # 4. Causal attention
#
# A language model learns to predict the next token. If it could see the next token while predicting it, it would only
# learn to copy. This notebook hides future tokens with a mask, applied in the right place, and verifies with
# derivatives that nothing leaks. At the end we add dropout to attention.
#
# Previous: [self-attention with trainable weights](03_self_attention.py). The notebook runs in about 15 seconds on two
# CPU cores.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

jax.config.update("jax_default_matmul_precision", "highest")  # full float32 precision on GPUs and TPUs too
jnp.set_printoptions(precision=2, suppress=True)

# %% [markdown]
# ## Six tokens, and scores between them
#
# Random embeddings represent a sentence of six tokens, three numbers each. JAX has no hidden random state: every random
# array is made from a *key*, and the same key gives the same numbers. Queries, keys and values are products with three
# matrices, as in notebook 3. (The *keys* of attention and the *keys* of random numbers share nothing but the name.)

# %%
words = ["The", "cat", "sat", "on", "my", "hat"]
seq, d_in, d_out = len(words), 3, 2

x_key, q_key, k_key, v_key = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(x_key, (seq, d_in))
W_query = 0.5 * jax.random.normal(q_key, (d_in, d_out))
W_key = 0.5 * jax.random.normal(k_key, (d_in, d_out))
W_value = jax.random.normal(v_key, (d_in, d_out))


def scores_of(x):
    return (x @ W_query) @ (x @ W_key).T / math.sqrt(d_out)


print(scores_of(x))

# %% [markdown]
# Row $t$ contains the scores of token $t$ (the query) with each token $s$ (the key). Everything to the right of the
# diagonal is the future: there $s > t$.
#
# ## The mask
#
# `jnp.tril` keeps the lower triangle of a matrix. The boolean mask says which tokens a token may attend to: row 0 sees
# only itself, row 5 sees all tokens.

# %%
mask = jnp.tril(jnp.ones((seq, seq), dtype=bool))
print(mask.astype(int))

# %% [markdown]
# ## −∞ before softmax
#
# Softmax turns a row of scores into weights: $\mathrm{softmax}(a)_s = e^{a_s} / \sum_r e^{a_r}$. In words: each score
# becomes a positive number, which is then divided by the row's sum. Since $e^{-\infty} = 0$, a score of $-\infty$
# becomes a weight of exactly 0 and adds 0 to the sum, as if the token did not exist.


# %%
def causal_weights(x):
    allowed = jnp.tril(jnp.ones((len(x), len(x)), dtype=bool))
    scores = jnp.where(allowed, scores_of(x), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


weights = causal_weights(x)
print(weights)
assert (weights[~mask] == 0).all()  # exactly, not nearly
assert jnp.allclose(weights.sum(-1), 1)

# %% [markdown]
# Here are both as plots. Grey cells are masked; the first token can only attend to itself, with weight 1.


# %%
def draw(ax, matrix, title, hide=None, cmap="viridis", **options):
    shown = matrix if hide is None else jnp.where(hide, jnp.nan, matrix)
    colours = plt.get_cmap(cmap).with_extremes(bad="lightgrey")
    image = ax.imshow(shown, cmap=colours, **options)
    ax.set_title(title, fontsize=10)
    ax.set_xticks(range(seq), words, fontsize=8)
    ax.set_yticks(range(seq), words, fontsize=8)
    return image


def full_weights(x):
    return jax.nn.softmax(scores_of(x), axis=-1)


fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.5), layout="constrained")
draw(axes[0], full_weights(x), "without a mask", vmin=0, vmax=1)
image = draw(axes[1], weights, "causal", hide=~mask, vmin=0, vmax=1)
axes[0].set_ylabel("query")
for ax in axes:
    ax.set_xlabel("key")
fig.colorbar(image, ax=axes, label="weight", shrink=0.8)
plt.show()

# %% [markdown]
# ## Why not 0 after softmax?
#
# This looks simpler: compute the weights as before, then set the masked ones to 0. But the rows no longer sum to 1:
# early tokens, with much future to hide, get context vectors that are too small.

# %%
zeroed = jnp.where(mask, full_weights(x), 0)
print("row sums", zeroed.sum(-1))
assert zeroed.sum(-1)[0] < 0.5

# %% [markdown]
# Dividing each row by its sum again (renormalising) fixes that. The result is the same as with $-\infty$: both are
# $e^{a_s}$ over the sum of the allowed $e^{a_r}$, because the sum over all tokens cancels.

# %%
renormalised = zeroed / zeroed.sum(-1, keepdims=True)
print("largest difference", f"{abs(renormalised - weights).max():.0e}")
assert jnp.allclose(renormalised, weights, atol=1e-6)

# %% [markdown]
# So zeros alone are wrong, zeros with renormalisation are mathematically right, and $-\infty$ is right in one step.
# Floating-point numbers make one more difference: if a future score is much larger than the allowed ones, softmax first
# rounds all allowed weights to 0, and renormalising cannot recover them.

# %%
row = jnp.array([1.0, 2.0, 200.0])  # the third token is in the future and has a very large score
allowed = jnp.array([True, True, False])

after = jnp.where(allowed, jax.nn.softmax(row), 0)
before = jax.nn.softmax(jnp.where(allowed, row, -jnp.inf))
print("0 after softmax, renormalised:", after / after.sum())
print("-inf before softmax:          ", before)
assert jnp.isnan(after / after.sum()).all()
assert jnp.allclose(before[0] / before[1], math.exp(-1))

# %% [markdown]
# ## Leakage: does the future get through?
#
# Zeros in the weight matrix are easy to see, but the real question is whether any information about a later token
# reaches an earlier output, by any path. A derivative answers it: $\partial\,\mathrm{out}_t / \partial\,x_s$ says how
# output $t$ changes when embedding $s$ changes a little. If it is 0, output $t$ does not depend on token $s$.
#
# `jax.jacobian(f)` is a function that computes all these derivatives at once. For outputs of shape (6, 2) and inputs of
# shape (6, 3) the result has shape (6, 2, 6, 3); we plot its norm for each pair of tokens.


# %%
def attend(weights_of):
    """Return the function from embeddings to context vectors that uses these attention weights."""
    return lambda x: weights_of(x) @ (x @ W_value)


def influence(function, x):
    """Return how strongly output t (row) depends on input s (column): the norm of that block of the Jacobian."""
    jacobian = jax.jit(jax.jacobian(function))(x)
    return jnp.sqrt((jacobian**2).sum((1, 3)))


def zeroed_weights(x):
    return jnp.where(jnp.tril(jnp.ones((len(x), len(x)), dtype=bool)), full_weights(x), 0)


unmasked, zero_after, causal = (influence(attend(f), x) for f in (full_weights, zeroed_weights, causal_weights))
assert (unmasked > 0).all()  # every output depends on every input
assert (causal[~mask] == 0).all()  # no output depends on the future
assert (causal[mask] > 0).all()  # but each depends on itself and its past

# %% [markdown]
# With zeros after softmax, the masked weights are also exactly 0. Yet the future leaks.

# %%
print(zero_after)
assert (zeroed_weights(x)[~mask] == 0).all()
assert (zero_after[~mask] > 0).all()

# %% [markdown]
# It leaks through the denominator: softmax divided by a sum over *all* tokens. When a later token changes, that sum
# changes, and with it every allowed weight. A model could learn to infer the next token from the size of the weights.

# %%
fig, axes = plt.subplots(1, 3, figsize=(8, 3.3), layout="constrained")
cases = [("no mask", unmasked), ("0 after softmax", zero_after), ("−∞ before softmax", causal)]
for ax, (title, matrix) in zip(axes, cases, strict=True):
    image = draw(ax, matrix, title, hide=matrix == 0, norm=LogNorm(1e-3, 1))
    ax.set_xlabel("input $s$")
axes[0].set_ylabel("output $t$")
fig.colorbar(image, ax=axes, label="norm of ∂ out / ∂ x", shrink=0.8, extend="both")
fig.suptitle("Which outputs depend on which inputs (log scale; grey: exactly 0)", fontsize=11)
plt.show()

# %% [markdown]
# The same check without derivatives: replace the last word, and compare the outputs of the five words before it.

# %%
other = x.at[-1].set(jnp.array([3.0, -3.0, 3.0]))  # JAX arrays are immutable; .at[].set() returns a new one
for title, weights_of in [("0 after ", zeroed_weights), ("-inf before", causal_weights)]:
    change = abs(attend(weights_of)(other) - attend(weights_of)(x))[:-1].max()
    print(f"{title:<12} earlier outputs change by {change:.3f}")

assert (attend(causal_weights)(other)[:-1] == attend(causal_weights)(x)[:-1]).all()
assert abs(attend(zeroed_weights)(other) - attend(zeroed_weights)(x))[:-1].max() > 0.01

# %% [markdown]
# ## Dropout
#
# In training, attention weights are dropped at random: each becomes 0 with probability $p$, here one half. So no output
# can rely on a single token. The remaining weights are divided by $1 - p$, so that the expected value of every weight
# is unchanged. Dropout needs randomness, so it takes a random key, and gives the same result for the same key.


# %%
def dropout(key, weights, rate):
    keep = jax.random.bernoulli(key, 1 - rate, weights.shape)  # True with probability 1 - rate
    return jnp.where(keep, weights / (1 - rate), 0)


first = dropout(jax.random.key(1), weights, 0.5)
assert (first == dropout(jax.random.key(1), weights, 0.5)).all()
assert (first != dropout(jax.random.key(2), weights, 0.5)).any()
print(first)

# %% [markdown]
# One draw differs a lot from the weights themselves; the mean of many draws is close. `jax.vmap` turns a function of
# one key into a function of an array of keys, here of 20,000 of them.

# %%
keys = jax.random.split(jax.random.key(3), 20_000)
many = jax.jit(jax.vmap(lambda key: dropout(key, weights, 0.5)))(keys)
print("largest |mean of draws - weights|:", f"{abs(many.mean(0) - weights).max():.2f}")
assert jnp.allclose(many.mean(0), weights, atol=0.05)

# %%
fig, axes = plt.subplots(1, 3, figsize=(8, 3.3), layout="constrained")
cases = [("weights", weights), ("one draw, $p = 0.5$", first), ("mean of 20,000 draws", many.mean(0))]
for ax, (title, matrix) in zip(axes, cases, strict=True):
    image = draw(ax, matrix, title, hide=~mask, vmin=0, vmax=2)
    ax.set_xlabel("key")
axes[0].set_ylabel("query")
fig.colorbar(image, ax=axes, label="weight", shrink=0.8)
plt.show()

# %% [markdown]
# Dark cells in the middle were dropped, and the others are doubled: a weight of 1 becomes 2. At inference time dropout
# is off, and nothing needs to be scaled.
#
# ## The library's layer
#
# In the library this is `CausalAttention` in [`slm_jax/attention.py`](../slm_jax/attention.py). With our three matrices
# as its parameters it gives the same result. `init` would create random parameters; here we fill the dict ourselves.

# %%
from slm_jax.attention import CausalAttention, causal_mask

layer = CausalAttention(d_in, d_out, context_length=8, drop_rate=0.5)
params = {"query": {"kernel": W_query}, "key": {"kernel": W_key}, "value": {"kernel": W_value}}
shapes = jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x)["params"])
assert shapes == jax.tree.map(jnp.shape, params)

out, used = layer.apply({"params": params}, x, return_weights=True)
assert jnp.allclose(out, attend(causal_weights)(x), atol=1e-6)
assert jnp.allclose(used, weights, atol=1e-6)
assert (causal_mask(seq) == mask).all()
print(out)

# %% [markdown]
# The layer passes the derivative check as well. `apply` is a pure function of parameters and input, so `jax.jacobian`
# works on it as on our own function.

# %%
proof = influence(lambda x: layer.apply({"params": params}, x), x)
assert (proof[~mask] == 0).all()
assert jnp.allclose(proof, causal, atol=1e-5)
print(proof)

# %% [markdown]
# Dropout is off by default (`deterministic=True`). In training it is on, and the key is passed by name,
# `rngs={"dropout": key}`: a layer with dropout is still a pure function, with one more argument.


# %%
@jax.jit
def train_mode(key):
    return layer.apply({"params": params}, x, deterministic=False, return_weights=True, rngs={"dropout": key})[1]


dropped = train_mode(jax.random.key(4))
assert (dropped == train_mode(jax.random.key(4))).all()
assert jnp.all(jnp.isclose(dropped, 0) | jnp.isclose(dropped, 2 * weights, atol=1e-5))
assert jnp.allclose(jax.vmap(train_mode)(keys).mean(0), weights, atol=0.05)

# %% [markdown]
# ## Exercises
#
# **1.** Let each token see only itself and the two before it (a *sliding window*, which some large models use). Make
# the mask, and show with derivatives that output 5 does not depend on token 2.
#
# <details><summary>Solution</summary>
#
# ```python
# distance = jnp.arange(seq)[:, None] - jnp.arange(seq)[None, :]  # how far back s is from t
# window = (distance >= 0) & (distance <= 2)
#
#
# def window_weights(x):
#     return jax.nn.softmax(jnp.where(window, scores_of(x), -jnp.inf), axis=-1)
#
#
# reacts = influence(attend(window_weights), x)
# assert reacts[5, 2] == 0
# assert (reacts[5, 3:] > 0).all()
# assert (reacts[~window] == 0).all()
# ```
#
# Both ends of the window are conditions on the distance $t - s$; all other scores are $-\infty$ before softmax.
# </details>
#
# **2.** Suppose the masked *scores* are set to 0 instead of $-\infty$, before softmax. What are the weights of the
# first token, and does the future leak?
#
# <details><summary>Solution</summary>
#
# ```python
# def zero_scores(x):
#     return jax.nn.softmax(jnp.where(mask, scores_of(x), 0), axis=-1)
#
#
# print(zero_scores(x)[0])
# assert (zero_scores(x)[~mask] > 0).all()  # exp(0) is 1: the future keeps a weight
# assert (influence(attend(zero_scores), x)[~mask] > 0).all()
# ```
#
# A score of 0 is an ordinary score. Future tokens keep positive weights, and their values go directly into the output.
# </details>
#
# **3.** The mean of dropped weights is right. How much does a *single* draw vary, depending on $p$? Compute the
# standard deviation of a weight of 1 under $p$ = 0.1 and $p$ = 0.5, and compare with $\sqrt{p / (1 - p)}$.
#
# <details><summary>Solution</summary>
#
# ```python
# for rate in (0.1, 0.5):
#     draws = jax.vmap(lambda key, rate=rate: dropout(key, jnp.ones(()), rate))(keys)
#     print(rate, draws.std().round(2), round(math.sqrt(rate / (1 - rate)), 2))
#     assert abs(draws.std() - math.sqrt(rate / (1 - rate))) < 0.03
# ```
#
# A draw is $1/(1-p)$ with probability $1-p$ and 0 otherwise; its variance is $1/(1-p) - 1 = p/(1-p)$.
# </details>

# %% [markdown]
# ## Key takeaways
#
# - Scores of later tokens are set to $-\infty$ before softmax: their weights are exactly 0, and the rest of the row
#   sums to 1.
# - To find leaks, look at derivatives, not at the attention weights: zeros after softmax leak through the denominator.
# - In training, dropout sets random weights to 0 and scales up the others; given a key, it is a pure function.
#
# Next: [multi-head attention](05_multi_head_attention.py).
