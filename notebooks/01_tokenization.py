# %% [markdown]
# # 1. Tokenization
#
# A language model computes with numbers, but a text is made of letters. This notebook covers the steps between the two:
# how a text becomes a list of integers (ids), why GPT-2 splits words into pieces and how those pieces are found, how a
# long list of ids becomes training examples, and how an id becomes a vector that also encodes its position.
#
# You only need to know Python. The notebook runs in about 10 seconds on two CPU cores.

# %%
import re
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import slm_jax
from slm_jax.tokenizer import BPETokenizer, CharTokenizer, SimpleTokenizer

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs round more than that by default

# %% [markdown]
# ## Words
#
# The simplest idea: split the text into words and punctuation marks, list the different ones, and number them. The list
# is the **vocabulary**, the number of a word is its **id**, and a piece of text that has an id is a **token**.

# %%
text = "The baker baked bread. The baker bakes cakes and breads, and the cakes are baked."


def words_of(text):
    return re.findall(r"\w+|[^\w\s]", text)


vocabulary = sorted(set(words_of(text)))
word_ids = {word: i for i, word in enumerate(vocabulary)}
ids = [word_ids[word] for word in words_of(text)]
print(word_ids)
print(ids)

# %% [markdown]
# The reverse lookup gives the words back. The spaces were discarded, so decoding has to guess them.

# %%
decoded = " ".join(vocabulary[i] for i in ids)
print(decoded)
assert words_of(decoded) == words_of(text)

# %% [markdown]
# A word that was not in the text has no id. The usual solution is one more token, `<|unk|>`, that stands for every
# unknown word; the word itself is lost. Another special token, `<|endoftext|>`, marks the end of a document.
#
# In the library this is `SimpleTokenizer` in [`slm_jax/tokenizer/words.py`](../slm_jax/tokenizer/words.py).

# %%
simple = SimpleTokenizer().build_vocab(text)
assert simple.encode(text) == ids
print(simple.encode("The baker bakes pies."))
print(simple.decode(simple.encode("The baker bakes pies.")))
assert "<|unk|>" in simple.decode(simple.encode("The baker bakes pies."))

# %% [markdown]
# Words as tokens have two drawbacks. A vocabulary for real texts would need an entry for every name, number and
# spelling mistake. And `baked`, `baker` and `bakes` get unrelated ids, so what a model learns about one does not help
# it with the others.
#
# ## Characters and bytes
#
# The opposite extreme is one id per character. The vocabulary is small, but the list of ids gets long, and a character
# that never occurred in the training text still has no id.

# %%
chars = CharTokenizer().build_vocab(text)
char_ids = chars.encode(text)
print(len(ids), "words,", len(char_ids), "characters;", chars.vocab_size, "ids in the vocabulary")
assert chars.decode(char_ids) == text
try:
    chars.encode("crème")
except ValueError as error:
    print(error)

# %% [markdown]
# A computer stores text as **bytes**, numbers from 0 to 255. In UTF-8, the usual encoding, each of the 128 ASCII
# characters (English letters, digits, punctuation) is one byte; all others take two to four. So 256 ids are enough for
# any text, and no input is ever unknown. The price is a longer sequence.

# %%
for sample in ("bread", "crème", "パン", "🍞"):
    print(sample, list(sample.encode("utf-8")))
    assert bytes(sample.encode("utf-8")).decode("utf-8") == sample

# %% [markdown]
# ## Byte-pair encoding: pieces between bytes and words
#
# **Byte-pair encoding** (BPE) starts with the bytes and lets the training text decide what else gets an id: find the
# most frequent pair of adjacent tokens, merge it into one token, and repeat. Frequent words become single tokens; rare
# ones stay in pieces.
#
# Pairs must not cross word boundaries, so the text is split first. A space belongs to the word after it and is written
# as `Ġ` here, as in GPT-2's own files. (In our plain English example every character is one byte.)


# %%
def split(text):
    """Split into contractions ('s, 'll), words, numbers, punctuation (each with its leading space) and whitespace."""
    return re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s", text)


pieces = [word.replace(" ", "Ġ") for word in split(text)]
print(pieces)
assert "".join(split(text)) == text

# %% [markdown]
# Each word starts as a list of single characters. Count the adjacent pairs in all words:

# %%
words = [list(piece) for piece in pieces]


def count_pairs(words):
    return Counter(pair for word in words for pair in pairwise(word))


print(count_pairs(words).most_common(5))

