# %% [markdown]
# # 10. Training
#
# [Notebook 9](09_pretraining_setup.py) gave us a loss, its gradients, and batches in a fixed order. Now we train. You
# will learn what AdamW does with a gradient, why the learning rate first rises and then falls, what gradient clipping
# is for, how to recognise overfitting, and what a checkpoint must contain so that a killed and resumed run ends with
# exactly the same bits as an uninterrupted one. The notebook runs in about 25 seconds on two CPU cores.

# %%
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import slm_jax
from slm_jax.training.config import OptimizerConfig
from slm_jax.training.optimizer import decay_mask, make_optimizer, make_schedule

jax.config.update("jax_default_matmul_precision", "highest")
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"

# %% [markdown]
# ## From a gradient to a step
#
# The gradient $g$ says for each parameter how the loss changes with it. Plain gradient descent moves in the opposite
# direction: $p \leftarrow p - \eta\, g$, with the **learning rate** $\eta$. The same rate for all parameters works
# poorly, because some gradients are a thousand times larger than others. **Adam** (Kingma & Ba 2015) keeps two running
# averages for each parameter:
#
# - $m \leftarrow \beta_1 m + (1-\beta_1)\, g$, of the gradient: its direction, with the noise of single batches
#   averaged out;
# - $v \leftarrow \beta_2 v + (1-\beta_2)\, g^2$, of its square: its typical size.
#
# Both start at 0 and are too small at first; dividing by $1-\beta^t$ at step $t$ corrects that. The update is
# $\eta\, \hat m / (\sqrt{\hat v} + \epsilon)$: about $\eta$ in size, whatever the size of the gradient. **AdamW**
# (Loshchilov & Hutter 2019) adds weight decay: it subtracts $\eta \lambda p$ directly from the parameter instead of
# adding it to the gradient, so the running averages don't see it.

# %%
BETA1, BETA2, EPS, DECAY = 0.9, 0.99, 1e-8, 0.1


@jax.jit
def adamw(params, grads, m, v, t, rate):
    """Return the parameters after step t (1, 2, …), and both averages."""
    m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, grads)
    v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, grads)

    def step(p, m, v):
        m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)
        return p - rate * (m_hat / (jnp.sqrt(v_hat) + EPS) + DECAY * p)

    return jax.tree.map(step, params, m, v), m, v


# %% [markdown]
# `jax.tree.map` calls a function on each leaf of a tree, here of a dict of arrays. In Optax an optimizer is two pure
# functions: `init` creates the state (both averages and the step count), and `update` takes gradients and state and
# returns the updates to add to the parameters, and the new state. We compare three steps of our code and of Optax:

# %%
params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, -0.1])}
key = jax.random.key(0)
m = v = jax.tree.map(jnp.zeros_like, params)
ours, theirs = params, params
optimizer = optax.adamw(0.01, b1=BETA1, b2=BETA2, eps=EPS, weight_decay=DECAY)
state = optimizer.init(theirs)
for t in (1, 2, 3):
    key, kernel_key, bias_key = jax.random.split(key, 3)
    grads = {"kernel": 1000 * jax.random.normal(kernel_key, (2, 2)), "bias": jax.random.normal(bias_key, 2) / 1000}
    ours, m, v = adamw(ours, grads, m, v, t, rate=0.01)
    updates, state = optimizer.update(grads, state, theirs)
    theirs = optax.apply_updates(theirs, updates)
    if t == 1:
        for name, gradient in grads.items():
            step = jnp.abs(ours[name] - params[name]).mean()
            print(f"{name}: mean |gradient| {jnp.abs(gradient).mean():.0e}, mean |first step| {step:.3f}")
assert all(jnp.allclose(a, b, atol=1e-6) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))

# %% [markdown]
# Gradients that differ by a factor of a million give steps of the same size: the learning rate. A valley that is steep
# in one direction and flat in the other shows why this helps. Plain gradient descent needs a small rate, or it diverges
# in the steep direction, but then it hardly moves along the flat bottom; Adam moves at the same speed in both
# directions.


# %%
def valley(p):
    return 0.5 * (p["x"] ** 2 / 100 + p["y"] ** 2)


slope = jax.jit(jax.grad(valley))
begin = {"x": jnp.array(-9.0), "y": jnp.array(2.5)}
paths = {}
for name, rule in (("plain, rate 1.8", optax.sgd(1.8)), ("Adam, rate 0.4", optax.adam(0.4))):
    p, state, paths[name] = begin, rule.init(begin), [begin]
    for _ in range(30):
        updates, state = rule.update(slope(p), state)
        p = optax.apply_updates(p, updates)
        paths[name].append(p)

