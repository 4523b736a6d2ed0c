# %% [markdown]
# # 6. Implementing GPT-2: its parts and its weights
#
# After attention (notebooks 2 to 5), three small parts of a GPT are missing: layer normalisation, the feed-forward
# network with its GELU nonlinearity, and shortcut (residual) connections. You write each in a few lines, see why it is
# needed, and check it against the library. At the end you read GPT-2's weights from their file by hand. The notebook
# runs in about 20 seconds on two CPU cores.

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

import slm_jax
from slm_jax.model import get_gpt_config
from slm_jax.nn.mlp import FeedForward, gelu
from slm_jax.nn.norms import LayerNorm

jax.config.update("jax_default_matmul_precision", "highest")  # full float32 precision on GPUs and TPUs too
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"  # colour-blind safe

# %% [markdown]
# ## Layer normalisation
#
# Activations in a deep model can grow or shrink from layer to layer. A layer norm brings every token back to the same
# scale: it subtracts the mean of the token's numbers and divides by their standard deviation.
#
# $$y = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}}$$
#
# The mean and the variance are taken over the features of *one* token (`axis=-1`); other tokens are not involved.


# %%
def standardize(x, eps=1e-5):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + eps)


# Three tokens of 200 numbers with very different scales and means.
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
heights = np.random.default_rng(0).uniform(-0.3, 0.3, 200)  # jitter, so that the points do not overlap
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
# root keeps the division and its gradient defined. It also means that a token much smaller than
# $\sqrt{\epsilon} \approx 0.003$ is not scaled up to variance 1.

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
# Mean 0 and variance 1 are not always best for the next layer. So each feature has two learned parameters, a scale
# (initially 1) and a bias (initially 0), with which the model can choose a different scale and mean. In Flax, `init`
# creates such parameters and `apply` uses them; both are pure functions of their arguments.
#
# In the library this is `LayerNorm` in [`slm_jax/nn/norms.py`](../slm_jax/nn/norms.py).


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
# Between two matrices there must be a nonlinear function, or they could be multiplied into one. ReLU sets everything
# below 0 to 0. GELU (Hendrycks & Gimpel, 2016) multiplies $x$ by the probability $\Phi(x)$ that a standard normal
# variable is smaller than $x$: large inputs pass, strongly negative ones vanish, and the corner becomes a smooth curve.
# GPT-2 was trained with a tanh approximation that was faster at the time.


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
# The right plot shows the derivatives. `grad` differentiates a function of one number, and `vmap` applies it along the
# grid. ReLU's derivative is exactly 0 for all negative inputs, so a neuron whose input is always negative gets no
# gradient and cannot recover. GELU's derivative is 0 at one point, about −0.75; further left it is slightly negative
# and approaches 0.

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
axes[1].set(title="derivative", xlabel="x", ylabel="derivative")
axes[0].legend()
plt.tight_layout()
plt.show()
low = grid[gelu_tanh(grid).argmin()]
print(f"lowest point: GELU({low:.2f}) = {gelu_tanh(low):.2f}")
assert abs(float(jax.grad(gelu_tanh)(low))) < 0.01

# %% [markdown]
# ## The feed-forward network
#
# A linear layer to four times the width, GELU, and a linear layer back. It processes each token separately, with the
# same matrices: attention collects information from other tokens, the feed-forward network processes it. It holds two
# thirds of a block's parameters.
#
# In the library this is `FeedForward` in [`slm_jax/nn/mlp.py`](../slm_jax/nn/mlp.py).


# %%
def feed_forward(p, x):
    hidden = gelu_tanh(x @ p["fc"]["kernel"] + p["fc"]["bias"])  # (..., 4 emb)
    return hidden @ p["proj"]["kernel"] + p["proj"]["bias"]  # (..., emb)


