# %% [markdown]
# # 11b. Following instructions
#
# A pretrained model goes on with a text; it does not answer. Instruction tuning shows it instructions with responses,
# and trains it on the responses alone. You will see how an instruction becomes text and tokens, which tokens count,
# and how answers are scored; and you will see that the *knowledge* in the answers comes from pretraining. At the end
# the same is done with LoRA, which trains a small part beside the frozen model.
#
# Before this came [classification](11a_classification.py). It runs in about 35 seconds on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import slm_jax
from slm_jax import lora
from slm_jax.data.instruction_batches import encode_examples, instruction_eval_batches
from slm_jax.data.instructions import Example
from slm_jax.data.templates import TEMPLATES, entry_messages, format_prompt
from slm_jax.evaluation.responses import exact_match, rouge_l
from slm_jax.tokenizer import SimpleTokenizer

jax.config.update("jax_default_matmul_precision", "highest")  # float32 in full also on a GPU or TPU
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # told apart also by colour-blind eyes

# %% [markdown]
# ## A world of 24 animals
#
# To tell knowledge and obedience apart, we make a world so small that a tiny model can know all of it: of each animal
# a colour, a place and a food. Written as sentences, that is the text for pretraining. The same facts are asked for by
# instructions. A quarter of the instructions is kept for testing: these questions are never asked in training.

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
print(len(train), "instructions to train on,", len(test), "to test with, such as:")
print(test[0])

# %% [markdown]
# ## The Alpaca format
#
# The model sees nothing but text, so an instruction has to be written as one. This is Stanford Alpaca's form, which the
# book uses, too: a fixed introduction, then headings. The response comes after the last heading. In the library this is
# [`slm_jax/data/templates.py`](../slm_jax/data/templates.py).


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
# Pretraining text: the three sentences of each animal in a random order, the animals in a random order, again and
# again, with an end-of-text token between animals. Rows are windows of 49 tokens: 48 inputs, and 48 targets shifted by
# one. The tokenizer has a token a word; it also knows the words of the instructions, which pretraining never shows.

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
# One loss serves for everything here: cross-entropy, times a *weight* for each target, 1 if it counts and 0 if not, and
# the mean over what counts. In pretraining every token counts. The loop over steps is `jax.lax.scan`: compiled as one
# program, it calls `step` for each key in turn and hands the state on.

# %%
cfg = slm_jax.get_gpt_config("tiny", vocab_size=tokenizer.vocab_size, context_length=width, emb_dim=64, n_layers=2)
model = slm_jax.GPTModel(cfg)


