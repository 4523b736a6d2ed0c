"""What must hold of continuations' scores: the naive loop's, whatever the order, the batch and the length."""

import dataclasses

import jax
import numpy as np
import pytest

from slm_jax.errors import InputError
from slm_jax.tokenizer import BPETokenizer, CharTokenizer, SimpleTokenizer

CONTEXT, VOCAB = 20, 12
RNG = np.random.default_rng(3)


def pair(n_context, n_continuation):
    return RNG.integers(0, VOCAB, n_context).tolist(), RNG.integers(0, VOCAB, n_continuation).tolist()


LENGTHS = [(1, 1), (5, 3), (1, 19), (15, 2), (14, 3), (19, 1), (20, 1), (1, 20)]  # all fit
TOO_LONG = [(20, 2), (2, 20), (40, 5), (20, 20), (33, 19)]
PAIRS = [pair(*lengths) for lengths in LENGTHS + TOO_LONG]


def naive(transformer, context, continuation):
    """The harness: the last context_length + 1 tokens, the continuation's one after the other."""
    ids = [*context, *continuation][-CONTEXT - 1 :]
    steps = [transformer.next_logprobs(ids[:i]) for i in range(len(ids) - len(continuation), len(ids))]
    scores = [step[id_] for step, id_ in zip(steps, continuation, strict=True)]
    return sum(scores), all(step.argmax() == id_ for step, id_ in zip(steps, continuation, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_one_token_at_a_time(transformer, batch_size):
    logprobs, is_greedy = transformer.scorer(batch_size=batch_size).score(PAIRS)
    expected = [naive(transformer, *pair) for pair in PAIRS]
    np.testing.assert_allclose(logprobs, [score for score, _ in expected], rtol=1e-5)
    assert is_greedy.tolist() == [greedy for _, greedy in expected]


def test_greedy_means_every_token(transformer):
    def continued(context, n):
        ids = list(context)
        for _ in range(n):
            ids.append(int(transformer.next_logprobs(ids).argmax()))
        return ids[len(context) :]

    def changed(ids, i):
        return [*ids[:i], (ids[i] + 1) % VOCAB, *ids[i + 1 :]]

    contexts = [[3], [5, 1, 0], list(range(10))]
    best = [(context, continued(context, 4)) for context in contexts]
    wrong = [(context, changed(ids, i)) for context, ids in best for i in range(4)]
    _, is_greedy = transformer.scorer().score(best + wrong)
    assert is_greedy.tolist() == [True] * 3 + [False] * 12


def test_many_lengths_take_few_shapes(transformer, shapes):
    transformer.scorer(batch_size=4).score([pair(i, 1) for i in range(1, 40)])
    assert set(shapes) == {(4, 16), (4, CONTEXT)}


def test_a_continuation_longer_than_the_context_is_scored_whole(bigrams):
    pairs = [pair(3, n) for n in (20, 21, 40, 41, 73)]
    logprobs, _ = bigrams.scorer().score(pairs)
    expected = [bigrams.score([*context, *continuation], len(continuation)) for context, continuation in pairs]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5)


def test_greedy_holds_across_the_pieces_of_a_long_continuation(bigrams):
    ids = [0]
    for _ in range(50):
        ids.append(int(bigrams.logprobs[ids[-1]].argmax()))
    early = [*ids[:3], (ids[3] + 1) % VOCAB, *ids[4:]]
    _, is_greedy = bigrams.scorer().score([(ids[:1], ids[1:]), (early[:1], early[1:])])
    assert is_greedy.tolist() == [True, False]


def test_truncated_is_what_loses_tokens(transformer):
    truncated = [transformer.scorer().is_truncated(pair) for pair in PAIRS]
    assert truncated == [False] * len(LENGTHS) + [True] * len(TOO_LONG)


def test_ids_outside_the_vocabulary_and_a_model_of_nans_are_refused(transformer):
    with pytest.raises(InputError, match=r"id 12, outside the model's vocabulary of 12"):
        transformer.scorer().score([([1], [2]), ([1, 12], [1])])
    params = jax.tree.map(lambda leaf: leaf * np.nan, transformer.params)
    with pytest.raises(InputError, match="pair 0 is not finite"):
        dataclasses.replace(transformer.scorer(), params=params).score([([1], [2])])


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train("the cat sat on the mat, the cat sat " * 9, vocab_size=280)


@pytest.mark.parametrize(
    ("context", "continuation", "context_text", "continuation_text"),
    [
        ("the cat", " sat", "the cat", " sat"),
        ("the cat ", "sat", "the cat", " sat"),
        ("the cat \n ", " sat", "the cat", " \n  sat"),
    ],
)
def test_white_space_moves_from_the_context_to_the_continuation(
    transformer, bpe, context, continuation, context_text, continuation_text
):
    context_ids, continuation_ids = transformer.scorer(bpe).encode(context, continuation)
    assert context_ids == bpe.encode(context_text)
    assert bpe.decode(continuation_ids) == continuation_text
    # As in the harness: the whole is encoded at once, and cut by the number of the context's own tokens.
    assert continuation_ids == bpe.encode(context + continuation)[len(context_ids) :]
    for blank in ("", "  "):  # without a context the end of text stands for it
        assert transformer.scorer(bpe).encode(blank, "the cat") == ([bpe.eot_id], bpe.encode(blank + "the cat"))


def test_a_continuation_without_tokens_is_refused(transformer):
    with pytest.raises(InputError, match="makes no token of ' '"):
        transformer.scorer(SimpleTokenizer().build_vocab("a b")).encode("a", " ")
    assert transformer.scorer(CharTokenizer().build_vocab("a b")).encode("a", " ")[1] == [0]
