# %% [markdown]
# # 6. Implementing GPT-2: its parts, and its weights
#
# After attention (notebooks 2 to 5) three small parts are missing from a GPT: layer normalisation, the GELU
# nonlinearity with the feed-forward network around it, and shortcuts. You will write each in a few lines, see what it
# is good for, and check it against the library. At the end you read GPT-2's weights from their file by hand. It runs
# in about 25 seconds on two CPU cores.

# %%
import os
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from slm_jax.nn.layers import LayerNorm, gelu

import slm_jax
from slm_jax.model import FeedForward, get_gpt_config

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs otherwise round the factors of a product
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"  # told apart by colour-blind readers too

# %% [markdown]
# ## Layer normalisation
#
# What flows through a deep model can grow or shrink from part to part. A layer norm brings every token back to the same
# size: from its numbers it subtracts their mean and divides by their standard deviation.
#
# $$y = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}}$$
#
# The mean and the variance are over the features of *one* token (`axis=-1`); other tokens play no part.


# %%
def standardize(x, eps=1e-5):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + eps)


# Three tokens of 200 numbers, of very different size and place.
x = jnp.array([[1.0], [8.0], [0.2]]) * jax.random.normal(jax.random.key(0), (3, 200)) + jnp.array(
    [[0.0], [20.0], [-1.0]]
)
y = standardize(x)
for name, values in (("before", x), ("after", y)):
    mean, variance = np.asarray(values.mean(axis=-1)), np.asarray(values.var(axis=-1))
    print(f"{name:<7} mean", mean.round(2) + 0.0, " variance", variance.round(2))
assert jnp.allclose(y.mean(axis=-1), 0, atol=1e-5)
assert jnp.allclose(y.var(axis=-1), 1, atol=1e-3)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
heights = np.random.default_rng(0).uniform(-0.3, 0.3, 200)  # so that the points do not lie on each other
for axis, values, title in ((axes[0], x, "before"), (axes[1], y, "after the layer norm")):
    for token, (row, colour) in enumerate(zip(values, (BLUE, ORANGE, GREEN), strict=True)):
        axis.plot(row, token + heights, ".", color=colour, ms=3)
    axis.set(title=title, xlabel="value of a feature", yticks=range(3), yticklabels=[f"token {i}" for i in range(3)])
plt.tight_layout()
plt.show()

# %% [markdown]
# ### What $\epsilon$ is for
#
# A token whose numbers are all equal has variance 0, and 0/0 is not a number. The tiny $\epsilon = 10^{-5}$ under the
# root keeps the division defined, for the gradient too. It also means that a token far smaller than
# $\sqrt{\epsilon} \approx 0.003$ is not brought up to variance 1.

# %%
flat = jnp.full((1, 8), 3.0)
print("with eps:", standardize(flat)[0, :3], "  without:", standardize(flat, eps=0.0)[0, :3])
assert jnp.all(standardize(flat) == 0)
assert jnp.isnan(standardize(flat, eps=0.0)).all()
faint = 1e-4 * x[:1]
print(f"variance of a token a ten-thousandth as large: {standardize(faint).var():.3f}")

# %% [markdown]
# ### Scale and shift
#
# Variance 1 need not be best for what comes next. So each feature gets two learned numbers, a scale (at first 1) and a
# bias (at first 0), with which the model can choose another size and place for it. In Flax, `init` makes such
# parameters and `apply` uses them; both are pure functions of what goes in.
#
# In the library this is `LayerNorm` in [`slm_jax/nn/layers.py`](../slm_jax/nn/layers.py).


# %%
def layer_norm(p, x):
    return standardize(x) * p["scale"] + p["bias"]


fresh = LayerNorm().init(jax.random.key(0), x)["params"]
print("fresh:", {name: (leaf.shape, float(leaf[0])) for name, leaf in fresh.items()})
trained = {"scale": 1 + 0.5 * jax.random.normal(jax.random.key(1), (200,)), "bias": jnp.linspace(-1, 1, 200)}
for p in (fresh, trained):
    assert jnp.allclose(layer_norm(p, x), LayerNorm().apply({"params": p}, x), atol=1e-5)
print("by hand = the library's, fresh and with other parameters")

