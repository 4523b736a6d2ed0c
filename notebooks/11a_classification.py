# %% [markdown]
# # 11a. A classifier from a language model
#
# A GPT predicts the next token. To do that, it summarises the text so far in a vector, and this vector can be used for
# other predictions, too: here, whether a review is positive or negative. You replace the large output head by a tiny
# one, freeze most of the model while the rest learns, and compute accuracy and a confusion matrix. At the end the
# library does the same, also for spam.
#
# Previous: [training](10_training.py). The notebook runs in about 25 seconds on two CPU cores.

# %%
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.utils.capture import capture_output

import slm_jax
from slm_jax.cli import main
from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.labelled import load_labelled
from slm_jax.evaluation.classes import class_figures
from slm_jax.tokenizer import SimpleTokenizer

jax.config.update("jax_default_matmul_precision", "highest")  # full float32 precision on GPUs and TPUs too
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # colour-blind safe

# %% [markdown]
# ## The data
#
# The data are 240 short reviews of films, shops and concerts, half of them positive, written for this notebook. Each
# line of the file is a JSON object with a text and its label.
#
# They are split in three: the model learns from the *training* texts, the *validation* texts are used to choose between
# models, and the *test* texts only for the final evaluation. Each part has as many positive as negative texts. In the
# library this is [`slm_jax/data/labelled.py`](../slm_jax/data/labelled.py).

# %%
splits = load_labelled(DataConfig(source="jsonl:data/sentiment.jsonl"), ClassificationConfig(), seed=0)
classes = splits.classes
for text, label in zip(splits.train.texts[:4], splits.train.labels[:4], strict=True):
    print(f"{classes[label]:<9} {text}")
for name in ("train", "validation", "test"):
    split = getattr(splits, name)
    print(f"{name:<11} {len(split.texts):>3} texts, {int(split.labels.sum())} of them {classes[1]}")
assert not set(splits.train.texts) & set(splits.test.texts)

# %% [markdown]
# ## Rows of equal length
#
# A batch is a rectangular array, but texts differ in length. So every text is padded with zeros on the right, and its
# true length is stored separately. Words that occur in no training text become `<|unk|>`: the model must not know
# anything about the test texts, not even their words.

# %%
tokenizer = SimpleTokenizer().build_vocab(" ".join(splits.train.texts))
width = 32


def to_batch(split):
    rows = [tokenizer.encode(text)[:width] for text in split.texts]
    inputs = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(inputs, rows, strict=True):
        row[: len(ids)] = ids
    return {"inputs": inputs, "lengths": np.array([len(ids) for ids in rows]), "labels": split.labels}


train, validation, test = (to_batch(split) for split in (splits.train, splits.validation, splits.test))
unknown = np.mean(
    [tokenizer.vocab_size - 1 == i for row, n in zip(test["inputs"], test["lengths"], strict=True) for i in row[:n]]
)
print(f"{tokenizer.vocab_size} words; longest training text: {train['lengths'].max()} tokens")
print(f"unknown words in the test texts: {unknown:.0%}")

# %% [markdown]
# ## A small language model first
#
# Fine-tuning starts from a model that already knows something about language. Ours gets a short pretraining: it
# predicts the next word of the training reviews, without their labels. Padding has weight 0 in the loss, as in
# [notebook 9](09_pretraining_setup.py). The training loop is compiled as one program: `jax.lax.scan` calls `step` for
# each key in turn and passes the state on.

# %%
cfg = slm_jax.get_gpt_config("tiny", vocab_size=tokenizer.vocab_size, context_length=width, emb_dim=32, n_layers=2)
gpt = slm_jax.GPTModel(cfg)


