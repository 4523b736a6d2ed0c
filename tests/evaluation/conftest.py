"""Models whose probabilities are known: by a table of pairs, or by one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.evaluation import logprobs
from slm_jax.evaluation.logprobs import Scorer
from slm_jax.model import GPTConfig, GPTModel, param_shapes
from slm_jax.tokenizer import CharTokenizer

CHARS = CharTokenizer().build_vocab("ab")
CONTEXT, VOCAB = 20, 12  # above the shortest bucket, and no power of two


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Scored:
    """A model and its parameters."""

    def scorer(self, tokenizer=CHARS, batch_size=8):
        return Scorer(self.model, self.params, tokenizer, batch_size)


class Bigrams(Scored):
    """A GPT in which the next token depends on the last one only, with logits that are given as a table.

    Embeddings are one-hot and the block adds nothing; with a bias of 1 the normed one-hots are independent, so that an
    output head gives any table.
    """

    def __init__(self, logits):
        vocab = len(logits)
        cfg = GPTConfig(
            vocab_size=vocab, context_length=CONTEXT, emb_dim=vocab, n_heads=1, n_layers=1, tie_weights=False
        )
        normed = np.eye(vocab) - 1 / vocab
        normed = normed / np.sqrt(np.square(normed).mean(-1, keepdims=True) + 1e-5) + 1
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(cfg))
        params["tok_emb"]["embedding"] = np.eye(vocab, dtype=np.float32)
        params["final_norm"] = {"scale": np.ones(vocab, np.float32), "bias": np.ones(vocab, np.float32)}
        params["out_head"]["kernel"] = np.linalg.solve(normed, np.asarray(logits, np.float64)).astype(np.float32)
        self.model, self.params, self.logprobs = GPTModel(cfg), params, log_softmax(logits)

    def score(self, ids, n_scored):
        """The log-probability of the last ids."""
        return sum(self.logprobs[a, b] for a, b in zip(ids[-n_scored - 1 : -1], ids[-n_scored:], strict=True))


class Transformer(Scored):
    """A GPT with random weights, and its probabilities one token at a time."""

    def __init__(self):
        cfg = GPTConfig(vocab_size=VOCAB, context_length=CONTEXT, emb_dim=16, n_heads=2, n_layers=2)
        rng = np.random.default_rng(0)  # weights large enough that each token depends on all before it
        random = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(cfg))
        self.model, self.params = GPTModel(cfg), random
        self._forward = jax.jit(self.model.apply)

    def next_logprobs(self, ids):
        """The log-probabilities of the token after some ids; what fills the row up cannot be seen from there."""
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(ids)] = ids
        return log_softmax(self._forward({"params": self.params}, row)[0, len(ids) - 1])


@pytest.fixture(scope="session")
def bigrams_of():
    return Bigrams


@pytest.fixture(scope="session")
def bigrams():
    return Bigrams(np.random.default_rng(1).normal(0, 2, (VOCAB, VOCAB)))


@pytest.fixture(scope="session")
def transformer():
    return Transformer()


@pytest.fixture
def shapes(monkeypatch):
    """The shapes that are computed, and so compiled for."""
    seen, compute = [], logprobs.target_logprobs

    def spy(model, params, inputs, targets):
        seen.append(inputs.shape)
        return compute(model, params, inputs, targets)

    monkeypatch.setattr(logprobs, "target_logprobs", spy)
    return seen
