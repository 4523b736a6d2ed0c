# %% [markdown]
# # 5. Multi-head attention
#
# One head of attention has one softmax for each token, so it has one unit of attention to give away. Several heads can
# look at several things at once. This notebook builds them three times: side by side, as one tensor cut into pieces,
# and fused into one matrix product. All three give the same numbers, and the parameters of one become those of the
# next in front of you. Then a small GPT is trained, and we look at what its heads look at.
#
# Before this: [causal attention](04_causal_attention.py). It runs in about 25 seconds on two CPU cores.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import slm_jax

jax.config.update("jax_default_matmul_precision", "highest")  # float32 in full also on a GPU or TPU
jnp.set_printoptions(precision=2, suppress=True)

# %% [markdown]
# ## Heads side by side
#
# The plainest way to have more than one head is to have more than one layer of causal attention, all with the same
# input and with matrices of their own, and to lay their outputs end to end. Here are four heads, each 8 numbers wide,
# over a batch of 2 sequences with 6 tokens of 32 numbers.

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
# parameters are a dict with a `CausalAttention` for each head. We fill that dict with our matrices.

# %%
from slm_jax.attention import FusedMultiHeadAttention, MultiHeadAttention, MultiHeadAttentionWrapper

wrapper = MultiHeadAttentionWrapper(width, head_dim, context_length=seq, drop_rate=0.0, n_heads=n_heads)
wrapper_params = {
    f"heads_{h}": {"query": {"kernel": q}, "key": {"kernel": k}, "value": {"kernel": v}}
    for h, (q, k, v) in enumerate(heads)
}
side = wrapper.apply({"params": wrapper_params}, x)
assert abs(side - expected).max() < 1e-5

# %% [markdown]
# ## The split: one wide matrix for each role
#
# Four products `x @ W_query` of 8 columns each are one product with the four matrices side by side, 32 columns wide:
# a column of the result depends on one column of the matrix only. So we multiply once, and then cut the result into
# heads.

# %%
roles = ("query", "key", "value")
wide = {
    role: jnp.concatenate([wrapper_params[f"heads_{h}"][role]["kernel"] for h in range(n_heads)], axis=1)
    for role in roles
}

pieces = (x @ wide["query"]).reshape(batch, seq, n_heads, head_dim)  # cut the last axis: 32 = 4 heads of 8
for h in range(n_heads):
    assert jnp.allclose(pieces[:, :, h], x @ heads[h][0], atol=1e-5)
print("wide matrix", wide["query"].shape, " result cut into heads", pieces.shape)

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
# With a head axis in place, one `einsum` computes the scores of all heads. Read its letters as axes: `bqhd` are the
# queries (batch, query, head, dimension), `bkhd` the keys; `d` is missing in the result, so it is summed over.


# %%
def split_heads(x, wide):
    q, k, v = (pieces_of(x @ wide[role]) for role in roles)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = ~jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool))
    weights = jax.nn.softmax(jnp.where(future, -jnp.inf, scores), axis=-1)
    context = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return context.reshape(x.shape)  # heads end to end again


def pieces_of(projected):
    return projected.reshape(batch, seq, n_heads, head_dim)


print("largest difference", f"{abs(split_heads(x, wide) - expected).max():.0e}")
assert abs(split_heads(x, wide) - expected).max() < 1e-5

# %% [markdown]
# ## The output projection
#
# So far the first 8 numbers of an output come from head 0 and from nowhere else. A last matrix, `out_proj`, mixes the
# heads. The wrapper has none, so to compare we give the library's `MultiHeadAttention` one that changes nothing: the
# identity matrix and a bias of zeros.

# %%
split = MultiHeadAttention(width, width, context_length=seq, drop_rate=0.0, n_heads=n_heads)
split_params = {role: {"kernel": wide[role]} for role in roles}
split_params["out_proj"] = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}

assert abs(split.apply({"params": split_params}, x) - side).max() < 1e-5

# %% [markdown]
# From here on `out_proj` is a real one, random, as it is before training.

# %%
mixing = jax.random.normal(jax.random.key(2), (width, width)) / math.sqrt(width)
split_params["out_proj"] = {"kernel": mixing, "bias": jnp.zeros(width)}
mixed = split.apply({"params": split_params}, x)
assert abs(mixed - side @ mixing).max() < 1e-5

# %% [markdown]
# ## The fused form
#
# The same step once more: query, key and value matrices side by side are one matrix of 96 columns. One product then
# gives all queries, all keys and all values. This is the layer that the library's GPT is made of, and the layout in
# which GPT-2's weights are published.