figure, ax = plt.subplots(figsize=(7.5, 3), layout="constrained")
x, y = np.meshgrid(np.linspace(-10, 3, 100), np.linspace(-3, 3, 100))
ax.contour(x, y, valley({"x": x, "y": y}), levels=12, colors="#CCCCCC", linewidths=0.8)
for (name, path), color in zip(paths.items(), (ORANGE, BLUE), strict=True):
    ax.plot([float(p["x"]) for p in path], [float(p["y"]) for p in path], ".-", color=color, label=name, linewidth=1)
ax.plot(0, 0, "k*", markersize=10)
ax.set(title="30 steps in a valley; the star is the lowest point", xlabel="flat direction", ylabel="steep direction")
ax.legend(frameon=False, loc="upper right")
plt.show()
ends = {name: float(valley(path[-1])) for name, path in paths.items()}
print({name: round(end, 3) for name, end in ends.items()})
assert ends["Adam, rate 0.4"] < ends["plain, rate 1.8"]

# %% [markdown]
# ## Warmup, then a cosine
#
# After one step, the averages contain only one batch, but Adam's steps already have full size. So the rate starts small
# and rises linearly during the first steps, the **warmup**. Towards the end, smaller steps average out the noise of
# single batches, so the rate falls, most often along half a **cosine** from the peak $\eta$ to a final rate
# $\eta_{\text{end}}$,
#
# $$\eta(t) = \eta_{\text{end}} + \tfrac{1}{2}(\eta - \eta_{\text{end}})\,(1 + \cos(\pi\, u)),$$
#
# where $u$ goes from 0 at the end of the warmup to 1 at the end of the run, one step after the last.
#
# In the library this is `make_schedule` in [`slm_jax/training/optimizer.py`](../slm_jax/training/optimizer.py).

# %%
PEAK, WARMUP, STEPS = 0.01, 20, 160


def rate_at(step):
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP  # not 0 at step 0, which would waste the step
    u = (step - WARMUP) / (STEPS - WARMUP)
    last = PEAK / 10
    return last + 0.5 * (PEAK - last) * (1 + math.cos(math.pi * u))


schedules = {
    kind: make_schedule(OptimizerConfig(learning_rate=PEAK, warmup_steps=WARMUP, schedule=kind), STEPS)
    for kind in ("cosine", "wsd", "constant")
}
assert all(abs(rate_at(t) - float(schedules["cosine"](t))) < 1e-7 for t in range(STEPS))

# %%
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
styles = {"cosine": (BLUE, "-"), "wsd": (ORANGE, "--"), "constant": (GREEN, ":")}
for kind, schedule in schedules.items():
    color, style = styles[kind]
    ax.plot(schedule(np.arange(STEPS)), style, color=color, label=kind)
ax.axvline(WARMUP, color=GREY, linewidth=1)
ax.text(WARMUP + 1, 0.0003, "end of warmup", color="#555555")
ax.set(title="learning rate by step", xlabel="step", ylabel="learning rate", ylim=(0, 1.05 * PEAK))
ax.legend(frameon=False, loc="lower center")
plt.show()

# %% [markdown]
# `wsd` (*warmup, stable, decay*) stays at the peak and falls in the last tenth, so the length of a run can be decided
# late.
#
# ## Clipping
#
# Sometimes a batch has much larger gradients than the others, because of an unusual text or an unstable model.
# **Clipping** limits them. The **global norm** is the root of the sum of all squares, over all leaves; if it exceeds a
# limit, all gradients are scaled down by the same factor, which preserves the direction.


# %%
def clip(grads, limit):
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    return jax.tree.map(lambda leaf: leaf * jnp.minimum(1, limit / norm), grads)


large = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}  # norm 13
for limit in (1.0, 100.0):
    clipped, _ = optax.clip_by_global_norm(limit).update(large, optax.EmptyState())
    assert all(
        jnp.allclose(a, b) for a, b in zip(jax.tree.leaves(clip(large, limit)), jax.tree.leaves(clipped), strict=True)
    )
    print(
        f"limit {limit:.0f}: global norm {optax.tree.norm(large):.0f} becomes {optax.tree.norm(clip(large, limit)):.0f}"
    )