# %% [markdown]
# Then merge the most frequent pair everywhere:


# %%
def merge(word, pair):
    """Merge each occurrence of the pair in a list of symbols."""
    merged = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


print(merge(list("Ġbaker"), ("a", "k")))
assert merge(list("Ġbaker"), ("a", "k")) == ["Ġ", "b", "ak", "e", "r"]

# %% [markdown]
# That is the whole algorithm. Repeat it sixteen times and record the merged pairs: this list of merges *is* the
# tokenizer. If two pairs are equally frequent, the one with the older symbols wins, so the same text always gives the
# same merges.

# %%
age = {symbol: i for i, symbol in enumerate(sorted(set("".join(pieces))))}
merges, history = [], [words]
print("merge  pair             times  tokens in the text")
for step in range(1, 17):
    counts = count_pairs(words)
    best = min(counts, key=lambda pair: (-counts[pair], age[pair[0]], age[pair[1]]))
    words = [merge(word, best) for word in words]
    age["".join(best)] = len(age)
    merges.append(best)
    history.append(words)
    print(f"{step:5}  {' + '.join(best):<16} {counts[best]:5}  {sum(map(len, words)):5}")

# %% [markdown]
# The plot shows the beginning of the second sentence; each box is one token, and the number is the token count. After
# two merges `ak` and `Ġb` are tokens. After four, `Ġbake` is a token, found only by counting, and `baker` and `bakes`
# share it.

# %%
COLOURS = ["#9ecae9", "#ffd08a", "#a8ddb5", "#e7b7d3"]  # colour-blind safe and readable under black text


def draw_tokens(rows, width=8.0):
    """Draw named lists of tokens, one row of boxes each; a character is equally wide in every row."""
    _, ax = plt.subplots(figsize=(width, 0.42 * len(rows) + 0.3))
    for y, tokens in enumerate(rows.values()):
        x = 0
        for i, token in enumerate(tokens):
            ax.barh(y, len(token), left=x, height=0.7, color=COLOURS[i % 4], edgecolor="white", linewidth=2)
            ax.text(x + len(token) / 2, y, token, ha="center", va="center", family="monospace", fontsize=9)
            x += len(token)
    ax.set_yticks(range(len(rows)), [f"{name}: {len(tokens)}" for name, tokens in rows.items()])
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    plt.show()


shown = range(5, 12)  # " The baker bakes cakes and breads,"
draw_tokens({f"{n} merges": [s for i in shown for s in history[n][i]] for n in (0, 2, 4, 8, 12, 16)})

# %% [markdown]
# ## Encoding a new text
#
# A new word is encoded with the same merges, in the order in which they were learned. Equivalently: as long as any
# adjacent pair forms a known token, merge the pair whose token was learned first. The position of a token in the list
# of merges is called its **rank**.


# %%
def encode_word(symbols, rank):
    """Merge the adjacent pair whose token has the lowest rank, until no pair forms a known token."""
    symbols = list(symbols)
    while True:
        known = [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in rank]
        if not known:
            return symbols
        _, i = min(known)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


rank = {a + b: i for i, (a, b) in enumerate(merges)}
for word in ("Ġbaked", "Ġbaking", "Ġcakewalk"):
    print(word, encode_word(word, rank))
assert [encode_word(piece, rank) for piece in pieces] == history[-1]

# %% [markdown]
# `baking` never occurred in the training text, which is no problem: a word without its own token is spelled with
# smaller tokens, down to single bytes.
#
# In the library this is `BPETokenizer` in [`slm_jax/tokenizer/bpe.py`](../slm_jax/tokenizer/bpe.py). Its ids are 0 to
# 255 for the bytes, then one per merge, then `<|endoftext|>`. Trained on our text, it learns the same sixteen merges:

# %%
bpe = BPETokenizer.train(text, vocab_size=256 + 16 + 1)
symbol_of = [chr(i).replace(" ", "Ġ") for i in range(256)]
for left, right in bpe.to_dict()["merges"]:
    symbol_of.append(symbol_of[left] + symbol_of[right])
assert symbol_of[256:] == ["".join(pair) for pair in merges]

# %% [markdown]
# So it also splits new texts as our code does, for example:

# %%
new_text = "The cake maker's bread doesn't break."
ours = [s for word in split(new_text) for s in encode_word(word.replace(" ", "Ġ"), rank)]
theirs = bpe.encode(new_text)
print([symbol_of[i] for i in theirs])
print(theirs)
assert [symbol_of[i] for i in theirs] == ours
assert bpe.decode(theirs) == new_text