# %%
fused = FusedMultiHeadAttention(width, n_heads)
fused_params = {
    "qkv": {"kernel": jnp.concatenate([split_params[role]["kernel"] for role in roles], axis=1)},
    "out_proj": split_params["out_proj"],
}
shapes = jax.tree.map(jnp.shape, fused.init(jax.random.key(0), x)["params"])
assert shapes == jax.tree.map(jnp.shape, fused_params)
print(shapes)

difference = abs(fused.apply({"params": fused_params}, x) - mixed).max()
print("largest difference", f"{difference:.0e}")
assert difference < 1e-5

# %% [markdown]
# The wrapper, the split and the fused form compute one function of `x`. If that is so, their derivatives agree, too.


# %%
def of_wrapper(x):
    return (wrapper.apply({"params": wrapper_params}, x) @ mixing).sum()


def of_fused(x):
    return fused.apply({"params": fused_params}, x).sum()


assert abs(jax.grad(of_wrapper)(x) - jax.grad(of_fused)(x)).max() < 1e-5

# %% [markdown]
# What changes is how much work is started. `jax.make_jaxpr` writes a function down as the list of operations that it
# is made of. We count the matrix products in it. Few large products keep a GPU or TPU busier than many small ones.

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
# ## What do heads look at?
#
# Nothing so far has told a head what to look for: training does. We give a small GPT a task in which we know where one
# has to look. A sequence is 8 random letters, then the same letters backwards, then forwards again.

# %%
N, LETTERS = 8, 16


def make_batch(key, rows=64):
    letters = jax.random.randint(key, (rows, N), 0, LETTERS)
    return jnp.concatenate([letters, letters[:, ::-1], letters], axis=1)


print("".join(chr(97 + int(i)) for i in make_batch(jax.random.key(0))[0]))

# %% [markdown]
# The first 8 letters cannot be predicted, so the loss counts the other 16. The model has one block with four heads.
# Training is a loop of four lines, jitted; notebook 10 takes such a loop apart.

# %%
cfg = slm_jax.GPTConfig(vocab_size=LETTERS, context_length=3 * N, emb_dim=32, n_heads=4, n_layers=1)
model = slm_jax.GPTModel(cfg)
optimizer = optax.adam(1e-2)


def score(logits, tokens):
    """Loss and accuracy of the letters that can be known."""
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
untrained = model.init(jax.random.key(0), test)["params"]

# %%
params, state = untrained, optimizer.init(untrained)
for step in range(300):
    params, state = train_step(params, state, jax.random.key(step))

NAME = "blocks/0/attn/weights"
logits, seen = slm_jax.capture(model, params, test, NAME)
_, seen_before = slm_jax.capture(model, untrained, test, NAME)
accuracy = score(logits, test)[1]
print(f"letters predicted right in new sequences: {accuracy:.0%}, by chance {1 / LETTERS:.0%}")
assert accuracy > 0.95

# %% [markdown]
# [`slm_jax.capture`](../slm_jax/evaluation/capture.py) runs the model and also returns what it computed on the way, by
# name: here the attention weights, (batch, heads, query, key). To predict letter $t + 1$, the backwards part has to
# look at letter $15 - (t + 1)$, and the last part at letter $t + 1 - 16$. Circles mark these places; nobody told the
# model.

# %%
query = jnp.arange(N - 1, 3 * N - 1)  # who looks: the positions before the letters that can be known
look_at = jnp.where(query + 1 < 2 * N, 2 * N - 2 - query, query + 1 - 2 * N)

fig, axes = plt.subplots(2, 4, figsize=(8, 4.7), layout="constrained", sharex=True, sharey=True)
for row, (when, captured) in enumerate([("before", seen_before), ("after", seen)]):
    for h in range(4):
        ax = axes[row, h]
        image = ax.imshow(captured[NAME][:, h].mean(0), vmin=0, vmax=1)
        ax.scatter(look_at, query, s=22, facecolors="none", edgecolors="tab:orange", linewidths=0.8)
        ax.set_title(f"head {h}, {when} training", fontsize=9)
        ax.set_xticks([0, 8, 16])
        ax.set_yticks([0, 8, 16])
fig.supxlabel("position looked at", fontsize=10)
fig.supylabel("position that looks", fontsize=10)
fig.colorbar(image, ax=axes, label="weight, mean of 64 sequences", shrink=0.8)
plt.show()

# %% [markdown]
# Before training a head spreads its unit over everything it may see. Afterwards the weight lies on the circles: a line
# to the left and down, letter by letter backwards, and then a line to the right and down, forwards. (For the last part
# there are two copies to choose from, the first and the backwards one.)

