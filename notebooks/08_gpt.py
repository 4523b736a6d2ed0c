# %% [markdown]
# # 8. GPT: the whole model, its size, and text generation
#
# Embeddings, blocks, a final norm and an output head: with the block of notebook 7 the model is complete. You write it
# as one function, count the parameters and memory of GPT-2 small to XL without creating them, train a tiny model,
# choose its next tokens by hand (greedy, with temperature, top-k), and make generation fast with a cache. The notebook
# runs in about 25 seconds on two CPU cores.

# %%
import json
import math
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import slm_jax
from slm_jax.model import param_shapes
from slm_jax.tasks.config import parse_args
from slm_jax.tokenizer import BPETokenizer
from slm_jax.tools.plan import make_plan

jax.config.update("jax_default_matmul_precision", "highest")  # full float32 precision on GPUs and TPUs too
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # colour-blind safe

# %% [markdown]
# ## The model as one function
#
# Every token id is looked up in one table, every position in another; their sum enters the residual stream. The blocks
# follow. Their output is normalised and multiplied with every row of the *same* token table: this is the output head
# (*tied weights*). The results are logits, one number for each possible next token.


# %%
def norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]["kernel"]) + p[name]["bias"] for name in "qkv")
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf), axis=-1)
    context = jnp.einsum("bhqk,bkhe->bqhe", weights, v)
    return jnp.einsum("bthe,hed->btd", context, p["out_proj"]["kernel"]) + p["out_proj"]["bias"]


def gpt(params, tokens):
    x = params["tok_emb"]["embedding"][tokens] + params["pos_emb"]["embedding"][: tokens.shape[1]]

    def block(x, p):
        x = x + attention(p["attn"], norm(p["norm1"], x))
        return x + dense(p["ff"]["proj"], jax.nn.gelu(dense(p["ff"]["fc"], norm(p["norm2"], x)))), None

    x, _ = jax.lax.scan(block, x, params["blocks"])  # the same code along the stacked parameters of all blocks
    return norm(params["final_norm"], x) @ params["tok_emb"]["embedding"].T


# %% [markdown]
# We compare it with the library's model, with a small vocabulary and two blocks. In the library this is `GPTModel` in
# [`slm_jax/model.py`](../slm_jax/model.py).

# %%
cfg = slm_jax.get_gpt_config("tiny", vocab_size=512, emb_dim=96, n_heads=4, n_layers=2, context_length=64)
model = slm_jax.GPTModel(cfg)
tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, cfg.vocab_size)
params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
logits = jax.jit(model.apply)({"params": params}, tokens)
by_hand = jax.jit(gpt)(params, tokens)
difference = jnp.abs(by_hand - logits).max() / jnp.abs(logits).max()
print("logits:", logits.shape, f"  relative difference below 1e-4: {difference < 1e-4}")
assert difference < 1e-4

# %% [markdown]
# ## Counting
#
# With width $D$, $L$ blocks, vocabulary $V$ and context $T$, the parts have
#
# | part | parameters |
# |---|---|
# | token embedding (and output head) | $V D$ |
# | position embedding | $T D$ |
# | attention, all blocks | $L (4 D^2 + 4 D)$ |
# | feed-forward, all blocks | $L (8 D^2 + 5 D)$ |
# | norms | $L \cdot 4 D + 2 D$ |
#
# `param_shapes` returns the whole tree as shapes. It uses `jax.eval_shape`, which traces `init` without creating
# arrays, so even GPT-2 XL (6 GB) costs nothing.


# %%
def formula(cfg):
    width, blocks = cfg.emb_dim, cfg.n_layers
    return {
        "token embedding": cfg.vocab_size * width,
        "position embedding": cfg.context_length * width,
        "attention": blocks * (4 * width**2 + 4 * width),
        "feed-forward": blocks * (8 * width**2 + 5 * width),
        "norms": blocks * 4 * width + 2 * width,
    }


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def counted(shapes):
    blocks = shapes["blocks"]
    return {
        "token embedding": size(shapes["tok_emb"]),
        "position embedding": size(shapes["pos_emb"]),
        "attention": size(blocks["attn"]),
        "feed-forward": size(blocks["ff"]),
        "norms": size([blocks["norm1"], blocks["norm2"], shapes["final_norm"]]),
    }