# %% [markdown]
# ## GPT-2's encoding, through tiktoken
#
# GPT-2's vocabulary was built in the same way from a large web crawl: 256 bytes, 50,000 merges and `<|endoftext|>`,
# 50,257 ids in total. `slm_jax.get_tokenizer("gpt2")` loads it through OpenAI's `tiktoken`, which downloads two files
# once, or finds them in the folder set by `TIKTOKEN_CACHE_DIR`.
#
# If the files are missing and there is no network, the cell below prints a message and trains a replacement on the
# documentation that ships with Python. The rest of the notebook works with either.

# %% tags=["sampled"]
large, name = slm_jax.get_tokenizer("gpt2"), "GPT-2"
try:
    large.encode("Are the files there?")
except FileNotFoundError:
    from slm_jax.data.builtin import python_docs

    print("GPT-2's files are not available: using a BPETokenizer trained on Python's documentation instead.")
    large, name = BPETokenizer.train(python_docs(), vocab_size=4096), "replacement"
print(f"{name}: {large.vocab_size:,} ids")
for sample in ("The baker bakes.", "the Baker", "antidisestablishmentarianism", "3.14159", "パン 🍞"):
    print(f"{sample!r:<32} {[large.encoding.decode_single_token_bytes(i) for i in large.encode(sample)]}")

# %% [markdown]
# A token is a sequence of bytes (`b"..."`), not of characters: a rare character may take several tokens, none of which
# is printable alone. `"the"` and `" the"`, `"baker"` and `"Baker"` are different tokens.
#
# Is our `encode_word` the complete algorithm? Give it the ranks of the large vocabulary, let it start from bytes, and
# compare with tiktoken, which does the same in fast Rust code.

# %% tags=["sampled"]
encoding = large.encoding
large_rank = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
sample = "Bakers in 1789 asked 4 sous a loaf; they'd never heard of crème brûlée, パン or 🍞."
by_hand = []
for word in split(sample):
    single_bytes = [bytes([byte]) for byte in word.encode("utf-8")]
    by_hand += [large_rank[token] for token in encode_word(single_bytes, large_rank)]
assert by_hand == large.encode(sample)
assert large.decode(by_hand) == sample
print(f"{len(sample)} characters, {len(sample.encode('utf-8'))} bytes, {len(by_hand)} tokens, equal ids")

# %% [markdown]
# Here are the tokenizations side by side. A larger vocabulary makes sequences shorter, but it also makes the model
# larger, because every id gets its own vector, as you will see below. And tokens that are rare in the training text are
# hardly learned.

# %% tags=["varies"]
line = "The unbaked cake is breaking apart."
draw_tokens(
    {
        "characters": list(line),
        "our 16 merges": [bpe.decode([i]).replace(" ", "·") for i in bpe.encode(line)],
        name: [large.decode([i]).replace(" ", "·") for i in large.encode(line)],
        "words": [word.replace(" ", "·") for word in split(line)],
    }
)

# %% [markdown]
# ## Sliding windows: training examples from a list of ids
#
# A language model learns to predict the next token. So a training example is a window of the text (the **input**) and
# the same window shifted by one token (the **target**): at each position, the target is the token that follows. No
# manual labels are needed.
#
# `context` is the window's length; `stride` is the distance between the starts of consecutive windows.

# %%
context, stride = 6, 3
tokens = np.array(bpe.encode(text))


def windows(tokens, context, stride):
    """Return inputs and targets, each (windows, context)."""
    starts = range(0, len(tokens) - context, stride)
    inputs = np.stack([tokens[s : s + context] for s in starts])
    targets = np.stack([tokens[s + 1 : s + context + 1] for s in starts])
    return inputs, targets


inputs, targets = windows(tokens, context, stride)
print(len(tokens), "tokens,", inputs.shape[0], "windows of", inputs.shape[1])
assert (inputs[:, 1:] == targets[:, :-1]).all()  # shifted by one

# %% [markdown]
# One window contains as many predictions as it has positions, one for each length of the preceding text:

# %%
names = np.array([symbol.replace("Ġ", "·") for symbol in symbol_of])  # show spaces as dots
for k in range(1, context + 1):
    print(f"{'|'.join(names[inputs[0, :k]]):<26} -> {names[targets[0, k - 1]]}")