# %% tags=["varies"]
on_circles = seen[NAME][:, :, query, look_at].mean((0, 2))
before = seen_before[NAME][:, :, query, look_at].mean((0, 2))
print("weight on the circles, by head, before:", before)
print("                                after: ", on_circles)
assert on_circles.mean() > 0.5 > 0.2 > before.mean()

# %% [markdown]
# All four heads learned the same look. Nothing makes heads differ but where they start and what the loss asks, and
# this task asks for one look at a time. In models of language heads do differ: some follow the previous token, some
# earlier copies of a word, some the first token of all. The [attention explorer](attention_explorer.py) draws the
# heads of any model.
#
# ## Does a head matter?
#
# A picture shows where a head looks, not whether the model needs it.
# [`slm_jax.ablate`](../slm_jax/evaluation/capture.py) runs the model without a head: its output is set to 0. We take
# out each head, then all but one, then all.

# %% tags=["varies"]
taken_out = {"none": []}
taken_out |= {f"head {h}": [h] for h in range(4)}
taken_out |= {f"all but head {h}": [g for g in range(4) if g != h] for h in range(4)}
taken_out |= {"all": [0, 1, 2, 3]}

right = {}
for what, gone in taken_out.items():
    names = [f"blocks/0/attn/heads/{h}" for h in gone]
    right[what] = float(score(slm_jax.ablate(model, params, test, names), test)[1])
    print(f"taken out: {what:<15} {right[what]:.0%} right")

# %% [markdown]
# Without any head a position knows only its own letter. Two of the 16 letters repeat the one before them (where a copy
# begins, as in `abc` `cba`), the other 14 can only be guessed: $(2 + 14/16)/16$, about 18%.

# %%
blind = (2 + 14 / LETTERS) / 16
assert right["none"] > 0.95
assert abs(right["all"] - blind) < 0.1
assert right["all"] < min(right[f"head {h}"] for h in range(4))

fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
ax.barh(list(right), list(right.values()), color="tab:blue")
ax.axvline(blind, color="tab:orange", linestyle="--", label="without attention, 18%")
ax.set_xlabel("letters predicted right")
ax.set_ylabel("taken out")
ax.set_xlim(0, 1)
ax.invert_yaxis()
fig.legend(loc="outside upper right", fontsize=9)
plt.show()

# %% [markdown]
# A head that can be taken out is not a head that does nothing: here the others do the same. To know what heads matter,
# take them out together, too.
#
# ## Exercises
#
# **1.** Show that the heads know nothing of each other before `out_proj`: change head 2's value matrix, and find which
# numbers of the wrapper's output move.
#
# <details><summary>Solution</summary>
#
# ```python
# changed = {**wrapper_params, "heads_2": {**wrapper_params["heads_2"], "value": {"kernel": 2 * heads[2][2]}}}
# moved = (wrapper.apply({"params": changed}, x) != side).any((0, 1))
# print(moved.reshape(n_heads, head_dim).astype(int))
# assert moved[16:24].all()
# assert not moved[:16].any() and not moved[24:].any()
# ```
#
# Only the 8 numbers of head 2 move. After `out_proj` all 32 would.
# </details>
#
# **2.** Go the other way: cut the fused layer's matrix into the wrapper's four dicts.
#
# <details><summary>Solution</summary>
#
# ```python
# cut = fused_params["qkv"]["kernel"].reshape(width, 3, n_heads, head_dim)  # role, then head, then column
# back = {
#     f"heads_{h}": {role: {"kernel": cut[:, r, h]} for r, role in enumerate(roles)} for h in range(n_heads)
# }
# assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), back, wrapper_params))
# ```
#
# Nothing was computed on the way there, numbers were only laid side by side, so the way back is exact.
# </details>
#
# **3.** How many parameters does the fused layer have with 1, 2, 4, 8 and 16 heads? `jax.eval_shape` tells the shapes
# of what a function returns without computing it.
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
# Always the same: more heads are narrower heads. The choice is between many narrow looks and few wide ones.
# </details>

# %% [markdown]
# ## What to take along
#
# - Multi-head attention is several causal attentions on the same input, laid end to end and mixed by `out_proj`.
# - Side by side, split and fused are one function: concatenating matrices turns the parameters of one into the next.
# - Heads learn where to look from the loss alone. `capture` shows where, `ablate` whether it matters.
#
# Next: [implementing GPT-2](06_gpt2_parts.py).
