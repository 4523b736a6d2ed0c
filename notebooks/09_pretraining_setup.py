# %% [markdown]
# # 9. Everything that training needs
#
# [Notebook 8](08_gpt.py) ended with a GPT that can be run but knows nothing yet. Before it learns, four things have to
# be right, and at the end of this notebook you will understand each of them: the **number** that says how wrong the
# model is (cross-entropy, and perplexity, its readable form); the **batches** that it is fed; what **`jit`** compiles,
# and when it has to do so again; and how a batch is spread over **eight devices** without changing the result. About
# 20 seconds on two CPU cores.

# %% [markdown]
# ## Before JAX starts
#
# One CPU can pretend to be eight devices. Two variables ask for it, and JAX reads them when it first looks for
# devices, so they come before anything is computed. `XLA_FLAGS` sets the number. `NPROC` sets how many threads there
# are to run them: devices that exchange results wait for each other, and with fewer threads than devices they may wait
# in vain, until JAX ends the process. Everything here computes on the CPU, also where there is a GPU or TPU: one of
# those is one device, and we want eight.

# %%
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "16"

import collections
import json
import math
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import slm_jax
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.data.corpus import load_corpus
from slm_jax.data.windows import train_batches, validation_batches
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.training.sharding import put_batch, put_params

devices = jax.devices("cpu")
jax.config.update("jax_default_device", devices[0])
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
assert len(devices) == 8, "JAX had started before this cell: restart the kernel and run the cells in order"
print([device.id for device in devices])

# %% [markdown]
# ## A text, in two parts
#
# The text is 240 short reviews that come with these notebooks. The model is judged on a part that it never trains on,
# or else learning by heart would look like understanding. The order of the steps matters: first texts are put aside
# (whole ones, but for the text at the cut, which is cut in two), then the tokenizer is trained on the rest, and last
# are tokens cut into windows. Cut the other way round, a window of one part could overlap a window of the other.

# %%
with open("data/sentiment.jsonl") as file:
    reviews = [json.loads(line)["text"] for line in file]
corpus = load_corpus(
    DataConfig(source="jsonl:data/sentiment.jsonl", validation_fraction=0.1),
    TokenizerConfig(kind="bpe", vocab_size=512),
)
tokenizer = corpus.tokenizer
print(f"{len(reviews)} reviews, {sum(map(len, reviews)):,} characters")
print(f"{corpus.train.size:,} tokens to train on, {corpus.validation.size:,} to validate on")
print(repr(tokenizer.decode(corpus.validation[:60].tolist())))

# %% [markdown]
# Reviews follow each other with an end-of-text token between them. Which reviews are put aside is a fixed random
# choice, so that both parts are alike. No whole review is in both; the text at the cut is cut in two.
#
# In the library this is [`slm_jax/data/corpus.py`](../slm_jax/data/corpus.py).


# %%
def documents(tokens):
    return tokenizer.decode(tokens.tolist()).split("<|endoftext|>")


train_documents, validation_documents = documents(corpus.train), documents(corpus.validation)
assert not set(train_documents) & set(validation_documents)
whole = [text for text in train_documents + validation_documents if text in reviews]
print(f"{len(train_documents)} + {len(validation_documents)} pieces, {len(whole)} of them whole reviews")
assert len(whole) >= len(reviews) - 1

# %% [markdown]
# ## Windows
#
# A model sees windows of a fixed length, its **context**. From a window that starts at $s$ it gets the tokens $s, s+1,
# \dots$ and should say at each position the next one, so the targets are the same window, one token on.

# %%
CONTEXT = 32
start = 100
inputs, targets = corpus.train[start : start + CONTEXT], corpus.train[start + 1 : start + CONTEXT + 1]
assert (inputs[1:] == targets[:-1]).all()
for position in range(6):
    seen, wanted = tokenizer.decode(inputs[: position + 1].tolist()), tokenizer.decode([int(targets[position])])
    print(f"{seen!r:>34}  ->  {wanted!r}")

