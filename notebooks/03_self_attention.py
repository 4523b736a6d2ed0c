# %% [markdown]
# # 3. Self-attention with trainable weights
#
# In notebook 2 a token could only attend to similar tokens. Three matrices change that: they determine what a token
# looks for, how other tokens find it, and what information it passes on. You will learn what queries, keys and values
# are, why scores are divided by a square root, and how JAX keeps weights outside of functions (`init` and `apply`). At
# the end you train attention to find the right token.
#
# Previous: [2. Simple attention](02_simple_attention.py). The notebook runs in about 20 seconds on two CPU cores.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from slm_jax.attention import SelfAttention, simple_attention

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs round more than that by default
jnp.set_printoptions(precision=2, suppress=True)

tokens = ["The", "cat", "chased", "a", "grey", "mouse"]
x = jnp.array(  # animal, action, function word: as in notebook 2
    [[0.1, 0.0, 0.9], [1.3, 0.3, 0.1], [0.6, 1.2, 0.1], [0.0, 0.1, 0.9], [0.5, 0.0, 0.4], [1.2, 0.2, 0.2]]
)

# %% [markdown]
# ## Three roles for one token
#
# Think of a library catalogue. You search with a question, the **query**; each book has a catalogue card that it is
# found by, the **key**; and what you take home is not the card but the content, the **value**. Each token plays all
# three roles, through three matrices: $q = x W_q$, $k = x W_k$, $v = x W_v$. The score is now the dot product of query
# and key.
#
# Before learning anything, choose two of the matrices by hand: *animals look for actions*.

# %%
W_query = jnp.array([[4.0, 0, 0], [0, 0, 0], [0, 0, 0]])  # the query's first number: four times "animal"
W_key = jnp.array([[0.0, 0, 0], [1, 0, 0], [0, 0, 0]])  # the key's first number: "action"
W_value = jnp.eye(3)  # pass on everything

queries, keys, values = x @ W_query, x @ W_key, x @ W_value
by_hand = jax.nn.softmax(queries @ keys.T, axis=-1)
print("cat attends to", ", ".join(f"{token} {weight:.2f}" for token, weight in zip(tokens, by_hand[1], strict=True)))
assert tokens[by_hand[1].argmax()] == tokens[by_hand[5].argmax()] == "chased"

# %% [markdown]
# *cat* and *mouse* now find their verb, which dot products of the embeddings could not do. The scores are no longer
# symmetric, because queries and keys are different vectors.


# %%
def draw_map(ax, weights, labels, title):
    """Draw attention weights, (seq, seq): a row is a query, a column is a key."""
    image = ax.imshow(weights, cmap="viridis", vmin=0, vmax=1)
    ax.set_xticks(range(len(labels)), labels, rotation=90)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("attends to")
    return image


_, simple_weights = simple_attention(x, return_weights=True)
fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.6), layout="constrained")
draw_map(axes[0], simple_weights, tokens, "simple attention")
image = draw_map(axes[1], by_hand, tokens, "animals look for actions")
fig.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
plt.show()
assert not jnp.allclose(queries @ keys.T, (queries @ keys.T).T)

# %% [markdown]
# ## Weights outside, functions pure: `init` and `apply`
#
# In a real model these matrices are not chosen by hand; they start random and are learned. In JAX, a function to be
# compiled or differentiated should be **pure**: its result depends only on its arguments, and it has no side effects.
# So a layer does not store its weights. It is a pair of functions:
#
# - `init(key)` creates the weights (the **params**), a plain dict of arrays;
# - `apply(params, x)` computes the layer's output with the given weights.
#
# Even randomness is an argument: the **key**. The same key gives the same weights; `split` derives new keys from a key.


# %%
def init(key, d_in, d_out):
    """Return the three matrices, (d_in, d_out) each, random with variance 1 / d_in."""
    names = ("query", "key", "value")
    return {
        name: {"kernel": jax.random.normal(k, (d_in, d_out)) / math.sqrt(d_in)}
        for name, k in zip(names, jax.random.split(key, 3), strict=True)
    }


params = init(jax.random.key(0), d_in=3, d_out=2)
print(jax.tree.map(jnp.shape, params))
again = init(jax.random.key(0), d_in=3, d_out=2)
assert jnp.array_equal(params["query"]["kernel"], again["query"]["kernel"])  # same key, same weights
assert not jnp.array_equal(params["query"]["kernel"], params["key"]["kernel"])  # each from its own key

