# %% [markdown]
# # 5. Multi-head attention
#
# One attention head has one softmax per token, so it has one unit of attention to distribute. Several heads can attend
# to several things at once. This notebook builds multi-head attention three times: with separate heads side by side,
# with one wide projection split into heads, and fused into one matrix product. All three give the same numbers, and you
# convert the parameters of each form into those of the next. Then you train a small GPT and see what its heads attend
# to.
#
# Previous: [causal attention](04_causal_attention.py). The notebook runs in about 20 seconds on two CPU cores.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import slm_jax

jax.config.update("jax_default_matmul_precision", "highest")  # full float32 precision on GPUs and TPUs too
jnp.set_printoptions(precision=2, suppress=True)

# %% [markdown]
# ## Heads side by side
#
# The simplest way to have several heads is to use several causal attention layers with the same input, each with its
# own matrices, and to concatenate their outputs. Here are four heads, each 8 numbers wide, on a batch of 2 sequences
# with 6 tokens of 32 numbers.

# %%
batch, seq, width, n_heads, head_dim = 2, 6, 32, 4, 8


def one_head(x, W_query, W_key, W_value):
    """Causal attention as in notebook 4: (batch, seq, width) to (batch, seq, head_dim)."""
    scores = (x @ W_query) @ (x @ W_key).swapaxes(-1, -2) / math.sqrt(W_query.shape[1])
    future = ~jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool))
    weights = jax.nn.softmax(jnp.where(future, -jnp.inf, scores), axis=-1)
    return weights @ (x @ W_value)


def side_by_side(x, heads):
    return jnp.concatenate([one_head(x, *matrices) for matrices in heads], axis=-1)


x = jax.random.normal(jax.random.key(0), (batch, seq, width))
keys = jax.random.split(jax.random.key(1), 3 * n_heads)
matrices = [jax.random.normal(key, (width, head_dim)) / math.sqrt(width) for key in keys]
heads = [matrices[3 * h : 3 * h + 3] for h in range(n_heads)]  # (query, key, value) of each head

expected = side_by_side(x, heads)
print("four heads of", head_dim, "numbers make", expected.shape)

# %% [markdown]
# In the library this is `MultiHeadAttentionWrapper` in [`slm_jax/attention.py`](../slm_jax/attention.py). Its
# parameters are a dict with one `CausalAttention` per head. We fill that dict with our matrices.

# %%
from slm_jax.attention import MultiHeadAttention, MultiHeadAttentionWrapper
from slm_jax.nn.fused_attention import FusedMultiHeadAttention

wrapper = MultiHeadAttentionWrapper(width, head_dim, context_length=seq, drop_rate=0.0, n_heads=n_heads)
wrapper_params = {
    f"heads_{h}": {"query": {"kernel": q}, "key": {"kernel": k}, "value": {"kernel": v}}
    for h, (q, k, v) in enumerate(heads)
}
side = wrapper.apply({"params": wrapper_params}, x)
assert abs(side - expected).max() < 1e-5

# %% [markdown]
# ## Splitting one wide projection into heads
#
# Four products `x @ W_query` of 8 columns each equal one product with the four matrices side by side, 32 columns wide:
# a column of the result depends on only one column of the matrix. So we multiply once, and then split the result into
# heads.

# %%
roles = ("query", "key", "value")
wide = {
    role: jnp.concatenate([wrapper_params[f"heads_{h}"][role]["kernel"] for h in range(n_heads)], axis=1)
    for role in roles
}

pieces = (x @ wide["query"]).reshape(batch, seq, n_heads, head_dim)  # split the last axis: 32 = 4 heads of 8
for h in range(n_heads):
    assert jnp.allclose(pieces[:, :, h], x @ heads[h][0], atol=1e-5)
print("wide matrix", wide["query"].shape, " result split into heads", pieces.shape)

# %%
fig, axes = plt.subplots(1, 5, figsize=(8, 3.1), layout="constrained", width_ratios=[1, 1, 1, 1, 4])
options = {"cmap": "PuOr", "vmin": -0.5, "vmax": 0.5, "aspect": "auto"}
for h in range(n_heads):
    axes[h].imshow(heads[h][0], **options)
    axes[h].set_title(f"head {h}", fontsize=10)
    axes[h].set_xticks([0, 7])