cfg = get_gpt_config("tiny", emb_dim=64)
tokens = jax.random.normal(jax.random.key(2), (2, 5, cfg.emb_dim))
params = jax.jit(FeedForward(4 * cfg.emb_dim).init)(jax.random.key(3), tokens)["params"]
params = jax.tree.map(lambda leaf: leaf + 0.05, params)  # make the biases, initially 0, matter
print(jax.tree.map(jnp.shape, params))
ours, theirs = feed_forward(params, tokens), FeedForward(4 * cfg.emb_dim).apply({"params": params}, tokens)
assert jnp.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
assert jnp.allclose(feed_forward(params, tokens[:, 3:4]), ours[:, 3:4], rtol=1e-4, atol=1e-5)  # each token separately

# %% [markdown]
# ## Shortcuts
#
# Stack 24 such networks and ask how the loss changes when the input of layer 1 changes. By the chain rule, this is a
# product of 24 derivatives. If each is one half, less than a ten-millionth of the gradient arrives at layer 1. A
# shortcut adds a layer's input to its output, and the derivative of $x + f(x)$ is $1 + f'(x)$: the 1 always passes the
# gradient on.
#
# Let us measure it. The loss below is linear in the output, so the gradient at the output has norm 1 with and without
# shortcuts. To get the gradient at the input of layer i, we add a zero, `probes[i]`, to it and differentiate with
# respect to that zero.

# %%
LAYERS, EMB = 24, 64


def init_layer(key):
    into, out_of = jax.random.split(key)
    fc = {"kernel": jax.random.normal(into, (EMB, 4 * EMB)) / jnp.sqrt(EMB), "bias": jnp.zeros(4 * EMB)}
    proj = {"kernel": jax.random.normal(out_of, (4 * EMB, EMB)) / jnp.sqrt(4 * EMB), "bias": jnp.zeros(EMB)}
    return {"fc": fc, "proj": proj}


layers = [init_layer(key) for key in jax.random.split(jax.random.key(4), LAYERS)]
x0, direction = jax.random.normal(jax.random.key(5), (2, 16, EMB))  # 16 tokens, and the direction of the loss
direction = direction / jnp.linalg.norm(direction)


def stack_loss(probes, layers, shortcut):
    x = x0
    for probe, layer in zip(probes, layers, strict=True):
        x = x + probe
        x = x + feed_forward(layer, x) if shortcut else feed_forward(layer, x)
    return -jnp.vdot(x, direction)


# %% [markdown]
# `jit` compiles the function; `shortcut` selects the program, so it is a *static* argument. One call gives the
# gradients for all 24 inputs and all parameters. GPT-2 also starts with small residual branches: the output matrices of
# the branches are divided by the square root of their number. That is the third stack.

# %%
gradients = jax.jit(jax.grad(stack_loss, argnums=(0, 1)), static_argnames="shortcut")
probes = [jnp.zeros_like(x0)] * LAYERS
scaled_layers = [{**layer, "proj": jax.tree.map(lambda leaf: leaf / LAYERS**0.5, layer["proj"])} for layer in layers]
stacks = {
    "with shortcuts": (layers, True, BLUE, "o"),
    "with shortcuts, small init": (scaled_layers, True, GREEN, "^"),
    "without": (layers, False, ORANGE, "s"),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
arrived, of_parameters = {}, {}
for name, (chosen, shortcut, colour, marker) in stacks.items():
    arrived[name], of_layers = gradients(probes, chosen, shortcut=shortcut)
    for axis, trees in zip(axes, (arrived[name], of_layers), strict=True):
        sizes = [jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree))) for tree in trees]
        axis.plot(range(1, LAYERS + 1), sizes, color=colour, marker=marker, ms=4, label=name)
    of_parameters[name] = sizes  # of the second plot
for axis, title in zip(axes, ("gradient at the layer's input", "gradient of the layer's parameters"), strict=True):
    axis.set(title=title, xlabel="layer (24 is next to the output)", ylabel="norm", yscale="log")
axes[0].set_ylim(1e-11, 1e3)
axes[0].legend(loc="lower right")
plt.tight_layout()
plt.show()


# %% [markdown]
# Without shortcuts, each layer passes on about half of the gradient: a straight line on the logarithmic axis, and a
# ten-millionth is left at layer 1. The same holds for the parameters (right): the gradient of layer 1's parameters is
# about two millionths of layer 24's. With shortcuts nothing gets lost; with standard initialisation the gradient even
# grows a hundredfold on its way back. With small initial branches it keeps its size.
#
# The direction shows the same. The cosine between the gradients at layer 1 and at the output is 1 for the same
# direction and about 0 for unrelated ones: only the third stack preserves the direction.