# %% [markdown]
# `jax.tree.map` applies a function to every array in the dict; here it takes the shape. All of JAX works on such nested
# dicts (called trees or pytrees). The division by $\sqrt{d_{out}}$ in `apply` is explained below; `d_out` is the width
# of queries and keys.


# %%
def apply(params, x):
    """Return context vectors (..., seq, d_out) and weights (..., seq, seq) of tokens x (..., seq, d_in)."""
    queries = x @ params["query"]["kernel"]
    keys = x @ params["key"]["kernel"]
    values = x @ params["value"]["kernel"]
    scores = queries @ keys.swapaxes(-1, -2) / math.sqrt(queries.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)
    return weights @ values, weights


context, weights = apply(params, x)
print(context)
assert context.shape == (6, 2)
assert jnp.allclose(weights.sum(axis=-1), 1)

# %% [markdown]
# In the library this is `SelfAttention` in [`slm_jax/attention.py`](../slm_jax/attention.py), a Flax module. The object
# holds only sizes and has the same two functions. Its `init` also takes an example input to infer all shapes, and it
# returns `{"params": ...}`, because a module may have other kinds of variables.

# %%
layer = SelfAttention(d_in=3, d_out=2)
variables = layer.init(jax.random.key(0), x)
print(jax.tree.map(jnp.shape, variables))
assert jax.tree.structure(variables["params"]) == jax.tree.structure(params)

# %% [markdown]
# The names and shapes are the same, so it can run with our params, and gives the same result.

# %%
library_context, library_weights = layer.apply({"params": params}, x, return_weights=True)
assert jnp.allclose(library_context, context, atol=1e-6)
assert jnp.allclose(library_weights, weights, atol=1e-6)

chosen = {"query": {"kernel": W_query}, "key": {"kernel": W_key}, "value": {"kernel": W_value}}
assert jnp.allclose(SelfAttention(3, 3).apply({"params": chosen}, x), apply(chosen, x)[0], atol=1e-6)
print(library_context[1], "=", context[1])

# %% [markdown]
# ## Why divide by the square root? The scores grow
#
# A score is a sum of d products. If the entries of queries and keys are independent with mean 0 and variance 1, each
# product has variance 1, and variances add up: the score has variance d, so its typical size (standard deviation) is
# $\sqrt{d}$. Dividing by $\sqrt{d}$ brings it back to 1.
#
# Measure it: 200 random queries, each with 16 random keys, of up to 1,024 dimensions. `cumsum`, the running sum of the
# products, also contains the scores for every smaller d.

# %%
query_key, key_key = jax.random.split(jax.random.key(1))
q = jax.random.normal(query_key, (200, 1, 1024))
k = jax.random.normal(key_key, (200, 16, 1024))
dims = jnp.array([1, 4, 16, 64, 256, 1024])
plain = jnp.moveaxis(jnp.cumsum(q * k, axis=-1)[..., dims - 1], -1, 0)  # (6, 200, 16): scores for each d
scaled = plain / jnp.sqrt(dims)[:, None, None]

print("    d  variance of the score   scaled")
for d, before, after in zip(dims.tolist(), plain.var(axis=(1, 2)), scaled.var(axis=(1, 2)), strict=True):
    print(f"{d:5}  {before:21.1f}  {after:7.2f}")
    assert 0.8 < after < 1.2

# %% [markdown]
# ## What large scores do to softmax
#
# Softmax of large scores gives nearly all the weight to one key: it **saturates**. Then its output hardly changes when
# scores change a little, so its gradients are close to 0 and learning stalls. Here we measure the largest of 16
# weights, and the norm of the **Jacobian**, the matrix of derivatives of each weight with respect to each score.
#
# `jax.jacobian` returns a function that computes this matrix; `vmap` applies it to all 200 rows.

# %%
slope = jax.jit(jax.vmap(lambda row: jnp.linalg.norm(jax.jacobian(jax.nn.softmax)(row))))


@jax.jit  # compile once, then run on all scores of the same shape
def measure(scores):
    """Return the mean largest weight, and the mean norm of the Jacobian, of scores (rows, keys)."""
    return jax.nn.softmax(scores).max(axis=-1).mean(), slope(scores).mean()


largest, gradient = {}, {}
for name, scores in {"plain": plain, "scaled": scaled}.items():
    measured = [measure(rows) for rows in scores]
    largest[name] = [float(weight) for weight, _ in measured]
    gradient[name] = [float(size) for _, size in measured]
    print(f"{name:<7} d = 1024: largest weight {largest[name][-1]:.2f}, Jacobian {gradient[name][-1]:.3f}")