def loss_fn(params, rows):
    logits = model.apply({"params": params}, rows["inputs"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
    return jnp.sum(losses * rows["weights"]) / jnp.sum(rows["weights"])


def train_model(loss_fn, trainable, data, steps, peak, batch=32):
    """Return what was trained, and the loss of every step; a step sees rows of data drawn at random."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, peak, steps // 10, steps, peak / 10))

    def step(state, key):
        trainable, opt_state = state
        rows = {name: values[jax.random.randint(key, (batch,), 0, len(values))] for name, values in data.items()}
        loss, gradient = jax.value_and_grad(loss_fn)(trainable, rows)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), loss

    data = jax.tree.map(jnp.asarray, data)
    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))
    (trainable, _), losses = run((trainable, optimizer.init(trainable)), jax.random.split(jax.random.key(0), steps))
    return trainable, np.asarray(losses)


# %% [markdown]
# GPT-2's first weights are drawn with a standard deviation of 0.02, which suits its width of 768. Ours is 64 wide, and
# with four times as much its loss falls sooner.

# %%
start = jax.jit(model.init)(jax.random.key(0), windows[:1, :8])["params"]
flat = flatten_dict(start, sep="/")
start = unflatten_dict(
    {path: leaf * (4 if path.endswith(("kernel", "embedding")) else 1) for path, leaf in flat.items()}, sep="/"
)
base, text_losses = train_model(loss_fn, start, text_rows, steps=200, peak=1e-2)
print(f"loss a token: {text_losses[0]:.2f} at first, {text_losses[-20:].mean():.2f} at the end")
assert text_losses[-20:].mean() < 0.6

# %% [markdown]
# ## Before: it goes on, it does not answer
#
# `answers` puts the prompts through the model and takes the likeliest word each time, up to the end-of-text token. The
# base knows what a fox is: it goes on with "The fox lives near". An instruction means nothing to it.


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
print(f"goes on: {beginnings[0]!r} -> {answers(base, beginnings[:1])[0]!r}")
print(f"asked: {test[0]['instruction']} ({test[0]['input']})   answered: {before[0]!r}")
assert sum(known) >= 20

# %% [markdown]
# ## Collate: rows, targets, and which of them count
#
# An example becomes one row: prompt, response, end of text. The targets are the same tokens, shifted by one. Then the
# mask: only targets in the response and the end-of-text token get weight 1. The prompt need not be learned, as a person
# will write it. The end must be learned, or the model would never stop. Padding has weight 0.


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
        rows["weights"][r, len(prompt) - 1 : n] = 1  # the last token of the prompt predicts the first of the response
    return rows


train_rows = collate(train)
first = collate(test[:1])
shown = int(first["weights"][0].nonzero()[0][0]) - 2
for i in range(shown, shown + 8):
    given, target = tokenizer.decode([first["inputs"][0, i]]), tokenizer.decode([first["targets"][0, i]])
    print(f"{given:>14} -> {target:<14} weight {first['weights'][0, i]:.0f}")

# %% [markdown]
# As a picture: each row is an example, each cell a target.

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
print(f"{train_rows['weights'].sum() / n_real.sum():.0%} of the real targets count")

# %% [markdown]
# In the library this is [`slm_jax/data/instruction_batches.py`](../slm_jax/data/instruction_batches.py), which sorts by
# length, to save padding. Its rows are ours.

# %%
examples = [Example("here", entry_messages(entry, "here")) for entry in train]
tokens, _ = encode_examples(
    examples, tokenizer, TEMPLATES["alpaca"], mask_prompt=True, max_length=width, too_long="drop"
)
batches = instruction_eval_batches(
    [[t] for t in tokens], batch_size=len(train), limit=width, bucketed=False, packed=False
)
by_length = np.argsort(n_real, kind="stable")
theirs = next(batches)
assert all(np.array_equal(theirs[name], train_rows[name][by_length]) for name in theirs)
print("the same", ", ".join(theirs))

# %% [markdown]
# ## Train on the responses
#
# The loop and the loss are those of pretraining; only the rows are new. All parameters are trained, at a fifth of the
# rate.

# %%
tuned, tuned_losses = train_model(loss_fn, base, train_rows, steps=80, peak=2e-3, batch=16)
after = answers(tuned, map(to_prompt, test))
print(f"loss a token of the responses: {tuned_losses[0]:.2f} -> {tuned_losses[-1]:.3f}")

# %% tags=["sampled"]
for entry, old, new in list(zip(test, before, after, strict=True))[:8]:
    print(f"{entry['instruction']} ({entry['input']})\n    before: {old}\n    after:  {new}")

# %% [markdown]
# ## Scoring
#
# *Exact match* is the share of answers that are equal to the reference. It is strict: "The fox is grey." is as wrong as
# nonsense. *ROUGE-L* gives part of the points: it looks for the longest common subsequence, the most words that occur
# in both texts in the same order, gaps allowed. With $L$ common words of $m$ in the reference and $n$ in the answer,
#
# $$\text{ROUGE-L} = \frac{2 L}{m + n}$$
#
# In words: twice what they share, over what both have together. In the library these are
# [`slm_jax/evaluation/responses.py`](../slm_jax/evaluation/responses.py).


# %%
def common_length(a, b):
    """The longest common subsequence of two lists: table[i, j] is that of the first i and the first j words."""
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
# What is not an exact match, if anything:

# %% tags=["sampled"]
for reference, answer in zip(references, after, strict=True):
    if not exact_match(reference, answer):
        print(f"{answer!r} where {reference!r} was expected: ROUGE-L {rouge(reference, answer):.2f}")

# %% [markdown]
# These questions were never asked in training. The model can answer them because the facts were in the *pretraining*
# text; 80 steps on other questions only taught it what an instruction wants. To see that, take the pretraining away:
# the model `start` has seen no text. It gets the same rows and steps.

# %%
untaught, untaught_losses = train_model(loss_fn, start, train_rows, steps=80, peak=2e-3, batch=16)
guesses = answers(untaught, map(to_prompt, test))
assert scores(guesses)[0] < 0.2 < scores(after)[0]

# %% tags=["varies"]
print(f"not pretrained: exact match {scores(guesses)[0]:.2f}   ROUGE-L {scores(guesses)[1]:.2f}")

# %% tags=["sampled"]
for entry, guess in list(zip(test, guesses, strict=True))[:4]:
    print(f"{entry['instruction']} ({entry['input']})\n    {guess}")

# %% [markdown]
# It learns the form, and ROUGE-L gives it points for words such as "The" that every answer has; but what it says of an
# animal is a guess.
#
# ## LoRA: a small change beside a frozen matrix
#
# All 109,000 parameters were trained for this, and a second task would need a second copy of them. *LoRA* (low-rank
# adaptation) freezes a matrix $W$ and learns a change that is a product of two thin matrices:
#
# $$y = x W + \frac{\alpha}{r}\, x A B$$
#
# In words: $A$ squeezes the input into $r$ numbers, $B$ spreads them out again, and the constant $\alpha / r$ sets the
# size. $B$ starts as zeros, so at first nothing is changed.

# %%
W = base["blocks"]["attn"]["out_proj"]["kernel"][0]  # of the first block
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
print("rank of the change:", np.linalg.matrix_rank(np.asarray(A @ B)))

# %% [markdown]
# In the library this is [`lora.py`](../slm_jax/nn/lora.py). An adapter lies in the params tree beside its matrix,
# with all layers stacked, and the model uses what it finds there. With our `A` and `B` in it, it merges to our matrix.

# %%
ours = lora.init_adapters(jax.random.key(3), base, ("attn/out_proj",), rank=rank, alpha=alpha)
place = ours["blocks"]["attn"]["out_proj_adapter"]
assert not place["lora_b"].any()
place["lora_a"] = place["lora_a"].at[0].set(A)
place["lora_b"] = place["lora_b"].at[0].set(B)
merged = lora.merge_adapters(lora.add_adapters(base, ours))
assert jnp.allclose(merged["blocks"]["attn"]["out_proj"]["kernel"][0], W + A @ B * alpha / rank, atol=1e-5)
print("one merged matrix, ours and the library's")

# %% [markdown]
# Now with adapters on all matrices of the blocks, trained on the same rows. Only `lora_a` and `lora_b` are
# differentiated; the base is as it was.

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
    lambda small, rows: loss_fn(joined(small), rows), small, train_rows, steps=120, peak=1e-2, batch=16
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
assert table[3, 0] >= table[2, 0] - 0.1  # as good as full tuning, or nearly

# %% [markdown]
# LoRA trains less than a fifth as many numbers, and answers as well here. It is hardly faster: the forward pass and
# most of the backward pass remain, and it took 120 steps here, at a peak rate of 1e-2, where full tuning took 80 at
# 2e-3. What it saves is memory (the optimizer keeps two numbers for each trained one) and storage: one base, and a
# small file for each task.
#
# ## Exercises
#
# **1.** What if the prompt were learned, too? Set the weights of all real targets to 1. How many of them belong to
# the response then, and why is this a waste here?
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
# The introduction is the same in every row: most of the loss would be about predicting it. In the library this is
# `--instruction.mask_prompt false`.
#
# </details>
#
# **2.** Give the adapters only to `attn/*`. How many parameters are trained then? Say it first, then count.
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
# Query, key and value have an adapter each, although the model keeps them in one matrix.
#
# </details>
#
# ## What to take along
#
# - Instruction tuning is pretraining's loss on other rows, with a mask: only responses and their end count.
# - It teaches the form of an answer; the facts come from pretraining. So it needs few examples.
# - LoRA learns a low-rank change beside frozen matrices, and can be merged into them.
#
# From here: [look at any model's attention](attention_explorer.py), or do all of this with a larger model:
# [the quickstart](quickstart_colab.py).