def language_loss(params, rows):
    inputs, targets = rows["inputs"][:, :-1], rows["inputs"][:, 1:]
    counts = jnp.arange(1, width) < rows["lengths"][:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(gpt.apply({"params": params}, inputs), targets)
    return jnp.sum(losses * counts) / jnp.sum(counts)


@partial(jax.jit, static_argnames=("loss_fn", "steps", "learning_rate"))
def train_model(loss_fn, trainable, data, steps, learning_rate, seed=0):
    """Return the trained parameters and the loss of every step; a step uses 32 random rows of data."""
    optimizer = optax.adamw(learning_rate)

    def step(state, key):
        trainable, opt_state = state
        chosen = jax.random.randint(key, (32,), 0, len(data["inputs"]))
        rows = {name: values[chosen] for name, values in data.items()}
        loss, gradient = jax.value_and_grad(loss_fn)(trainable, rows)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), loss

    keys = jax.random.split(jax.random.key(seed), steps)
    (trainable, _), losses = jax.lax.scan(step, (trainable, optimizer.init(trainable)), keys)
    return trainable, losses


# %%
new_params = jax.jit(gpt.init)(jax.random.key(0), train["inputs"][:1])["params"]
base, losses = train_model(language_loss, new_params, train, steps=40, learning_rate=3e-3)
print(f"loss per word: {losses[0]:.2f} at first (uniform: {np.log(cfg.vocab_size):.2f}),", end=" ")
print(f"{losses[-5:].mean():.2f} at the end")
assert losses[-5:].mean() < 0.9 * losses[0]

# %% [markdown]
# ## A new head
#
# The language model's head gives a number for each word of the vocabulary. A classifier needs a number for each class:
# one small matrix and a bias, randomly initialised. It uses the hidden state of the **last real token**, because with
# causal attention only this token has seen the whole text:
#
# $$\text{logits} = h_{\text{last}} W + b$$
#
# In words: the 32 numbers of the last token, times a matrix of 32 rows and 2 columns, plus 2 biases.

# %%
head = {"kernel": 0.02 * jax.random.normal(jax.random.key(1), (cfg.emb_dim, len(classes))), "bias": jnp.zeros(2)}


@jax.jit
def class_logits(base, head, inputs, lengths):
    hidden = gpt.apply({"params": base}, inputs, method="hidden")  # (texts, width, 32)
    last = hidden[jnp.arange(len(inputs)), lengths - 1]  # (texts, 32): the last real token, not padding
    return last @ head["kernel"] + head["bias"]


logits = class_logits(base, head, test["inputs"], test["lengths"])
print("logits:", logits.shape, "for", len(test["labels"]), "texts")

# %% [markdown]
# In the library this is `GPTClassifier` in [`slm_jax/model.py`](../slm_jax/model.py). Its parameters are the
# GPT's and a `class_head`; it gives the same logits. The padding tokens make no difference.

# %%
classifier = slm_jax.GPTClassifier(cfg, n_classes=2, pooling="last")
whole = {**base, "class_head": head}
library_logits = jax.jit(lambda inputs: classifier.apply({"params": whole}, inputs, test["lengths"]))
theirs = library_logits(test["inputs"])
assert jnp.allclose(logits, theirs, atol=1e-5)

padding = np.arange(width) >= test["lengths"][:, None]
noise = np.where(padding, 7, test["inputs"])
assert jnp.allclose(theirs, library_logits(noise), atol=1e-5)
print("the same logits with other padding tokens")

# %% [markdown]
# ## Freezing
#
# *Freezing* a parameter means that training does not change it. With pure functions this is a matter of arguments: we
# pass two trees of parameters, and `grad` differentiates only with respect to the first. Frozen parameters have no
# gradient and no optimizer state. The blocks are stacked (first axis: layer), so "the last block" is the last slice.
#
# We compare three choices: only the head; the head with the last block and the final norm (the book's choice); and
# everything.


# %%
def split_last_block(params):
    """Return the trained parameters (last block, final norm and head) and the frozen ones (the rest)."""
    last = {"block": jax.tree.map(lambda leaf: leaf[-1:], params["blocks"])}
    trained = {**last, "final_norm": params["final_norm"], "class_head": params["class_head"]}
    return trained, {name: leaf for name, leaf in params.items() if name not in trained}


