# %% [markdown]
# # 7. The transformer block
#
# Notebooks 4 to 6 built the parts: multi-head causal attention, layer normalisation, the GELU feed-forward network, and
# shortcuts. Here they become one block, the unit that a GPT-2 repeats 12 to 48 times. You write it as a plain function,
# check it against the library's, and then compare two designs: should the layer norm come before each part, or after
# it? The notebook runs in about 25 seconds on two CPU cores.

# %%
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from slm_jax.model import TransformerBlock, get_gpt_config
from slm_jax.tokenizer import CharTokenizer

jax.config.update("jax_default_matmul_precision", "highest")  # full float32 precision on GPUs and TPUs too
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"  # colour-blind safe

# %% [markdown]
# ## The parameters of a block
#
# The library's block is a Flax module. `init` creates its parameters from a random key and an example input; what is
# `None` is for generation, rotary positions and packed documents, and `deterministic` turns dropout off. The parameters
# are a dict of dicts whose names show the parts of the block: two norms, attention, feed-forward.

# %%
cfg = get_gpt_config("tiny", n_layers=1, emb_dim=64, n_heads=4, context_length=32)
library_block = TransformerBlock(cfg)
x = jax.random.normal(jax.random.key(0), (2, 10, cfg.emb_dim))  # (batch, seq, emb)
plain = {"cache": None, "start": None, "angles": None, "segment_ids": None, "deterministic": True}
params = jax.jit(lambda key, x: library_block.init(key, x, **plain))(jax.random.key(1), x)["params"]
for name, part in params.items():
    print(f"{name:<6}", jax.tree.map(jnp.shape, part))

# %% [markdown]
# A new norm has scale 1 and bias 0, and new biases are 0, so a mistake with one of them would not be noticed. So we add
# noise to all parameters before we compare.


# %%
@jax.jit
def add_noise(params, key):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))  # different noise for each leaf
    noisy = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


params = add_noise(params, jax.random.key(2))

# %% [markdown]
# ## The parts, as plain functions
#
# These are the results of notebooks 5 and 6 in a few lines each. Every function takes its part of the parameters, `p`,
# and a batch of sequences `x` of shape (batch, seq, emb); none has any state.


# %%
def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def feed_forward(p, x):
    return dense(p["proj"], jax.nn.gelu(dense(p["fc"], x)))  # emb -> 4 emb -> emb; GELU in its tanh form


# %% [markdown]
# Attention uses the layout of the library's layer in notebook 5: three kernels with an axis for the heads (`btd` is
# batch, token, feature; `dhe` feature, head, entry of a head); each head averages the values of the current and earlier
# tokens; a last matrix mixes the heads.


# %%
def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]["kernel"]) + p[name]["bias"] for name in "qkv")
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    context = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores, axis=-1), v)
    return jnp.einsum("bthe,hed->btd", context, p["out_proj"]["kernel"]) + p["out_proj"]["bias"]


# %% [markdown]
# ## The block
#
# The block has two steps, each adding the output of a part, applied to a normalised copy of the stream:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}_1(x)) \qquad x \leftarrow x + \mathrm{ff}(\mathrm{norm}_2(x))$$
#
# Attention moves information between tokens; the feed-forward part processes each token separately.


# %%
def pre_norm_block(p, x):
    x = x + attention(p["attn"], layer_norm(p["norm1"], x))
    return x + feed_forward(p["ff"], layer_norm(p["norm2"], x))


ours = pre_norm_block(params, x)
theirs, _ = library_block.apply({"params": params}, x, **plain)
difference = jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()
assert ours.shape == x.shape
assert difference < 1e-5
print("shape in and out:", ours.shape, f"  relative difference below 1e-5: {difference < 1e-5}")

# %% [markdown]
# In the library this is `TransformerBlock` in [`slm_jax/model.py`](../slm_jax/model.py). It adds dropout on both
# branches, the cache of notebook 8, and the choice of a fast attention kernel. Input and output have the same shape, so
# any number of blocks can be stacked.
#
# ## Pre-norm and post-norm
#
# On the left is the block above, as in GPT-2: the norms are inside the branches, and the grey line, the *residual
# stream*, runs from bottom to top with only additions on it. On the right is the order of the original transformer
# (Vaswani et al., 2017): the norms are on the stream itself.


