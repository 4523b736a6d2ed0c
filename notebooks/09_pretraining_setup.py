# %% [markdown]
# # 9. Preparing for training
#
# [Notebook 8](08_gpt.py) ended with a complete GPT. This notebook covers four things that training needs: the **loss**
# that measures how wrong the model is (cross-entropy, and perplexity, its readable form); the **batches** it is trained
# on; what **`jit`** compiles, and when it compiles again; and how a batch is distributed over **eight devices** without
# changing the result. It runs in about 20 seconds on two CPU cores.

# %% [markdown]
# ## Before JAX starts
#
# JAX can simulate eight devices on one CPU. Two environment variables control this, and JAX reads them when it
# initialises its devices, so they must be set before any computation. `XLA_FLAGS` sets the number of devices. `NPROC`
# sets the number of threads: devices that exchange results wait for each other, and with fewer threads than devices
# they may deadlock, until JAX aborts the process. Everything here runs on the CPU, even if there is a GPU or TPU,
# because we want eight devices.

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
assert len(devices) == 8, "JAX was initialised before this cell: restart the kernel and run the cells in order"
print([device.id for device in devices])

# %% [markdown]
# ## Training and validation text
#
# The text is 240 short reviews that come with these notebooks. The model is evaluated on a part that it never trains
# on; otherwise memorising would look like understanding. The order of the steps matters: first the texts are split into
# training and validation (only the text at the boundary is cut in two), then the tokenizer is trained on the training
# part, and last the tokens are cut into windows. In the other order, a training window could overlap a validation
# window.

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
# An end-of-text token separates the reviews. The validation reviews are a fixed random choice, so that both parts are
# similar. No review is in both parts, except the one at the boundary, which is cut in two.
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
# A model sees windows of a fixed length, its **context**. From a window that starts at $s$ it gets the tokens
# $s, s+1, \dots$ and should predict the next token at each position, so the targets are the same window shifted by one
# token.

# %%
CONTEXT = 32
start = 100
inputs, targets = corpus.train[start : start + CONTEXT], corpus.train[start + 1 : start + CONTEXT + 1]
assert (inputs[1:] == targets[:-1]).all()
for position in range(6):
    seen, wanted = tokenizer.decode(inputs[: position + 1].tolist()), tokenizer.decode([int(targets[position])])
    print(f"{seen!r:>34}  ->  {wanted!r}")

# %% [markdown]
# Windows start every **stride** tokens. With a stride equal to the context each token is a target once; with half of
# it, twice, with different text before it. The loader below returns batches of windows in the requested order; without
# shuffling, its first batch equals the windows cut by hand.
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
# `loader[i]` is the batch of step $i$, always the same for the same seed, and independent of which batches were read
# before. So a killed run can resume with exactly the same batches ([notebook 10](10_training.py)).

# %%
first, again, other = loader(corpus.train), loader(corpus.train), loader(corpus.train, seed=1)
assert (first[700]["inputs"] == again[700]["inputs"]).all()
assert (first[700]["inputs"] != other[700]["inputs"]).any()

# %% [markdown]
# To see the order, give the loader the numbers 0, 1, 2, … as text: the first input of a window is then its start. One
# pass over all windows is an **epoch**, and each epoch has its own order. The alternative, random starts (the default
# of `slm-jax train`), has no epochs: some tokens occur several times before others occur once. After the number of
# steps of one epoch, a token has not been used with probability $1/e$, about 37%.