def join_last_block(trained, frozen):
    below = jax.tree.map(lambda leaf: leaf[:-1], frozen["blocks"])
    blocks = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), below, trained["block"])
    rest = {name: leaf for name, leaf in {**frozen, **trained}.items() if name != "block"}
    return {**rest, "blocks": blocks}


choices = {
    "head only": (
        {"class_head": whole["class_head"]},
        base,
        lambda trained, frozen: {**frozen, **trained},
    ),
    "last block": (*split_last_block(whole), join_last_block),
    "everything": (whole, {}, lambda trained, frozen: trained),
}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


for name, (trained, _, _) in choices.items():
    print(f"{name:<11} {count(trained):>6,} of {count(whole):,} parameters are trained")
assert count(choices["head only"][0]) == 32 * 2 + 2

# %% [markdown]
# ## Before and after
#
# The loss is cross-entropy again, over 2 classes instead of a vocabulary. *Accuracy* is the share of texts that are
# classified correctly. With two classes of the same size, guessing gives about one half, and so does the new head
# before training.


# %%
def class_loss(params, rows):
    logits = classifier.apply({"params": params}, rows["inputs"], rows["lengths"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["labels"]).mean()


@jax.jit
def predict(params, inputs, lengths):
    return classifier.apply({"params": params}, inputs, lengths).argmax(-1)


def accuracy(params, data):
    return float(np.mean(predict(params, data["inputs"], data["lengths"]) == data["labels"]))


before = {name: accuracy(whole, data) for name, data in (("train", train), ("validation", validation))}
print(f"before: accuracy {before['train']:.2f} on training texts, {before['validation']:.2f} on validation texts")
assert 0.35 < before["train"] < 0.65

# %% tags=["varies"]
after, curves = {}, {}
for name, (trained, frozen, join) in choices.items():

    def loss_fn(trained, rows, frozen=frozen, join=join):
        return class_loss(join(trained, frozen), rows)

    found, curves[name] = train_model(loss_fn, trained, train, steps=80, learning_rate=2e-3)
    after[name] = join(found, frozen)
    print(f"{name:<11} train {accuracy(after[name], train):.2f}   validation {accuracy(after[name], validation):.2f}")

for name in ("tok_emb", "pos_emb"):  # frozen parameters have not changed
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after["last block"][name], base[name]))

chosen = max(after, key=lambda name: accuracy(after[name], validation))  # only then evaluate on the test texts, once
print(f"chosen: {chosen}, test {accuracy(after[chosen], test):.2f}")
assert chosen == "everything"
assert accuracy(after[chosen], test) >= 0.7

# %% [markdown]
# In the run shown here, neither the head alone nor the last block gets far from chance, not even on the training texts.
# More steps do not help: the head stays near chance, and the last block memorises the training texts without improving
# on the test texts. The reason is the base model: after 168 reviews, its vectors contain hardly any information about
# sentiment. Training everything fixes that. Freezing pays off with a base that was trained on much more text: the
# library's recipe `classify_builtin` trains the last block of a model pretrained on Python's documentation, and it
# separates prose from code almost perfectly.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
for (name, curve), colour in zip(curves.items(), (GREY, ORANGE, BLUE), strict=True):
    left.plot(np.convolve(curve, np.ones(5) / 5, mode="valid"), color=colour, label=name)
left.set_xlabel("step")
left.set_ylabel("training loss (mean of 5 steps)")
left.legend()
for i, (data, colour) in enumerate(((train, GREY), (validation, BLUE))):
    heights = [before[("train", "validation")[i]], *(accuracy(params, data) for params in after.values())]
    bars = right.bar(np.arange(4) + 0.4 * i - 0.2, heights, 0.38, color=colour, label=("training", "validation")[i])
    right.bar_label(bars, fmt="%.2f", fontsize=7)