# %%
def draw(axis, title, parts):
    """Draw boxes from bottom to top; those of branches are drawn beside the stream."""
    axis.annotate("", (0, len(parts) + 0.7), (0, -0.6), arrowprops={"arrowstyle": "->", "color": GREY, "lw": 3})
    for height, (text, colour, on_stream) in enumerate(parts):
        x = 0 if on_stream else 1.5
        box = {"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": "none"}
        axis.text(x, height, text, ha="center", va="center", color="white", bbox=box, fontsize=11)
    for height, (text, _, on_stream) in enumerate(parts):
        if not on_stream and (height == 0 or parts[height - 1][2]):  # a branch leaves the stream below its first box
            axis.plot([0, 1.5, 1.5], [height - 0.5, height - 0.5, height - 0.25], color=GREY, lw=1.5, zorder=0)
        if not on_stream and height > 0 and not parts[height - 1][2]:
            axis.plot([1.5, 1.5], [height - 0.75, height - 0.25], color=GREY, lw=1.5, zorder=0)
        if text == "+":  # and returns to it
            axis.plot([1.5, 1.5, 0], [height - 0.75, height, height], color=GREY, lw=1.5, zorder=0)
    axis.set(title=title, xlim=(-1.2, 2.6), ylim=(-0.9, len(parts) + 0.9))
    axis.axis("off")


norm1, norm2 = ("norm 1", GREEN), ("norm 2", GREEN)
attn, ff, plus = ("attention", BLUE, False), ("feed-forward", BLUE, False), ("+", ORANGE, True)
figure, axes = plt.subplots(1, 2, figsize=(7, 5))
draw(axes[0], "pre-norm: GPT-2", [(*norm1, False), attn, plus, (*norm2, False), ff, plus])
draw(axes[1], "post-norm: 2017", [attn, plus, (*norm1, True), ff, plus, (*norm2, True)])
plt.tight_layout()
plt.show()

# %% [markdown]
# As functions they differ only in the position of the norms, and they have the same parameters:


# %%
def post_norm_block(p, x):
    x = layer_norm(p["norm1"], x + attention(p["attn"], x))
    return layer_norm(p["norm2"], x + feed_forward(p["ff"], x))


assert jnp.abs(post_norm_block(params, x) - pre_norm_block(params, x)).max() > 0.1
sizes = [float(jnp.abs(block(params, 100 * x)).mean()) for block in (pre_norm_block, post_norm_block)]
print(f"mean |output| for an input with mean |x| = 80: pre-norm {sizes[0]:.0f}, post-norm {sizes[1]:.1f}")

# %% [markdown]
# Pre-norm keeps the size of the stream; post-norm brings it back to size 1 after each part, whatever the input. That
# sounds tidy, but the gradient then has to pass back through every one of those norms.
#
# ## A small model for the comparison
#
# The model has eight blocks of width 32, reads 16 letters and predicts the next one. `init_block` draws every matrix
# with standard deviation $1/\sqrt{\text{inputs}}$, which preserves the scale of the activations. `vmap` calls it for
# eight keys at once and stacks the results along a first axis, as the library does with its blocks.

# %%
EMB, HEADS, LAYERS, CONTEXT = 32, 4, 8, 16


def init_dense(key, n_in, n_out):
    return {"kernel": jax.random.normal(key, (n_in, n_out)) / math.sqrt(n_in), "bias": jnp.zeros(n_out)}


def init_block(key):
    keys = jax.random.split(key, 6)
    norm = {"scale": jnp.ones(EMB), "bias": jnp.zeros(EMB)}
    square = [init_dense(key, EMB, EMB) for key in keys[:4]]
    q, k, v = (jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-1], HEADS, -1), p) for p in square[:3])
    out_proj = {"kernel": square[3]["kernel"].reshape(HEADS, -1, EMB), "bias": square[3]["bias"]}
    ff = {"fc": init_dense(keys[4], EMB, 4 * EMB), "proj": init_dense(keys[5], 4 * EMB, EMB)}
    return {"norm1": norm, "attn": {"q": q, "k": k, "v": v, "out_proj": out_proj}, "norm2": norm, "ff": ff}


def init_model(key, vocab_size, n_layers=LAYERS):
    keys = jax.random.split(key, 4)
    return {
        "tok_emb": 0.3 * jax.random.normal(keys[0], (vocab_size, EMB)),
        "pos_emb": 0.1 * jax.random.normal(keys[1], (CONTEXT, EMB)),
        "blocks": jax.vmap(init_block)(jax.random.split(keys[2], n_layers)),
        "final_norm": {"scale": jnp.ones(EMB), "bias": jnp.zeros(EMB)},
        "head": jax.random.normal(keys[3], (EMB, vocab_size)) / math.sqrt(EMB),
    }


# %% [markdown]
# `jax.lax.scan` applies one block's code along the stacked parameters, so the block is compiled once and not eight
# times. A pre-norm model needs one more norm after its last block, because nothing has normalised the stream before.
# Both models get it, so that they differ only in the block.