# %% [markdown]
# Where do windows start? Every **stride** tokens. A stride equal to the context uses each token as a target once; half
# of it uses each twice, with different text in front. The loader below gives batches of windows in the order that you
# ask for; without shuffling, its first batch is what we would cut by hand.
#
# In the library this is [`slm_jax/data/windows.py`](../slm_jax/data/windows.py).


# %%
def loader(tokens, **options):
    defaults = {"batch_size": 8, "sampling": "stride", "stride": None, "shuffle": True, "seed": 0}
    return train_batches(tokens, context_length=CONTEXT, **{**defaults, **options})


by_hand = [corpus.train[s : s + CONTEXT] for s in range(0, 8 * 16, 16)]
batch = loader(corpus.train, stride=16, shuffle=False)[0]
assert (batch["inputs"] == np.stack(by_hand)).all()
assert (batch["targets"][:, :-1] == batch["inputs"][:, 1:]).all()
print({name: value.shape for name, value in batch.items()})

# %% [markdown]
# ## The order is a function of seed and step
#
# `loader[i]` is the batch of step $i$, always the same one for the same seed. Nothing has to be read before it. That
# is why a run that was killed can go on with exactly the batches that it would have had ([notebook
# 10](10_training.py)).

# %%
first, again, other = loader(corpus.train), loader(corpus.train), loader(corpus.train, seed=1)
assert (first[700]["inputs"] == again[700]["inputs"]).all()
assert (first[700]["inputs"] != other[700]["inputs"]).any()

# %% [markdown]
# To see the order, give the loader the numbers 0, 1, 2 … as a text: the first input of a window is then its start. One
# pass over all windows is an **epoch**, and each epoch has an order of its own. The alternative, random starts (what
# `slm-jax train` does unless told otherwise), has no epochs: some tokens come several times before others come once.
# After as many steps as an epoch has, a token was left out with probability $1/e$, about 37%.

