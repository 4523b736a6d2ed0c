# %% [markdown]
# # 2. Simple attention
#
# In a sentence, words depend on each other: *chased* means more once you know who chased whom. Attention lets each
# token collect information from all the others. In this notebook you compute it for six tokens, step by step: dot
# products measure similarity, softmax turns them into weights, and the weighted average gives a new vector for each
# token. Nothing is learned yet; that comes in notebook 3.
#
# Previous: [1. Tokenization](01_tokenization.py), where tokens became vectors. The notebook runs in about 10 seconds on
# two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from slm_jax.attention import simple_attention

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs round more than that by default
jnp.set_printoptions(precision=2, suppress=True)

# %% [markdown]
# ## Six tokens
#
# Real embeddings have hundreds of dimensions without names. Ours have three, set by hand so that you can follow: how
# much a token is an *animal*, an *action*, or a *function word*. The array has shape (tokens, dimensions):

# %%
tokens = ["The", "cat", "chased", "a", "grey", "mouse"]
x = jnp.array(
    [
        # animal, action, function word
        [0.1, 0.0, 0.9],
        [1.3, 0.3, 0.1],
        [0.6, 1.2, 0.1],
        [0.0, 0.1, 0.9],
        [0.5, 0.0, 0.4],
        [1.2, 0.2, 0.2],
    ]
)
assert x.shape == (6, 3)

# %% [markdown]
# ## Similarity: the dot product
#
# Multiply two vectors element by element and add up: $a \cdot b = a_1 b_1 + a_2 b_2 + a_3 b_3$. The result is large if
# both vectors are large in the same dimensions, so it measures how closely they point in the same direction (and how
# long they are). It is called the **score**. Here are the scores of *cat* with each token:

# %%
query = x[1]  # "cat"
by_hand = [sum(float(q) * float(k) for q, k in zip(query, key, strict=True)) for key in x]
for token, score in zip(tokens, by_hand, strict=True):
    print(f"cat · {token:<7} {score:.2f}")
scores = x @ query  # all six at once, as a matrix times a vector
assert jnp.allclose(scores, jnp.array(by_hand), atol=1e-6)

# %% [markdown]
# ## Softmax: from scores to weights
#
# We want weights: positive numbers that sum to 1, larger for larger scores. **Softmax** computes
# $w_i = e^{s_i} / \sum_j e^{s_j}$. The exponential makes every number positive and amplifies differences; dividing by
# the sum makes them sum to 1. The results are called the **attention weights**.


# %%
def naive_softmax(scores):
    return jnp.exp(scores) / jnp.exp(scores).sum()


weights = naive_softmax(scores)
for token, weight in zip(tokens, weights, strict=True):
    print(f"cat -> {token:<7} {weight:.2f}")
assert (weights > 0).all()
assert jnp.isclose(weights.sum(), 1)

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8))
for ax, values, title in ((axes[0], scores, "score: dot product"), (axes[1], weights, "weight: softmax")):
    bars = ax.barh(tokens, values, color=["#e69f00" if token == "cat" else "#0072b2" for token in tokens])
    ax.bar_label(bars, fmt="%.2f", padding=3)
    ax.set_title(f"cat: {title}", fontsize=10)
    ax.set_xlim(0, 1.2 * float(values.max()))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Softmax that does not overflow
#
# The formula is correct, but the code overflows. The largest 32-bit float is about $3.4 \cdot 10^{38}$, and $e^{89}$ is
# larger: it becomes infinity, and infinity divided by infinity is not a number (`nan`).

# %%
large_scores = jnp.array([100.0, 99.0, 90.0])
print(naive_softmax(large_scores))
assert jnp.isnan(naive_softmax(large_scores)).any()

# %% [markdown]
# The solution: subtract the largest score first. $e^{s_i - m} = e^{s_i} / e^{m}$, so numerator and denominator shrink
# by the same factor, and the weights stay the same. Now the largest exponent is 0, and $e^0 = 1$. `jax.nn.softmax` does
# this.


# %%
def softmax(scores):
    powers = jnp.exp(scores - scores.max())
    return powers / powers.sum()


print(softmax(large_scores))
assert jnp.allclose(softmax(scores), naive_softmax(scores), atol=1e-6)
assert jnp.allclose(softmax(large_scores), jax.nn.softmax(large_scores), atol=1e-6)

# %% [markdown]
# Adding the same number to all scores changes nothing; multiplying them does. Small scores give nearly equal weights;
# large scores give almost all the weight to the largest one. Notebook 3 returns to this, because scores get large in a
# real model.