right.set_xticks(range(4), ["before", *(name.replace(" ", "\n") for name in after)])
right.set_ylim(0, 1.35)
right.set_ylabel("accuracy")
right.legend(ncol=2, loc="upper left")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The confusion matrix
#
# Accuracy is one number for all texts. A *confusion matrix* counts for each true class (row) which class was predicted
# (column), so it shows which mistakes the model makes. It gives two numbers per class: *precision*, the share of texts
# predicted as this class that really belong to it, and *recall*, the share of texts of this class that were predicted
# as it. In the library this is [`slm_jax/evaluation/classes.py`](../slm_jax/evaluation/classes.py).

# %%
found = np.asarray(predict(after["everything"], test["inputs"], test["lengths"]))
confusion = np.zeros((2, 2), int)
for true, predicted in zip(test["labels"], found, strict=True):
    confusion[true, predicted] += 1
precision = confusion.diagonal() / confusion.sum(0)
recall = confusion.diagonal() / confusion.sum(1)
theirs = class_figures(confusion, classes)
assert np.allclose(theirs.precision, precision)
assert np.allclose(theirs.recall, recall)
assert np.isclose(theirs.accuracy, np.mean(found == test["labels"]))

# %%
figure, axes = plt.subplots(figsize=(3.8, 3.4))
axes.imshow(confusion, cmap="Blues", vmin=0, vmax=24)
for (row, column), n in np.ndenumerate(confusion):
    axes.text(column, row, n, ha="center", va="center", fontsize=14, color="white" if n > 12 else "black")
axes.set_xticks((0, 1), classes)
axes.set_yticks((0, 1), classes)
axes.set_xlabel("predicted class")
axes.set_ylabel("true class")
figure.tight_layout()
plt.show()

# %% tags=["sampled"]
for name, p, r in zip(classes, precision, recall, strict=True):
    print(f"{name}: precision {p:.2f}, recall {r:.2f}")
wrong = np.flatnonzero(found != test["labels"])
print("wrong, for example:")
for i in wrong[:3]:
    print(f"  {splits.test.texts[i]}  (is {classes[test['labels'][i]]})")

# %% [markdown]
# ## The same with the library
#
# `slm-jax finetune` does all of this: it reads the file, splits it, trains, keeps the checkpoint with the lowest
# validation loss, and evaluates. In a terminal you would type the options below; here `main` gets them as a list. This
# recipe has no base model and uses the mean over all tokens instead of the last one; all texts are padded to one
# length, so that only one program is compiled instead of one per batch width. In the library this is
# [`slm_jax/tasks/classification.py`](../slm_jax/tasks/classification.py).