# %%
numbers = np.arange(corpus.train.size)
n_windows = len(range(0, numbers.size - CONTEXT, CONTEXT))
epoch = n_windows / 8  # in steps
steps = np.arange(3 * n_windows // 8)
in_order, at_random = loader(numbers), loader(numbers, sampling="random")
shuffled = np.stack([in_order[int(i)]["inputs"][:, 0] for i in steps])
random = np.stack([at_random[int(i)]["inputs"][:, 0] for i in steps])
assert sorted(shuffled.ravel()[:n_windows]) == list(range(0, numbers.size - CONTEXT, CONTEXT))
print(f"{n_windows} windows, {epoch:.1f} batches of 8 an epoch")

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", width_ratios=(1.1, 1, 1))
for row, (stride, color) in enumerate([(32, BLUE)] * 3 + [(16, ORANGE)] * 3):
    left = stride * (row % 3)
    axes[0].barh(row, CONTEXT, left=left, color=color, height=0.7)
    axes[0].text(left + CONTEXT / 2, row, f"{left} to {left + CONTEXT - 1}", color="white", ha="center", va="center")
axes[0].set(title="windows of 32 tokens", xlabel="position in the text")
axes[0].set_yticks([1, 4], ["stride 32", "stride 16"])
axes[0].invert_yaxis()
axes[1].plot(np.repeat(steps, 8), shuffled.ravel(), ".", color=BLUE, markersize=3)
axes[1].set(title="shuffled windows", xlabel="step", ylabel="start of the window")
for found, color, name in ((shuffled, BLUE, "shuffled"), (random, GREEN, "random starts")):
    targets_seen = [np.unique(found[: i + 1, :, None] + np.arange(1, CONTEXT + 1)).size for i in steps]
    axes[2].plot(steps + 1, np.array(targets_seen) / (numbers.size - 1), color=color, label=name)
axes[2].set(title="tokens that were a target", xlabel="steps done", ylabel="share of the text", ylim=(0, 1.05))
axes[2].legend(frameon=False, loc="lower right")
for ax in axes[1:]:
    for i in (1, 2):
        ax.axvline(i * epoch, color=GREY, linestyle="--", linewidth=1)
plt.show()

# %% [markdown]
# At the dashed lines another epoch begins. Validation is simpler: the whole split, once, in order. What is missing in
# the last window is filled up and gets **weight** 0, so that every token but the first is a target once.

# %%
batches = list(validation_batches(corpus.validation, context_length=CONTEXT, batch_size=8))
counted = sum(batch["weights"].sum() for batch in batches)
print(f"{len(batches)} batches, {int(counted)} targets counted of {sum(batch['weights'].size for batch in batches)}")
assert counted == corpus.validation.size - 1

# %% [markdown]
# ## Cross-entropy by hand
#
# A new model, two numbers a position to look at: the probability that it gave to the right token, and the loss, which
# is $-\ln$ of that probability. For each position:
#
# 1. **log-softmax**: turn the logits $z$ into log-probabilities, $\ln p_i = z_i - \ln \sum_j e^{z_j}$. The largest
#    logit is taken off first, so that no exponential overflows.
# 2. **gather**: take the log-probability of the token that really came.
# 3. **mean**: average $-\ln p$ over all positions.

# %%
cfg = slm_jax.get_gpt_config(
    "tiny", vocab_size=tokenizer.vocab_size, context_length=CONTEXT, emb_dim=64, n_heads=2, n_layers=1
)
model = slm_jax.GPTModel(cfg)
batch = loader(corpus.train, batch_size=16)[0]
params = jax.jit(model.init)(jax.random.key(0), batch["inputs"])["params"]
logits = jax.jit(model.apply)({"params": params}, batch["inputs"])  # float32 (batch, position, token)

shifted = logits - logits.max(axis=-1, keepdims=True)
log_probs = shifted - jnp.log(jnp.exp(shifted).sum(axis=-1, keepdims=True))
picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
loss = -picked.mean()
print(f"logits {logits.shape}, of the right tokens {picked.shape}, loss {loss:.3f} nats a token")

# %% [markdown]
# Optax has the same in one call. The library's loss gives two sums, of the losses and of the weights, so that the mean
# can be taken once over several batches or devices. It also never holds the logits of a whole large batch; the value
# is the same.
#
# In the library this is `make_loss_fn` in [`slm_jax/tasks/pretraining.py`](../slm_jax/tasks/pretraining.py) and
# [`slm_jax/nn/loss.py`](../slm_jax/nn/loss.py).

# %%
of_optax = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
loss_fn = make_loss_fn(model)
loss_sum, weight_sum, _ = jax.jit(lambda params, batch: loss_fn(params, {}, batch, None))(params, batch)
print(f"by hand {loss:.5f}   optax {of_optax:.5f}   library {loss_sum / weight_sum:.5f}")
assert abs(loss - of_optax) < 1e-5
assert abs(loss - loss_sum / weight_sum) < 1e-5

# %% [markdown]
# ## Perplexity, and the loss of a model that knows nothing
#
# **Perplexity** is $e^{\text{loss}}$: the model is as unsure as if it had to choose among that many equally likely
# tokens.
#
# GPT-2's initial weights are small, so the logits of a new model are all near 0 and all tokens nearly equally likely,
# each with probability $1/V$ for a vocabulary of $V$. Its loss is then $-\ln \frac{1}{V} = \ln V$, and its perplexity
# $V$. It is worth checking at the start of any training: a first loss far above $\ln V$ says that something is wrong
# already.

# %%
V = tokenizer.vocab_size
print(f"loss {loss:.2f}, ln {V} = {math.log(V):.2f}; perplexity {math.exp(loss):.0f}")
assert abs(loss - math.log(V)) < 0.1

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
p = np.geomspace(1 / 2000, 1, 200)
axes[0].plot(p, -np.log(p), color=BLUE)
for probability, name in ((1 / V, f"a new model, 1/{V}"), (1 / 20, "1/20"), (1 / 2, "1/2"), (1, "certain")):
    axes[0].plot(probability, -math.log(probability), "o", color=ORANGE)
    axes[0].annotate(
        name, (probability, -math.log(probability)), (6, 4), textcoords="offset points", ha="left", fontsize=9
    )
axes[0].set(title="loss of one token", xlabel="probability of the right token", ylabel="−ln p (nats)", xscale="log")
axes[0].set_xlim(right=6)
axes[1].hist(np.ravel(-picked), bins=30, color=BLUE)
axes[1].axvline(math.log(V), color=ORANGE, label=f"ln {V}")
axes[1].set(title="a new model on one batch", xlabel="loss of a token (nats)", ylabel="tokens")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# ## `jit`: traced once
#
# `jax.jit` runs your Python function **once** for each new kind of arguments, with stand-ins instead of arrays, writes
# down which operations it does (it is *traced*), compiles them with XLA, and from then on runs only the compiled
# program. So what Python itself does, such as the `append` below, happens only while tracing, and we can count with
# it. A kind is shape and type; values do not matter.

# %%
traces = []


@jax.jit
def mean_square(x):
    traces.append(f"{x.dtype}{list(x.shape)}")  # Python: runs while tracing, and never again
    return jnp.mean(x * x)


mean_square(jnp.array([1.0, 2.0, 3.0]))
mean_square(jnp.array([4.0, 5.0, 6.0]))  # other values: nothing is compiled
mean_square(jnp.array([1.0, 2.0, 3.0, 4.0]))  # another shape
mean_square(jnp.array([1, 2, 3]))  # another type
mean_square(jnp.array([7.0, 8.0, 9.0]))  # the first program again
print(traces)
assert traces == ["float32[3]", "float32[4]", "int32[3]"]

# %% [markdown]
# This is why batches have one shape for the whole run, and why what is short is filled up with weight 0. A Python
# value that decides *what* is computed can be declared **static**; then each value is a program of its own.

# %%
traces.clear()


def power(x, exponent):
    traces.append(exponent)
    return x**exponent if exponent > 0 else jnp.ones_like(x)  # Python's `if` needs a value that is known


fast_power = jax.jit(power, static_argnames="exponent")
for exponent in (2, 3, 2, 0, 3):
    fast_power(jnp.arange(3.0), exponent=exponent)
print(traces)
assert traces == [2, 3, 0]

# %% [markdown]
# ## What is traced, and what is compiled
#
# What was written down is called a **jaxpr**. Here for one layer: a matrix product, a GELU, a sum. Each line is one
# operation, with the type and shape of its result in front.


# %% tags=["varies"]
def gelu(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def layer(x, w):
    return gelu(x @ w).sum()


x, w = jnp.ones((64, 128)), jnp.ones((128, 256))
print(jax.make_jaxpr(layer)(x, w).pretty_print(use_color=False))

# %% [markdown]
# XLA does not run these one after the other. It **fuses** operations that work element by element into one loop, which
# reads its input once and writes its result once, where one operation after the other would write and read every value
# in between. A compiled program can be asked how much arithmetic it does, in floating-point operations (FLOPs). A
# product of (m, k) and (k, n) matrices is $2mkn$ of them: a multiplication and an addition for each pair.

# %%
whole_program = jax.jit(gelu).lower(x).compile().as_text()
main_program = whole_program[whole_program.index("ENTRY") :]
results = [line for line in main_program.splitlines() if " = " in line and "parameter(" not in line]
print(f"{len(jax.make_jaxpr(gelu)(x).eqns)} operations of GELU become {len(results)}")
assert len(results) == 1

flops = jax.jit(lambda x, w: x @ w).lower(x, w).compile().cost_analysis()["flops"]
print(f"product: {flops:,.0f} FLOPs by XLA, {2 * 64 * 128 * 256:,} by 2mkn")
assert abs(flops / (2 * 64 * 128 * 256) - 1) < 0.01

# %% [markdown]
# Now the heart of training: the loss and its gradient with respect to every parameter. `jax.value_and_grad` makes a
# function that returns both; `jit` compiles it whole, forwards and backwards. A rule of thumb says that this takes six
# FLOPs a token for each parameter: two forwards and twice that backwards.


# %%
def mean_loss(params, batch):
    loss_sum, weight_sum, _ = loss_fn(params, {}, batch, None)  # {}: nothing is frozen; None: no dropout
    return loss_sum / weight_sum


loss_and_grads = jax.jit(jax.value_and_grad(mean_loss))
compiled = loss_and_grads.lower(params, batch).compile()
n_params = sum(leaf.size for leaf in jax.tree.leaves(params))
rule = 6 * n_params * batch["inputs"].size
print(f"{n_params:,} parameters, {batch['inputs'].size} tokens")
print(f"{compiled.cost_analysis()['flops'] / 1e6:.0f} million FLOPs by XLA, {rule / 1e6:.0f} million by the rule")
assert 0.8 < compiled.cost_analysis()["flops"] / rule < 1.2

# %% [markdown]
# ## With and without `jit`
#
# Without `jit` each operation is a program of its own: Python hands one to the device, and every result goes through
# memory. We time twenty GELUs after one another, both ways, each called once before so that compiling does not count.
# JAX returns before the work is done, so a measurement has to wait for it: `block_until_ready`. Small arrays show what
# Python costs for each operation, large ones what the ways through memory cost.


# %% tags=["varies"]
def twenty(x):
    for _ in range(20):
        x = gelu(x)
    return x


def milliseconds(function, x):
    function(x).block_until_ready()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        function(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 1000 * sorted(times)[3]


sizes = (64, 256, 1024)
eager = [milliseconds(twenty, jnp.ones((64, size))) for size in sizes]
jitted = [milliseconds(jax.jit(twenty), jnp.ones((64, size))) for size in sizes]
for size, slow, fast in zip(sizes, eager, jitted, strict=True):
    print(f"(64, {size}): {slow:6.2f} ms eager, {fast:6.2f} ms jitted, {slow / fast:.0f} times")

# %%
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for offset, times, color, name in ((-0.2, eager, ORANGE, "eager"), (0.2, jitted, BLUE, "jitted")):
    ax.bar(np.arange(len(sizes)) + offset, times, width=0.4, color=color, label=name)
ax.set_xticks(range(len(sizes)), [f"(64, {size})" for size in sizes])
ax.set(title="twenty GELUs", xlabel="shape", ylabel="milliseconds (log scale)", yscale="log")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Eight devices
#
# A **mesh** gives the devices names by axis. A **sharding** says how an array lies on them: `P("data")` cuts the first
# axis of the array along the mesh's axis `data`, and `P()` gives every device the whole. We cut the batch, 16 rows, so
# that each device has two; the parameters are whole on each.

# %%
mesh = jax.make_mesh((8,), ("data",), devices=devices, axis_types=(AxisType.Auto,))
split_batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
copied_params = jax.device_put(params, NamedSharding(mesh, P()))
for shard in split_batch["inputs"].addressable_shards[:3]:
    print(f"device {shard.device.id}: rows {shard.index[0].start} to {shard.index[0].stop - 1}, {shard.data.shape}")
assert all(shard.data.shape == (2, CONTEXT) for shard in split_batch["inputs"].addressable_shards)

# %% [markdown]
# The function stays as it is. `jit` sees where its arguments lie and compiles one program that all devices run, each
# on its rows. Where a result needs all rows, such as the mean loss and the gradients, XLA puts in an exchange: an
# **all-reduce** adds up what the devices have and gives the sum to each.

# %%
split_loss, split_grads = loss_and_grads(copied_params, split_batch)
program = loss_and_grads.lower(copied_params, split_batch).compile().as_text()
n_exchanges = program.count("all-reduce(") + program.count("all-reduce-start(")
print("all-reduce in the program:", n_exchanges > 0)
assert n_exchanges > 0
assert split_loss.sharding.is_fully_replicated

# %% [markdown]
# The result must not depend on how many devices there are. It does not, but for the order in which numbers are added:
# with rounding, $(a+b)+c$ is not always $a+(b+c)$. So we compare gradients relative to their **global norm**, the root
# of the sum of all their squares.


# %%
def distance(grads, others):
    """Norm of the difference over the norm of the first, both over all leaves."""
    other = jax.device_get(others)
    return optax.tree.norm(jax.tree.map(lambda a, b: a - b, grads, other)) / optax.tree.norm(grads)


one_loss, one_grads = loss_and_grads(params, batch)
print(f"loss on one device {one_loss:.5f}, on eight {split_loss:.5f}")
assert abs(one_loss - jax.device_get(split_loss)) < 1e-5
assert distance(one_grads, split_grads) < 1e-5

# %% [markdown]
# ## Splitting the parameters too
#
# Eight copies of the parameters are fine while they fit. For a large model they are split as well: each device keeps a
# part of every large matrix, and the parts are brought together where they are needed. This is called fully sharded
# data parallelism, **FSDP**. A mesh of 2 × 4 does both: the batch is cut over all eight devices, the parameters over
# the four of the axis `fsdp`, and the two groups along `data` hold the same parts.
#
# In the library this is [`slm_jax/training/sharding.py`](../slm_jax/training/sharding.py); for a run it is one option,
# `--mesh.fsdp 4`.

# %%
mesh_2x4 = jax.make_mesh((2, 4), ("data", "fsdp"), devices=devices, axis_types=(AxisType.Auto,) * 2)
fsdp_params, fsdp_batch = put_params(mesh_2x4, params), put_batch(mesh_2x4, batch)
fsdp_loss, fsdp_grads = loss_and_grads(fsdp_params, fsdp_batch)
assert abs(one_loss - jax.device_get(fsdp_loss)) < 1e-5
assert distance(one_grads, fsdp_grads) < 1e-5


def bytes_on_device_0(tree):
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
    return sum(shard.nbytes for shard in shards)


for name, tree in (("whole on each device", copied_params), ("split over four", fsdp_params)):
    print(f"{name}: {bytes_on_device_0(tree) / 1000:.0f} kB a device")
assert bytes_on_device_0(fsdp_params) < bytes_on_device_0(copied_params) / 3

# %% [markdown]
# Which device holds what: the pictures below are read from the arrays themselves, through `addressable_shards`. Every
# rectangle is a piece of the array, with the numbers of the devices that hold it. Small arrays, such as norms and
# biases, stay whole: to split them would cost more in messages than it saves in memory.

# %%
COLORS = ["#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#7FB3D5", "#BBBBBB"]


def draw(ax, array, title):
    holders = collections.defaultdict(list)
    for shard in array.addressable_shards:
        rows, columns = (s.indices(size)[:2] for s, size in zip(shard.index, array.shape, strict=True))
        holders[rows, columns].append(shard.device.id)
    for color, ((rows, columns), ids) in zip(COLORS, sorted(holders.items()), strict=False):
        (top, bottom), (left, right) = rows, columns
        ax.add_patch(plt.Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="black"))
        text = f"{ids[0]} to {ids[-1]}" if len(ids) == 8 else ", ".join(map(str, sorted(ids)))
        ax.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center")
    ax.set(xlim=(0, array.shape[1]), ylim=(array.shape[0], 0), title=title, xlabel=f"shape {array.shape}")
    ax.set_xticks([0, array.shape[1]])
    ax.set_yticks([0, array.shape[0]])


figure, axes = plt.subplots(1, 4, figsize=(9, 3.4), layout="constrained")
draw(axes[0], split_batch["inputs"], "batch, mesh 8")
draw(axes[1], copied_params["tok_emb"]["embedding"], "embedding, mesh 8")
draw(axes[2], fsdp_params["tok_emb"]["embedding"], "embedding, mesh 2 × 4")
draw(axes[3], fsdp_params["blocks"]["ff"]["fc"]["kernel"][0], "fc kernel, mesh 2 × 4")
figure.suptitle("numbers: the devices that hold a piece")
plt.show()

# %% [markdown]
# The cut goes along the largest axis that four divides: the rows of the embedding, the columns of the kernel. On eight
# real devices the program is the same one; here eight pretended ones share your cores, so nothing becomes faster.
#
# ## Exercises
#
# **1. Bits a byte.** The loss a token depends on the tokenizer: longer tokens are harder to guess, and there are fewer
# of them. Loss a *byte* of text can be compared. How many bits a byte does the new model need, if a nat is $1/\ln 2$
# bits and a token stands for `corpus.bytes_per_token` bytes? How many does a model need that takes all 256 bytes as
# equally likely?
#
# <details><summary>Solution</summary>
#
# ```python
# bits_per_byte = float(loss) / math.log(2) / corpus.bytes_per_token
# uniform = -math.log2(1 / 256)
# print(f"{bits_per_byte:.2f} bits a byte, {uniform:.0f} by guessing bytes")
# assert bits_per_byte < uniform == 8
# ```
#
# It needs about half as many as guessing bytes does, and has not learned anything: that much is in the tokenizer,
# whose tokens are pieces that occur often.
# </details>
#
# **2. Fewer programs.** A service gets texts of any length from 1 to 64 tokens. Jitted as it is, it would compile 64
# programs. Fill the texts up with zeros so that it compiles at most 7, and show by counting traces that it does.
#
# <details><summary>Solution</summary>
#
# ```python
# counted = []
#
#
# @jax.jit
# def average(tokens, length):
#     counted.append(tokens.shape)
#     mask = jnp.arange(tokens.size) < length
#     return jnp.sum(tokens * mask) / length
#
#
# for length in range(1, 65):
#     width = 2 ** math.ceil(math.log2(length))
#     padded = np.zeros(width, np.float32)
#     padded[:length] = np.arange(length)
#     assert abs(average(padded, length) - (length - 1) / 2) < 1e-4
# assert len(counted) == 7
# ```
#
# The widths are the powers of two from 1 to 64. The length is an array to JAX, not a shape, so its value costs no
# program; the mask keeps what was filled up out of the result. The library does the same with texts to be classified.
# </details>
#
# **3. Another mesh.** Lay the same parameters and batch on a mesh of 4 × 2. What does each device hold of the token
# embedding and of the batch? Say it before you look; then check it, and that the loss is the same.
#
# <details><summary>Solution</summary>
#
# ```python
# mesh_4x2 = jax.make_mesh((4, 2), ("data", "fsdp"), devices=devices, axis_types=(AxisType.Auto,) * 2)
# placed, rows = put_params(mesh_4x2, params), put_batch(mesh_4x2, batch)
# assert placed["tok_emb"]["embedding"].addressable_shards[0].data.shape == (V // 2, cfg.emb_dim)
# assert rows["inputs"].addressable_shards[0].data.shape == (2, CONTEXT)
# other_loss, _ = loss_and_grads(placed, rows)
# assert abs(one_loss - jax.device_get(other_loss)) < 1e-5
# ```
#
# Half of the embedding, as `fsdp` is two now, and two rows as before: the batch is cut over both axes together.
# </details>
#
# ## What to take along
#
# - The loss is the mean of $-\ln p$ of the tokens that came; a new model's is $\ln V$, and $e^{\text{loss}}$ is the
#   number of tokens that it hesitates between.
# - `jit` runs Python once for each shape and type and a compiled program afterwards; so batches keep one shape, and a
#   batch is a function of seed and step.
# - A sharding says where the pieces of an array lie; the function stays the same, XLA puts the exchanges in, and loss
#   and gradients agree up to rounding.
#
# Next: [training](10_training.py), where these gradients are put to use.