axes[4].imshow(wide["query"], **options)
axes[4].set_title("one wide query matrix", fontsize=10)
axes[4].set_xticks([0, 7, 15, 23, 31])
for h in range(1, n_heads):
    axes[4].axvline(h * head_dim - 0.5, color="black")
for ax in axes:
    ax.set_xlabel("column")
    ax.set_yticks([])
axes[0].set_ylabel("row (feature of x)")
plt.show()

# %% [markdown]
# With a head axis, one `einsum` computes the scores of all heads. Its letters are axes: `bqhd` are the queries (batch,
# query, head, dimension), `bkhd` the keys; `d` does not appear in the result, so it is summed over.


# %%
def split_heads(x, wide):
    q, k, v = (pieces_of(x @ wide[role]) for role in roles)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = ~jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool))
    weights = jax.nn.softmax(jnp.where(future, -jnp.inf, scores), axis=-1)
    context = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return context.reshape(x.shape)  # concatenate the heads


def pieces_of(projected):
    return projected.reshape(batch, seq, n_heads, head_dim)


print("largest difference", f"{abs(split_heads(x, wide) - expected).max():.0e}")
assert abs(split_heads(x, wide) - expected).max() < 1e-5

# %% [markdown]
# ## The output projection
#
# So far the first 8 numbers of an output come only from head 0. A last matrix, `out_proj`, mixes the heads. The wrapper
# has none, so for the comparison we give the library's `MultiHeadAttention` one that changes nothing: the identity
# matrix and a zero bias.

# %%
split = MultiHeadAttention(width, width, context_length=seq, drop_rate=0.0, n_heads=n_heads)
split_params = {role: {"kernel": wide[role]} for role in roles}
split_params["out_proj"] = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}

assert abs(split.apply({"params": split_params}, x) - side).max() < 1e-5

# %% [markdown]
# From here on `out_proj` is random, as it is before training.

# %%
mixing = jax.random.normal(jax.random.key(2), (width, width)) / math.sqrt(width)
split_params["out_proj"] = {"kernel": mixing, "bias": jnp.zeros(width)}
mixed = split.apply({"params": split_params}, x)
assert abs(mixed - side @ mixing).max() < 1e-5

# %% [markdown]
# ## The fused form
#
# The same idea once more: the query, key and value matrices side by side are one matrix of 96 columns, and one product
# gives all queries, keys and values. This is the layer in the library's GPT,
# [`slm_jax/nn/fused_attention.py`](../slm_jax/nn/fused_attention.py). It stores three kernels of shape (width, heads,
# head_dim), which can be distributed over devices by head, and concatenates them for the product.

# %%
fused = FusedMultiHeadAttention(width, n_heads)
fused_params = {role[0]: {"kernel": wide[role].reshape(width, n_heads, head_dim)} for role in roles}  # q, k and v
fused_params["out_proj"] = {"kernel": mixing.reshape(n_heads, head_dim, width), "bias": jnp.zeros(width)}
shapes = jax.tree.map(jnp.shape, fused.init(jax.random.key(0), x)["params"])
assert shapes == jax.tree.map(jnp.shape, fused_params)
print(shapes)

difference = abs(fused.apply({"params": fused_params}, x) - mixed).max()
print("largest difference", f"{difference:.0e}")
assert difference < 1e-5

# %% [markdown]
# The wrapper, the split and the fused form compute the same function of `x`, so their derivatives agree, too.


# %%
def of_wrapper(x):
    return (wrapper.apply({"params": wrapper_params}, x) @ mixing).sum()


def of_fused(x):
    return fused.apply({"params": fused_params}, x).sum()


assert abs(jax.jit(jax.grad(of_wrapper))(x) - jax.jit(jax.grad(of_fused))(x)).max() < 1e-5

# %% [markdown]
# They differ in the number of operations. `jax.make_jaxpr` returns a function as a list of operations; we count the
# matrix products in it. A few large products use a GPU or TPU better than many small ones.

# %%
products = {}
for name, layer, params in [
    ("wrapper", wrapper, wrapper_params),
    ("split", split, split_params),
    ("fused", FusedMultiHeadAttention(width, n_heads, implementation="explicit"), fused_params),
]:
    program = jax.make_jaxpr(lambda x, layer=layer, params=params: layer.apply({"params": params}, x))(x)
    products[name] = str(program).count("dot_general[")