assert gradient["plain"][-1] < 0.25 * gradient["scaled"][-1]

# %%
size = {"plain": plain.std(axis=(1, 2)), "scaled": scaled.std(axis=(1, 2))}
titles = {"size of scores": size, "largest of 16 weights": largest, "norm of softmax's Jacobian": gradient}
fig, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for ax, (title, curves) in zip(axes, titles.items(), strict=True):
    ax.plot(dims, curves["plain"], "o-", color="#d55e00", label="q · k")
    ax.plot(dims, curves["scaled"], "s--", color="#0072b2", label="q · k / √d")
    ax.set_xscale("log", base=4)
    ax.set_xticks(dims.tolist(), dims.tolist())
    ax.minorticks_off()
    ax.set_xlabel("d, width of queries and keys")
    ax.set_title(title, fontsize=10)
    ax.set_ylim(bottom=0)
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The mean hides how bad it gets: for most rows hardly any gradient is left, and a few rows, in which two scores are
# close together, keep the mean up. With 1,024 dimensions, for how many rows is the Jacobian less than a tenth of its
# usual size with scaled scores?

# %%
usual = slope(scaled[-1]).mean()
lost = (slope(plain[-1]) < usual / 10).mean()
print(f"{float(lost):.0%} of the rows without scaling, {float((slope(scaled[-1]) < usual / 10).mean()):.0%} with it")
assert lost > 0.4

# %% [markdown]
# ## Gradients with `jax.grad`
#
# `jax.grad(f)` returns a function that computes the gradient of `f` with respect to its first argument. If that
# argument is a dict of params, the gradient is a dict of the same structure: one derivative of the loss for each
# weight.
#
# To check it, compute one derivative numerically: change one weight slightly up and down, and see how the loss changes.


# %%
def loss_of(params, x, target):
    """Return the mean squared difference between context vectors and target."""
    return jnp.mean((apply(params, x)[0] - target) ** 2)


target = jnp.ones((6, 2))
grads = jax.jit(jax.grad(loss_of))(params, x, target)
print(jax.tree.map(jnp.shape, grads))


def nudged(step):
    kernel = params["query"]["kernel"].at[1, 0].add(step)  # a new array: JAX never changes arrays in place
    return loss_of({**params, "query": {"kernel": kernel}}, x, target)


estimate = (nudged(0.01) - nudged(-0.01)) / 0.02
print(f"by jax.grad {grads['query']['kernel'][1, 0]:.4f}, numerically {estimate:.4f}")
assert jnp.isclose(grads["query"]["kernel"][1, 0], estimate, rtol=0.02, atol=1e-4)

# %% [markdown]
# ## Learning where to look
#
# Here is a task that requires attention: six tokens with three random numbers each. One of the six, at a random
# position, is marked. Every token should output the three numbers *of the marked one*. The layer is not given the
# meaning or the position of the mark; it learns only from the loss.
#
# A token here has five numbers: three of content, the mark (0 or 1), and a constant 1, so that all tokens can have the
# same query.


# %%
def make_examples(key, n):
    """Return n examples: tokens (n, 6, 5) and the content to fetch (n, 1, 3)."""
    content_key, place_key = jax.random.split(key)
    content = jax.random.normal(content_key, (n, 6, 3))
    mark = jax.nn.one_hot(jax.random.randint(place_key, (n,), 0, 6), 6)[..., None]
    return jnp.concatenate([content, mark, jnp.ones((n, 6, 1))], axis=-1), (content * mark).sum(axis=1, keepdims=True)


@jax.jit
def step(params, key):
    """Return params after one step of gradient descent, and the loss before it."""
    loss, grads = jax.value_and_grad(loss_of)(params, *make_examples(key, 128))
    return jax.tree.map(lambda weight, grad: weight - 0.5 * grad, params, grads), loss


untrained = init(jax.random.key(2), d_in=5, d_out=3)
trained, losses = untrained, []
for number in range(200):
    trained, loss = step(trained, jax.random.fold_in(jax.random.key(3), number))  # new examples in each step
    losses.append(float(loss))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.4f}")
assert losses[-1] < 0.05

# %% [markdown]
# Params go in, new params come out; no step changes anything in place. `fold_in` derives a key from a key and a number,
# so each step has its own random examples, and the same ones whenever you run this.
#
# Look at an example that was not in the training data.

