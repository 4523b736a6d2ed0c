# %% [markdown]
# # 8. GPT: the whole model, its size, and text from it
#
# Embeddings, blocks, one last norm and an output head: with the block of notebook 7 the model is complete. You will
# write it as one function, count its parameters and its memory from GPT-2 small to XL without making them, train a
# tiny one, choose its next tokens by hand (greedy, with temperature, top-k), and make generation fast with a cache. It
# runs in about 30 seconds on two CPU cores.

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

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs otherwise round the factors of a product
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # told apart by colour-blind readers too

# %% [markdown]
# ## The model as one function
#
# Every token id is looked up in one table, every position in another; the sum enters the residual stream. The blocks
# follow. What comes out is normalised, and compared by dot product with every row of the *same* token table: that is
# the output head (*tied weights*). The results are logits, one number for each token that could come next.


# %%
def norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def attention(p, x, n_heads):
    batch, seq, emb = x.shape
    q, k, v = (part.reshape(batch, seq, n_heads, -1) for part in jnp.split(dense(p["qkv"], x), 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(emb // n_heads)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), scores, -jnp.inf), axis=-1)
    return dense(p["out_proj"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, seq, emb))


def gpt(params, tokens, n_heads):
    x = params["tok_emb"]["embedding"][tokens] + params["pos_emb"]["embedding"][: tokens.shape[1]]

    def block(x, p):
        x = x + attention(p["attn"], norm(p["norm1"], x), n_heads)
        return x + dense(p["ff"]["proj"], jax.nn.gelu(dense(p["ff"]["fc"], norm(p["norm2"], x)))), None

    x, _ = jax.lax.scan(block, x, params["blocks"])  # the same code along the stacked parameters of all blocks
    return norm(params["final_norm"], x) @ params["tok_emb"]["embedding"].T


# %% [markdown]
# Against the library's, with a small vocabulary and two blocks. In the library this is `GPTModel` in
# [`slm_jax/model.py`](../slm_jax/model.py).

# %%
cfg = slm_jax.get_gpt_config("tiny", vocab_size=512, emb_dim=96, n_heads=4, n_layers=2, context_length=64)
model = slm_jax.GPTModel(cfg)
tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, cfg.vocab_size)
params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
logits = jax.jit(model.apply)({"params": params}, tokens)
by_hand = jax.jit(gpt, static_argnames="n_heads")(params, tokens, n_heads=cfg.n_heads)
difference = jnp.abs(by_hand - logits).max() / jnp.abs(logits).max()
print("logits:", logits.shape, f"  relative difference below 1e-4: {difference < 1e-4}")
assert difference < 1e-4

# %% [markdown]
# ## Counting
#
# With width $D$, $L$ blocks, vocabulary $V$ and context $T$ the parts have
#
# | part | parameters |
# |---|---|
# | token embedding (and output head) | $V D$ |
# | position embedding | $T D$ |
# | attention, all blocks | $L (4 D^2 + 4 D)$ |
# | feed-forward, all blocks | $L (8 D^2 + 5 D)$ |
# | norms | $L \cdot 4 D + 2 D$ |
#
# `param_shapes` gives the whole tree as shapes. Underneath is `jax.eval_shape`: it follows what `init` would do and
# makes no array, so GPT-2 XL, 6 GB, costs nothing.


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
# Position embeddings and norms are too few to be seen. In the small model nearly a third is the token table; in XL
# almost everything is in the blocks, and two thirds of them in the feed-forward networks.
#
# ## Memory
#
# A float32 takes 4 bytes. To *run* a model its weights must be in memory. To *train* it with AdamW there are also the
# gradients and AdamW's two running means, each as large as the weights, so 16 bytes a parameter; and the activations
# that the backward pass needs, which grow with batch and length. So would the logits, a number for each token of the
# vocabulary at each position, but the library makes them in pieces of at most half a gigabyte ([notebook
# 9](09_pretraining_setup.py)). The command `slm-jax plan` estimates all of them by formulas, see
# [`slm_jax/tools/plan/memory.py`](../slm_jax/tools/plan/memory.py). Here for a T4, Colab's free GPU, in float32, with 4
# rows of 1,024 tokens.

# %%
GB = 1e9
memories = {}
for name in sizes:
    options = {"model.preset": f"gpt2-{name}", "tokenizer.kind": "gpt2", "train.batch_size": 4}
    run = parse_args([f"--{key}={value}" for key, value in options.items()])  # as slm-jax plan would be called
    memories[name] = make_plan(run, "t4").by_remat["none"].memory
    memory, n_params = memories[name], sum(parts[name].values())
    assert memory.parameters == memory.gradients == 4 * n_params
    assert memory.optimizer == 8 * n_params
    print(f"gpt2-{name:<7} weights {memory.parameters / GB:4.1f} GB, training {memory.total / GB:5.1f} GB")

# %%
figure, axis = plt.subplots(figsize=(8, 3.2))
left = np.zeros(len(sizes))
named = ("parameters", "gradients", "optimizer", "activations")
for part, colour in zip((*named, "logits and the rest"), (BLUE, GREEN, ORANGE, PINK, "#56B4E9"), strict=True):
    rest = [memories[name].total - sum(getattr(memories[name], other) for other in named) for name in sizes]
    widths = np.array([getattr(memories[name], part, amount) / GB for name, amount in zip(sizes, rest, strict=True)])
    axis.barh([f"gpt2-{name}" for name in sizes], widths, left=left, color=colour, label=part)
    left += widths
assert np.allclose(left, [memories[name].total / GB for name in sizes])
axis.axvline(12, color="black", ls=":", lw=1)
axis.axvline(16, color="black", ls="--", lw=1)
axis.text(17, 0, "a T4 has 16 GB (dashed), JAX gives a program 12 (dotted)", fontsize=9, va="center")
axis.set(xlabel="GB, training in float32, 4 x 1,024 tokens")
axis.invert_yaxis()
axis.legend(fontsize=9)
plt.tight_layout()
plt.show()

# %% [markdown]
# On a T4 only GPT-2 small can be trained this way. The card has 16 GB, and JAX gives a program 75 % of a GPU's memory
# unless told otherwise, so there are 12. Most of the small model's memory is activations; a smaller batch, 16-bit
# numbers or recomputing them in the backward pass (`--model.remat`) saves part of it. For XL the weights and what AdamW
# keeps of them are already more than the card has.
#
# ## A model that says something
#
# To choose tokens we need a model with an opinion. The 240 short reviews of notebook 11a, cut into tokens by a BPE made
# from them (notebook 1), are enough for one that has learned how such sentences go. The loop is short: loss, gradient,
# AdamW. What belongs to a real training is the subject of notebooks 9 and 10.

# %%
with open("data/sentiment.jsonl", encoding="utf-8") as file:
    text = "\n".join(json.loads(line)["text"] for line in file)
tokenizer = BPETokenizer.train(text, vocab_size=cfg.vocab_size)
ids = np.array(tokenizer.encode(text))
STEPS, BATCH, LENGTH = 300, 16, 24
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
    f"{len(ids):,} tokens; loss {first:.1f} (all tokens alike: {math.log(cfg.vocab_size):.1f}), at the end {last:.1f}"
)
assert last < first / 2

# %% [markdown]
# ## From logits to the next token
#
# The model reads a prompt; only the logits behind its last token matter. Softmax makes probabilities of them. *Greedy*
# choice takes the likeliest, and again, and again. Each round runs the model on the text so far. The rows are filled up
# to a fixed length on the right, so that one compiled program serves all of them: no token looks to the right.

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
# Greedy text is always the same. In the library this is [`decode.py`](../slm_jax/generation/decode.py).
#
# ### Temperature
#
# Drawing from the probabilities gives variety. Dividing the logits by a *temperature* first makes the distribution
# sharper (below 1) or flatter (above 1): at 0 it becomes greedy, at infinity all tokens are alike.
#
# ### Top-k
#
# However small the tail's probabilities, it has hundreds of tokens, and one of them in a sentence is enough to spoil
# it. Top-k sets all but the $k$ likeliest to $-\infty$ before softmax, so that the rest share their probability.


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
# Now draw. JAX has no hidden random state: each draw takes a key, and the same key gives the same draw. The library
# makes the key of row $i$ with `fold_in(key, i)` and that of its $n$-th new token with another `fold_in`. With the same
# keys the loop by hand draws the same tokens.


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
# The loop above runs the whole text through the model for every new token, and gets the same keys and values again for
# all that was there before: no token sees a later one, so nothing in them can change. They can be kept. Then a new
# token needs only its own query, key and value. In one attention head, with NumPy, as arrays that grow would make JAX
# compile anew for each length:


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
    keys = np.vstack([keys, token @ w_key])  # the cache: one row longer for each token
    values = np.vstack([values, token @ w_value])
    one_by_one.append(softmax(keys @ (token @ w_query) / math.sqrt(HEAD_DIM)) @ values)
assert np.allclose(one_by_one, whole)
print("token by token with a cache = all at once, with no mask needed: the future is not there yet")

# %% [markdown]
# In a compiled program shapes are fixed, so the library's cache has room for `capacity` tokens from the start and
# counts how many it holds. `apply` with a cache returns the logits of the new tokens and the cache with them in it.
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
# ### What it is worth
#
# First the proof: 40 tokens written in both ways are the same. `anew` computes the whole window for each token,
# `from_cache` one token. The model has a longer context than ours, one more block and random weights, as speed does not
# depend on what they say; its head is its own, because a random model with a tied one only repeats itself.

# %%
LONGEST = 512
shape = {"vocab_size": 512, "emb_dim": 96, "n_heads": 4, "n_layers": 3, "context_length": LONGEST}
long_cfg = slm_jax.get_gpt_config("tiny", tie_weights=False, **shape)
long_model = slm_jax.GPTModel(long_cfg)
long_params = jax.jit(long_model.init)(jax.random.key(7), tokens)["params"]


@jax.jit
def anew(params, window, n):
    """Return the likeliest token after the first n of a window of fixed length."""
    return long_model.apply({"params": params}, window)[0, n - 1].argmax()


@jax.jit
def from_cache(params, token, cache):
    """Return the likeliest token after this one and what the cache holds, and the longer cache."""
    logits, cache = long_model.apply({"params": params}, token[None, None], cache=cache)
    return logits[0, -1].argmax(), cache


N_NEW = 40
slow, fast = [1], [1]
cache = slm_jax.init_cache(long_cfg, long_params, batch_size=1, capacity=LONGEST)
for n in range(1, N_NEW + 1):
    slow.append(int(anew(long_params, jnp.array([[*slow, *[0] * (64 - n)]]), n)))
    token, cache = from_cache(long_params, jnp.int32(fast[-1]), cache)
    fast.append(int(token))
assert slow == fast
print(f"{N_NEW} tokens, the same both ways, {len(set(slow))} different ones")

# %% [markdown]
# Then the time of one more token, after texts of different length. `block_until_ready` waits for the result, because
# JAX returns before it is there; the first call, which compiles, is not measured.


# %%
def milliseconds(function, *arguments, repeats=15):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds)  # what else the machine does can only add to it


