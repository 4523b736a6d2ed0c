# %% [markdown]
# # 11b. Following instructions
#
# A pretrained model continues a text; it does not answer questions. Instruction tuning trains it on instructions with
# responses, with the loss on the responses only. You will see how an instruction becomes text and tokens, which tokens
# count in the loss, how answers are scored, and that the *knowledge* in the answers comes from pretraining. At the end
# you do the same with LoRA, which trains small matrices next to the frozen model.
#
# Previous: [classification](11a_classification.py). The notebook runs in about 25 seconds on two CPU cores.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import slm_jax
from slm_jax.data.instructions import Example, encode_examples, instruction_eval_batches
from slm_jax.data.templates import TEMPLATES, entry_messages, format_prompt
from slm_jax.evaluation.responses import exact_match, rouge_l
from slm_jax.nn import lora
from slm_jax.tokenizer import SimpleTokenizer

jax.config.update("jax_default_matmul_precision", "highest")  # full float32 precision on GPUs and TPUs too
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # colour-blind safe

# %% [markdown]
# ## A world of 24 animals
#
# To separate what the model knows from whether it follows instructions, we invent a world small enough for a tiny model
# to learn completely: each animal has a colour, a place and a food. The facts, written as sentences, are the
# pretraining text. The instructions ask for the same facts. A quarter of the instructions is held out for testing.

# %%
TABLE = """
fox red forest mice, crow black tree worms, frog green pond flies, mouse grey barn seeds, bear brown mountain honey,
swan white lake plants, whale blue sea fish, camel yellow desert grass, owl grey tower mice, duck white pond worms,
lion yellow savanna meat, rabbit brown meadow clover, penguin black ice fish, parrot green jungle fruit,
monkey brown jungle fruit, crab red beach plants, goat white mountain grass, spider black attic flies,
horse brown meadow grass, seal grey ice fish, hen red barn seeds, turtle green beach plants, wolf grey forest meat,
bee yellow tree honey"""
animals = [line.split() for line in TABLE.split(",")]
facts = [
    (f"The {name} is {colour}.", f"The {name} lives near the {place}.", f"The {name} eats {food}.")
    for name, colour, place, food in animals
]
questions = ("What colour is this animal?", "Where does this animal live?", "What does this animal eat?")
entries = [
    {"instruction": question, "input": animal[0], "output": sentence}
    for animal, sentences in zip(animals, facts, strict=True)
    for question, sentence in zip(questions, sentences, strict=True)
]
order = np.random.default_rng(0).permutation(len(entries))
train, test = [entries[i] for i in order[18:]], [entries[i] for i in order[:18]]
print(len(train), "training instructions,", len(test), "test instructions, such as:")
print(test[0])

# %% [markdown]
# ## The Alpaca format
#
# The model only sees text, so an instruction must be formatted as text. This is Stanford Alpaca's prompt template,
# which the book also uses: a fixed introduction, then headings. The response comes after the last heading. In the
# library this is [`slm_jax/data/templates.py`](../slm_jax/data/templates.py).


# %%
def to_prompt(entry):
    introduction = "Below is an instruction that describes a task. "
    introduction += "Write a response that appropriately completes the request."
    about = f"\n\n### Input:\n{entry['input']}" if entry["input"] else ""
    return f"{introduction}\n\n### Instruction:\n{entry['instruction']}{about}\n\n### Response:\n"


print(to_prompt(test[0]) + test[0]["output"])
assert all(to_prompt(entry) == format_prompt(entry, template="alpaca") for entry in entries)

# %% [markdown]
# ## The base: a model that knows the facts
#
# The pretraining text consists of the three sentences of each animal in random order, the animals in random order,
# repeated 80 times, with an end-of-text token between animals. Rows are windows of 49 tokens: 48 inputs, and 48 targets
# shifted by one. The tokenizer has one token per word; its vocabulary includes the words of the instructions, which do
# not occur in pretraining.

# %%
width = 48
words = " ".join([*(sentence for three in facts for sentence in three), *map(to_prompt, entries)])
tokenizer = SimpleTokenizer().build_vocab(words)
rng = np.random.default_rng(1)
corpus = []
for _ in range(80):
    for i in rng.permutation(len(animals)):
        corpus += [*tokenizer.encode(" ".join(rng.permutation(facts[i]))), tokenizer.eot_id]