# %%
fig, ax = plt.subplots(figsize=(8, 1.9))
rows = {0.0: (0, "#9ecae9"), 1.0: (1, "#ffd08a"), 2.4: (stride, "#9ecae9"), 3.4: (stride + 1, "#ffd08a")}
for y, (start, colour) in rows.items():
    for place in range(start, start + context):
        ax.barh(y, 1, left=place, height=0.8, color=colour, edgecolor="white", linewidth=2)
        ax.text(place + 0.5, y, names[tokens[place]], ha="center", va="center", family="monospace", fontsize=8)
ax.set_yticks(list(rows), ["window 0: inputs", "targets", "window 1: inputs", "targets"])
ax.invert_yaxis()
ax.set_xticks([place + 0.5 for place in range(10)], range(10))
ax.set_xlabel("position in the text (tokens)")
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plt.show()

# %% [markdown]
# The plot above shows the first two windows with stride 3: each row of targets is the row of inputs shifted by one
# token. The plot below shows the positions of the windows for two strides. With stride = context, each token (except at
# the very end) is an input once per pass through the text; a smaller stride repeats it with a different amount of text
# before it.

# %%
fig, ax = plt.subplots(figsize=(8, 2.6))
rows = [(s, start) for s in (context, stride) for start in range(0, len(tokens) - context, s)]
for y, (s, start) in enumerate(rows):
    ax.barh(y, context - 0.15, left=start, height=0.7, color="#0072b2" if s == context else "#e69f00")
strides = np.array([s for s, _ in rows])
centres = [float(np.flatnonzero(strides == s).mean()) for s in (context, stride)]
ax.set_yticks(centres, [f"stride {context}:\nno overlap", f"stride {stride}:\nmost tokens in two"])
ax.invert_yaxis()
ax.set_xlabel("position in the text (tokens)")
ax.spines[["top", "right", "left"]].set_visible(False)
ax.tick_params(axis="y", length=0)
plt.show()

# %% [markdown]
# In the library this is [`slm_jax/data/windows.py`](../slm_jax/data/windows.py), which also shuffles the windows and
# groups them into batches.

# %%
from slm_jax.data.windows import train_batches

batches = train_batches(
    tokens, context_length=context, batch_size=4, sampling="stride", stride=stride, shuffle=False, seed=0
)
first = batches[0]
assert (first["inputs"] == inputs[:4]).all()
assert (first["targets"] == targets[:4]).all()
print({key: value.shape for key, value in first.items()})

# %% [markdown]
# ## Token embeddings: a vector for each id
#
# Ids are only labels: 7 is not "more" than 3. So each id gets a row of numbers, its **embedding**, in a table of shape
# (vocabulary size, width). The numbers start random and are learned like all other weights.
#
# JAX draws random numbers from a **key** that you pass in. The same key always gives the same numbers, and there is no
# hidden state; to get different numbers, you `split` the key.

# %%
emb_dim = 16
token_key, position_key = jax.random.split(jax.random.key(0))
token_table = 0.5 * jax.random.normal(token_key, (bpe.vocab_size, emb_dim))
example = jnp.array(bpe.encode(text)[:14])
token_vectors = token_table[example]  # (14, 16): row i of the result is row example[i] of the table
print(token_table.shape, "->", token_vectors.shape)

# %% [markdown]
# Looking up a row is the same as a matrix multiplication: write the id as a vector with a single 1 at its index
# (**one-hot**), and multiply by the table. That is why gradient descent can learn the table like any other weight. The
# lookup just skips the multiplications by zero.

# %%
one_hot = jax.nn.one_hot(example, bpe.vocab_size)  # (14, 273)
assert jnp.allclose(one_hot @ token_table, token_vectors, atol=1e-6)

# %% [markdown]
# ## Position embeddings: where a token is
#
# The same token gets the same vector wherever it occurs, but order matters: *the baker bakes the cake* is not *the cake
# bakes the baker*. GPT-2 has a second learned table with a row for each **position**, and adds the two vectors.

# %%
position_table = 0.5 * jax.random.normal(position_key, (context + 10, emb_dim))
position_vectors = position_table[jnp.arange(len(example))]
vectors = token_vectors + position_vectors

fig, axes = plt.subplots(1, 3, figsize=(8.5, 4.4), sharey=True)
for ax, (title, values) in zip(
    axes,
    {"token": token_vectors, "+ position": position_vectors, "= what the model reads": vectors}.items(),
    strict=True,
):
    image = ax.imshow(values, cmap="PuOr", vmin=-1.5, vmax=1.5, aspect="auto")
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("dimension")
axes[0].set_yticks(range(len(example)), [f"{names[i]}  {place}" for place, i in enumerate(example.tolist())])
axes[0].set_ylabel("token and its position")
fig.colorbar(image, ax=axes, label="value", shrink=0.8)
plt.show()