# %% [markdown]
# ## The complete optimizer
#
# The library's optimizer chains these parts: clipping, Adam's averages, weight decay; the training step multiplies by
# the scheduled rate. Norms and biases do not decay: they are few, and a norm's scale should stay near 1. We compare one
# step of our code with the library's, using the last gradients above, which are far over the limit.
#
# In the library the whole training step, from batch to new parameters, is in
# [`slm_jax/training/step.py`](../slm_jax/training/step.py).

# %%
library = make_optimizer(OptimizerConfig(beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, clip_norm=1.0))
head, head_grads = {"class_head": params}, {"class_head": grads}  # the library looks at a parameter's path
direction, _ = library.update(head_grads, library.init(head), head)
by_library = jax.tree.map(lambda p, d: p - rate_at(0) * d, head, direction)["class_head"]

zeros = jax.tree.map(jnp.zeros_like, params)
by_hand, _, _ = adamw(params, clip(grads, 1.0), zeros, zeros, 1, rate_at(0))
print("decays:", decay_mask(head))
by_hand["bias"] += rate_at(0) * DECAY * params["bias"]  # ours decays everything: undo it for the bias
assert all(jnp.allclose(by_hand[name], by_library[name], atol=1e-7) for name in params)

# %% [markdown]
# ## A training run
#
# Real training is a command. A recipe is a file of settings; all others have defaults. Ours trains a model with one
# block on the 240 reviews that come with these notebooks, half of them for validation: so little text and so many steps
# that the model will overfit. In a terminal the command is `slm-jax train --config small.yaml --run whole`. A run this
# small is fastest on the CPU, so we set `JAX_PLATFORMS`.

# %%
FOLDER = Path("training_runs")
shutil.rmtree(FOLDER, ignore_errors=True)  # from an earlier execution of this notebook
FOLDER.mkdir()
RECIPE = f"""
runs_dir: {FOLDER}
data: {{source: "jsonl:data/sentiment.jsonl", validation_fraction: 0.5}}
tokenizer: {{kind: bpe, vocab_size: 512}}
model: {{preset: tiny, context_length: 32, emb_dim: 64, n_heads: 2, n_layers: 1}}
optimizer: {{learning_rate: {PEAK}, schedule: cosine, warmup_steps: {WARMUP}, clip_norm: 1.0}}
train: {{steps: {STEPS}, batch_size: 32, eval_every: 10, log_every: 1}}
checkpoint: {{every: 40, keep: 2}}
sample: {{every: 0}}
"""
(FOLDER / "small.yaml").write_text(RECIPE)


def command(run):
    return [sys.executable, "-m", "slm_jax", "train", "--config", str(FOLDER / "small.yaml"), "--run", run]


# Jupyter sets FORCE_COLOR, which would turn on the colours and the progress line of a terminal.
on_cpu = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | {"JAX_PLATFORMS": "cpu"}

# %% tags=["sampled"]
finished = subprocess.run(command("whole"), env=on_cpu, capture_output=True, text=True)
assert finished.returncode == 0, finished.stderr
lines = finished.stdout.splitlines()
print("\n".join(line for line in lines if line.startswith(("step", "overfitting", "done"))))

# %% [markdown]
# A run is a folder. `metrics.jsonl` is its log, one line for each step (`train`) and each evaluation (`val`);
# `checkpoints/` contains what is needed to resume.

# %%
run = FOLDER / "whole"
print(sorted(path.name for path in run.iterdir() if not path.name.startswith(".")))
log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
print("fields of a training line:", *log[1])


def column(log, split, name):
    rows = [row for row in log if row["split"] == split]
    return [row["step"] for row in rows], [row[name] for row in rows]


# %% [markdown]
# ## Reading the curves
#
# The first loss is $\ln 512 = 6.24$, as expected for an untrained model. The learning rate follows the schedule that we
# plotted. Gradients were clipped wherever their norm is above 1.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for ax, name, title in zip(
    axes, ("loss", "learning_rate", "grad_norm"), ("training loss", "learning rate", "gradient norm"), strict=True
):
    ax.plot(*column(log, "train", name), color=BLUE, linewidth=1)
    ax.set(title=title, xlabel="step")