sizes = {name: slm_jax.get_gpt_config(f"gpt2-{name}") for name in ("small", "medium", "large", "xl")}
parts = {name: formula(config) for name, config in sizes.items()}
for name, config in sizes.items():
    assert parts[name] == counted(param_shapes(config))
    print(f"gpt2-{name:<7} {sum(parts[name].values()):>13,}")
assert sum(parts["small"].values()) == 124_439_808

# %%
figure, axis = plt.subplots(figsize=(8, 3.2))
colours = (BLUE, PINK, GREEN, ORANGE, "#000000")
left = np.zeros(len(sizes))
for part, colour in zip(parts["small"], colours, strict=True):
    widths = np.array([parts[name][part] / 1e6 for name in sizes])
    axis.barh([f"gpt2-{name}" for name in sizes], widths, left=left, color=colour, label=part)
    left += widths
for row, name in enumerate(sizes):
    share = parts[name]["token embedding"] / sum(parts[name].values())
    axis.text(left[row] + 15, row, f"{left[row]:,.0f} M, token table {share:.0%}", va="center", fontsize=9)
axis.set(xlabel="parameters, millions", xlim=(0, 2150))
axis.invert_yaxis()
axis.legend(loc="upper right", fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# Position embeddings and norms are too small to be visible. In the small model nearly a third is the token table; in XL
# almost everything is in the blocks, two thirds of it in the feed-forward networks.
#
# ## Memory
#
# A float32 takes 4 bytes. To *run* a model, its weights must be in memory. *Training* with AdamW also needs the
# gradients and AdamW's two running averages, each as large as the weights, so 16 bytes per parameter; and the
# activations for the backward pass, which grow with batch size and sequence length. The logits, one number per
# vocabulary token at each position, would grow too, but the library computes them in chunks of at most half a gigabyte
# ([notebook 9](09_pretraining_setup.py)). The command `slm-jax plan` estimates all of these, see
# [`slm_jax/tools/plan/memory_model.py`](../slm_jax/tools/plan/memory_model.py). Here is its estimate for a T4, Colab's
# free GPU, in float32, with 4 rows of 1,024 tokens.

# %%
GB = 1e9
memories = {}
for name in sizes:
    options = {"model.preset": f"gpt2-{name}", "tokenizer.kind": "gpt2", "train.batch_size": 4}
    run = parse_args([f"--{key}={value}" for key, value in options.items()])  # the options of slm-jax plan
    memories[name] = make_plan(run, "t4").by_remat["none"].memory
    memory, n_params = memories[name], sum(parts[name].values())
    assert memory.parameters == memory.gradients == 4 * n_params
    assert memory.optimizer == 8 * n_params
    print(f"gpt2-{name:<7} weights {memory.parameters / GB:4.1f} GB, training {memory.total / GB:5.1f} GB")

# %%
figure, axis = plt.subplots(figsize=(8, 3.2))
left = np.zeros(len(sizes))
named = ("parameters", "gradients", "optimizer", "activations")
for part, colour in zip((*named, "logits and other"), (BLUE, GREEN, ORANGE, PINK, "#56B4E9"), strict=True):
    rest = [memories[name].total - sum(getattr(memories[name], other) for other in named) for name in sizes]
    widths = np.array([getattr(memories[name], part, amount) / GB for name, amount in zip(sizes, rest, strict=True)])
    axis.barh([f"gpt2-{name}" for name in sizes], widths, left=left, color=colour, label=part)
    left += widths
assert np.allclose(left, [memories[name].total / GB for name in sizes])
axis.axvline(12, color="black", ls=":", lw=1)
axis.axvline(16, color="black", ls="--", lw=1)
axis.text(17, 0, "a T4 has 16 GB (dashed), JAX uses 12 by default (dotted)", fontsize=9, va="center")
axis.set(xlabel="GB, training in float32, 4 x 1,024 tokens")
axis.invert_yaxis()
axis.legend(fontsize=9)
plt.tight_layout()
plt.show()

# %% [markdown]
# On a T4 only GPT-2 small can be trained this way. The card has 16 GB, of which JAX uses 75% (12 GB) by default. Most
# of the small model's memory is activations; a smaller batch, 16-bit numbers or recomputing activations in the backward
# pass (gradient checkpointing, `--model.remat`) saves part of it. For XL, the weights and AdamW's state alone exceed
# the card's memory.
#
# ## Training a tiny model
#
# To choose tokens we need a trained model. The 240 short reviews of notebook 11a, tokenized with a BPE trained on them
# (notebook 1), are enough to learn what such sentences look like. The loop is short: loss, gradient, AdamW. Notebooks 9
# and 10 cover a full training setup.

# %%
with open("data/sentiment.jsonl", encoding="utf-8") as file:
    text = "\n".join(json.loads(line)["text"] for line in file)
tokenizer = BPETokenizer.train(text, vocab_size=cfg.vocab_size)
ids = np.array(tokenizer.encode(text))
STEPS, BATCH, LENGTH = 200, 16, 24
optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, STEPS), b2=0.99)