# %%
def loss(params, batch, block):
    inputs, targets = batch[:, :-1], batch[:, 1:]
    x = params["tok_emb"][inputs] + params["pos_emb"]
    x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])
    logits = layer_norm(params["final_norm"], x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


# %% [markdown]
# The text is the 240 short reviews of notebook 11a, tokenized into characters. All runs see the same batches in the
# same order.

# %%
with open("data/sentiment.jsonl", encoding="utf-8") as file:
    text = "\n".join(json.loads(line)["text"] for line in file)
tokenizer = CharTokenizer().build_vocab(text)
ids = np.array(tokenizer.encode(text))
STEPS, BATCH = 100, 16
starts = np.random.default_rng(0).integers(0, len(ids) - CONTEXT - 1, (STEPS, BATCH, 1))
batches = jnp.asarray(ids[starts + np.arange(CONTEXT + 1)])
print(f"{len(ids):,} characters, {tokenizer.vocab_size} distinct; batches: {batches.shape}")

# %% [markdown]
# ## A short training
#
# We use Adam with a constant learning rate: no warmup, no clipping. `train` does all steps in one compiled program with
# `jax.lax.scan`, and records at every step the loss and the gradient norm of each block: the root of the sum of squares
# over all its parameters. The program is compiled once for each kind of block, because the block is a *static*
# argument, part of the program and not of the data.

# %%
adam = optax.scale_by_adam()
constant = jnp.full(STEPS, 3e-3)


def norm_by_block(gradients):
    squares = [jnp.square(leaf).reshape(len(leaf), -1).sum(axis=1) for leaf in jax.tree.leaves(gradients["blocks"])]
    return jnp.sqrt(sum(squares))


@partial(jax.jit, static_argnames="block")
def train(params, rates, block):
    """Train for one step per learning rate; return the losses, (steps,), and gradient norms, (steps, blocks)."""

    def step(state, batch_and_rate):
        (params, averages), (batch, rate) = state, batch_and_rate
        value, gradients = jax.value_and_grad(loss)(params, batch, block)
        directions, averages = adam.update(gradients, averages)
        params = jax.tree.map(lambda leaf, direction: leaf - rate * direction, params, directions)
        return (params, averages), (value, norm_by_block(gradients))

    return jax.lax.scan(step, (params, adam.init(params)), (batches, rates))[1]


new_model = jax.jit(init_model, static_argnums=(1, 2))
initial = [new_model(jax.random.key(seed), tokenizer.vocab_size) for seed in (0, 1, 2)]
blocks = {"pre-norm": (pre_norm_block, BLUE, "o"), "post-norm": (post_norm_block, ORANGE, "s")}
runs, first = {}, {}
for name, (block, _, _) in blocks.items():
    runs[name] = [jax.tree.map(np.asarray, train(params, constant, block)) for params in initial]
    first[name] = np.array([norms[0] for _, norms in runs[name]])  # (seeds, blocks)

# %% [markdown]
# ### Gradients at initialisation
#
# First we look at the gradients of the first step.

# %%
for name, norms in first.items():
    print(f"{name:<10} all blocks {np.linalg.norm(norms, axis=1).mean():.1f}, the last block {norms[:, -1].mean():.1f}")
assert first["post-norm"][:, -1].min() > 1.5 * first["pre-norm"][:, -1].max()

figure, axis = plt.subplots(figsize=(6.5, 3.8))
for name, (_, colour, marker) in blocks.items():
    for seed, values in enumerate(first[name]):
        axis.plot(range(1, LAYERS + 1), values, color=colour, marker=marker, label=name if seed == 0 else None)
axis.set(xlabel="block (8 is next to the output)", ylabel="gradient norm", ylim=(0, None))
axis.set_title("at initialisation, three seeds")
axis.legend()
plt.show()

# %% [markdown]
# In the pre-norm model the stream grows with every block, so later blocks contribute a smaller share of it, and their
# gradients are smaller. In the post-norm model every norm brings the stream back to size 1, so later blocks keep their
# influence: their gradients are larger than pre-norm's, in the last block two to three times as large.
#
# ### Loss

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
for name, (_, colour, _) in blocks.items():
    for seed, (losses, norms) in enumerate(runs[name]):
        for axis, values in zip(axes, (losses, np.linalg.norm(norms, axis=1)), strict=True):
            axis.plot(range(1, STEPS + 1), values, color=colour, lw=1.2, label=name if seed == 0 else None)
frequencies = np.bincount(ids) / len(ids)
UNIGRAM = -np.sum(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0]))
axes[0].axhline(UNIGRAM, color=GREY, ls="--", label="character frequencies alone")
axes[0].set(xlabel="step", ylabel="training loss (nats per character)", ylim=(2, 4.5))
axes[1].set(xlabel="step", ylabel="gradient norm of all blocks", ylim=(0, None))
axes[0].legend()
plt.tight_layout()
plt.show()
final = {name: [losses[-10:].mean() for losses, _ in of] for name, of in runs.items()}
for name, values in final.items():
    print(f"{name:<10} mean loss of the last ten steps, three seeds:", np.round(values, 2))