# %%
def finetune(options):
    """Run slm-jax finetune with these options; return its summary (None if it failed) and its messages."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    with capture_output() as printed:
        status = main(["finetune", *words])
    summary = Path("runs", options["run"], "summary.json")
    return (json.loads(summary.read_text()) if status == 0 else None), printed.stderr


recipe = {
    "base": "null", "trainable": "all", "resume": "never", "model.n_layers": 1, "model.emb_dim": 32,
    "model.context_length": 64, "tokenizer.kind": "simple", "train.steps": 80, "train.batch_size": 32,
    "train.eval_every": 40, "checkpoint.every": 40, "optimizer.learning_rate": 2e-3,
    "classification.pooling": "mean", "classification.pad_to": "longest",
}  # fmt: skip
summary, messages = finetune({**recipe, "run": "sentiment", "data.source": "jsonl:data/sentiment.jsonl"})
assert summary is not None, messages

# %% tags=["varies"]
for name in ("train", "test"):
    print(f"{name:<6} accuracy {summary['before'][name]['accuracy']:.2f} -> {summary['after'][name]['accuracy']:.2f}")
assert summary["after"]["test"]["accuracy"] >= 0.7
classify = slm_jax.load_classifier("runs/sentiment")
for text in ("A wonderful book, I loved it.", "The food was cold and the staff were rude."):
    print(f"{text:<45} {classify([text])[0].label} ({classify([text])[0].probability:.0%})")

# %% [markdown]
# ## Spam
#
# Here is a larger, real data set: the SMS Spam Collection, 5,574 messages, of which 13% are spam. If nearly nine in ten
# belong to one class, a model that always predicts "ham" has an accuracy of 87% and is useless. So `downsample` keeps
# as many messages of each class as there are of the rarer one. The file is read from the folder `$SLM_JAX_DATA`, or
# downloaded once (480 kB). Without the file and a network, this part is skipped.

# %% tags=["sampled"]
spam = {"data.source": "named:sms-spam", "classification.balance": "downsample", "classification.max_length": 32}
fewer = {"train.steps": 40, "optimizer.learning_rate": 3e-3, "train.eval_batch_size": 256}
summary, messages = finetune({**recipe, **spam, **fewer, "run": "spam"})
if summary is None:
    print("skipped:", " ".join(messages.split())[:200])
else:
    for name in ("train", "test"):
        print(
            f"{name:<6} accuracy {summary['before'][name]['accuracy']:.2f} -> {summary['after'][name]['accuracy']:.2f}"
        )
    print("test, true class by row (ham, spam):", summary["after"]["test"]["confusion"])
    assert summary["after"]["test"]["accuracy"] > 0.8

# %% [markdown]
# ## Exercises
#
# **1.** The last token has seen the whole text. What has the first token seen? Let a classifier use it
# (`pooling="first"`), with the parameters trained above, and compare the logits of texts that begin with the same word.
#
# <details><summary>Solution</summary>
#
# ```python
# first = slm_jax.GPTClassifier(cfg, n_classes=2, pooling="first")
# logits_first = jax.jit(first.apply)({"params": after["everything"]}, test["inputs"], test["lengths"])
# openings = test["inputs"][:, 0]
# for word in np.unique(openings):
#     same = logits_first[openings == word]
#     assert jnp.allclose(same, same[0], atol=1e-5)
# print(f"{len(np.unique(openings))} first words, as many different predictions for {len(openings)} texts")
# ```
#
# With causal attention the first token has seen only itself, so nothing after it can change the prediction. Training
# does not help: "A" or "The" says little about a review.
#
# </details>
#
# **2.** How good is a constant prediction if 13% of the messages are spam? Compute the accuracy and the recall of spam
# for a model that always predicts "ham", for 1,000 messages.
#
# <details><summary>Solution</summary>
#
# ```python
# always_ham = class_figures(np.array([[870, 0], [130, 0]]), ("ham", "spam"))
# print(always_ham.accuracy, always_ham.recall)
# assert always_ham.accuracy == 0.87 and always_ham.recall[1] == 0
# ```
#
# Accuracy alone hides the problem; the confusion matrix shows an empty column.
#
# </details>
#
# **3.** How precise is an accuracy measured on 48 texts? The standard error of a share $p$ of $n$ texts is
# $\sqrt{p (1 - p) / n}$.
#
# <details><summary>Solution</summary>
#
# ```python
# p = accuracy(after["everything"], test)
# error = np.sqrt(p * (1 - p) / len(test["labels"]))
# print(f"{p:.2f} with a standard error of {error:.2f}")
# assert 0.01 < error < 0.08
# ```
#
# Two models that differ by less than about two standard errors may be equally good. Small test sets allow few
# conclusions.
#
# </details>
#
# ## Key takeaways
#
# - A classifier is a language model with a different head on its last real token, and cross-entropy over classes.
# - Freezing is a choice of which tree to differentiate. It saves work, and pays off with a well-trained base model.
# - Look at the confusion matrix, at the class balance, and at the number of texts behind an accuracy.
#
# Next: [following instructions](11b_instruction_tuning.py).