def loss(params, batch):
    logits = model.apply({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@jax.jit
def step(params, state, batch):
    value, gradients = jax.value_and_grad(loss)(params, batch)
    changes, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, changes), state, value


# %% tags=["varies"]
state, losses = jax.jit(optimizer.init)(params), []
generator = np.random.default_rng(0)
for _ in range(STEPS):
    starts = generator.integers(0, len(ids) - LENGTH - 1, (BATCH, 1))
    params, state, value = step(params, state, jnp.asarray(ids[starts + np.arange(LENGTH + 1)]))
    losses.append(value)
first, last = float(losses[0]), float(np.mean(losses[-20:]))
print(
    f"{len(ids):,} tokens; loss at first {first:.1f} (uniform: {math.log(cfg.vocab_size):.1f}), at the end {last:.1f}"
)
assert last < first / 2

# %% [markdown]
# ## From logits to the next token
#
# The model reads a prompt; only the logits of its last token matter. Softmax turns them into probabilities. *Greedy*
# decoding takes the most probable token, appends it, and repeats. Each step runs the model on the text so far. The rows
# are padded on the right to a fixed length, so that one compiled program works for all of them; with causal attention
# the padding has no effect.

# %%
apply = jax.jit(model.apply)
WINDOW = 32
prompt = tokenizer.encode("The food was")


def next_logits(params, row):
    padded = jnp.array([row + [0] * (WINDOW - len(row))])
    return np.asarray(apply({"params": params}, padded))[0, len(row) - 1]


def greedy(params, row, n_new):
    for _ in range(n_new):
        row = [*row, int(next_logits(params, row).argmax())]
    return row


# %% tags=["sampled"]
by_hand = greedy(params, prompt, 12)
by_library = slm_jax.generate(model, params, jnp.array([prompt]), max_new_tokens=12, temperature=0)
assert by_library[0].tolist() == by_hand
print(repr(tokenizer.decode(by_hand)))

# %% [markdown]
# Greedy decoding always gives the same text. In the library this is [`decode.py`](../slm_jax/generation/decode.py).
#
# ### Temperature
#
# Sampling from the probabilities gives variety. Dividing the logits by a *temperature* first makes the distribution
# sharper (below 1) or flatter (above 1): toward 0 it becomes greedy, toward infinity all tokens are equally likely.
#
# ### Top-k
#
# The unlikely tokens have small probabilities, but there are hundreds of them, and a single one can spoil a sentence.
# Top-k sets all logits except the $k$ largest to $-\infty$ before softmax, so that only the $k$ most probable tokens
# can be sampled.


# %%
def distribution(logits, temperature=1.0, top_k=None):
    logits = logits / temperature
    if top_k is not None:
        logits = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    return np.asarray(jax.nn.softmax(logits))


logits = next_logits(params, prompt)
for temperature in (0.5, 1.0, 2.0):
    assert math.isclose(distribution(logits, temperature).sum(), 1, rel_tol=1e-5)
assert (distribution(logits, top_k=5) > 0).sum() == 5

# %% tags=["varies"]
order = np.argsort(-logits)[:12]
names = [repr(tokenizer.decode([int(i)])) for i in order]
settings = (
    ("temperature 0.5", 0.5, None),
    ("temperature 1", 1.0, None),
    ("temperature 2", 2.0, None),
    ("top-k 5", 1.0, 5),
)
figure, axes = plt.subplots(1, 4, figsize=(10, 3.6), sharey=True, sharex=True)
for axis, (title, temperature, top_k), colour in zip(axes, settings, (BLUE, GREEN, ORANGE, PINK), strict=True):
    probabilities = distribution(logits, temperature, top_k)
    axis.barh(names, probabilities[order], color=colour)
    axis.set(title=title, xlabel="probability")
    rest = 1 - float(probabilities[order].sum())
    axis.text(0.97, 0.04, f"all others {rest:.0%}", transform=axis.transAxes, ha="right", fontsize=9)
axes[0].invert_yaxis()
axes[0].set_ylabel('next token after "The food was"')
plt.tight_layout()
plt.show()

# %% [markdown]
# Now sample. JAX has no hidden random state: each sample takes a key, and the same key gives the same sample. The
# library derives the key of row $i$ with `fold_in(key, i)` and that of its $n$-th new token with another `fold_in`.
# With the same keys our loop samples the same tokens.


# %%
@partial(jax.jit, static_argnames="top_k")
def draw(logits, key, top_k):
    best, candidates = jax.lax.top_k(logits, top_k)
    return candidates[jax.random.categorical(key, best)]  # draws from softmax(best)


def sample(params, row, n_new, key, temperature, top_k):
    row_key = jax.random.fold_in(key, 0)  # row 0, the only one
    for n in range(n_new):
        logits = next_logits(params, row) / temperature
        row = [*row, int(draw(logits, jax.random.fold_in(row_key, n), top_k))]
    return row


# %% tags=["sampled"]
for temperature in (0.5, 1.0, 2.0):
    options = {"temperature": temperature, "top_k": 20, "key": jax.random.key(19)}
    by_hand = sample(params, prompt, 12, **options)
    by_library = slm_jax.generate(model, params, jnp.array([prompt]), max_new_tokens=12, **options)
    assert by_library[0].tolist() == by_hand
    print(f"temperature {temperature}: {tokenizer.decode(by_hand)!r}")

# %% [markdown]
# In the library this is [`sampler.py`](../slm_jax/generation/sampler.py), with two more filters, top-p and min-p.
#
# ## The cache of keys and values
#
# The loop above runs the whole text through the model for every new token and recomputes the same keys and values for
# all earlier tokens: no token sees a later one, so they cannot change. We can store them instead. Then a new token
# needs only its own query, key and value. Here is one attention head in NumPy (with growing arrays, JAX would recompile
# for each length):


# %%
def softmax(scores):
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


HEAD_DIM, LONG = 16, 10
generator = np.random.default_rng(5)
w_query, w_key, w_value = generator.normal(size=(3, 96, HEAD_DIM)) / math.sqrt(96)
x = generator.normal(size=(LONG, 96))
scores = (x @ w_query) @ (x @ w_key).T / math.sqrt(HEAD_DIM)
whole = softmax(np.where(np.tri(LONG, dtype=bool), scores, -np.inf)) @ (x @ w_value)

keys = values = np.zeros((0, HEAD_DIM))
one_by_one = []
for token in x:
    keys = np.vstack([keys, token @ w_key])  # the cache grows by one row per token
    values = np.vstack([values, token @ w_value])
    one_by_one.append(softmax(keys @ (token @ w_query) / math.sqrt(HEAD_DIM)) @ values)
assert np.allclose(one_by_one, whole)
print("token by token with a cache = all at once; no mask is needed, because there are no future tokens yet")

# %% [markdown]
# In a compiled program shapes are fixed, so the library's cache has room for `capacity` tokens from the start and
# counts how many it holds. `apply` with a cache returns the logits of the new tokens and the updated cache.
#
# In the library this is [`cache.py`](../slm_jax/nn/cache.py).

# %%
cached = jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache))
tokens = jnp.asarray(ids[None, :WINDOW])
full = apply({"params": params}, tokens)
cache = slm_jax.init_cache(cfg, params, batch_size=1, capacity=WINDOW)
steps = []
for position in range(WINDOW):
    one, cache = cached(params, tokens[:, position : position + 1], cache)
    steps.append(one)