# %%
def cosine(a, b):
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


for name, of in arrived.items():
    print(f"{name:<27} norm {jnp.linalg.norm(of[0]):8.2g}   cosine {cosine(of[0], -direction):5.2f}")
share = of_parameters["without"][0] / of_parameters["without"][-1]
print(f"without shortcuts, parameter gradients of layer 1 relative to layer {LAYERS}: {share:.1g}")
assert jnp.linalg.norm(arrived["without"][0]) < 2e-7
assert 1e-6 < share < 3e-6
assert jnp.linalg.norm(arrived["with shortcuts"][0]) > 0.5
assert cosine(arrived["with shortcuts, small init"][0], -direction) > 0.4
assert abs(cosine(arrived["without"][0], -direction)) < 0.2

# %% [markdown]
# ## GPT-2's weights: a file of named tensors
#
# GPT-2 consists of these parts and attention. OpenAI published its weights, and Hugging Face hosts them as a
# *safetensors* file: names, shapes and plain numbers, no code. We look for the real weights on this machine, in the
# folder `$SLM_JAX_DATA/gpt2` and in Hugging Face's cache, and download nothing. If there are none, we write such a file
# for a small model with random weights: the names and the layout are the same.

# %% tags=["sampled"]
warnings.filterwarnings("ignore", message="IProgress")  # progress bars are not needed here
os.environ["HF_HUB_OFFLINE"] = "1"  # without this line load_gpt2("gpt2") downloads 548 MB once
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
    gpt2_params = jax.jit(model.init)(jax.random.key(6), jnp.zeros((1, 4), jnp.int32))["params"]
    slm_jax.save_gpt2(gpt2_cfg, gpt2_params, folder)
    weights_file = folder / "model.safetensors"
    REAL = False
print("the real GPT-2" if REAL else "no GPT-2 on this machine: using a small model with random weights")
print(f"{weights_file.name}: {weights_file.stat().st_size / 1e6:,.1f} MB, {gpt2_cfg.n_layers} blocks")

# %% [markdown]
# ### The contents of the file
#
# These are the names of the first block, and those outside the blocks. `h.0` is block 0; `c_attn` computes queries,
# keys and values; `wte` and `wpe` are the token and position embeddings. Some files have `transformer.` in front of
# each name, and some contain the causal mask as `attn.bias`, which is not a weight.

# %% tags=["sampled"]
with safe_open(weights_file, framework="numpy") as file:
    tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
for name, tensor in tensors.items():
    if not name.startswith("h.") or name.startswith("h.0."):
        print(f"{name:<26} {tensor.shape}")
print(f"{len(tensors)} tensors, {sum(tensor.size for tensor in tensors.values()):,} numbers")

# %% [markdown]
# ### Mapping the names
#
# Our tree has different names and stacks the tensors of all blocks into one array per name. Two tables map the names.
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
# Loading then means: stack the tensors of each name from all blocks, store them under the new path, and check that no
# tensor is left over. Only attention needs more: `c_attn` is one matrix for queries, keys and values, where we have
# three arrays with an axis for the heads. `load_gpt2` gives the same tree, bit for bit.


# %%
def load_by_hand(tensors, cfg):
    left = dict(tensors)

    def stack(name):
        return np.stack([left.pop(f"h.{layer}.{name}") for layer in range(cfg.n_layers)])

    flat = {path: left.pop(name) for name, path in OUTSIDE.items()}
    flat |= {path: stack(name) for name, path in IN_BLOCK.items()}
    for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
        for name, part in zip("qkv", np.split(stack(f"attn.c_attn.{kind}"), 3, axis=-1), strict=True):
            flat[f"blocks/attn/{name}/{leaf}"] = part.reshape(*part.shape[:-1], cfg.n_heads, -1)
    mixing = flat["blocks/attn/out_proj/kernel"]
    flat["blocks/attn/out_proj/kernel"] = mixing.reshape(cfg.n_layers, cfg.n_heads, -1, cfg.emb_dim)
    assert not left, f"not used: {sorted(left)}"
    return unflatten_dict(flat, sep="/")