# %%
fig, axes = plt.subplots(1, 4, figsize=(8, 2.4), sharey=True)
for ax, factor in zip(axes, (0, 1, 5, 50), strict=True):
    shares = softmax(factor * scores)
    ax.bar(tokens, shares, color="#0072b2")
    ax.set_title(f"scores times {factor}", fontsize=10)
    ax.tick_params(axis="x", rotation=90)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("weight")
plt.tight_layout()
plt.show()
assert jnp.allclose(softmax(scores + 7), weights, atol=1e-6)

# %% [markdown]
# ## The context vector
#
# Now multiply each token's vector by its weight and add up, $z = \sum_i w_i x_i$. This weighted average is the
# **context vector** of *cat*: still mostly an animal, but with some action from *chased*.

# %%
context = sum(weight * vector for weight, vector in zip(weights, x, strict=True))
print("cat alone:     ", query)
print("cat in context:", context)
assert jnp.allclose(context, weights @ x, atol=1e-6)  # a vector times a matrix does the same
assert context[1] > query[1]  # more action than before

# %% [markdown]
# An average stays within the range of its inputs: in each dimension the context vector lies between the smallest and
# the largest of the six values. In the plot (two of the three dimensions) it has moved from *cat* toward the middle.

# %%
assert ((x.min(axis=0) <= context) & (context <= x.max(axis=0))).all()
fig, ax = plt.subplots(figsize=(6, 4))
for token, vector, weight in zip(tokens, x, weights, strict=True):
    ax.plot([context[0], vector[0]], [context[1], vector[1]], color="0.75", linewidth=14 * float(weight), zorder=1)
    ax.scatter(vector[0], vector[1], s=60, color="#0072b2", zorder=2)
    offset = (0, -18) if token in ("The", "grey", "mouse") else (0, 9)  # below or above, to avoid overlaps
    ax.annotate(f"{token} ({weight:.2f})", vector[:2], xytext=offset, textcoords="offset points", ha="center")
ax.scatter(context[0], context[1], s=160, marker="*", color="#d55e00", zorder=3)
ax.annotate("cat in context", context[:2], xytext=(-10, 10), textcoords="offset points", ha="right", color="#b04a00")
ax.set_xlabel("animal")
ax.set_ylabel("action")
ax.set_ylim(-0.2, 1.4)
ax.set_xlim(-0.15, 1.5)
ax.set_title("The thicker the line, the larger the weight", fontsize=10)
plt.show()

# %% [markdown]
# ## All tokens at once
#
# The computation is the same for every token. Write the three steps as a function of one query; `jax.vmap` turns a
# function of one input into a function of many. `in_axes=(0, None)` means: map over the rows of the first argument, and
# pass the whole second argument each time.


# %%
def attend(query, x):
    """Return the context vector of one query, (emb,), over the tokens x, (seq, emb)."""
    return softmax(x @ query) @ x


contexts = jax.vmap(attend, in_axes=(0, None))(x, x)
print(contexts.shape)
assert jnp.allclose(contexts[1], context, atol=1e-6)

# %% [markdown]
# Here is the same in three lines of matrix operations, which is how models do it: `x @ x.T` contains the score of every
# token (row) with every token (column), softmax is applied to each row, and one more product computes the averages.

# %%
all_scores = x @ x.T  # (6, 6)
all_weights = jax.nn.softmax(all_scores, axis=-1)  # each row sums to 1
all_contexts = all_weights @ x  # (6, 3)
assert jnp.allclose(all_contexts, contexts, atol=1e-6)
assert jnp.allclose(all_weights.sum(axis=-1), 1)

# %% [markdown]
# Each row of this attention map shows which tokens one token attends to. You will see many such maps: a row is a query,
# a column is a key.

# %%
fig, ax = plt.subplots(figsize=(5.6, 4.6))
image = ax.imshow(all_weights, cmap="viridis", vmin=0)
ax.set_xticks(range(6), tokens)
ax.set_yticks(range(6), tokens)
ax.set_xlabel("attends to")
ax.set_ylabel("token")
for row in range(6):
    for column in range(6):
        value = float(all_weights[row, column])
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.25 else "white")
fig.colorbar(image, label="attention weight")
plt.show()

# %% [markdown]
# *cat* and *mouse* attend to each other, so do *The* and *a*, and *chased* attends mostly to itself.