difference = jnp.abs(jnp.concatenate(steps, axis=1) - full).max() / jnp.abs(full).max()
assert difference < 1e-4
assert cache.lengths.tolist() == [WINDOW]
print(f"relative difference below 1e-4: {difference < 1e-4}")

# %% [markdown]
# ### The speedup
#
# First we check that both methods generate the same 40 tokens. `recomputed` computes the whole window for each token,
# `cached_step` only one token. The model has a longer context and random weights, because speed does not depend on the
# values; its head is not tied, because a random model with a tied head only repeats its input.

# %%
LONGEST = 512
shape = {"vocab_size": 512, "emb_dim": 96, "n_heads": 4, "n_layers": 2, "context_length": LONGEST}
long_cfg = slm_jax.get_gpt_config("tiny", tie_weights=False, **shape)
long_model = slm_jax.GPTModel(long_cfg)
long_params = jax.jit(long_model.init)(jax.random.key(7), tokens)["params"]


@jax.jit
def recomputed(params, window, n):
    """Return the most probable token after the first n of a window of fixed length."""
    return long_model.apply({"params": params}, window)[0, n - 1].argmax()


@jax.jit
def cached_step(params, token, cache):
    """Return the most probable token after the cached tokens and this one, and the updated cache."""
    logits, cache = long_model.apply({"params": params}, token[None, None], cache=cache)
    return logits[0, -1].argmax(), cache


