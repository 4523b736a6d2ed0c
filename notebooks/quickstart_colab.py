# %% [markdown]
# # Quickstart on Colab
#
# From nothing to a model that you trained, fine-tuned and talked with, in one sitting: look at the machine, train, see
# the loss fall, let the model write, fine-tune it, load GPT-2, chat, and take the result with you.
#
# On Colab choose **Runtime → Change runtime type** and a GPU (T4) or a TPU, then **Runtime → Run all**. By arithmetic,
# not by measurement, it takes 6 to 9 minutes on a T4 (the sum is below, where the sizes are chosen). Without an
# accelerator everything is made tiny and takes about 35 seconds on two CPU cores. How it all works inside is the
# matter of the other notebooks, from [the first one](01_tokenization.py) on.

# %% [markdown]
# ## What was installed, and what was left alone
#
# The cell above installed slm_jax. Colab brings a JAX that fits its GPU or TPU, and installing must not replace it:
# slm_jax asks only for `jax>=0.7.2`, so pip keeps what is there. The cell's last line compares JAX's version with the
# one before the installation. The parts of JAX on this machine:

# %% tags=["sampled"]
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot as plt

names = {distribution.metadata["Name"] for distribution in metadata.distributions()}
for name in sorted(names):
    if name == "jax" or name.startswith(("jaxlib", "jax-", "libtpu")):
        print(f"{name:<22} {metadata.version(name)}")
assert {"jax", "jaxlib"} <= names

# %% [markdown]
# ## One command for everything
#
# slm_jax is a command with many parts: `slm-jax train`, `slm-jax generate` and so on. In a terminal you would type
# them; the function below runs one, shows what it prints, and stops the notebook if it failed.
#
# Each command is a process of its own, and this notebook itself never starts JAX. That is on purpose: the process that
# uses a TPU, or most of the memory of a GPU, keeps it until it ends. The commands are in
# [`slm_jax/cli.py`](../slm_jax/cli.py).