# %% [markdown]
# ## GELU
#
# Between two matrices there must be something that is not linear, or they could be multiplied into one. ReLU cuts
# everything below 0 off. GELU (Hendrycks & Gimpel, 2016) weighs $x$ with the probability $\Phi(x)$ that a standard
# normal number is smaller than $x$: large inputs pass, strongly negative ones vanish, and the corner becomes a curve.
# GPT-2 was trained with an approximation by tanh that was faster at the time.


# %%
def gelu_exact(x):
    return x * jax.scipy.stats.norm.cdf(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))


grid = jnp.linspace(-4, 4, 801)
apart = jnp.abs(gelu_exact(grid) - gelu_tanh(grid)).max()
print(f"the two forms differ by at most {apart:.5f}")
assert apart < 1e-3
assert jnp.allclose(gelu(grid), gelu_tanh(grid), atol=1e-6)
assert jnp.allclose(gelu(grid, exact=True), gelu_exact(grid), atol=1e-6)

# %% [markdown]
# Right: the slopes. `grad` differentiates a function of one number, `vmap` applies it along the grid. ReLU's slope is
# exactly 0 on the whole left, so a neuron that is always there passes no gradient on and cannot come back. GELU's slope
# is 0 at one point, about −0.75; further left it is a little negative and fades out.

# %%
curves = (
    ("ReLU", jax.nn.relu, GREY, "-"),
    ("GELU, exact", gelu_exact, BLUE, "-"),
    ("GELU, tanh", gelu_tanh, ORANGE, "--"),
)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
for name, function, colour, line in curves:
    axes[0].plot(grid, function(grid), color=colour, ls=line, label=name)
    axes[1].plot(grid, jax.vmap(jax.grad(function))(grid), color=colour, ls=line)
axes[0].set(title="function", xlabel="x", ylabel="output", ylim=(-0.5, 3))
axes[1].set(title="slope", xlabel="x", ylabel="derivative")
axes[0].legend()
plt.tight_layout()
plt.show()
low = grid[gelu_tanh(grid).argmin()]
print(f"lowest point: GELU({low:.2f}) = {gelu_tanh(low):.2f}")
assert abs(float(jax.grad(gelu_tanh)(low))) < 0.01

# %% [markdown]
# ## The feed-forward network
#
# To four times the width, GELU, and back. It sees one token at a time, with the same matrices for each: attention has
# gathered what a token needs to know, here the model works on it. Two thirds of a block's parameters are in it.
#
# In the library this is `FeedForward` in [`slm_jax/model.py`](../slm_jax/model.py).


# %%
def feed_forward(p, x):
    hidden = gelu_tanh(x @ p["fc"]["kernel"] + p["fc"]["bias"])  # (..., 4 emb)
    return hidden @ p["proj"]["kernel"] + p["proj"]["bias"]  # (..., emb)


cfg = get_gpt_config("tiny", emb_dim=64)
tokens = jax.random.normal(jax.random.key(2), (2, 5, cfg.emb_dim))
params = FeedForward(cfg).init(jax.random.key(3), tokens)["params"]
params = jax.tree.map(lambda leaf: leaf + 0.05, params)  # so that the biases, at first 0, count
print(jax.tree.map(jnp.shape, params))
ours, theirs = feed_forward(params, tokens), FeedForward(cfg).apply({"params": params}, tokens)
assert jnp.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
assert jnp.allclose(feed_forward(params, tokens[:, 3:4]), ours[:, 3:4], rtol=1e-4, atol=1e-5)  # a token by itself

# %% [markdown]
# ## Shortcuts
#
# Stack 24 such networks and ask how the loss would change if the input of layer 1 changed. By the chain rule that is a
# product of 24 derivatives. If each is one half, less than a ten-millionth is left at the bottom. A shortcut
# adds a layer's input to its output, and the derivative of $x + f(x)$ is $1 + f'(x)$: the 1 always gets through.
#
# We measure it. The loss below is so simple that the gradient at the output is the same, of size 1, with and without
# shortcuts. Adding a zero, `probes[i]`, to the input of layer i and differentiating by it gives the gradient that
# arrives there.

# %%
LAYERS, EMB = 24, 64


