# %% [markdown]
# # 3. Self-attention with trainable weights
#
# In notebook 2 a token could only look for tokens like itself. Three matrices change that: they decide what a token
# looks for, what it can be found by, and what it hands over. At the end you will know what queries, keys and values
# are, why scores are divided by a square root, and how JAX keeps weights outside of functions (`init` and `apply`). You
# will also have watched attention learn where to look.
#
# Before: [2. Simple attention](02_simple_attention.py). It runs in about 20 seconds on two CPU cores.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from slm_jax.attention import SelfAttention, simple_attention

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs round more than that by default
jnp.set_printoptions(precision=2, suppress=True)

tokens = ["The", "cat", "chased", "a", "grey", "mouse"]
x = jnp.array(  # animal, action, small word: as in notebook 2
    [[0.1, 0.0, 0.9], [1.3, 0.3, 0.1], [0.6, 1.2, 0.1], [0.0, 0.1, 0.9], [0.5, 0.0, 0.4], [1.2, 0.2, 0.2]]
)

# %% [markdown]
# ## Three roles for one token
#
# Think of a library with cards. You come with a question, the **query**; each book has a card that says what it can be
# found by, the **key**; and what you take home is not the card but the content, the **value**. Each token plays all
# three roles, through three matrices: $q = x W_q$, $k = x W_k$, $v = x W_v$. The score is now query times key.
#
# Before anything is learned, choose two of the matrices by hand: *animals ask, actions answer*.

# %%
W_query = jnp.array([[4.0, 0, 0], [0, 0, 0], [0, 0, 0]])  # the query's first number: four times "animal"
W_key = jnp.array([[0.0, 0, 0], [1, 0, 0], [0, 0, 0]])  # the key's first number: "action"
W_value = jnp.eye(3)  # hand over everything

queries, keys, values = x @ W_query, x @ W_key, x @ W_value
by_hand = jax.nn.softmax(queries @ keys.T, axis=-1)
print("cat looks at", ", ".join(f"{token} {weight:.2f}" for token, weight in zip(tokens, by_hand[1], strict=True)))
assert tokens[by_hand[1].argmax()] == tokens[by_hand[5].argmax()] == "chased"

# %% [markdown]
# *cat* and *mouse* now find their verb, which no dot product of embeddings would have told them, and the scores are
# not symmetric any more: asking and answering are two things.


# %%
def draw_map(ax, weights, labels, title):
    """Draw attention weights, (seq, seq): rows ask, columns answer."""
    image = ax.imshow(weights, cmap="viridis", vmin=0, vmax=1)
    ax.set_xticks(range(len(labels)), labels, rotation=90)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("looks at")
    return image


_, simple_weights = simple_attention(x, return_weights=True)
fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.6), layout="constrained")
draw_map(axes[0], simple_weights, tokens, "simple attention: like looks at like")
image = draw_map(axes[1], by_hand, tokens, "animals ask, actions answer")
fig.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
plt.show()
assert not jnp.allclose(queries @ keys.T, (queries @ keys.T).T)

# %% [markdown]
# ## Weights outside, functions pure: `init` and `apply`
#
# Nobody chooses these matrices for a real model; they start random and are learned. In JAX a function that is to be
# compiled or differentiated should be **pure**: its result depends on its arguments and on nothing else, and it
# changes nothing. So a layer does not own its weights. It is a pair of functions:
#
# - `init(key)` makes the weights (the **params**), a plain dict of arrays;
# - `apply(params, x)` computes the layer with the weights it is given.
#
# Even randomness is an argument: the **key**. The same key gives the same weights; `split` makes new keys of one.


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
assert not jnp.array_equal(params["query"]["kernel"], params["key"]["kernel"])  # each from a key of its own

# %% [markdown]
# `jax.tree.map` did something to every array in the dict, here: took its shape. All of JAX works on such nested dicts
# (it calls them trees). The division by $\sqrt{d_{out}}$ in `apply` is explained below; `d_out` is the width of queries
# and keys.


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
# holds only sizes; it has the same two functions. Its `init` also takes an example input, which it runs once to find
# all the shapes, and it wraps the params in `{"params": ...}`, because a module may have other kinds of variables.