# %%
def slm_jax(command, hide=False, typed=""):
    """Run `slm-jax COMMAND`, show its lines as they come, return them; hide keeps them back. `typed` is its input."""
    lines, plain = [], {"PYTHONUNBUFFERED": "1", "TERM": "dumb"}  # no colours, no moving lines
    with subprocess.Popen(
        [sys.executable, "-m", "slm_jax", *shlex.split(command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if "COLOR" not in name} | plain,
    ) as process:
        process.stdin.write(typed)
        process.stdin.close()
        for line in process.stdout:
            line = line.replace(str(Path.home()), "~").replace(str(Path.cwd()), ".")
            lines.append(line)
            if not hide:
                print(line, end="")
    assert process.returncode == 0, "".join(lines)
    return "".join(lines)


# %% [markdown]
# ## What this machine has
#
# `doctor` looks at the device, its memory, the installed versions, and at what else can go wrong. It marks each line as
# `ok`, `note` or `problem`, and says what to do. Here is its line about the devices; with a problem the cell stops and
# shows all lines. `slm_jax("doctor")` always shows all.

# %% tags=["varies"]
said = slm_jax("doctor", hide=True)
print(*(line for line in said.splitlines() if "devices" in line.split()[:2]), sep="\n")
only_cpu = "× cpu" in said
print("this notebook uses", "the CPU" if only_cpu else "the accelerator")

# %% [markdown]
# ## How large, how long
#
# On an accelerator we train the recipe `tiny` of the library (1.3 million parameters) for 3,000 steps of 32 texts; on a
# CPU something much smaller for 100 steps of 8.
#
# The arithmetic for a T4, which computes $8.1 \times 10^{12}$ operations a second in float32 at best: a token costs
# about 6 operations a parameter, so 3,000 steps × 32 × 128 tokens × 8 million operations (1.3 million parameters × 6)
# make $1.0 \times 10^{14}$. At a tenth of the peak that is two minutes. Starting Python and compiling takes perhaps 30
# seconds a command, seven commands in all: three and a half minutes. Fine-tuning and GPT-2's 0.5 GB add one or two.
# Together six to nine minutes; none of it was measured on a T4.

# %%
if only_cpu:
    size = "--model.n_layers 2 --model.emb_dim 64 --model.context_length 128 --tokenizer.vocab_size 1024"
    steps, batch, finetune_steps = 100, 8, 30
else:
    size = "--model.preset tiny"
    steps, batch, finetune_steps = 3000, 32, 300

# %% [markdown]
# ## Train
#
# The text is the documentation that every Python carries, so nothing is downloaded. A tokenizer is trained on it, then
# the model. What is printed: the loss on the training text, the loss on text that it does not train on, and the
# tokens a second.
#
# A run is a folder, here `runs/colab`. If Colab stops the machine, the folder is gone with it. To keep it, mount your
# Drive and let every checkpoint be copied there: run the two lines that are comments, and add
# `--checkpoint.mirror /content/drive/MyDrive/runs` to the command. The same command then goes on where it stopped.

# %% tags=["sampled"]
# from google.colab import drive
# drive.mount("/content/drive")

shutil.rmtree("runs/colab", ignore_errors=True)  # a second pass through this notebook starts anew
said = slm_jax(
    f"train --run colab {size} --train.steps {steps} --train.batch_size {batch} --train.eval_every {steps // 2} "
    f"--train.log_every {steps // 25} --optimizer.warmup_steps {steps // 10} --checkpoint.every {steps // 2} "
    "--sample.every 0"
)

# %% [markdown]
# ## Look at the loss
#
# Every line of `metrics.jsonl` is one measurement. The loss is in nats a token: it begins near the logarithm of the
# vocabulary's size, which is a guess among all tokens, and falls quickly at first.

# %%
rows = [json.loads(line) for line in Path("runs/colab/metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(figsize=(7, 3.5))
for split, colour, style in (("train", "#0072B2", "-"), ("val", "#D55E00", "o--")):
    points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
    axes.plot(*zip(*points, strict=True), style, color=colour, label={"train": "training", "val": "validation"}[split])
axes.set_xlabel("step")
axes.set_ylabel("loss (nats a token)")
axes.legend()
plt.show()
losses = [row["loss"] for row in rows if row["split"] == "train"]
assert losses[-1] < losses[0] - 0.5, "the model did not learn"

# %% [markdown]
# ## Let it write
#
# After a few steps of training this is no English yet: on a CPU expect frequent words in a random order. After the
# training on an accelerator it looks like documentation, and means nothing.

# %% tags=["sampled"]
text = slm_jax('generate --run runs/colab --prompt "The function returns" --max-new-tokens 40 --seed 1')
assert "The function returns" in text

# %% [markdown]
# ## Fine-tune it on instructions
#
# The same model now learns to answer: the instruction is "Explain this function.", the input is a function's
# signature from Python's standard library, and the answer its docstring. `--instruction.responses 0` leaves out the
# answers to the whole test set, which would take longest. What the command prints, much as above, is hidden here. How
# this works is [notebook 11b](11b_instruction_tuning.py).

# %% tags=["varies"]
shutil.rmtree("runs/colab-assistant", ignore_errors=True)
said = slm_jax(
    "finetune --task instruction --base runs/colab --run colab-assistant --trainable all "
    f"--train.steps {finetune_steps} --train.eval_every {finetune_steps} --checkpoint.every {finetune_steps} "
    "--train.batch_size 16 --instruction.responses 0 --instruction.too_long truncate --sample.every 0",
    hide=True,
)
summary = json.loads(Path("runs/colab-assistant/summary.json").read_text())
before, after = summary["before"]["test"]["loss"], summary["after"]["test"]["loss"]
print(f"loss on held-out answers: {before:.2f} before, {after:.2f} after")
assert after < before

# %% [markdown]
# ## Chat
#
# In a terminal `slm-jax chat --run runs/colab-assistant` is a conversation. Here one line goes in, as if it were typed,
# and one answer comes out; then the input ends, and with it the chat. Do not expect sense of so small a model. After
# the accelerator's steps it can have learned the form of an answer, and where to stop; on a CPU not even that.

# %% tags=["sampled"]
said = slm_jax(
    "chat --run runs/colab-assistant --max-new-tokens 30 --temperature 0",
    typed="Explain this function. def read(self, n):\n",
)

# %% [markdown]
# ## GPT-2
#
# OpenAI's GPT-2 with 124 million parameters is 0.5 GB to download. On Colab that takes some seconds. Without a network
# we go on without it. To fine-tune it on your texts, give `--base gpt2` to `finetune`; for classes, a CSV file with the
# columns `text` and `label` is enough: `finetune --base gpt2 --data.source csv:reviews.csv --run reviews`.

# %% tags=["sampled"]
try:
    said = slm_jax(
        'generate --run gpt2 --prompt "Every effort moves you" --max-new-tokens 40 --temperature 0', hide=True
    )
    print(said)
except AssertionError as error:
    if "cannot be downloaded" not in str(error):
        raise
    print("left out: GPT-2 is not on this machine, and cannot be downloaded")

# %% [markdown]
# ## Hand it on
#
# `export` writes a folder that Hugging Face's transformers opens as a `GPT2LMHeadModel`, with tokenizer and model card.
# On Colab, `google.colab.files.download("colab-hf.zip")` brings it to your computer.

# %%
shutil.rmtree("colab-hf", ignore_errors=True)
said = slm_jax("export --run runs/colab-assistant --out colab-hf", hide=True)
print(sorted(path.name for path in Path("colab-hf").iterdir()))
shutil.make_archive("colab-hf", "zip", "colab-hf")
assert Path("colab-hf/model.safetensors").stat().st_size > 100_000

# %% [markdown]
# ## Exercises
#
# **1.** How many parameters does your model have? A *safetensors* file begins with 8 bytes, the length of a header; the
# header is JSON and has the shape of each tensor; the numbers follow, 4 bytes each.
#
# <details><summary>Solution</summary>
#
# ```python
# import math
#
# raw = Path("colab-hf/model.safetensors").read_bytes()
# n_header = int.from_bytes(raw[:8], "little")
# header = json.loads(raw[8 : 8 + n_header])
# shapes = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
# n_parameters = sum(math.prod(shape) for shape in shapes.values())
# print(f"{n_parameters:,} parameters; token table {shapes['transformer.wte.weight']}")
# assert 4 * n_parameters == len(raw) - 8 - n_header
# ```
#
# Nearly the whole file is weights. To store them in 2 bytes each would halve it.
#
# </details>
#
# **2.** A loss of $L$ nats is as good as a guess among $e^L$ tokens, the *perplexity*. Among how many tokens did the
# model guess at first, and among how many at the end? Why does the first number make sense?
#
# <details><summary>Solution</summary>
#
# ```python
# first, last = (math.exp(loss) for loss in (losses[0], losses[-1]))
# print(f"perplexity {first:.0f} at first, {last:.0f} at the end")
# assert last < first < 1.5 * shapes["transformer.wte.weight"][0]
# ```
#
# At first it is about the size of the vocabulary, the rows of the token table: the new model knows nothing.
#
# </details>
#
# ## What to take along
#
# - One command a step: `train`, `finetune`, `generate`, `chat`, `export`; `--help` shows each one's options.
# - A run is a folder. Keep it on your Drive with `--checkpoint.mirror`, and a machine that goes away costs nothing.
# - Small models learn the form of a text long before its meaning. For sense, start from GPT-2.
#
# To understand what just happened, go on with [notebook 1](01_tokenization.py).