lengths = (64, 256, LONGEST)
times = {"computed anew": [], "from the cache": []}
for n in lengths:
    times["computed anew"].append(milliseconds(anew, long_params, jnp.zeros((1, n), jnp.int32), n))
    holds = cache._replace(lengths=jnp.array([n - 1]))  # as if n - 1 tokens were in it
    times["from the cache"].append(milliseconds(from_cache, long_params, jnp.int32(1), holds))

# %% tags=["varies"]
figure, axis = plt.subplots(figsize=(6.5, 3.6))
for (name, values), colour, marker in zip(times.items(), (ORANGE, BLUE), ("s", "o"), strict=True):
    axis.plot(lengths, values, color=colour, marker=marker, label=name)
    print(f"{name:<15}", " ".join(f"{value:6.2f}" for value in values), "ms a token")
axis.set(xlabel="tokens in the text", ylabel="ms for one more token", xticks=lengths, ylim=(0, None))
axis.legend()
plt.tight_layout()
plt.show()
assert times["from the cache"][-1] < times["computed anew"][-1]
print(
    f"after {LONGEST} tokens the cache is {times['computed anew'][-1] / times['from the cache'][-1]:.0f} times as fast"
)

# %% [markdown]
# Computed anew, a token costs as much as the whole text; from the cache about the same after any text of this length.
# (Our cache step always looks at all 512 places; in a much larger context that would show, too.) The price is memory:
# keys and values of every token in every block,
#
# $$2 \cdot L \cdot D \cdot \text{tokens} \cdot \text{bytes of a number}$$
#
# for GPT-2 small and its full context in float32:

# %%
small = sizes["small"]
cache_bytes = 2 * small.n_layers * small.emb_dim * small.context_length * 4
shapes = jax.eval_shape(lambda: slm_jax.init_cache(small, param_shapes(small), batch_size=1, capacity=1024))
assert cache_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.blocks))
print(f"{cache_bytes / 1e6:.1f} MB a text, beside {4 * sum(parts['small'].values()) / 1e6:.0f} MB of weights")

# %% [markdown]
# ## Exercises
#
# **1.** The book's first GPT has an output head of its own instead of the shared token table, and no biases for
# queries, keys and values. How many parameters does it have at GPT-2 small's size? Find it with a formula and with
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
# The 124 million of the name are those of the tied model.
#
# </details>
#
# **2.** Top-p keeps the fewest of the likeliest tokens that together have at least probability $p$: few where the model
# is sure, many where it is not. Write it for one row of logits, and compare with
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
#     before = jnp.cumsum(probabilities) - probabilities  # of all that are likelier
#     return jnp.full_like(logits, -jnp.inf).at[order].set(jnp.where(before < p, logits[order], -jnp.inf))
#
#
# for p in (0.3, 0.7, 0.95):
#     assert jnp.array_equal(jnp.isfinite(top_p(logits, p)), jnp.isfinite(keep_top_p(logits[None], p)[0]))
# ```
#
# A token is kept if those before it do not have $p$ yet, so that the likeliest is always kept.
#
# </details>
#
# **3.** Entropy, $-\sum p \ln p$, says how undecided a distribution is. Show that it grows with temperature for our
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
# Temperature is a dial between "always the same" and "anything goes"; what lies between is taste.
#
# </details>
#
# ## What to take along
#
# - A GPT is embeddings, blocks, a norm, and the token table once more. `eval_shape` tells the size of any of them
#   without making it.
# - Training in float32 takes 16 bytes a parameter before the first activation; running it takes 4.
# - Logits leave the choice to us: greedy, temperature, top-k. Keys and values of earlier tokens never change, and
#   keeping them makes each new token cheap.
#
# Next: [9. Pretraining set-up](09_pretraining_setup.py), what the model is trained on and how it is measured.