# %%
layer = SelfAttention(d_in=3, d_out=2)
variables = layer.init(jax.random.key(0), x)
print(jax.tree.map(jnp.shape, variables))
assert jax.tree.structure(variables["params"]) == jax.tree.structure(params)

# %% [markdown]
# The same names and shapes; so it can run with our params, and gives what we got.

# %%
library_context, library_weights = layer.apply({"params": params}, x, return_weights=True)
assert jnp.allclose(library_context, context, atol=1e-6)
assert jnp.allclose(library_weights, weights, atol=1e-6)

hands = {"query": {"kernel": W_query}, "key": {"kernel": W_key}, "value": {"kernel": W_value}}
assert jnp.allclose(SelfAttention(3, 3).apply({"params": hands}, x), apply(hands, x)[0], atol=1e-6)
print(library_context[1], "=", context[1])

# %% [markdown]
# ## Why divide by the square root? The scores grow
#
# A score is a sum of d products. If queries and keys have numbers of mean 0 and variance 1 that know nothing of each
# other, each product has variance 1, and variances add up: the score has variance d, so its typical size (standard
# deviation) is $\sqrt{d}$. Dividing by $\sqrt{d}$ brings it back to 1.
#
# Measure it: 200 random queries, each with 16 random keys, of up to 1,024 dimensions. `cumsum`, the running sum of the
# products, has the scores for every smaller d as well.

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
# Softmax of large scores gives nearly everything to one key: it **saturates**. Then it hardly reacts when scores
# change a little, and learning by gradients is nothing but changing things a little. Measured here: the largest of 16
# weights, and the size of the **Jacobian**, the table of how each weight changes with each score.
#
# `jax.jacobian` makes a function that computes this table; `vmap` runs it on all 200 rows.

# %%
slope = jax.vmap(lambda row: jnp.linalg.norm(jax.jacobian(jax.nn.softmax)(row)))


@jax.jit  # compile it once, then run it on scores of equal shape
def measure(scores):
    """Return the mean largest weight, and the mean size of the Jacobian, of scores (rows, keys)."""
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
titles = {"size of scores": size, "largest of 16 weights": largest, "size of softmax's Jacobian": gradient}
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
# The mean hides how bad it gets: for most rows hardly any slope is left, and a few lucky ones, with two scores close
# together, keep the mean up. With 1,024 dimensions, how many rows have lost nine tenths of the slope that scaled scores
# have?

# %%
usual = slope(scaled[-1]).mean()
lost = (slope(plain[-1]) < usual / 10).mean()
print(f"{float(lost):.0%} of the rows without scaling, {float((slope(scaled[-1]) < usual / 10).mean()):.0%} with it")
assert lost > 0.4

# %% [markdown]
# ## A gradient through it
#
# `jax.grad(f)` makes a function that returns the gradient of `f` with respect to its first argument. Where that
# argument is a dict of params, the gradient is a dict of the same form: one number for each weight, saying how the loss
# grows with it.
#
# To trust it, check one number by hand: nudge one weight up and down, and see how the loss changes.


# %%
def loss_of(params, x, target):
    """Return the mean squared difference between context vectors and what they should be."""
    return jnp.mean((apply(params, x)[0] - target) ** 2)


target = jnp.ones((6, 2))
grads = jax.grad(loss_of)(params, x, target)
print(jax.tree.map(jnp.shape, grads))


def nudged(step):
    kernel = params["query"]["kernel"].at[1, 0].add(step)  # a new array: JAX never changes one in place
    return loss_of({**params, "query": {"kernel": kernel}}, x, target)


estimate = (nudged(0.01) - nudged(-0.01)) / 0.02
print(f"by jax.grad {grads['query']['kernel'][1, 0]:.4f}, by nudging {estimate:.4f}")
assert jnp.isclose(grads["query"]["kernel"][1, 0], estimate, rtol=0.02, atol=1e-4)