N_NEW = 40
slow, fast = [1], [1]
cache = slm_jax.init_cache(long_cfg, long_params, batch_size=1, capacity=LONGEST)
for n in range(1, N_NEW + 1):
    slow.append(int(recomputed(long_params, jnp.array([[*slow, *[0] * (64 - n)]]), n)))
    token, cache = cached_step(long_params, jnp.int32(fast[-1]), cache)
    fast.append(int(token))
assert slow == fast
print(f"{N_NEW} tokens, the same with both methods, {len(set(slow))} distinct")

# %% [markdown]
# Then we measure the time for one more token after texts of different lengths. `block_until_ready` waits for the
# result, because JAX returns before it is computed; the first call, which compiles, is not measured.


# %%
def milliseconds(function, *arguments, repeats=15):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds)  # other load on the machine can only add time


lengths = (64, 256, LONGEST)
times = {"recomputed": [], "with a cache": []}
for n in lengths:
    times["recomputed"].append(milliseconds(recomputed, long_params, jnp.zeros((1, n), jnp.int32), n))
    holds = cache._replace(lengths=jnp.array([n - 1]))  # as if n - 1 tokens were in it
    times["with a cache"].append(milliseconds(cached_step, long_params, jnp.int32(1), holds))

# %% tags=["varies"]
figure, axis = plt.subplots(figsize=(6.5, 3.6))
for (name, values), colour, marker in zip(times.items(), (ORANGE, BLUE), ("s", "o"), strict=True):
    axis.plot(lengths, values, color=colour, marker=marker, label=name)
    print(f"{name:<13}", " ".join(f"{value:6.2f}" for value in values), "ms per token")
axis.set(xlabel="tokens in the text", ylabel="ms for one more token", xticks=lengths, ylim=(0, None))
axis.legend()
plt.tight_layout()
plt.show()
assert times["with a cache"][-1] < times["recomputed"][-1]
ratio = times["recomputed"][-1] / times["with a cache"][-1]
print(f"after {LONGEST} tokens the cache is {ratio:.0f} times as fast")