def init_layer(key):
    into, out_of = jax.random.split(key)
    fc = {"kernel": jax.random.normal(into, (EMB, 4 * EMB)) / jnp.sqrt(EMB), "bias": jnp.zeros(4 * EMB)}
    proj = {"kernel": jax.random.normal(out_of, (4 * EMB, EMB)) / jnp.sqrt(4 * EMB), "bias": jnp.zeros(EMB)}
    return {"fc": fc, "proj": proj}


layers = [init_layer(key) for key in jax.random.split(jax.random.key(4), LAYERS)]
x0, direction = jax.random.normal(jax.random.key(5), (2, 16, EMB))  # 16 tokens, and where they should go
direction = direction / jnp.linalg.norm(direction)


def stack_loss(probes, layers, shortcut):
    x = x0
    for probe, layer in zip(probes, layers, strict=True):
        x = x + probe
        x = x + feed_forward(layer, x) if shortcut else feed_forward(layer, x)
    return -jnp.vdot(x, direction)


# %% [markdown]
# `jit` compiles the function; `shortcut` decides which program it is, so it is *static*. One call gives the gradients
# for all 24 inputs and all parameters. GPT-2 also begins with small steps: the matrices that write into the stream are
# divided by the root of how many there are. That is the third stack.

# %%
gradients = jax.jit(jax.grad(stack_loss, argnums=(0, 1)), static_argnames="shortcut")
probes = [jnp.zeros_like(x0)] * LAYERS
scaled_layers = [{**layer, "proj": jax.tree.map(lambda leaf: leaf / LAYERS**0.5, layer["proj"])} for layer in layers]
stacks = {
    "with shortcuts": (layers, True, BLUE, "o"),
    "with shortcuts, small at first": (scaled_layers, True, GREEN, "^"),
    "without": (layers, False, ORANGE, "s"),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
arrived, of_parameters = {}, {}
for name, (chosen, shortcut, colour, marker) in stacks.items():
    arrived[name], of_layers = gradients(probes, chosen, shortcut=shortcut)
    for axis, trees in zip(axes, (arrived[name], of_layers), strict=True):
        sizes = [jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree))) for tree in trees]
        axis.plot(range(1, LAYERS + 1), sizes, color=colour, marker=marker, ms=4, label=name)
    of_parameters[name] = sizes  # the last that were drawn
for axis, title in zip(axes, ("gradient at the layer's input", "gradient of the layer's parameters"), strict=True):
    axis.set(title=title, xlabel="layer (24 is next to the output)", ylabel="size", yscale="log")
axes[0].set_ylim(1e-11, 1e3)
axes[0].legend(loc="lower right")
plt.tight_layout()
plt.show()


# %% [markdown]
# Without shortcuts each layer passes on about half of the gradient: a straight line on the logarithmic axis, and at the
# bottom a ten-millionth is left. The parameters (right) fare alike: the gradient of those of layer 1 is about two
# millionths of that of layer 24's. With shortcuts nothing gets lost; with layers of full size the gradient even grows
# on its way, a hundredfold. With small first steps it arrives as it left.
#
# Its direction tells the same. The cosine between the gradient at layer 1 and that at the output is 1 for the same
# direction and about 0 for unrelated ones: only the third stack keeps it.


# %%
def cosine(a, b):
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


for name, of in arrived.items():
    print(f"{name:<31} size {jnp.linalg.norm(of[0]):8.2g}   cosine {cosine(of[0], -direction):5.2f}")
share = of_parameters["without"][0] / of_parameters["without"][-1]
print(f"without shortcuts, parameters of layer 1 against those of layer {LAYERS}: {share:.1g}")
assert jnp.linalg.norm(arrived["without"][0]) < 2e-7
assert 1e-6 < share < 3e-6
assert jnp.linalg.norm(arrived["with shortcuts"][0]) > 0.5
assert cosine(arrived["with shortcuts, small at first"][0], -direction) > 0.4
assert abs(cosine(arrived["without"][0], -direction)) < 0.2

# %% [markdown]
# ## GPT-2's weights: a file of named tensors
#
# These parts, with attention, are all that GPT-2 has. OpenAI published its weights, and Hugging Face keeps them as a
# *safetensors* file: names, shapes and plain numbers, no code. We look for the real ones on this machine, in the folder
# `gpt2` below the one that the environment variable `SLM_JAX_DATA` names and in Hugging Face's cache, and download
# nothing. If there are none, we write such a file ourselves, of a small model with random weights: the names and the
# layout are the same.