print(products)
assert products == {"wrapper": 20, "split": 6, "fused": 4}

# %% [markdown]
# Four heads: 4 × (3 projections, scores, context) = 20. Split: 3 projections, scores, context and `out_proj` = 6.
# Fused: 1 + 2 + 1 = 4.
#
# ## What do heads attend to?
#
# A head learns what to look for in training. We give a small GPT a task in which we know the right positions to attend
# to. A sequence is 8 random letters, then the same letters backwards, then forwards again.

# %%
N, LETTERS = 8, 16


def make_batch(key, rows=64):
    letters = jax.random.randint(key, (rows, N), 0, LETTERS)
    return jnp.concatenate([letters, letters[:, ::-1], letters], axis=1)


print("".join(chr(97 + int(i)) for i in make_batch(jax.random.key(0))[0]))

# %% [markdown]
# The first 8 letters cannot be predicted, so the loss counts only the other 16. The model has one block with four
# heads. The training step is a short jitted function; notebook 10 explains such a loop in detail.

# %%
cfg = slm_jax.GPTConfig(vocab_size=LETTERS, context_length=3 * N, emb_dim=32, n_heads=4, n_layers=1)
model = slm_jax.GPTModel(cfg)
optimizer = optax.adam(1e-2)


def score(logits, tokens):
    """Return loss and accuracy on the predictable letters."""
    logits, targets = logits[:, N - 1 : -1], tokens[:, N:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(), (logits.argmax(-1) == targets).mean()


@jax.jit
def train_step(params, state, key):
    tokens = make_batch(key)

    def loss(params):
        return score(model.apply({"params": params}, tokens), tokens)[0]

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


test = make_batch(jax.random.key(1000))  # training uses the keys 0 to 299, so it never sees these
untrained = jax.jit(model.init)(jax.random.key(0), test)["params"]

# %%
params, state = untrained, optimizer.init(untrained)
for step in range(300):
    params, state = train_step(params, state, jax.random.key(step))

NAME = "blocks/0/attn/weights"
logits, seen = slm_jax.capture(model, params, test, NAME)
_, seen_before = slm_jax.capture(model, untrained, test, NAME)
accuracy = score(logits, test)[1]
print(f"accuracy on new sequences: {accuracy:.0%}, by chance {1 / LETTERS:.0%}")
assert accuracy > 0.95

# %% [markdown]
# [`slm_jax.capture`](../slm_jax/evaluation/capture.py) runs the model and also returns intermediate results by name:
# here the attention weights, (batch, heads, query, key). To predict letter $t + 1$, the backwards part must attend to
# letter $15 - (t + 1)$, and the last part to letter $t + 1 - 16$. Circles mark these positions; the model is not given
# them.

# %%
query = jnp.arange(N - 1, 3 * N - 1)  # the positions before the predictable letters
source = jnp.where(query + 1 < 2 * N, 2 * N - 2 - query, query + 1 - 2 * N)

fig, axes = plt.subplots(2, 4, figsize=(8, 4.7), layout="constrained", sharex=True, sharey=True)
for row, (when, captured) in enumerate([("before", seen_before), ("after", seen)]):
    for h in range(4):
        ax = axes[row, h]
        image = ax.imshow(captured[NAME][:, h].mean(0), vmin=0, vmax=1)
        ax.scatter(source, query, s=22, facecolors="none", edgecolors="tab:orange", linewidths=0.8)
        ax.set_title(f"head {h}, {when} training", fontsize=9)
        ax.set_xticks([0, 8, 16])
        ax.set_yticks([0, 8, 16])
fig.supxlabel("key position", fontsize=10)
fig.supylabel("query position", fontsize=10)
fig.colorbar(image, ax=axes, label="weight, mean of 64 sequences", shrink=0.8)
plt.show()

# %% [markdown]
# Before training, a head spreads its attention over all positions it may see. Afterwards the weight is on the circles:
# first along a diagonal to the lower left (backwards), then along one to the lower right (forwards). (In the last part
# there are two copies to choose from, the first and the backwards one.)

# %% tags=["varies"]
on_circles = seen[NAME][:, :, query, source].mean((0, 2))
before = seen_before[NAME][:, :, query, source].mean((0, 2))
print("weight on the circles, by head, before:", before)
print("                                after: ", on_circles)
assert on_circles.mean() > 0.5 > 0.2 > before.mean()

# %% [markdown]
# All four heads learned the same pattern. Heads differ only through their initial values and what the loss rewards, and
# this task needs only one position at a time. In language models, heads do differ: some attend to the previous token,
# some to earlier copies of a word, some to the first token. The [attention explorer](attention_explorer.py) plots the
# heads of any model.
#
# ## Does a head matter?
#
# A plot shows where a head attends, not whether the model needs it.
# [`slm_jax.ablate`](../slm_jax/evaluation/capture.py) runs the model with a head's output set to 0. We remove each
# head, then all but one, then all.

# %% tags=["varies"]
cases = {"none": []}
cases |= {f"head {h}": [h] for h in range(4)}
cases |= {f"all but head {h}": [g for g in range(4) if g != h] for h in range(4)}
cases |= {"all": [0, 1, 2, 3]}

accuracies = {}
for name, removed in cases.items():
    names = [f"blocks/0/attn/heads/{h}" for h in removed]
    accuracies[name] = float(score(slm_jax.ablate(model, params, test, names), test)[1])
    print(f"removed: {name:<15} accuracy {accuracies[name]:.0%}")

# %% [markdown]
# Without any head, a position only knows its own letter. Two of the 16 letters repeat the one before them (where a copy
# begins, as in `abc` `cba`); the other 14 can only be guessed: $(2 + 14/16)/16$, about 18%.

# %%
blind = (2 + 14 / LETTERS) / 16
assert accuracies["none"] > 0.95
assert abs(accuracies["all"] - blind) < 0.1
assert accuracies["all"] < min(accuracies[f"head {h}"] for h in range(4))

fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
ax.barh(list(accuracies), list(accuracies.values()), color="tab:blue")
ax.axvline(blind, color="tab:orange", linestyle="--", label="without attention, 18%")
ax.set_xlabel("accuracy")
ax.set_ylabel("removed")
ax.set_xlim(0, 1)
ax.invert_yaxis()
fig.legend(loc="outside upper right", fontsize=9)
plt.show()

# %% [markdown]
# A head that can be removed is not a head that does nothing: here the other heads do the same. To find out which heads
# matter, also remove several together.
#
# ## Exercises
#
# **1.** Show that the heads are independent before `out_proj`: change head 2's value matrix, and find which numbers of
# the wrapper's output change.
#
# <details><summary>Solution</summary>
#
# ```python
# changed = {**wrapper_params, "heads_2": {**wrapper_params["heads_2"], "value": {"kernel": 2 * heads[2][2]}}}
# differs = (wrapper.apply({"params": changed}, x) != side).any((0, 1))
# print(differs.reshape(n_heads, head_dim).astype(int))
# assert differs[16:24].all()
# assert not differs[:16].any() and not differs[24:].any()
# ```
#
# Only the 8 numbers of head 2 change. After `out_proj` all 32 would.
# </details>
#
# **2.** Go the other way: convert the fused layer's kernels into the wrapper's four dicts.
#
# <details><summary>Solution</summary>
#
# ```python
# back = {
#     f"heads_{h}": {role: {"kernel": fused_params[role[0]]["kernel"][:, h]} for role in roles} for h in range(n_heads)
# }
# assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), back, wrapper_params))
# ```
#
# The conversion only rearranges numbers and computes nothing, so the inverse is exact.
# </details>
#
# **3.** How many parameters does the fused layer have with 1, 2, 4, 8 and 16 heads? `jax.eval_shape` returns the shapes
# of a function's result without computing it.
#
# <details><summary>Solution</summary>
#
# ```python
# counts = []
# for n in (1, 2, 4, 8, 16):
#     tree = jax.eval_shape(FusedMultiHeadAttention(width, n).init, jax.random.key(0), x)
#     counts.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))
# print(counts)
# assert set(counts) == {4 * width**2 + width}
# ```
#
# Always the same number: more heads are narrower heads. The choice is between many narrow heads and a few wide ones.
# </details>

# %% [markdown]
# ## Key takeaways
#
# - Multi-head attention is several causal attentions on the same input, concatenated and mixed by `out_proj`.
# - Side by side, split and fused are the same function: concatenating matrices converts the parameters of one form into
#   the next.
# - Heads learn where to attend from the loss alone. `capture` shows where, `ablate` whether it matters.
#
# Next: [implementing GPT-2](06_gpt2_parts.py).