# %%
new_x, new_target = make_examples(jax.random.key(4), 500)
shown = int(new_x[:, 2, 3].argmax())  # the first example with the mark at position 2
labels = ["0", "1", "2*", "3", "4", "5"]
fig, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
axes[0].plot(losses, color="#0072b2")
axes[0].set_yscale("log")
axes[0].set_xlabel("step")
axes[0].set_title("loss", fontsize=10)
draw_map(axes[1], apply(untrained, new_x[shown])[1], labels, "before (* is marked)")
image = draw_map(axes[2], apply(trained, new_x[shown])[1], labels, "after")
fig.colorbar(image, ax=axes[2], label="attention weight")
plt.show()

# %%
new_weights = apply(trained, new_x)[1]  # (500, 6, 6)
on_marked = (new_weights * new_x[:, None, :, 3]).sum(axis=-1)
print(f"weight on the marked token, mean of 500 new examples: {float(on_marked.mean()):.2f} (by chance 0.17)")
print("value matrix, rows of the three content numbers:")
print(trained["value"]["kernel"][:3])
assert on_marked.mean() > 0.8
assert loss_of(trained, new_x, new_target) < 0.05

# %% [markdown]
# All three matrices learned their role. The queries match the key of the marked token, so every row attends to one
# column, and the value matrix is nearly the identity: it passes the content on unchanged. Training a GPT is this loop
# with more layers, a better optimizer and text.
#
# ## Exercises
#
# **1. The other way round.** Choose matrices by hand so that *chased* attends mostly to *cat* and *mouse*: actions look
# for animals.
#
# <details><summary>Solution</summary>
#
# ```python
# action_query = jnp.zeros((3, 3)).at[1, 0].set(8.0)
# animal_key = jnp.zeros((3, 3)).at[0, 0].set(1.0)
# verb = {"query": {"kernel": action_query}, "key": {"kernel": animal_key}, "value": {"kernel": jnp.eye(3)}}
# _, verb_weights = apply(verb, x)
# print(", ".join(f"{token} {weight:.2f}" for token, weight in zip(tokens, verb_weights[2], strict=True)))
# assert set(verb_weights[2].argsort()[-2:].tolist()) == {1, 5}  # cat and mouse
# assert verb_weights[2, jnp.array([1, 5])].sum() > 0.8
# ```
#
# The query of *chased* is large in its first number, and so are the keys of *cat* and *mouse*. The factor 8 determines
# how sharp the choice is.
#
# </details>
#
# **2. Could the weights do the scaling?** Show that attention without the division gives the same result if its query
# matrix is divided by $\sqrt{d_{out}}$ instead. Why does the formula still contain the division?
#
# <details><summary>Solution</summary>
#
# ```python
# def apply_unscaled(params, x):
#     queries, keys, values = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
#     return jax.nn.softmax(queries @ keys.swapaxes(-1, -2), axis=-1) @ values
#
# smaller = {**params, "query": {"kernel": params["query"]["kernel"] / math.sqrt(2)}}
# assert jnp.allclose(apply_unscaled(smaller, x), apply(params, x)[0], atol=1e-6)
# ```
#
# Both forms can represent the same functions. They differ in where training starts and how large its steps are: with
# the division, the usual random weights give scores of size 1 for any width.
#
# </details>
#
# **3. Who depends on whom?** Use `jax.jacobian` to find out whether the context vector of the first token changes when
# the last token's vector changes. Is that acceptable for a model that should predict the next token?
#
# <details><summary>Solution</summary>
#
# ```python
# jacobian = jax.jit(jax.jacobian(lambda x: apply(params, x)[0]))(x)  # (6, 2, 6, 3), as for outputs and inputs
# influence = jnp.abs(jacobian).max(axis=(1, 3))
# assert influence[0, 5] > 1e-4
# ```
#
# It changes: each token sees all others, including those after it. A model that should predict the next token could
# just read it. The next notebook hides the future.
#
# </details>
#
# ## Key takeaways
#
# - Queries, keys and values come from three learned matrices, and scores need not be symmetric.
# - Scores grow with the square root of the width; dividing by it keeps softmax from saturating and its gradients
#   useful.
# - A layer is two pure functions, `init(key, ...)` and `apply(params, x)`; params are a dict, and so are their
#   gradients.
#
# Next: [4. Causal attention](04_causal_attention.py).
