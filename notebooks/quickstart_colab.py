# %% [markdown]
# # Quickstart on Colab
#
# Train, fine-tune and chat with your own model in one session: check the machine, train, plot the loss, generate text,
# fine-tune, chat, load GPT-2, and export the result.
#
# On Colab choose **Runtime → Change runtime type** and a GPU (T4) or a TPU, then **Runtime → Run all**. It should take
# 6 to 9 minutes on a T4 (estimated below, not measured). Without an accelerator, the notebook uses a tiny model and
# takes about 30 seconds on two CPU cores. The other notebooks explain how everything works, starting with [the first
# one](01_tokenization.py).

# %% [markdown]
# ## Installation
#
# The cell above installed slm_jax. Colab comes with a JAX that fits its GPU or TPU, and the installation must not
# replace it: slm_jax only requires `jax>=0.7.2`, so pip keeps the installed version. The cell's last line checks this.
# The JAX packages on this machine:

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
# slm_jax is a command with subcommands: `slm-jax train`, `slm-jax generate` and so on. In a terminal you would type
# them; the function below runs one, shows its output, and stops the notebook if it fails.
#
# Each command is a separate process, and this notebook itself never initialises JAX, because a process that uses a TPU,
# or most of a GPU's memory, keeps it until it ends. The commands are listed in [`slm_jax/cli.py`](../slm_jax/cli.py).