starts = rng.integers(0, len(corpus) - width, 4000)
windows = np.array(corpus, np.int32)[starts[:, None] + np.arange(width + 1)]
text_rows = {"inputs": windows[:, :-1], "targets": windows[:, 1:], "weights": np.ones((4000, width), np.float32)}
print(f"{tokenizer.vocab_size} words, {len(corpus):,} tokens of text")
print(tokenizer.decode(windows[0, :20]))

# %% [markdown]
# We use one loss for everything here: the cross-entropy of each target times its *weight*, 1 if it counts and 0 if not,
# averaged over the targets that count. In pretraining every token counts. The loop over steps is `jax.lax.scan`:
# compiled as one program, it calls `step` for each key in turn and passes the state on.

# %%
cfg = slm_jax.get_gpt_config("tiny", vocab_size=tokenizer.vocab_size, context_length=width, emb_dim=64, n_layers=2)
model = slm_jax.GPTModel(cfg)


def loss_fn(params, rows):
    logits = model.apply({"params": params}, rows["inputs"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
    return jnp.sum(losses * rows["weights"]) / jnp.sum(rows["weights"])


@partial(jax.jit, static_argnames=("loss_fn", "steps", "peak", "batch"))
def train_model(loss_fn, trainable, data, steps, peak, batch=32):
    """Return the trained parameters and the loss of every step; a step uses random rows of data."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, peak, steps // 10, steps, peak / 10))

    def step(state, key):
        trainable, opt_state = state
        rows = {name: values[jax.random.randint(key, (batch,), 0, len(values))] for name, values in data.items()}
        loss, gradient = jax.value_and_grad(loss_fn)(trainable, rows)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), loss

    keys = jax.random.split(jax.random.key(0), steps)
    (trainable, _), losses = jax.lax.scan(step, (trainable, optimizer.init(trainable)), keys)
    return trainable, losses


# %% [markdown]
# GPT-2's initial weights have a standard deviation of 0.02, which suits its width of 768. Our model has width 64, and
# with weights four times as large its loss falls faster.

# %%
start = jax.jit(model.init)(jax.random.key(0), windows[:1, :8])["params"]
flat = flatten_dict(start, sep="/")
start = unflatten_dict(
    {path: leaf * (4 if path.endswith(("kernel", "embedding")) else 1) for path, leaf in flat.items()}, sep="/"
)
base, text_losses = train_model(loss_fn, start, text_rows, steps=200, peak=1e-2)
print(f"loss per token: {text_losses[0]:.2f} at first, {text_losses[-20:].mean():.2f} at the end")
assert text_losses[-20:].mean() < 0.6

# %% [markdown]
# ## Before tuning: it continues, it does not answer
#
# `answers` generates greedily from each prompt, up to the end-of-text token. The base knows the facts: it completes
# "The fox lives near the". But it cannot follow an instruction.


# %%
def answers(params, texts):
    prompts = [tokenizer.encode(text) for text in texts]
    rows = slm_jax.generate(
        model, slm_jax.unstack_blocks(params), prompts, max_new_tokens=8, temperature=0, eos_id=tokenizer.eot_id
    )
    found = [np.asarray(row)[len(prompt) :].tolist() for row, prompt in zip(rows, prompts, strict=True)]
    return [tokenizer.decode(ids[: [*ids, tokenizer.eot_id].index(tokenizer.eot_id)]) for ids in found]


beginnings = [f"The {name} lives near the" for name, *_ in animals]
known = [text.split(".")[0] == place for text, (_, _, place, _) in zip(answers(base, beginnings), animals, strict=True)]
print(f"places that the base knows: {sum(known)} of {len(animals)}")
before = answers(base, map(to_prompt, test))
print(f"continuation: {beginnings[0]!r} -> {answers(base, beginnings[:1])[0]!r}")
print(f"question: {test[0]['instruction']} ({test[0]['input']})   answer: {before[0]!r}")
assert sum(known) >= 20

# %% [markdown]
# ## Collating: inputs, targets and loss weights
#
# An example becomes one row: prompt, response, end of text. The targets are the same tokens, shifted by one. Only
# targets in the response and the end-of-text token get weight 1. The prompt need not be learned, because the user
# writes it. The end must be learned, or the model would never stop. Padding has weight 0.


# %%
def collate(examples):
    rows = {name: np.zeros((len(examples), width), np.int32) for name in ("inputs", "targets")}
    rows["weights"] = np.zeros((len(examples), width), np.float32)
    for r, entry in enumerate(examples):
        prompt = tokenizer.encode(to_prompt(entry))
        ids = [*prompt, *tokenizer.encode(entry["output"]), tokenizer.eot_id]
        n = len(ids) - 1
        rows["inputs"][r, :n] = ids[:-1]
        rows["targets"][r, :n] = ids[1:]
        rows["weights"][r, len(prompt) - 1 : n] = 1  # the prompt's last token predicts the response's first
    return rows


train_rows = collate(train)
first = collate(test[:1])
shown = int(first["weights"][0].nonzero()[0][0]) - 2
for i in range(shown, shown + 8):
    given, target = tokenizer.decode([first["inputs"][0, i]]), tokenizer.decode([first["targets"][0, i]])
    print(f"{given:>14} -> {target:<14} weight {first['weights'][0, i]:.0f}")

# %% [markdown]
# In the plot, each row is an example and each cell a target.

# %%
n_real = np.array([len(tokenizer.encode(to_prompt(e) + e["output"])) for e in train])
kinds = (np.arange(width) < n_real[:, None]).astype(int) + train_rows["weights"].astype(int)
figure, axes = plt.subplots(figsize=(7.5, 3))
axes.imshow(kinds[:10], cmap=plt.matplotlib.colors.ListedColormap(["white", "#CCCCCC", BLUE]), aspect="auto")
axes.set_xticks(np.arange(-0.5, width), minor=True)
axes.set_yticks(np.arange(-0.5, 10), minor=True)
axes.grid(which="minor", color="white", linewidth=1)
axes.tick_params(which="minor", length=0)
axes.set_xlabel("position in the row")
axes.set_ylabel("example")
handles = [plt.Rectangle((0, 0), 1, 1, facecolor=c, edgecolor=GREY) for c in ("#CCCCCC", BLUE, "white")]
figure.legend(
    handles, ["prompt: weight 0", "response and end: weight 1", "padding: weight 0"], loc="upper center", ncol=3
)
figure.tight_layout(rect=(0, 0, 1, 0.92))
plt.show()
print(f"{train_rows['weights'].sum() / n_real.sum():.0%} of the targets (without padding) count")

# %% [markdown]
# In the library this is [`slm_jax/data/instructions.py`](../slm_jax/data/instructions.py), which also
# sorts the examples by length to reduce padding. Its rows equal ours.

# %%
examples = [Example("here", entry_messages(entry, "here")) for entry in train]
tokens, _ = encode_examples(
    examples, tokenizer, TEMPLATES["alpaca"], mask_prompt=True, max_length=width, too_long="drop"
)
batches = instruction_eval_batches(
    [[t] for t in tokens], batch_size=len(train), limit=width, bucketed=False, packed=False
)
by_length = np.argsort(n_real, kind="stable")
theirs = next(iter(batches))
assert all(np.array_equal(theirs[name], train_rows[name][by_length]) for name in theirs)
print("the same", ", ".join(theirs))

# %% [markdown]
# ## Train on the responses
#
# The loop and the loss are the same as in pretraining; only the rows are new. All parameters are trained, with a fifth
# of the learning rate.

# %%
tuned, tuned_losses = train_model(loss_fn, base, train_rows, steps=80, peak=2e-3, batch=16)
after = answers(tuned, map(to_prompt, test))
print(f"loss per response token: {tuned_losses[0]:.2f} -> {tuned_losses[-1]:.3f}")

# %% tags=["sampled"]
for entry, old, new in list(zip(test, before, after, strict=True))[:8]:
    print(f"{entry['instruction']} ({entry['input']})\n    before: {old}\n    after:  {new}")

# %% [markdown]
# ## Scoring
#
# *Exact match* is the share of answers that equal the reference. It is strict: "The fox is grey." counts as little as
# nonsense. *ROUGE-L* gives partial credit: it uses the longest common subsequence, the longest list of words that
# occurs in both texts in the same order, with gaps allowed. If it has $L$ words, the reference $m$ and the answer $n$,
#
# $$\text{ROUGE-L} = \frac{2 L}{m + n}$$
#
# In words: twice the number of shared words, divided by the total number of words in both. In the library these are in
# [`slm_jax/evaluation/responses.py`](../slm_jax/evaluation/responses.py).


# %%
def common_length(a, b):
    """Return the length of the longest common subsequence; table[i, j] is that of the first i and the first j words."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def rouge(reference, answer):
    a, b = (text.lower().replace(".", "").split() for text in (reference, answer))
    return 2 * common_length(a, b) / (len(a) + len(b)) if a and b else 0.0


references = [entry["output"] for entry in test]
for answer in ("The fox is red.", "The fox is grey.", "It is red.", "Nonsense."):
    print(f"{answer:<18} exact match {exact_match('The fox is red.', answer)!s:<5}   ROUGE-L", end=" ")
    print(f"{rouge('The fox is red.', answer):.2f}")
pairs = [*zip(references, before, strict=True), *zip(references, after, strict=True)]
assert all(abs(rouge(*pair) - rouge_l(*pair)) < 1e-9 for pair in pairs)


# %%
def scores(found):
    return [float(np.mean([measure(*pair) for pair in zip(references, found, strict=True)])) for measure in
            (exact_match, rouge)]  # fmt: skip


# %% tags=["varies"]
for name, found in (("before", before), ("after", after)):
    print(f"{name:<7} exact match {scores(found)[0]:.2f}   ROUGE-L {scores(found)[1]:.2f}")
assert scores(before)[0] == 0
assert scores(after)[0] >= 0.5

# %% [markdown]
# Answers that are not an exact match, if any:

# %% tags=["sampled"]
for reference, answer in zip(references, after, strict=True):
    if not exact_match(reference, answer):
        print(f"{answer!r} where {reference!r} was expected: ROUGE-L {rouge(reference, answer):.2f}")

# %% [markdown]
# These questions were not in the training set. The model can answer them because the facts were in the *pretraining*
# text; 80 steps on other questions only taught it to follow instructions. To check this, we skip the pretraining and
# train the initial model `start` with the same rows and steps.

# %%
not_pretrained, _ = train_model(loss_fn, start, train_rows, steps=80, peak=2e-3, batch=16)
guesses = answers(not_pretrained, map(to_prompt, test))
assert scores(guesses)[0] < 0.2 < scores(after)[0]

# %% tags=["varies"]
print(f"not pretrained: exact match {scores(guesses)[0]:.2f}   ROUGE-L {scores(guesses)[1]:.2f}")

# %% tags=["sampled"]
for entry, guess in list(zip(test, guesses, strict=True))[:4]:
    print(f"{entry['instruction']} ({entry['input']})\n    {guess}")

# %% [markdown]
# It learns the form of an answer, and ROUGE-L gives credit for words such as "The" that every answer has; but its facts
# are guesses.
#
# ## LoRA: a low-rank update of frozen matrices
#
# This trained all 109,000 parameters, and a second task would need a second copy of them. *LoRA* (low-rank adaptation)
# freezes a matrix $W$ and learns an update that is the product of two thin matrices:
#
# $$y = x W + \frac{\alpha}{r}\, x A B$$
#
# In words: $A$ projects the input to $r$ numbers, $B$ projects them to the output, and the constant $\alpha / r$ sets
# the scale. $B$ starts as zeros, so at first nothing changes.

# %%
W = base["blocks"]["ff"]["fc"]["kernel"][0]  # of the first block
rank, alpha = 4, 8.0
a_key, b_key, x_key = jax.random.split(jax.random.key(2), 3)
bound = 1 / np.sqrt(len(W))
A = jax.random.uniform(a_key, (len(W), rank), minval=-bound, maxval=bound)
B = jnp.zeros((rank, W.shape[1]))
x = jax.random.normal(x_key, (5, len(W)))


def adapted(x, B):
    return x @ W + (x @ A) @ B * alpha / rank


assert jnp.array_equal(adapted(x, B), x @ W)
B = jax.random.normal(b_key, B.shape)  # as if it had been trained
assert jnp.allclose(adapted(x, B), x @ (W + A @ B * alpha / rank), atol=1e-4)  # merged: one matrix again
print(f"W has {W.size:,} numbers; A and B together {A.size + B.size:,}")
print("rank of the update:", np.linalg.matrix_rank(np.asarray(A @ B)))

# %% [markdown]
# In the library this is [`lora.py`](../slm_jax/nn/lora.py). An adapter is stored in the params tree next to its matrix,
# stacked over the layers, and the model uses the adapters that it finds there. With our `A` and `B` it merges to the
# same matrix.

# %%
ours = lora.init_adapters(jax.random.key(3), base, ("ff/fc",), rank=rank, alpha=alpha)
place = ours["blocks"]["ff"]["fc_adapter"]
assert not place["lora_b"].any()
place["lora_a"] = place["lora_a"].at[0].set(A)
place["lora_b"] = place["lora_b"].at[0].set(B)
merged = lora.merge_adapters(lora.add_adapters(base, ours))
assert jnp.allclose(merged["blocks"]["ff"]["fc"]["kernel"][0], W + A @ B * alpha / rank, atol=1e-5)
print("one merged matrix, ours and the library's")

# %% [markdown]
# Now we add adapters to all matrices of the blocks and train them on the same rows. Only `lora_a` and `lora_b` are
# differentiated; the base does not change.

# %%
with_adapters = lora.add_adapters(
    base, lora.init_adapters(jax.random.key(4), base, ("attn/*", "ff/*"), rank=8, alpha=16.0)
)
flat = flatten_dict(with_adapters, sep="/")
small = {path: leaf for path, leaf in flat.items() if path.endswith(lora.TRAINED)}
frozen = {path: leaf for path, leaf in flat.items() if path not in small}


def joined(small):
    return unflatten_dict({**frozen, **small}, sep="/")


small, lora_losses = train_model(
    lambda small, rows: loss_fn(joined(small), rows), small, train_rows, steps=160, peak=1e-2, batch=16
)
with_lora = answers(lora.merge_adapters(joined(small)), map(to_prompt, test))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


print(f"trained: {count(base):,} parameters before, {count(small):,} with LoRA")
assert count(small) < 0.2 * count(base)

# %% tags=["varies"]
names = ("base", "no pretraining,\nfully tuned", "fully tuned", "LoRA")
table = np.array([scores(found) for found in (before, guesses, after, with_lora)])
figure, axes = plt.subplots(figsize=(6.5, 3.3))
for i, (label, colour) in enumerate((("exact match", BLUE), ("ROUGE-L", ORANGE))):
    bars = axes.bar(np.arange(4) + 0.38 * i - 0.19, table[:, i], 0.36, color=colour, label=label)
    axes.bar_label(bars, fmt="%.2f")
axes.set_xticks(range(4), names)
axes.set_ylim(0, 1.15)
axes.set_ylabel("score on 18 held-out questions")
axes.legend(loc="upper left")
plt.show()
assert table[3, 0] >= table[2, 0] - 0.1  # about as good as full tuning

# %% [markdown]
# LoRA trains less than a fifth of the parameters and answers about as well here. It is hardly faster: the forward pass
# and most of the backward pass remain, and here it took 160 steps at a peak rate of 1e-2, where full tuning took 80 at
# 2e-3. It saves memory (the optimizer keeps two numbers per trained parameter) and storage: one base, and a small file
# for each task.
#
# ## Exercises
#
# **1.** What if the prompt were learned, too? Set the weights of all targets except padding to 1. Which share of them
# belongs to the response, and why is this a waste here?
#
# <details><summary>Solution</summary>
#
# ```python
# unmasked = (np.arange(width) < n_real[:, None]).astype(np.float32)
# share = train_rows["weights"].sum() / unmasked.sum()
# print(f"{share:.0%} of the targets are responses")
# assert (unmasked >= train_rows["weights"]).all()
# assert share < 0.25
# ```
#
# The introduction is the same in every row, and most of the loss would come from predicting it. In the library this is
# `--instruction.mask_prompt false`.
#
# </details>
#
# **2.** Use adapters only for `attn/*`. How many parameters are trained then? Predict the number, then count.
#
# <details><summary>Solution</summary>
#
# ```python
# few = lora.init_adapters(jax.random.key(4), base, ("attn/*",), rank=8, alpha=16.0)
# n_few = sum(leaf.size for path, leaf in flatten_dict(few, sep="/").items() if path.endswith(lora.TRAINED))
# print(n_few)
# assert n_few == 2 * 4 * (64 * 8 + 8 * 64)  # layers, matrices (q, k, v, out_proj), A and B
# ```
#
# Query, key, value and output projection have one adapter each.
#
# </details>
#
# ## Key takeaways
#
# - Instruction tuning is the pretraining loss on different rows, with a mask: only responses and their end count.
# - It teaches the form of an answer; the facts come from pretraining. So it needs few examples.
# - LoRA learns low-rank updates of frozen matrices, which can be merged into them.
#
# Next: [look at any model's attention](attention_explorer.py), or do all of this with a larger model in [the
# quickstart](quickstart_colab.py).