# %% tags=["sampled"]
warnings.filterwarnings("ignore", message="IProgress")  # progress bars are not needed here
os.environ["HF_HUB_OFFLINE"] = "1"  # without this line load_gpt2("gpt2") would download 548 MB, once
try:
    gpt2_cfg, gpt2_params = slm_jax.load_gpt2("gpt2")
    from slm_jax.weights.hub import find_weights

    weights_file = find_weights("gpt2")
    if weights_file.is_dir():
        weights_file = weights_file / "model.safetensors"
    REAL = True
except FileNotFoundError:
    folder = Path(tempfile.mkdtemp()) / "small-gpt2"
    gpt2_cfg = slm_jax.get_gpt_config("gpt2-small", n_layers=3, emb_dim=48, n_heads=4, vocab_size=500)
    model = slm_jax.GPTModel(gpt2_cfg)
    gpt2_params = model.init(jax.random.key(6), jnp.zeros((1, 4), jnp.int32))["params"]
    slm_jax.save_gpt2(gpt2_cfg, gpt2_params, folder)
    weights_file = folder / "model.safetensors"
    REAL = False
print("the real GPT-2" if REAL else "no GPT-2 on this machine: a small one with random weights")
print(f"{weights_file.name}: {weights_file.stat().st_size / 1e6:,.1f} MB, {gpt2_cfg.n_layers} blocks")

# %% [markdown]
# ### What is in the file
#
# The first block's names, and those outside the blocks. `h.0` is block 0; `c_attn` makes queries, keys and values;
# `wte` and `wpe` are the embeddings of tokens and positions. Some files have `transformer.` in front of each name, and
# some hold the causal mask as `attn.bias`, which is no weight.

# %% tags=["sampled"]
with safe_open(weights_file, framework="numpy") as file:
    tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
for name, tensor in tensors.items():
    if not name.startswith("h.") or name.startswith("h.0."):
        print(f"{name:<26} {tensor.shape}")
print(f"{len(tensors)} tensors, {sum(tensor.size for tensor in tensors.values()):,} numbers")

# %% [markdown]
# ### The map of names
#
# Our tree has other names and stacks the tensor of one name from all blocks into one array. Two tables say it all.
# GPT-2's matrices are stored as (inputs, outputs), like ours, so nothing is transposed; and the output head is the
# token embedding again, so it is not in the file.

# %%
OUTSIDE = {
    "wte.weight": "tok_emb/embedding",
    "wpe.weight": "pos_emb/embedding",
    "ln_f.weight": "final_norm/scale",
    "ln_f.bias": "final_norm/bias",
}
MODULES = {
    "ln_1": "norm1",
    "attn.c_attn": "attn/qkv",
    "attn.c_proj": "attn/out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "ff/fc",
    "mlp.c_proj": "ff/proj",
}
IN_BLOCK = {}
for theirs, ours in MODULES.items():
    IN_BLOCK[f"{theirs}.weight"] = f"blocks/{ours}/{'scale' if theirs.startswith('ln') else 'kernel'}"
    IN_BLOCK[f"{theirs}.bias"] = f"blocks/{ours}/bias"

# %% [markdown]
# Loading is then: stack the tensors of one name from all blocks, put each under its path, and see that none is left
# over. `load_gpt2` gives the same tree, to the last bit.


# %%
def load_by_hand(tensors, n_layers):
    left = dict(tensors)
    flat = {path: left.pop(name) for name, path in OUTSIDE.items()}
    for name, path in IN_BLOCK.items():
        flat[path] = np.stack([left.pop(f"h.{layer}.{name}") for layer in range(n_layers)])
    assert not left, f"not used: {sorted(left)}"
    return unflatten_dict(flat, sep="/")


by_hand = load_by_hand(tensors, gpt2_cfg.n_layers)
loaded_cfg, loaded = slm_jax.load_gpt2(weights_file)
flat_hand, flat_loaded = flatten_dict(by_hand, sep="/"), flatten_dict(loaded, sep="/")
assert flat_hand.keys() == flat_loaded.keys()
assert all(np.array_equal(flat_hand[path], flat_loaded[path]) for path in flat_hand)
print(f"{len(flat_hand)} arrays in the tree, all equal to load_gpt2's")