# %% [markdown]
# Without a cache, each token costs as much as the whole text; with a cache the cost is about the same for all these
# lengths. (Our cached step always attends to all 512 positions; in a much longer context that cost would show, too.)
# The price is memory: keys and values of every token in every block,
#
# $$2 \cdot L \cdot D \cdot \text{tokens} \cdot \text{bytes of a number}$$
#
# for GPT-2 small and its full context in float32:

# %%
small = sizes["small"]
cache_bytes = 2 * small.n_layers * small.emb_dim * small.context_length * 4
shapes = jax.eval_shape(lambda: slm_jax.init_cache(small, param_shapes(small), batch_size=1, capacity=1024))
assert cache_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.blocks))
print(f"{cache_bytes / 1e6:.1f} MB per sequence, plus {4 * sum(parts['small'].values()) / 1e6:.0f} MB of weights")

# %% [markdown]
# ## Exercises
#
# **1.** The book's first GPT has a separate output head instead of the shared token table, and no biases for queries,
# keys and values. How many parameters does it have at GPT-2 small's size? Compute the number with a formula and with
# `param_shapes`.
#
# <details><summary>Solution</summary>
#
# ```python
# book = slm_jax.get_gpt_config("gpt2-small", tie_weights=False, qkv_bias=False)
# expected = sum(formula(book).values()) + book.vocab_size * book.emb_dim - book.n_layers * 3 * book.emb_dim
# assert size(param_shapes(book)) == expected == 163_009_536
# ```
#
# The usual "124 million" refers to the tied model.
#
# </details>
#
# **2.** Top-p keeps the smallest set of most probable tokens whose total probability is at least $p$: few where the
# model is confident, many where it is not. Write it for one row of logits, and compare with
# `slm_jax.generation.sampler.keep_top_p(logits[None], p)`.
#
# <details><summary>Solution</summary>
#
# ```python
# from slm_jax.generation.sampler import keep_top_p
#
#
# def top_p(logits, p):
#     order = jnp.argsort(-logits)
#     probabilities = jax.nn.softmax(logits)[order]
#     before = jnp.cumsum(probabilities) - probabilities  # of all more probable tokens
#     return jnp.full_like(logits, -jnp.inf).at[order].set(jnp.where(before < p, logits[order], -jnp.inf))
#
#
# for p in (0.3, 0.7, 0.95):
#     assert jnp.array_equal(jnp.isfinite(top_p(logits, p)), jnp.isfinite(keep_top_p(logits[None], p)[0]))
# ```
#
# A token is kept if the total probability of the tokens before it is below $p$, so the most probable token is always
# kept.
#
# </details>
#
# **3.** Entropy, $-\sum p \ln p$, measures how uncertain a distribution is. Show that it grows with temperature for our
# prompt, from near 0 to near the logarithm of the vocabulary.
#
# <details><summary>Solution</summary>
#
# ```python
# def entropy(probabilities):
#     kept = probabilities[probabilities > 0]
#     return float(-jnp.sum(kept * jnp.log(kept)))
#
#
# entropies = [entropy(distribution(logits, temperature)) for temperature in (0.01, 0.5, 1.0, 2.0, 100.0)]
# assert entropies == sorted(entropies)
# assert entropies[0] < 0.1
# assert entropies[-1] > 0.99 * math.log(cfg.vocab_size)
# ```
#
# Temperature moves the distribution between always the same token and a uniform choice; values between are a matter of
# taste.
#
# </details>
#
# ## Key takeaways
#
# - A GPT is embeddings, blocks, a norm, and the token table again as output head. `eval_shape` gives the sizes without
#   creating arrays.
# - Training in float32 takes 16 bytes per parameter plus activations; running the model takes 4.
# - A decoding method chooses the next token from the logits: greedy, temperature, top-k. Keys and values of earlier
#   tokens never change, and caching them makes each new token cheap.
#
# Next: [9. Pretraining setup](09_pretraining_setup.py), what the model is trained on and how it is measured.