# %%
numbers = np.arange(corpus.train.size)
n_windows = len(range(0, numbers.size - CONTEXT, CONTEXT))
epoch = n_windows / 8  # in steps
steps = np.arange(3 * n_windows // 8)
in_order, at_random = loader(numbers), loader(numbers, sampling="random")
shuffled = np.stack([in_order[int(i)]["inputs"][:, 0] for i in steps])
random = np.stack([at_random[int(i)]["inputs"][:, 0] for i in steps])
assert sorted(shuffled.ravel()[:n_windows]) == list(range(0, numbers.size - CONTEXT, CONTEXT))
print(f"{n_windows} windows, {epoch:.1f} batches of 8 per epoch")

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
axes[2].set(title="tokens used as a target", xlabel="steps", ylabel="share of the text", ylim=(0, 1.05))
axes[2].legend(frameon=False, loc="lower right")
for ax in axes[1:]:
    for i in (1, 2):
        ax.axvline(i * epoch, color=GREY, linestyle="--", linewidth=1)
plt.show()

# %% [markdown]
# The dashed lines mark the epochs. Validation is simpler: the whole split, once, in order. The last window is padded,
# and the padding gets **weight** 0, so that every token except the first is a target exactly once.

# %%
batches = list(validation_batches(corpus.validation, context_length=CONTEXT, batch_size=8))
counted = sum(batch["weights"].sum() for batch in batches)
size = sum(batch["weights"].size for batch in batches)
print(f"{len(batches)} batches, {int(counted)} of {size} targets have weight 1")
assert counted == corpus.validation.size - 1

# %% [markdown]
# ## Cross-entropy by hand
#
# We take an untrained model. At each position its loss is $-\ln$ of the probability that it assigned to the correct
# token:
#
# 1. **log-softmax**: turn the logits $z$ into log-probabilities, $\ln p_i = z_i - \ln \sum_j e^{z_j}$. The largest
#    logit is subtracted first, so that no exponential overflows.
# 2. **gather**: select the log-probability of the correct token.
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
print(f"logits {logits.shape}, of the correct tokens {picked.shape}, loss {loss:.3f} nats per token")

# %% [markdown]
# Optax does the same in one call. The library's loss returns two sums, of the losses and of the weights, so that the
# mean can be taken once over several batches or devices. It also never stores the logits of a whole large batch; the
# value is the same.
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
# ## Perplexity, and the loss of an untrained model
#
# **Perplexity** is $e^{\text{loss}}$: the model is as uncertain as if it had to choose among that many equally likely
# tokens.
#
# GPT-2's initial weights are small, so the logits of an untrained model are near 0 and all tokens nearly equally
# likely, each with probability $1/V$ for a vocabulary of $V$. Its loss is then $-\ln \frac{1}{V} = \ln V$, and its
# perplexity $V$. Check this at the start of any training: an initial loss far above $\ln V$ indicates a mistake.

# %%
V = tokenizer.vocab_size
print(f"loss {loss:.2f}, ln {V} = {math.log(V):.2f}; perplexity {math.exp(loss):.0f}")
assert abs(loss - math.log(V)) < 0.1

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
p = np.geomspace(1 / 2000, 1, 200)
axes[0].plot(p, -np.log(p), color=BLUE)
for probability, name in ((1 / V, f"untrained, 1/{V}"), (1 / 20, "1/20"), (1 / 2, "1/2"), (1, "certain")):
    axes[0].plot(probability, -math.log(probability), "o", color=ORANGE)
    axes[0].annotate(
        name, (probability, -math.log(probability)), (6, 4), textcoords="offset points", ha="left", fontsize=9
    )
axes[0].set(title="loss of one token", xlabel="probability of the correct token", ylabel="−ln p (nats)", xscale="log")
axes[0].set_xlim(right=6)
axes[1].hist(np.ravel(-picked), bins=30, color=BLUE)
axes[1].axvline(math.log(V), color=ORANGE, label=f"ln {V}")
axes[1].set(title="untrained model on one batch", xlabel="loss of a token (nats)", ylabel="tokens")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# ## `jit`: traced once
#
# `jax.jit` runs your Python function **once** for each new combination of argument shapes and dtypes, with abstract
# values instead of arrays. It records the operations (*tracing*), compiles them with XLA, and from then on runs only
# the compiled program. So Python side effects, such as the `append` below, happen only during tracing, and we can count
# traces with them.

# %%
traces = []


@jax.jit
def mean_square(x):
    traces.append(f"{x.dtype}{list(x.shape)}")  # Python: runs only during tracing
    return jnp.mean(x * x)


mean_square(jnp.array([1.0, 2.0, 3.0]))
mean_square(jnp.array([4.0, 5.0, 6.0]))  # other values: nothing is compiled
mean_square(jnp.array([1.0, 2.0, 3.0, 4.0]))  # another shape
mean_square(jnp.array([1, 2, 3]))  # another dtype
mean_square(jnp.array([7.0, 8.0, 9.0]))  # the first program again
print(traces)
assert traces == ["float32[3]", "float32[4]", "int32[3]"]

# %% [markdown]
# This is why batches have the same shape for the whole run, and why short windows are padded with weight 0. A Python
# value that decides *what* is computed can be declared **static**; then each value gets its own program.

# %%
traces.clear()


def power(x, exponent):
    traces.append(exponent)
    return x**exponent if exponent > 0 else jnp.ones_like(x)  # Python's `if` needs a concrete value


fast_power = jax.jit(power, static_argnames="exponent")
for exponent in (2, 3, 2, 0, 3):
    fast_power(jnp.arange(3.0), exponent=exponent)
print(traces)
assert traces == [2, 3, 0]

# %% [markdown]
# ## What is traced, and what is compiled
#
# The recorded operations are called a **jaxpr**. Here it is for one layer: a matrix product, a GELU, a sum. Each line
# is one operation, with the dtype and shape of its result in front.


# %% tags=["varies"]
def gelu(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def layer(x, w):
    return gelu(x @ w).sum()


x, w = jnp.ones((64, 128)), jnp.ones((128, 256))
print(jax.make_jaxpr(layer)(x, w).pretty_print(use_color=False))

# %% [markdown]
# XLA does not run these one by one. It **fuses** element-wise operations into one loop, which reads its input once and
# writes its result once, instead of writing and reading every intermediate value. XLA also reports how much arithmetic
# a compiled program does, in floating-point operations (FLOPs). A product of (m, k) and (k, n) matrices takes $2mkn$: a
# multiplication and an addition for each pair.

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
# Now the core of training: the loss and its gradient with respect to every parameter. `jax.value_and_grad` makes a
# function that returns both; `jit` compiles the forward and backward pass together. As a rule of thumb, this takes six
# FLOPs per token and parameter: two forward and four backward.


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
# Without `jit`, each operation is a separate program that Python dispatches to the device, and every result goes
# through memory. We time twenty GELUs in a row, with and without `jit`, after one call to exclude compilation. JAX
# returns before the work is done, so a measurement must wait with `block_until_ready`. Small arrays show the cost of
# Python per operation, large ones the cost of memory traffic.


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
# A **mesh** arranges the devices along named axes. A **sharding** says how an array is distributed over them:
# `P("data")` splits the first axis of the array along the mesh axis `data`, and `P()` replicates the array on every
# device. We split the batch of 16 rows, so that each device has two; the parameters are replicated.

# %%
mesh = jax.make_mesh((8,), ("data",), devices=devices, axis_types=(AxisType.Auto,))
split_batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
copied_params = jax.device_put(params, NamedSharding(mesh, P()))
for shard in split_batch["inputs"].addressable_shards[:3]:
    print(f"device {shard.device.id}: rows {shard.index[0].start} to {shard.index[0].stop - 1}, {shard.data.shape}")
assert all(shard.data.shape == (2, CONTEXT) for shard in split_batch["inputs"].addressable_shards)

# %% [markdown]
# The function stays the same. `jit` sees the sharding of its arguments and compiles one program that all devices run,
# each on its rows. Where a result needs all rows, such as the mean loss and the gradients, XLA inserts a collective
# operation: an **all-reduce** adds up the devices' values and gives the sum to each.

# %%
split_loss, split_grads = loss_and_grads(copied_params, split_batch)
program = loss_and_grads.lower(copied_params, split_batch).compile().as_text()
n_collectives = program.count("all-reduce(") + program.count("all-reduce-start(")
print("all-reduce in the program:", n_collectives > 0)
assert n_collectives > 0
assert split_loss.sharding.is_fully_replicated

# %% [markdown]
# The result must not depend on the number of devices. It does not, except for the order of additions: with rounding,
# $(a+b)+c$ is not always $a+(b+c)$. So we compare gradients relative to their **global norm**, the root of the sum of
# all their squares.


# %%
def distance(grads, others):
    """Return the global norm of the difference, relative to that of the first."""
    other = jax.device_get(others)
    return optax.tree.norm(jax.tree.map(lambda a, b: a - b, grads, other)) / optax.tree.norm(grads)


one_loss, one_grads = loss_and_grads(params, batch)
print(f"loss on one device {one_loss:.5f}, on eight {split_loss:.5f}")
assert abs(one_loss - jax.device_get(split_loss)) < 1e-5
assert distance(one_grads, split_grads) < 1e-5

# %% [markdown]
# ## Sharding the parameters
#
# Eight copies of the parameters are fine while they fit in memory. For a large model they are sharded as well: each
# device keeps a part of every large matrix, and the parts are gathered when they are needed. This is called fully
# sharded data parallelism, **FSDP**. A 2 × 4 mesh does both: the batch is split over all eight devices, the parameters
# over the four devices of the axis `fsdp`, and the two groups along `data` hold the same parts.
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


for name, tree in (("replicated", copied_params), ("sharded over four", fsdp_params)):
    print(f"{name}: {bytes_on_device_0(tree) / 1000:.0f} kB per device")
assert bytes_on_device_0(fsdp_params) < bytes_on_device_0(copied_params) / 3

# %% [markdown]
# The plots show which device holds what, read from the arrays themselves through `addressable_shards`. Every rectangle
# is a shard of the array, with the numbers of the devices that hold it. Small arrays, such as norms and biases, stay
# replicated: sharding them would cost more in communication than it saves in memory.

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
figure.suptitle("numbers: the devices that hold a shard")
plt.show()

# %% [markdown]
# Matrices are split along the axis of the model's width: the columns of the embedding, the rows of the kernel. On eight
# real devices the program is the same; here eight simulated devices share your cores, so nothing gets faster.
#
# ## Exercises
#
# **1. Bits per byte.** The loss per token depends on the tokenizer: longer tokens are harder to predict, and there are
# fewer of them. The loss per *byte* of text is comparable. How many bits per byte does the untrained model need, if a
# nat is $1/\ln 2$ bits and a token represents `corpus.bytes_per_token` bytes? How many does a model need for which all
# 256 bytes are equally likely?
#
# <details><summary>Solution</summary>
#
# ```python
# bits_per_byte = float(loss) / math.log(2) / corpus.bytes_per_token
# uniform = -math.log2(1 / 256)
# print(f"{bits_per_byte:.2f} bits per byte, {uniform:.0f} for uniform bytes")
# assert bits_per_byte < uniform == 8
# ```
#
# It needs about half as many bits as the uniform model, without any training: the tokenizer already contributes that
# much, because its tokens are frequent pieces of text.
# </details>
#
# **2. Fewer programs.** A service gets texts of any length from 1 to 64 tokens. With `jit` alone it would compile 64
# programs. Pad the texts with zeros so that it compiles at most 7, and check it by counting traces.
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
# The widths are the powers of two from 1 to 64. For JAX the length is an array value, not a shape, so it needs no new
# program; the mask excludes the padding from the result. The library does the same when it classifies texts.
# </details>
#
# **3. Another mesh.** Distribute the same parameters and batch over a 4 × 2 mesh. What does each device hold of the
# token embedding and of the batch? Predict it, then check it, and check that the loss is the same.
#
# <details><summary>Solution</summary>
#
# ```python
# mesh_4x2 = jax.make_mesh((4, 2), ("data", "fsdp"), devices=devices, axis_types=(AxisType.Auto,) * 2)
# placed, rows = put_params(mesh_4x2, params), put_batch(mesh_4x2, batch)
# assert placed["tok_emb"]["embedding"].addressable_shards[0].data.shape == (V, cfg.emb_dim // 2)
# assert rows["inputs"].addressable_shards[0].data.shape == (2, CONTEXT)
# other_loss, _ = loss_and_grads(placed, rows)
# assert abs(one_loss - jax.device_get(other_loss)) < 1e-5
# ```
#
# Half of the embedding, because `fsdp` is two now, and two rows as before: the batch is split over both axes together.
# </details>
#
# ## Key takeaways
#
# - The loss is the mean of $-\ln p$ of the correct tokens; for an untrained model it is $\ln V$. Perplexity is
#   $e^{\text{loss}}$.
# - `jit` traces a function once per shape and dtype, so all batches have one shape. A batch is a function of seed and
#   step.
# - A sharding says where the parts of an array are stored; the function stays the same, XLA inserts the communication,
#   and loss and gradients agree up to rounding.
#
# Next: [training](10_training.py), where these gradients are used.