# %%
top_two = {token: {tokens[i] for i in row.argsort()[-2:]} for token, row in zip(tokens, all_weights, strict=True)}
assert top_two["cat"] == top_two["mouse"] == {"cat", "mouse"}
assert top_two["The"] == top_two["a"] == {"The", "a"}
assert all_weights[2].argmax() == 2  # "chased"

# %% [markdown]
# In the library this is `simple_attention` in [`slm_jax/attention.py`](../slm_jax/attention.py). It also accepts many
# sentences at once, as an array of shape (batch, tokens, dimensions); each sentence attends only to its own tokens.

# %%
library_contexts, library_weights = simple_attention(x, return_weights=True)
assert jnp.allclose(library_contexts, all_contexts, atol=1e-6)
assert jnp.allclose(library_weights, all_weights, atol=1e-6)
assert jnp.allclose(simple_attention(jnp.stack([x, 2 * x]))[0], all_contexts, atol=1e-6)
print(library_contexts[1], "=", context)

# %% [markdown]
# ## What simple attention cannot do
#
# It ignores the order of the tokens. If you shuffle the tokens, you get the same context vectors, shuffled in the same
# way: *a mouse chased the grey cat* makes no difference. That is why position embeddings are added to the tokens before
# attention.

# %%
order = jnp.array([3, 5, 2, 0, 4, 1])
print(" ".join(tokens[i] for i in order))
assert jnp.allclose(simple_attention(x[order]), all_contexts[order], atol=1e-6)

# %% [markdown]
# It also cannot choose what to look for. The scores are symmetric: the score of *cat* with *mouse* is the score of
# *mouse* with *cat*. A token can only find similar tokens, never "the verb that belongs to me". That needs learned
# weights.

# %%
assert jnp.array_equal(all_scores, all_scores.T)
print("largest weight of each row:", [tokens[i] for i in all_weights.argmax(axis=-1)])

# %% [markdown]
# ## Exercises
#
# **1. Longer vectors.** Make the vector of *mouse* twice as long. Which tokens' weights on *mouse* grow? Then score by
# the angle alone: divide each vector by its length before the dot product (cosine similarity). Where is the largest
# score of each row now, and why?
#
# <details><summary>Solution</summary>
#
# ```python
# longer = x.at[5].multiply(2)  # a new array; JAX never changes arrays in place
# _, longer_weights = simple_attention(longer, return_weights=True)
# assert (longer_weights[:, 5] > all_weights[:, 5]).all()  # all of them
#
# unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
# cosine = unit @ unit.T
# assert (cosine.argmax(axis=-1) == jnp.arange(6)).all()
# ```
#
# No number here is negative, so every dot product with a longer *mouse* grows. By angle, each token is most similar to
# itself: the cosine of angle 0 is 1.
#
# </details>
#
# **2. How sharp?** By which integer must you multiply the scores of *cat* until *cat* gives 90% of its attention to one
# token? Which token is it, and why is the number so large?
#
# <details><summary>Solution</summary>
#
# ```python
# factor = next(f for f in range(1, 1000) if softmax(f * scores).max() > 0.9)
# print(factor, tokens[int(scores.argmax())])
# gap = scores[1] - scores[5]  # cat's score of itself, and of mouse
# assert jnp.exp(factor * gap) > 9 >= jnp.exp((factor - 1) * gap)
# ```
#
# With only two tokens left to compete, the first has 90% when its exponential is nine times the other's: when
# $e^{f \cdot gap} = 9$. The gap between *cat* and *mouse* is only 0.15.
#
# </details>
#
# **3. Add positions.** Add a random vector for each position to `x`, as in notebook 1, and show that shuffling the
# tokens no longer just shuffles the result.
#
# <details><summary>Solution</summary>
#
# ```python
# positions = 0.5 * jax.random.normal(jax.random.key(0), (6, 3))
# straight = simple_attention(x + positions)
# shuffled = simple_attention(x[order] + positions)  # the positions stay, the tokens move
# assert jnp.abs(shuffled - straight[order]).max() > 0.05
# ```
#
# The vector of *mouse* at position 1 differs from the vector of *mouse* at position 5.
#
# </details>
#
# ## Key takeaways
#
# - Attention is a weighted average: dot products give the scores, and softmax turns them into weights.
# - Softmax implementations subtract the largest score first; the result is the same, and nothing overflows.
# - Simple attention ignores the order of tokens and cannot choose what to look for.
#
# Next: [3. Self-attention with trainable weights](03_self_attention.py).