# %%
def slm_jax(command, hide=False, stdin=""):
    """Run `slm-jax COMMAND` with `stdin` as its input; show its output, unless `hide` is True, and return it."""
    lines, plain = [], {"PYTHONUNBUFFERED": "1", "TERM": "dumb"}  # no colours, no progress line
    with subprocess.Popen(
        [sys.executable, "-m", "slm_jax", *shlex.split(command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if "COLOR" not in name} | plain,
    ) as process:
        process.stdin.write(stdin)
        process.stdin.close()
        for line in process.stdout:
            line = line.replace(str(Path.home()), "~").replace(str(Path.cwd()), ".")
            lines.append(line)
            if not hide:
                print(line, end="")
    assert process.returncode == 0, "".join(lines)
    return "".join(lines)


# %% [markdown]
# ## Check the machine
#
# `doctor` checks the device, its memory, the installed versions and common problems. It marks each line as `ok`, `note`
# or `problem`, and suggests a fix. Here we show only its line about the devices; if it finds a problem, the cell stops
# and shows everything.

# %% tags=["varies"]
output = slm_jax("doctor", hide=True)
print(*(line for line in output.splitlines() if "devices" in line.split()[:2]), sep="\n")
only_cpu = "× cpu" in output
print("this notebook uses", "the CPU" if only_cpu else "the accelerator")

# %% [markdown]
# ## Model size and training steps
#
# On an accelerator we train the library's `tiny` model (1.3 million parameters) for 3,000 steps with a batch size of
# 32; on a CPU, a much smaller model for 100 steps with a batch size of 8.
#
# The estimate for a T4, whose peak is $8.1 \times 10^{12}$ operations per second in float32: training takes about 6
# operations per token and parameter, so 3,000 steps × 32 × 128 tokens × 8 million operations (1.3 million parameters ×
# 6) are $1.0 \times 10^{14}$. At a tenth of the peak that is two minutes. Starting and compiling seven commands at
# about 30 seconds each takes three and a half minutes, fine-tuning and GPT-2's 0.5 GB one or two more. This was not
# measured on a T4.

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
# The text is the documentation that ships with Python, so nothing is downloaded. First a tokenizer is trained on it,
# then the model. The output shows the training loss, the validation loss, and the throughput in tokens per second.
#
# A run is a folder, here `runs/colab`. If Colab stops the machine, the folder is lost. To keep it, mount your Drive and
# copy every checkpoint there: uncomment the two lines below, and add `--checkpoint.mirror /content/drive/MyDrive/runs`
# to the command. Running the same command again then resumes from the last checkpoint.

# %% tags=["sampled"]
# from google.colab import drive
# drive.mount("/content/drive")

shutil.rmtree("runs/colab", ignore_errors=True)  # start from scratch if this cell is run again
output = slm_jax(
    f"train --run colab {size} --train.steps {steps} --train.batch_size {batch} --train.eval_every {steps // 2} "
    f"--train.log_every {steps // 25} --optimizer.warmup_steps {steps // 10} --checkpoint.every {steps // 2} "
    "--sample.every 0"
)

# %% [markdown]
# ## Plot the loss
#
# Every line of `metrics.jsonl` is one measurement. The loss is in nats per token: it starts near the logarithm of the
# vocabulary size, the loss of a uniform guess, and falls quickly at first.

# %%
rows = [json.loads(line) for line in Path("runs/colab/metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(figsize=(7, 3.5))
for split, colour, style in (("train", "#0072B2", "-"), ("val", "#D55E00", "o--")):
    points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
    axes.plot(*zip(*points, strict=True), style, color=colour, label={"train": "training", "val": "validation"}[split])
axes.set_xlabel("step")
axes.set_ylabel("loss (nats per token)")
axes.legend()
plt.show()
losses = [row["loss"] for row in rows if row["split"] == "train"]
assert losses[-1] < losses[0] - 0.5, "the model did not learn"

# %% [markdown]
# ## Generate text
#
# After so few steps this is not English yet: on a CPU, expect frequent words in random order. After training on an
# accelerator, the text looks like documentation but makes no sense.

# %% tags=["sampled"]
text = slm_jax('generate --run runs/colab --prompt "The function returns" --max-new-tokens 40 --seed 1')
assert "The function returns" in text

# %% [markdown]
# ## Fine-tune it on instructions
#
# Now the same model learns to answer: the instruction is "Explain this function.", the input is a function's signature
# from Python's standard library, and the answer its docstring. `--instruction.responses 0` skips generating answers for
# the whole test set, which would take longest. The command's output, similar to the above, is hidden. [Notebook
# 11b](11b_instruction_tuning.py) explains how this works.

# %% tags=["varies"]
shutil.rmtree("runs/colab-assistant", ignore_errors=True)
output = slm_jax(
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
# In a terminal, `slm-jax chat --run runs/colab-assistant` starts a conversation. Here we send one line as input and get
# one answer; then the input ends, and so does the chat. Do not expect sense from such a small model. After training on
# an accelerator it may have learned the form of an answer and when to stop; on a CPU not even that.

# %% tags=["sampled"]
output = slm_jax(
    "chat --run runs/colab-assistant --max-new-tokens 30 --temperature 0.8 --seed 1",
    stdin="Explain this function. def read(self, n):\n",
)

# %% [markdown]
# ## GPT-2
#
# OpenAI's GPT-2 with 124 million parameters is a 0.5 GB download, which takes some seconds on Colab. Without a network
# this cell is skipped. To fine-tune GPT-2 on your own texts, pass `--base gpt2` to `finetune`; for classification, a
# CSV file with the columns `text` and `label` is enough:
# `finetune --base gpt2 --data.source csv:reviews.csv --run reviews`.

# %% tags=["sampled"]
try:
    output = slm_jax(
        'generate --run gpt2 --prompt "Every effort moves you" --max-new-tokens 40 --temperature 0', hide=True
    )
    print(output)
except AssertionError as error:
    if "download" not in str(error):
        raise
    print("skipped: GPT-2 is not on this machine and cannot be downloaded")

# %% [markdown]
# ## Export the model
#
# `export` writes a folder that Hugging Face's transformers loads as a `GPT2LMHeadModel`, with tokenizer and model card.
# On Colab, `google.colab.files.download("colab-hf.zip")` downloads it to your computer.

# %%
shutil.rmtree("colab-hf", ignore_errors=True)
slm_jax("export --run runs/colab-assistant --out colab-hf", hide=True)
print(sorted(path.name for path in Path("colab-hf").iterdir()))
shutil.make_archive("colab-hf", "zip", "colab-hf")
assert Path("colab-hf/model.safetensors").stat().st_size > 100_000

# %% [markdown]
# ## Exercises
#
# **1.** How many parameters does your model have? A *safetensors* file starts with 8 bytes that contain the length of
# the header; the header is JSON with the shape of each tensor; the numbers follow, 4 bytes each.
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
# Nearly the whole file is weights. Storing them in 2 bytes each would halve it.
#
# </details>
#
# **2.** A loss of $L$ nats corresponds to a uniform choice among $e^L$ tokens, the *perplexity*. What is the model's
# perplexity at first and at the end? Why is the first number plausible?
#
# <details><summary>Solution</summary>
#
# ```python
# first, last = (math.exp(loss) for loss in (losses[0], losses[-1]))
# print(f"perplexity {first:.0f} at first, {last:.0f} at the end")
# assert last < first < 1.5 * shapes["transformer.wte.weight"][0]
# ```
#
# At first it is about the size of the vocabulary, the number of rows of the token table: the model is untrained.
#
# </details>
#
# ## Key takeaways
#
# - There is one command per step: `train`, `finetune`, `generate`, `chat`, `export`; `--help` shows the options of
#   each.
# - A run is a folder. With `--checkpoint.mirror` it is also stored on your Drive and survives the loss of the machine.
# - Small models learn the form of a text long before its meaning. For meaningful text, start from GPT-2.
#
# To understand how this works, continue with [notebook 1](01_tokenization.py).