print(f"character frequencies alone: {UNIGRAM:.2f}")
assert max(final["pre-norm"]) < min(final["post-norm"]) - 0.3
assert all(abs(value - UNIGRAM) < 0.1 for value in final["post-norm"])

# %% [markdown]
# With pre-norm, all three seeds learn which characters follow which. With post-norm none does: the loss falls to the
# dashed line, the loss of a model that knows only character frequencies, and stays there. Data, initial parameters and
# learning rate are the same; only the position of two norms differs. The gradients (right) do not help: post-norm's are
# larger in the first steps, and then smaller than those of the model that learns.
#
# ## Limits of this experiment
#
# We measured one depth, one learning rate and one initialisation. The initialisation matters as much as the order. We
# repeat the experiment with the output matrices of the branches a tenth as large, which is the idea of GPT-2's
# initialisation: every block then starts close to the identity.


# %%
def quiet(params):
    """Return params with the output layers of the branches divided by 10."""
    blocks = params["blocks"]
    attn = {**blocks["attn"], "out_proj": jax.tree.map(lambda leaf: leaf / 10, blocks["attn"]["out_proj"])}
    ff = {**blocks["ff"], "proj": jax.tree.map(lambda leaf: leaf / 10, blocks["ff"]["proj"])}
    return {**params, "blocks": {**blocks, "attn": attn, "ff": ff}}


# %%
quiet_runs = {name: train(quiet(initial[0]), constant, block) for name, (block, _, _) in blocks.items()}
quiet_final = {name: float(losses[-10:].mean()) for name, (losses, _) in quiet_runs.items()}
print("loss with small branches:", {name: round(value, 2) for name, value in quiet_final.items()})
assert max(quiet_final.values()) < 2.6

# %% [markdown]
# Now both learn, and post-norm is no worse. So our result is: with eight blocks, standard initialisation and 100 steps
# of Adam at 0.003 without warmup, pre-norm learns and post-norm does not; at this depth, small initial branches fix it.
# This does not prove anything about large models, but it agrees with results for them (Xiong et al., 2020): post-norm
# needs careful initialisation and warmup, the more so the deeper the model, while pre-norm is robust. GPT-2 and nearly
# all its successors use pre-norm, and GPT-2 also uses small initial branches.
#
# ## Exercises
#
# **1.** How many parameters does one block of width $D$ have? Write the formula and check it against the parameters
# above and against GPT-2 small: `slm_jax.model.count_params` counts a model's parameters without creating them, and the
# difference between two blocks and one is one block.
#
# <details><summary>Solution</summary>
#
# ```python
# def block_params(width):
#     attention_part = 3 * width**2 + 3 * width + width**2 + width
#     feed_forward_part = 4 * width**2 + 4 * width + 4 * width**2 + width
#     return attention_part + feed_forward_part + 2 * 2 * width  # two norms, each with scale and bias
#
#
# assert block_params(64) == 12 * 64**2 + 13 * 64 == sum(leaf.size for leaf in jax.tree.leaves(params))
# from slm_jax.model import count_params
#
# one, two = (count_params(get_gpt_config("gpt2-small", n_layers=n)) for n in (1, 2))
# assert two - one == block_params(768) == 7_087_872
# ```
#
# $12D^2 + 13D$: two thirds of the quadratic term belong to the feed-forward part, one third to attention.
#
# </details>
#
# **2.** Is it the depth? Train a post-norm model of two blocks as above, with the standard initialisation.
#
# <details><summary>Solution</summary>
#
# ```python
# losses, _ = train(new_model(jax.random.key(0), tokenizer.vocab_size, 2), constant, post_norm_block)
# assert losses[-10:].mean() < 2.6
# ```
#
# It learns as well as pre-norm does. With two blocks there is no reason to move the norms.
#
# </details>
#
# **3.** Would warmup help? Let the learning rate rise linearly from 0 to 0.003 over the first 60 steps.
#
# <details><summary>Solution</summary>
#
# ```python
# warmup = 3e-3 * jnp.minimum(1, jnp.arange(STEPS) / 60)
# losses, _ = train(initial[0], warmup, post_norm_block)
# assert losses[-10:].mean() > max(final["pre-norm"]) + 0.1
# ```
#
# At this rate it does not: in our measurement the loss was again that of the character frequencies. Rules of thumb need
# checking.
#
# </details>
#
# ## Key takeaways
#
# - A block adds twice to the residual stream: attention moves information between tokens, feed-forward processes each
#   token. Its output has the shape of its input.
# - With pre-norm there are only additions on the stream; post-norm normalises the stream itself, twice per block.
# - In our deep model with standard initialisation only pre-norm learned; with small initial branches or few blocks both
#   did. Order, initialisation and depth interact.
#
# Next: [8. GPT](08_gpt.py), the complete model and text generation.
