"""What must hold of samplers: what is kept is what the definition says, and draws follow what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import InputError
from slm_jax.generation.config import Sampling
from slm_jax.generation.sampler import choose_tokens, keep_top_p, penalize_repetition

PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.02, 0.2, 0.08])
LOGITS = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]], jnp.float32)) + 3  # logits need not be normalised


@pytest.mark.parametrize("p", [0.5, 0.99])
def test_top_p_of_a_large_vocabulary_is_what_sorting_gives(p):
    logits = np.asarray(jax.random.normal(jax.random.key(2), (4, 50_257)) * 3)
    for row, result in zip(logits.astype(np.float64), np.asarray(keep_top_p(jnp.asarray(logits), p)), strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities)
        n = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
        n_kept = int(np.isfinite(result).sum())
        assert abs(n_kept - n) <= max(2, 1e-3 * n)  # sums in float32
        assert np.isfinite(result[order[:n_kept]]).all()


def test_repetition_penalty_lowers_what_was_seen_whatever_its_sign():
    logits = jnp.array([[2.0, -2.0, 1.0, -1.0]])
    seen = jnp.array([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 4.0).tolist() == [[0.5, -8.0, 1.0, -1.0]]


def draws(sampling, n=4000, seen=None):
    logits = jnp.tile(LOGITS[:1], (n, 1))
    keys = jax.random.split(jax.random.key(5), n)
    seen = None if seen is None else jnp.tile(jnp.array(seen), (n, 1))
    ids = choose_tokens(logits, sampling.numbers(), sampling.top_k, keys, seen)
    assert ids.dtype == jnp.int32
    return np.bincount(ids, minlength=6) / n


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(), [0, 1, 2, 3, 4, 5]),
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=2), [1, 2]),
        (Sampling(top_k=100), [0, 1, 2, 3, 4, 5]),
        (Sampling(top_k=0), [0, 1, 2, 3, 4, 5]),
        (Sampling(top_p=0.01), [1]),
        (Sampling(top_p=0.39), [1]),
        (Sampling(top_p=0.64), [1, 2]),
        (Sampling(top_p=0.66), [1, 2, 4]),
        (Sampling(top_p=0.92), [1, 2, 4, 5]),
        (Sampling(min_p=0.15), [1, 2, 4, 5]),
        (Sampling(min_p=0.6), [1, 2]),
        (Sampling(min_p=1.0), [1]),
        (Sampling(top_k=4, top_p=0.9), [1, 2, 4]),  # of the four left, 0.4/0.93 … : three reach 0.9
        (Sampling(temperature=0.5, top_p=0.66), [1, 2]),  # the temperature comes first: squares of the probabilities
        (Sampling(top_k=3, min_p=0.55), [1, 2]),
    ],
)
def test_draws_follow_what_is_kept(sampling, allowed):
    weights = np.zeros(6)
    weights[allowed] = PROBABILITIES[allowed] ** (1 / sampling.temperature)
    assert np.abs(draws(sampling) - weights / weights.sum()).max() < 0.03
    assert draws(sampling)[weights == 0].sum() == 0


def test_the_penalty_comes_before_the_draw_and_before_greedy():
    seen = [[False, True, False, False, False, False]]
    sampling = Sampling(repetition_penalty=50.0)
    assert draws(sampling)[1] > 0.3  # without `seen` nothing is penalised
    assert draws(sampling, seen=seen)[1] < 0.1
    greedy = Sampling(temperature=0, repetition_penalty=50.0)
    assert choose_tokens(LOGITS[:1], greedy.numbers(), None, None, jnp.array(seen)).tolist() == [2]


def test_greedy_takes_no_notice_of_the_filters():
    greedy = Sampling(temperature=0, top_k=1, top_p=0.1, min_p=1.0)
    assert greedy.is_greedy
    assert Sampling(temperature=1e-40).is_greedy  # a division would overflow
    assert choose_tokens(LOGITS, greedy.numbers(), greedy.top_k, None, None).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("min_p", -0.1), ("repetition_penalty", 0.0)],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is {value}"):
        Sampling(**{name: value})
    assert Sampling(temperature=np.float64(0.5)) == Sampling(temperature=0.5)
    assert Sampling(top_p=1.0).numbers() == Sampling().numbers()