axes[0].axhline(math.log(512), color=GREY, linestyle="--", linewidth=1)
axes[0].text(STEPS, math.log(512) - 0.1, "ln 512", ha="right", va="top", color="#555555")
axes[0].set(ylabel="nats per token")
axes[2].axhline(1, color=GREY, linestyle="--", linewidth=1)
axes[2].set(yscale="log")
plt.show()
steps, rates = column(log, "train", "learning_rate")
assert all(abs(rate - rate_at(step - 1)) < 1e-7 for step, rate in zip(steps, rates, strict=True))
assert abs(log[0]["loss"] - math.log(512)) < 0.1

# %% [markdown]
# ## Overfitting
#
# The training loss falls until the end. The validation loss, on reviews that the model never trained on, falls only at
# first, and then **rises**: from then on the model memorises the training reviews. It also becomes confident, and
# confident wrong predictions cost most in $-\ln p$. More text is the best remedy, then fewer steps, dropout, or a
# smaller model. The library keeps the checkpoint with the lowest validation loss in addition to the latest ones.

# %% tags=["varies"]
validation_steps, validation = column(log, "val", "loss")
lowest = int(np.argmin(validation))
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
ax.plot(*column(log, "train", "loss"), color=BLUE, linewidth=1, label="training (one batch)")
ax.plot(validation_steps, validation, "o-", color=ORANGE, markersize=4, label="validation (all of it)")
ax.annotate(
    f"lowest: {validation[lowest]:.2f}",
    (validation_steps[lowest], validation[lowest]),
    (0, 30),
    textcoords="offset points",
    ha="center",
    arrowprops={"arrowstyle": "->", "color": "#555555"},
)
ax.set(title="training and validation loss", xlabel="step", ylabel="loss (nats per token)")
ax.legend(frameon=False)
plt.show()
train_end = np.mean(column(log, "train", "loss")[1][-10:])
print(f"validation {validation[lowest]:.1f} at its lowest, {validation[-1]:.1f} at the end; training {train_end:.1f}")
assert 0 < validation_steps[lowest] < STEPS
assert validation[-1] > validation[lowest] + 0.5
assert train_end < validation[lowest] - 1

# %% [markdown]
# ## Checkpoints
#
# To resume exactly, a run needs more than parameters: the optimizer's averages, the step number (which gives the
# learning rate and, with the seed, batches and dropout), and the position in the data. A checkpoint is written to a
# temporary folder and renamed when it is complete, so a half-written one is never mistaken for a checkpoint; the
# SHA-256 of every file is stored with it.
#
# In the library this is [`slm_jax/training/checkpoint.py`](../slm_jax/training/checkpoint.py).


# %% tags=["varies"]
def saved_steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())


print("kept:", saved_steps(run))
assert set(saved_steps(run)) == {validation_steps[lowest], STEPS - 40, STEPS}

# %% [markdown]
# ## Killing a run
#
# Now we start the same recipe under another run name. As soon as it has a checkpoint of step 40 and has done some more
# steps, we send it **SIGKILL**: the operating system ends the process at once, without a chance to save anything, as in
# a power failure.

# %% tags=["sampled"]
killed = FOLDER / "killed"


def steps_in_log(run):
    log = run / "metrics.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


with open(FOLDER / "killed.txt", "w") as output:
    process = subprocess.Popen(command("killed"), env=on_cpu, stdout=output, stderr=output)
    while process.poll() is None and not (steps_in_log(killed) >= 50 and 40 in saved_steps(killed)):
        time.sleep(0.002)
    process.kill()
    process.wait()
assert process.returncode == -signal.SIGKILL, (FOLDER / "killed.txt").read_text()
steps_before = steps_in_log(killed)
log_before = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
resumed_from = saved_steps(killed)[-1]
print(f"killed after step {steps_before} of {STEPS}; checkpoints of steps {saved_steps(killed)}")
assert 40 <= resumed_from <= steps_before < STEPS

# %% [markdown]
# ## Resuming it
#
# The same command again finds the run, loads its latest complete checkpoint, cuts the log back to that step, and
# resumes.

# %% tags=["varies"]
resumed = subprocess.run(command("killed"), env=on_cpu, capture_output=True, text=True)
assert resumed.returncode == 0, resumed.stderr
assert f"from step {resumed_from} " in resumed.stdout
print("resumed from step", resumed_from)

# %% [markdown]
# Is the result the same? We compare the log (without times and rates) and the final parameters, not with a tolerance
# but bit for bit.


# %%
def without_clock(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "mfu")} for row in rows]


def final_bits(run):
    params = slm_jax.load_run(run, "latest").params
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(params)}