by_hand = load_by_hand(tensors, gpt2_cfg)
loaded_cfg, loaded = slm_jax.load_gpt2(weights_file)
flat_hand, flat_loaded = flatten_dict(by_hand, sep="/"), flatten_dict(loaded, sep="/")
assert flat_hand.keys() == flat_loaded.keys()
assert all(np.array_equal(flat_hand[path], flat_loaded[path]) for path in flat_hand)
print(f"{len(flat_hand)} arrays in the tree, all equal to load_gpt2's")

# %% [markdown]
# ### The same function?
#
# Equal names and shapes prove little. What counts is that the model computes the same logits with the original
# parameters, those loaded by hand, and those loaded by `load_gpt2`.
#
# In the library this is [`slm_jax/weights/huggingface.py`](../slm_jax/weights/huggingface.py), a table like ours, and
# [`slm_jax/runs.py`](../slm_jax/runs.py), which also checks shapes, finite numbers and the settings in `config.json`.

# %%
apply = jax.jit(slm_jax.GPTModel(loaded_cfg).apply)
ids = jnp.array([[15, 496, 7, 7, 140, 88, 302, 3]])
logits = [apply({"params": tree}, ids) for tree in (gpt2_params, by_hand, loaded)]
assert jnp.array_equal(logits[0], logits[1])
assert jnp.array_equal(logits[0], logits[2])
print("logits", logits[0].shape[:2], "+ vocabulary: the same three times")

# %% [markdown]
# An untrained model gives each token about the same probability. The real GPT-2 continues the text with a sentence.

# %% tags=["sampled"]
probabilities = jax.nn.softmax(logits[0][0, -1])
print(f"largest probability: {probabilities.max():.2g}; uniform: {1 / gpt2_cfg.vocab_size:.2g}")
if REAL:
    tokenizer = slm_jax.get_tokenizer("gpt2")
    prompt = jnp.array([tokenizer.encode("The first thing to know about a language model is")])
    rows = slm_jax.generate(slm_jax.GPTModel(gpt2_cfg), loaded, prompt, max_new_tokens=20, temperature=0)
    print(tokenizer.decode(rows[0]))

# %% [markdown]
# ## Exercises
#
# **1.** Many newer models do not subtract the mean and only divide by the root mean square (RMSNorm). Write it, and
# show that it equals a layer norm on tokens with mean 0.
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
# The matrix before it can learn to remove the mean, so little is lost, and one pass over the numbers is saved.
#
# </details>
#
# **2.** With shortcuts every layer adds something, and the activations grow. How large are they after all 24 layers of
# `layers`, and of `scaled_layers`?
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
# Each layer adds a fraction of the current activations, so they grow like compound interest. A GPT has two branches per
# block, so GPT-2 divides by $\sqrt{2 \cdot \text{layers}}$.
#
# </details>
#
# **3.** `attn.c_proj.weight` is square, so its transpose has the same shape, and no shape check can find the mistake.
# Transpose it in all blocks and look at the logits.
#
# <details><summary>Solution</summary>
#
# ```python
# wrong = {name: tensor.T if name.endswith("attn.c_proj.weight") else tensor for name, tensor in tensors.items()}
# other = apply({"params": load_by_hand(wrong, gpt2_cfg)}, ids)
# assert other.shape == logits[0].shape
# assert not jnp.allclose(other, logits[0], rtol=1e-4, atol=1e-6)
# ```
#
# It loads without an error and computes something else. That is why the library's tests compare logits, not just
# shapes.
#
# </details>
#
# ## Key takeaways
#
# - A layer norm brings each token to mean 0 and variance 1, then lets the model scale and shift it.
# - Shortcuts pass the gradient on; without them a ten-millionth of it was left after 24 layers.
# - Weights are named tensors. Tables of names convert GPT-2's file into our tree, and equal logits confirm it.
#
# Next: [7. The transformer block](07_transformer_block.py), which combines these parts.