# %% [markdown]
# ### The same function?
#
# Equal names and shapes prove little. What counts is that the model computes the same logits: for the parameters that
# we started from, for those read by hand, and for those that `load_gpt2` read.
#
# In the library this is [`slm_jax/weights/huggingface.py`](../slm_jax/weights/huggingface.py), the same two tables, and
# [`slm_jax/runs.py`](../slm_jax/runs.py), which also checks shapes, finite numbers and the settings in
# `config.json`.

# %%
apply = jax.jit(slm_jax.GPTModel(loaded_cfg).apply)
ids = jnp.array([[15, 496, 7, 7, 140, 88, 302, 3]])
logits = [apply({"params": tree}, ids) for tree in (gpt2_params, by_hand, loaded)]
assert jnp.array_equal(logits[0], logits[1])
assert jnp.array_equal(logits[0], logits[2])
print("logits", logits[0].shape[:2], "+ vocabulary: the same three times")

# %% [markdown]
# A model that knows nothing gives each of its tokens about the same probability, and the likeliest continuation is as
# good as any other. The real one goes on with a sentence.

# %% tags=["sampled"]
probabilities = jax.nn.softmax(logits[0][0, -1])
print(f"likeliest next token: {probabilities.max():.2g}; all alike would be {1 / gpt2_cfg.vocab_size:.2g}")
if REAL:
    tokenizer = slm_jax.get_tokenizer("gpt2")
    prompt = jnp.array([tokenizer.encode("The first thing to know about a language model is")])
    rows = slm_jax.generate(slm_jax.GPTModel(gpt2_cfg), loaded, prompt, max_new_tokens=20, temperature=0)
    print(tokenizer.decode(rows[0]))

# %% [markdown]
# ## Exercises
#
# **1.** Many newer models leave the mean alone and only divide by the root of the mean square (RMSNorm). Write it, and
# show that on tokens whose mean is 0 it does the same as a layer norm.
#
# <details><summary>Solution</summary>
#
# ```python
# def rms_norm(x, eps=1e-5):
#     return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)
#
#
# centred = x - x.mean(axis=-1, keepdims=True)
# assert jnp.allclose(rms_norm(centred), standardize(x), atol=1e-4)
# assert not jnp.allclose(rms_norm(x), standardize(x), atol=0.1)
# ```
#
# The mean can be removed by the matrix before it, so little is lost, and one pass over the numbers is saved.
#
# </details>
#
# **2.** With shortcuts every layer adds something, and the stream grows. How large is it after all 24 of `layers`, and
# of `scaled_layers`?
#
# <details><summary>Solution</summary>
#
# ```python
# def size_after(layers):
#     x = x0
#     for layer in layers:
#         x = x + feed_forward(layer, x)
#     return float(jnp.sqrt(jnp.mean(x**2)))
#
#
# plain, scaled = size_after(layers), size_after(scaled_layers)
# print(f"{plain:.0f} and {scaled:.1f}")
# assert plain > 20
# assert scaled < 2
# ```
#
# Each layer adds a share of what is there, so the stream grows like compound interest. A GPT writes twice a block, so
# GPT-2 divides by $\sqrt{2 \cdot \text{layers}}$.
#
# </details>
#
# **3.** `attn.c_proj.weight` is square, so a transposed copy fits in shape and no check of shapes can find the mistake.
# Transpose it in all blocks and look at the logits.
#
# <details><summary>Solution</summary>
#
# ```python
# wrong = {name: tensor.T if name.endswith("attn.c_proj.weight") else tensor for name, tensor in tensors.items()}
# other = apply({"params": load_by_hand(wrong, gpt2_cfg.n_layers)}, ids)
# assert other.shape == logits[0].shape
# assert not jnp.allclose(other, logits[0], rtol=1e-4, atol=1e-6)
# ```
#
# It loads without a word and computes something else. That is why the library's tests compare logits, not shapes.
#
# </details>
#
# ## What to take along
#
# - A layer norm brings each token to mean 0 and variance 1, then lets the model scale and shift it.
# - Shortcuts let the gradient through; without them a ten-millionth of it was left after 24 layers.
# - Weights are named tensors. Two tables of names turn GPT-2's file into our tree, and equal logits prove it.
#
# Next: [7. The transformer block](07_transformer_block.py), these parts in their places.
