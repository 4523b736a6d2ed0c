# %% [markdown]
# # Attention explorer
#
# What do the heads of a model attend to, and which of them does it need? Set a model and a text in the next cell, and
# run all cells. The model may be one of your runs, GPT-2, or any weights that slm_jax reads. With `MODEL = None` a tiny
# model is trained here; then the notebook takes about 20 seconds on two CPU cores.
#
# Prerequisite: [multi-head attention](05_multi_head_attention.py).

# %%
MODEL = None  # or "../runs/tiny", "../runs/tiny@800", "gpt2", "path/to/weights", relative to this folder
TEXT = "notebook koobeton notebook"  # for the tiny model: a word of 8 letters, reversed, and repeated

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import MaxNLocator

import slm_jax
from slm_jax.tokenizer import CharTokenizer

jnp.set_printoptions(precision=2, suppress=True)

# %% [markdown]
# ## A tiny model, if no other is set
#
# Its texts are random: 8 letters, the same reversed, and the same again. Everything after the first word can be
# predicted by attending to the right position; the first word cannot, so the loss cannot fall below $7 \ln 26 / 25$,
# about 0.91. Notebook 5 examines such a model.

# %%
alphabet = CharTokenizer().build_vocab("abcdefghijklmnopqrstuvwxyz ")
SPACE = alphabet.encode(" ")[0]
cfg = slm_jax.GPTConfig(vocab_size=alphabet.vocab_size, context_length=32, emb_dim=64, n_heads=4, n_layers=2)
tiny = slm_jax.GPTModel(cfg)
optimizer = optax.adam(5e-3)


def three_words(key, rows=32):
    word = jax.random.randint(key, (rows, 8), SPACE + 1, SPACE + 27)
    space = jnp.full((rows, 1), SPACE)
    return jnp.concatenate([word, space, word[:, ::-1], space, word], axis=1)