assert without_clock(killed) == without_clock(run)
assert final_bits(killed) == final_bits(run)
print(f"{len(without_clock(run))} log lines and {len(final_bits(run))} parameter arrays: all equal")

# %%
figure, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
ax.plot(*column(log, "train", "loss"), color="#BBBBBB", linewidth=5, label="uninterrupted")
ax.plot(*column(log_before, "train", "loss"), color=ORANGE, linewidth=1.2, label="until it was killed")
after = [row for row in without_clock(killed) if row["step"] > resumed_from]
ax.plot(*column(after, "train", "loss"), color=BLUE, linewidth=1.2, linestyle="--", label="after the resume")
ax.axvline(steps_before, color=ORANGE, linewidth=1)
ax.axvline(resumed_from, color=BLUE, linewidth=1, linestyle="--")
ax.set(title="killed and resumed", xlabel="step", ylabel="training loss (nats per token)")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# The steps between the two thin lines were done twice, with the same batches and the same results. The bits are equal
# on the same machine with the same number of threads; on another machine sums are rounded in a different order: the run
# still resumes, with a message.
#
# ## Exercises
#
# **1. Bias correction.** Remove the division by $1-\beta^t$ from Adam. How large is the first step then, in units of
# the learning rate, for $\beta_1 = 0.9$ and $\beta_2 = 0.99$? Work it out, then check it.
#
# <details><summary>Solution</summary>
#
# ```python
# g = 123.0
# m, v = (1 - BETA1) * g, (1 - BETA2) * g**2
# raw = m / (math.sqrt(v) + EPS)
# corrected = (m / (1 - BETA1)) / (math.sqrt(v / (1 - BETA2)) + EPS)
# assert abs(raw - 1) < 1e-6
# assert abs(corrected - 1) < 1e-6
# assert abs((1 - BETA1) / math.sqrt(1 - 0.999) - 3.16) < 0.01
# ```
#
# $0.1 g / \sqrt{0.01 g^2} = 1$: with these two numbers the first step happens to be the same. With the common
# $\beta_2 = 0.999$ it would be $0.1/\sqrt{0.001} = 3.2$ times as large.
# </details>
#
# **2. Momentum.** An older optimizer than Adam: $m \leftarrow \mu m + g$, and a step of $-\eta\, m$. Write it and run
# it in the valley for 30 steps with rate 0.5 and $\mu = 0.8$. Does it beat plain gradient descent? Compare with
# `optax.sgd`.
#
# <details><summary>Solution</summary>
#
# ```python
# p, momentum = begin, jax.tree.map(jnp.zeros_like, begin)
# rule = optax.sgd(0.5, momentum=0.8)
# q, state = begin, rule.init(begin)
# for _ in range(30):
#     momentum = jax.tree.map(lambda m, g: 0.8 * m + g, momentum, slope(p))
#     p = jax.tree.map(lambda p, m: p - 0.5 * m, p, momentum)
#     updates, state = rule.update(slope(q), state)
#     q = optax.apply_updates(q, updates)
# assert all(abs(p[name] - q[name]) < 1e-5 for name in p)
# assert valley(p) < ends["plain, rate 1.8"]
# ```
#
# Along the flat direction the gradients agree and add up; across the valley they change sign and cancel.
# </details>
#
# **3. Early stopping.** From the log of the run: after which share of all steps was the validation loss lowest, and how
# much larger is the perplexity at the end? Could you have seen it in the training loss?
#
# <details><summary>Solution</summary>
#
# ```python
# share = validation_steps[lowest] / STEPS
# ratio = math.exp(validation[-1] - validation[lowest])
# print(f"lowest after {share:.0%} of the steps; perplexity at the end is {ratio:.1f} times as large")
# _, losses = column(log, "train", "loss")
# assert ratio > 1.3
# assert np.mean(losses[-10:]) < np.mean(losses[validation_steps[lowest] - 10 : validation_steps[lowest]])
# ```
#
# No: the training loss keeps falling past that step. That is what the validation split is for.
# </details>
#
# ## Key takeaways
#
# - AdamW divides a running average of the gradient by its typical size, so every parameter moves by about the learning
#   rate; warmup, cosine decay and clipping keep training stable.
# - A run is a function of configuration, seed and step. With parameters, averages and step in a checkpoint it resumes
#   bit for bit.
# - Judge a model by its validation loss. If it rises while the training loss falls, the model overfits.
#
# Next: applications of a trained model, [classification](11a_classification.py) and
# [instructions](11b_instruction_tuning.py).