# %% [markdown]
# Compare the rows of a token that occurs twice: equal on the left, different on the right.

# %%
twice = [i for i, token in enumerate(example.tolist()) if token == example[1]]
print("positions of", repr(str(names[example[1]])), twice)
a, b = twice[:2]
assert jnp.array_equal(token_vectors[a], token_vectors[b])
assert not jnp.allclose(vectors[a], vectors[b])

# %% [markdown]
# In the library these are the first lines of `GPTModel` in [`slm_jax/model.py`](../slm_jax/model.py), with the tables
# at `tok_emb/embedding` and `pos_emb/embedding` of its parameters. `slm_jax.capture` returns intermediate results of a
# model; `"embeddings"` is the input of the first block. (`init` creates a model's parameters, see notebook 3; `jax.jit`
# compiles a function before it runs.)

# %%
config = slm_jax.get_gpt_config("tiny", vocab_size=bpe.vocab_size, context_length=16, emb_dim=16, n_heads=2, n_layers=1)
model = slm_jax.GPTModel(config)
params = jax.jit(model.init)(jax.random.key(1), example[None])["params"]
params = {**params, "tok_emb": {"embedding": token_table}, "pos_emb": {"embedding": position_table}}
_, seen = slm_jax.capture(model, params, example[None], "embeddings")
assert jnp.allclose(seen["embeddings"][0], vectors, atol=1e-6)
print("the model reads an array of shape (batch, positions, width):", seen["embeddings"].shape)

# %% [markdown]
# ## Exercises
#
# **1. How many windows?** Before you process a large text, you want to know how many windows it gives. Write
# `n_windows(n_tokens, context, stride)` without making the windows, and check it against `windows`. Remember the last
# target.
#
# <details><summary>Solution</summary>
#
# ```python
# def n_windows(n_tokens, context, stride):
#     last_start = n_tokens - context - 1  # the last target is one position after the window
#     return last_start // stride + 1
#
# for n in (20, 23, 36):
#     for s in (1, 3, 6):
#         assert len(windows(np.arange(n), 6, s)[0]) == n_windows(n, 6, s)
# ```
#
# A window needs `context + 1` tokens. Starts are then 0, s, 2s, … up to `n_tokens - context - 1`.
#
# </details>
#
# **2. More merges.** Train `BPETokenizer` on `text` with 0, 4, 8, 16, 32 and 1000 merges. How many tokens does `text`
# have each time? Why does training stop by itself, and how many tokens are left then?
#
# <details><summary>Solution</summary>
#
# ```python
# lengths = {}
# for n in (0, 4, 8, 16, 32, 1000):
#     tokenizer = BPETokenizer.train(text, vocab_size=257 + n)
#     lengths[tokenizer.vocab_size - 257] = len(tokenizer.encode(text))
# print(lengths)
# assert lengths[0] == len(text.encode("utf-8"))
# assert list(lengths.values()) == sorted(lengths.values(), reverse=True)
# assert lengths[max(lengths)] == len(split(text))
# ```
#
# Merges never cross word boundaries. Once every word is one token, there is no pair left.
#
# </details>
#
# **3. Order.** Reverse the tokens of `example`. Show that the token embeddings are the same rows in another order, but
# that after adding the positions no row equals any of the original rows.
#
# <details><summary>Solution</summary>
#
# ```python
# backwards = token_table[example[::-1]]
# assert jnp.array_equal(backwards[::-1], token_vectors)
# with_places = backwards + position_vectors
# distances = jnp.abs(with_places[:, None] - vectors[None]).max(axis=-1)  # (14, 14): every row with every row
# assert distances.min() > 0.01
# ```
#
# Without positions, a model that treats all rows alike cannot distinguish a sentence from its reverse. The next
# notebook shows that attention is such a model.
#
# </details>
#
# ## Key takeaways
#
# - Text becomes ids. Byte-pair encoding starts from 256 bytes, so nothing is unknown, and merges frequent pairs.
# - A training example is a window and the same window shifted by one token; context and stride define the windows.
# - A token enters the model as the sum of two learned vectors: one for the token, one for its position.
#
# Next: [2. Simple attention](02_simple_attention.py).