# %% [markdown]
# ## Learning where to look
#
# A task that needs looking: six tokens with three random numbers each. One of the six, at a random place, carries a
# mark. Every token should output the three numbers *of the marked one*. Nothing tells the layer what the mark means or
# where it is; there is only the loss.
#
# A token here has five numbers: three of content, the mark (0 or 1), and a constant 1, so that a query can be the same
# for all.


# %%
def make_examples(key, n):
    """Return n examples: tokens (n, 6, 5) and the content to fetch (n, 1, 3)."""
    content_key, place_key = jax.random.split(key)
    content = jax.random.normal(content_key, (n, 6, 3))
    mark = jax.nn.one_hot(jax.random.randint(place_key, (n,), 0, 6), 6)[..., None]
    return jnp.concatenate([content, mark, jnp.ones((n, 6, 1))], axis=-1), (content * mark).sum(axis=1, keepdims=True)


@jax.jit
def step(params, key):
    """Return params after one step against the gradient, and the loss before it."""
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
# Params go in, new params come out; no step has changed anything in place. `fold_in` makes a key from a key and a
# number, so each step has random examples of its own, and the same ones whenever you run this.
#
# Look at an example that was not trained on.

# %%
new_x, new_target = make_examples(jax.random.key(4), 500)
shown = int(new_x[:, 2, 3].argmax())  # the first example with the mark at place 2
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
# All three matrices learned their role. Queries and keys meet at the mark, so every row looks at one column, and the
# value matrix is nearly the identity: it hands over the content as it is. Training a GPT is this loop with more
# layers, a better optimizer and text.
#
# ## Exercises
#
# **1. The other way round.** Choose matrices by hand so that *chased* looks mostly at *cat* and *mouse*: actions ask,
# animals answer.
#
# <details><summary>Solution</summary>
#
# ```python
# asks_action = jnp.zeros((3, 3)).at[1, 0].set(8.0)
# is_animal = jnp.zeros((3, 3)).at[0, 0].set(1.0)
# verb = {"query": {"kernel": asks_action}, "key": {"kernel": is_animal}, "value": {"kernel": jnp.eye(3)}}
# _, verb_weights = apply(verb, x)
# print(", ".join(f"{token} {weight:.2f}" for token, weight in zip(tokens, verb_weights[2], strict=True)))
# assert set(verb_weights[2].argsort()[-2:].tolist()) == {1, 5}  # cat and mouse
# assert verb_weights[2, jnp.array([1, 5])].sum() > 0.8
# ```
#
# The query of *chased* is large in its first number, and so are the keys of *cat* and *mouse*. The factor 8 decides
# how sharp the choice is.
#
# </details>
#
# **2. Could the weights do the scaling?** Show that attention without the division gives the same result, if its query
# matrix is divided by $\sqrt{d_{out}}$ instead. Why is the division in the formula all the same?
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
# What can be computed is the same. What differs is where training starts, and how large its steps are: with the
# division, the usual random weights give scores of size 1, whatever the width.
#
# </details>
#
# **3. Who depends on whom?** Use `jax.jacobian` to find out whether the context vector of the first token changes when
# the last token's vector does. Is that good for a model that is to predict the next token?
#
# <details><summary>Solution</summary>
#
# ```python
# jacobian = jax.jacobian(lambda x: apply(params, x)[0])(x)  # (6, 2, 6, 3): output token, number, input token, number
# influence = jnp.abs(jacobian).max(axis=(1, 3))
# assert influence[0, 5] > 1e-4
# ```
#
# It changes: each token sees all others, also those after it. A model that is to predict the next token could just read
# it. The next notebook hides the future.
#
# </details>
#
# ## What to take along
#
# - Queries look, keys are found, values are handed over: three learned matrices, and scores that need not be symmetric.
# - Scores grow with the square root of the width; dividing by it keeps softmax from saturating and its gradient alive.
# - A layer is two pure functions, `init(key, ...)` and `apply(params, x)`; params are a dict, and so are
#   their gradients.
#
# Next: [4. Causal attention](04_causal_attention.py).