def losses(logits, tokens):
    """Return the loss of each token except the first, (batch, seq - 1): minus the log of its probability."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


@jax.jit
def train_step(params, state, key):
    def loss(params):
        tokens = three_words(key)
        return losses(tiny.apply({"params": params}, tokens), tokens).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


# %% [markdown]
# The trained model is saved to a folder in Hugging Face's format, with its tokenizer, and loaded from there like any
# other model.

# %%
folder = Path("explorer-model")
if MODEL is None and not folder.exists():
    params = jax.jit(tiny.init)(jax.random.key(0), three_words(jax.random.key(0)))["params"]
    state = optimizer.init(params)
    for step in range(300):
        params, state, loss = train_step(params, state, jax.random.key(step))
    assert loss < 1.5, "the tiny model has not learned its task"
    slm_jax.save_gpt2(cfg, params, folder, tokenizer=alphabet)

run = slm_jax.load_model(MODEL or folder)
model = slm_jax.GPTModel(run.model_config)
n_layers, n_heads = run.model_config.n_layers, run.model_config.n_heads
print(f"{n_layers} layers of {n_heads} heads, context {run.model_config.context_length}")

# %% [markdown]
# ## The text, as the model sees it
#
# Spaces are shown as dots.

# %%
ids = run.tokenizer.encode(TEXT)[: run.model_config.context_length]
assert len(ids) >= 2, "the text is too short: expected at least two tokens"
tokens = jnp.array([ids])
seq = len(ids)


def label(token):
    text = run.tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎")
    return text.replace("$", r"\$")  # otherwise matplotlib reads it as a formula


labels = [label(token) for token in ids]
print(seq, "tokens:", *labels)

# %% [markdown]
# ## All weights
#
# [`slm_jax.capture`](../slm_jax/evaluation/capture.py) runs the model once and returns the requested intermediate
# results by name; `*` stands for every block. `attention[layer, head, t, s]` is the weight with which token $t$ attends
# to token $s$: rows sum to 1, and future tokens have 0.

# %%
logits, seen = slm_jax.capture(model, run.params, tokens, "blocks/*/attn/weights")
attention = np.stack([np.asarray(weights[0], np.float32) for weights in seen.values()])

assert attention.shape == (n_layers, n_heads, seq, seq)
assert np.allclose(attention.sum(-1), 1, atol=0.02)  # the device's dtype may be 16-bit
assert (np.triu(attention, 1) == 0).all()

loss = float(losses(logits, tokens).mean())
print(f"loss of this text: {loss:.2f} nats per token")

# %% [markdown]
# ## One head
#
# Layers and heads are counted from 0. Change the two numbers and run the cell again.


# %%
def show(layer, head):
    size = min(8, 2.5 + 0.16 * seq)
    fig, ax = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = ax.imshow(attention[layer, head], vmin=0, vmax=1)
    fontsize = max(3, min(9, 250 / seq))
    ax.set_xticks(range(seq), labels, fontsize=fontsize, rotation=90 if max(map(len, labels)) > 2 else 0)
    ax.set_yticks(range(seq), labels, fontsize=fontsize)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(f"layer {layer}, head {head}")
    fig.colorbar(image, ax=ax, label="weight", shrink=0.8)
    plt.show()


show(layer=0, head=0)

# %% [markdown]
# ## All heads
#
# There is one row per layer. What to look for: a line parallel to the diagonal is a head that attends to a fixed
# distance back; a bright first column is an inactive head (unused attention often goes to the first token); single
# bright cells are tokens that a head selects. In the tiny model, look for two slanted lines, one backwards through the
# first word and one forwards.

# %%
fig, axes = plt.subplots(
    n_layers, n_heads, figsize=(8, 0.4 + 8 * n_layers / n_heads), squeeze=False, layout="constrained"
)
for layer in range(n_layers):
    for head in range(n_heads):
        ax = axes[layer, head]
        ax.imshow(attention[layer, head] ** 0.5, vmin=0, vmax=1)  # the root makes small weights visible
        ax.set_xticks([])
        ax.set_yticks([])
        if layer == 0:
            ax.set_title(f"head {head}", fontsize=9)
    axes[layer, 0].set_ylabel(f"layer {layer}", fontsize=9)
plt.show()

# %% [markdown]
# ## The average of each layer

# %%
columns = min(n_layers, 4)
rows = -(-n_layers // columns)
fig, axes = plt.subplots(
    rows, columns, figsize=(1 + 3.4 * min(columns, 2), 0.4 + 3.2 * rows), squeeze=False, layout="constrained"
)
for layer, ax in enumerate(axes.flat):
    ax.set_visible(layer < n_layers)
    if layer < n_layers:
        ax.imshow(attention[layer].mean(0) ** 0.5, vmin=0, vmax=1)
        ax.set_title(f"layer {layer}, mean", fontsize=9)
        ax.set_xlabel("position looked at", fontsize=8)
        ax.set_ylabel("position that looks", fontsize=8)
plt.show()

# %% [markdown]
# ## Statistics of the heads
#
# How much of its attention does a head give to the token itself, the previous token, the first token, and earlier
# copies of the token, and over how many tokens does it spread? The last is $2^H$, with $H$ the entropy in bits: 1 means
# a single token, 10 is equivalent to ten tokens with equal weights.

# %%
same = np.tril(np.equal.outer(ids, ids), -1)  # same[t, s]: s is before t and the same token
spread = 2 ** -(attention * np.log2(np.maximum(attention, 1e-9))).sum(-1)
statistics = {
    "itself": np.diagonal(attention, 0, 2, 3).mean(-1),
    "previous token": np.diagonal(attention, -1, 2, 3).mean(-1),
    "first token": attention[..., 1:, 0].mean(-1),
    "earlier copies": (attention * same).sum((-2, -1)) / max(1, same.any(-1).sum()),
    "spread over": spread.mean(-1),
}

# %%
fig, axes = plt.subplots(1, 5, figsize=(8, max(2.2, 0.22 * n_layers)), layout="constrained", sharey=True)
for ax, (what, value) in zip(axes, statistics.items(), strict=True):
    image = ax.imshow(value, vmin=0, vmax=None if what == "spread over" else 1, aspect="auto", cmap="cividis")
    ax.set_title(what, fontsize=9)
    ax.set_xlabel("head", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    fig.colorbar(image, ax=ax, orientation="horizontal").ax.tick_params(labelsize=7)
axes[0].set_ylabel("layer", fontsize=8)
plt.show()

# %% [markdown]
# ## The largest weights of a head
#
# For each token, the two tokens with the largest weights:


# %% tags=["sampled"]
def most(layer, head, first=0, last=12, count=2):
    for t in range(first, min(last, seq)):
        best = np.argsort(-attention[layer, head, t, : t + 1])[:count]
        targets = "   ".join(f"{labels[s]} ({s}) {attention[layer, head, t, s]:.2f}" for s in best)
        print(f"{labels[t]:>8} ({t:>2}) attends to   {targets}")


most(layer=0, head=0, first=seq // 2, last=seq // 2 + 8)

# %% [markdown]
# ## One token, all heads
#
# This plot shows what one token attends to in every head; by default it is the second to last token.


# %%
def from_token(t):
    fig, ax = plt.subplots(figsize=(8, min(8, 1.4 + 0.2 * n_layers * n_heads)), layout="constrained")
    image = ax.imshow(attention[:, :, t, : t + 1].reshape(-1, t + 1), vmin=0, vmax=1, aspect="auto")
    names = [f"layer {layer}, head {head}" for layer in range(n_layers) for head in range(n_heads)]
    every = max(1, len(names) // 24)
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    ax.set_xticks(range(t + 1), labels[: t + 1], fontsize=8, rotation=90 if max(map(len, labels)) > 2 else 0)
    ax.set_title(f"attention of {labels[t]} ({t})", fontsize=10)
    fig.colorbar(image, ax=ax, label="weight")
    plt.show()


from_token(seq - 2)

# %% [markdown]
# ## Which heads does the model need?
#
# A weight shows where a head attends, not whether the model uses the result.
# [`slm_jax.ablate`](../slm_jax/evaluation/capture.py) runs the model with one head's output set to 0; we measure how
# much the loss of the text rises. This takes one run of the model per head: 144 for GPT-2 small.

# %% tags=["varies"]
without = np.zeros((n_layers, n_heads))
for layer in range(n_layers):
    for head in range(n_heads):
        changed = slm_jax.ablate(model, run.params, tokens, f"blocks/{layer}/attn/heads/{head}")
        without[layer, head] = losses(changed, tokens).mean()

rise = without - loss
for index in np.argsort(-rise, axis=None)[:5]:
    layer, head = np.unravel_index(index, rise.shape)
    print(f"without layer {layer}, head {head}: loss {loss:.2f} -> {without[layer, head]:.2f}")

# %%
most_changed = max(float(abs(rise).max()), 1e-3)
fig, ax = plt.subplots(figsize=(6, max(2.4, 0.3 * n_layers)), layout="constrained")
image = ax.imshow(rise, cmap="PuOr_r", vmin=-most_changed, vmax=most_changed, aspect="auto")
ax.set_xticks(range(n_heads))
ax.set_yticks(range(n_layers))
ax.set_xlabel("head removed")
ax.set_ylabel("layer")
fig.colorbar(image, ax=ax, label="increase of the loss")
plt.show()

# %% [markdown]
# If removing a head hardly changes the loss, another head may do the same job. So remove several together: here whole
# layers of attention, and all of it. `ablate` accepts a list of names, and `*` in them.

# %% tags=["varies"]
for name in [*(f"blocks/{layer}/attn" for layer in range(n_layers)), "blocks/*/attn"]:
    changed = losses(slm_jax.ablate(model, run.params, tokens, name), tokens).mean()
    print(f"without {name:<14} loss {loss:.2f} -> {changed:.2f}")

assert MODEL is not None or changed > loss + 1  # the tiny model cannot do without attention

# %% [markdown]
# ## Exercises
#
# **1.** What are the bounds of "spread over" for the token at position $t$, counted from 0? Predict them, then check
# all heads.
#
# <details><summary>Solution</summary>
#
# ```python
# assert (spread > 0.99).all()
# assert (spread < np.arange(1, seq + 1) + 0.01).all()
# ```
#
# At least 1, with all the weight on one token; at most $t + 1$, with equal weights on all visible tokens. So the first
# token always has 1, and the mean over a text of $n$ tokens is at most $(n + 1) / 2$.
#
# </details>
#
# **2.** The loss of the text is a mean. Which tokens can the tiny model predict, and which can it not? Look at the loss
# of each token.
#
# <details><summary>Solution</summary>
#
# ```python
# each = losses(logits, tokens)[0]  # of all tokens except the first
# print(np.round(np.asarray(each), 1))
# if MODEL is None and TEXT == "notebook koobeton notebook":
#     assert each[:7].mean() > 2 > 1 > each[7:].mean()
# ```
#
# The letters of the first word are random and cost about $\ln 26 = 3.3$ each or more. Everything after it is determined
# by the text before.
#
# </details>
#
# ## Key takeaways
#
# - `capture` returns the weights of every layer and head by name; the rest of this notebook is plotting.
# - Heads have typical patterns: the previous token, the first, earlier copies. Statistics find them faster than plots.
# - Where a head attends and whether the model needs it are two questions; `ablate` answers the second.
#
# Attention is one half of a block. The other half, and the rest of the model: [implementing GPT-2](06_gpt2_parts.py).
