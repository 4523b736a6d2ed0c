"""What must hold of generation: greedy is a naive loop, draws follow softmax, rows know nothing of each other."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slm_jax
from slm_jax.errors import InputError
from slm_jax.generate import generate, sample_tokens, stream
from slm_jax.model import GPTConfig, GPTModel, param_shapes

CONTEXT, VOCAB = 6, 16
CFG = GPTConfig(
    vocab_size=VOCAB, context_length=CONTEXT, emb_dim=16, n_heads=2, n_layers=2, tie_weights=False, unroll=False
)
MODEL = GPTModel(CFG)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the next token depends on the whole context."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(CFG))


@cache
def forward():
    return jax.jit(MODEL.apply)


def naive_greedy(params, prompt, n):
    """Feed the model what there is, no more than its context, and take the likeliest token: one row, no padding."""
    ids = list(prompt)
    for _ in range(n):
        logits = forward()({"params": params}, jnp.array([ids[-CONTEXT:]]))
        ids.append(int(jnp.argmax(logits[0, -1])))
    return ids


def greedy(params, prompts, n, **more):
    return generate(MODEL, params, prompts, max_new_tokens=n, temperature=0.0, **more)


PROMPTS = [[3], [1, 2, 3, 4], [9, 8, 7, 6, 5, 4], [5, 0, 1, 2, 11, 12, 13, 14, 15]]  # up to longer than the context


# Greedy


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_is_the_naive_loop_even_past_the_context(params, prompt):
    ids = greedy(params, jnp.array([prompt]), 10)
    assert ids[0].tolist() == naive_greedy(params, prompt, 10)
    assert len(set(ids[0, len(prompt) :].tolist())) > 1  # not one token over and over


def test_only_the_last_context_tokens_count(params):
    long = [7, 7, 7, *PROMPTS[2]]
    assert greedy(params, [long], 8)[0][3:].tolist() == greedy(params, [PROMPTS[2]], 8)[0].tolist()


def test_each_row_of_a_ragged_batch_is_as_if_alone(params):
    together = greedy(params, PROMPTS, 9)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert row.tolist() == naive_greedy(params, prompt, 9)


def test_greedy_needs_no_key_and_ignores_one(params):
    prompts = jnp.array([PROMPTS[1]])
    assert (greedy(params, prompts, 6) == greedy(params, prompts, 6, key=KEY)).all()


# What comes back


@pytest.mark.parametrize("prompts", [np.array([[1, 2], [3, 4]]), jnp.array([[1, 2], [3, 4]])], ids=["numpy", "jax"])
def test_an_array_gives_an_array_with_its_prompts(params, prompts):
    ids = greedy(params, prompts, 3)
    assert isinstance(ids, jax.Array)
    assert (ids.shape, ids.dtype) == ((2, 5), jnp.int32)
    assert (ids[:, :2] == prompts).all()
    assert ((ids >= 0) & (ids < VOCAB)).all()


@pytest.mark.parametrize("prompts", [[[1], [2, 3, 4]], [[1, 2], [3, 4]], ([1], [2]), [np.array([1, 2])], [[5]]])
def test_lists_give_a_list_of_rows_with_their_prompts(params, prompts):
    rows = greedy(params, prompts, 3)
    assert isinstance(rows, list)
    assert len(rows) == len(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        assert (row.shape, row.dtype) == ((len(prompt) + 3,), jnp.int32)
        assert row[: len(prompt)].tolist() == list(prompt)


def test_it_is_among_the_public_names():
    assert slm_jax.generate is generate


# The end of a text


def test_after_the_end_only_the_end_comes(params):
    free = [naive_greedy(params, prompt, 10) for prompt in PROMPTS]
    eos = free[1][len(PROMPTS[1]) + 2]  # what the second row comes to third
    rows = greedy(params, PROMPTS, 10, eos_id=eos)
    ends = []
    for prompt, unstopped, row in zip(PROMPTS, free, rows, strict=True):
        added = unstopped[len(prompt) :]
        end = added.index(eos) if eos in added else 10
        ends.append(end)
        assert row.tolist() == [*prompt, *added[:end], *[eos] * (10 - end)]
    assert ends[1] <= 2
    assert len(set(ends)) > 1  # rows that ended beside rows that went on


def test_when_all_rows_have_ended_the_rest_is_the_end(params):
    prompt = PROMPTS[1]
    eos = naive_greedy(params, prompt, 1)[-1]
    ids = greedy(params, jnp.array([prompt, prompt]), 500, eos_id=eos)
    assert ids.shape == (2, len(prompt) + 500)
    assert (ids[:, len(prompt) :] == eos).all()
    assert len(list(stream(MODEL, params, [prompt], max_new_tokens=500, temperature=0.0, eos_id=eos))) == 1


def test_an_end_in_the_prompt_ends_nothing(params):
    prompt = PROMPTS[1]
    free = naive_greedy(params, prompt, 8)
    eos = next(token for token in range(VOCAB) if token not in free[len(prompt) :])
    assert greedy(params, [[eos, eos]], 1, eos_id=eos)[0].tolist() == naive_greedy(params, [eos, eos], 1)
    assert greedy(params, [prompt], 8, eos_id=eos)[0].tolist() == free


def test_a_stream_yields_a_token_a_row_as_they_come(params):
    columns = list(stream(MODEL, params, PROMPTS, max_new_tokens=4, temperature=0.0))
    assert [column.shape for column in columns] == [(4,)] * 4
    rows = [row[len(prompt) :].tolist() for prompt, row in zip(PROMPTS, greedy(params, PROMPTS, 4), strict=True)]
    assert np.stack(columns, axis=1).tolist() == rows


# Sampling


def chi_square(counts, probabilities):
    """Return the statistic over its degrees of freedom; what is expected fewer than five times is counted together."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    keep = expected > 0
    assert (observed[~keep] == 0).all()
    observed, expected = observed[keep], expected[keep]
    return ((observed - expected) ** 2 / expected).sum() / (len(expected) - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_draws_follow_softmax_of_the_logits_over_the_temperature(params, temperature, top_k):
    prompt, n = PROMPTS[2], 8192
    rows = jnp.tile(jnp.array(prompt), (n, 1))
    ids = generate(MODEL, params, rows, max_new_tokens=1, temperature=temperature, top_k=top_k, key=KEY)
    counts = np.bincount(np.asarray(ids[:, -1]), minlength=VOCAB)
    logits = np.asarray(forward()({"params": params}, jnp.array([prompt]))[0, -1], np.float64) / temperature
    if top_k:
        outside = np.argsort(logits)[:-top_k]
        assert (counts[outside] == 0).all()
        logits[outside] = -np.inf
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    assert (probabilities > 0.01).sum() >= 3  # something to choose from
    assert chi_square(counts, probabilities) < 3.5  # p < 1e-4 from four degrees of freedom on
    for other in (temperature * 0.6, temperature * 1.6):
        wrong = probabilities ** (temperature / other)
        assert chi_square(counts, wrong / wrong.sum()) > 3.5  # it would have been noticed


def test_top_k_holds_at_every_step(params):
    ids = generate(MODEL, params, jnp.tile(jnp.array(PROMPTS[1]), (64, 1)), max_new_tokens=5, top_k=3, key=KEY)
    ids = np.asarray(ids)
    for step in range(4, 9):
        window = ids[:, max(0, step - CONTEXT) : step]
        logits = np.asarray(forward()({"params": params}, jnp.asarray(window))[:, -1])
        rank = (logits > np.take_along_axis(logits, ids[:, [step]], 1)).sum(1)
        assert rank.max() < 3
        assert len(set(rank)) > 1


def test_top_k_of_one_is_greedy(params):
    sampled = generate(MODEL, params, PROMPTS, max_new_tokens=8, temperature=2.0, top_k=1, key=KEY)
    for one, other in zip(sampled, greedy(params, PROMPTS, 8), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 10_000])
def test_top_k_of_all_is_none(top_k):
    logits = jax.random.normal(KEY, (4, VOCAB))
    assert (sample_tokens(logits, KEY, 1.0, top_k) == sample_tokens(logits, KEY, 1.0, None)).all()


def test_a_low_temperature_is_nearly_greedy(params):
    sampled = generate(MODEL, params, [PROMPTS[1]], max_new_tokens=8, temperature=1e-4, key=KEY)
    assert sampled[0].tolist() == naive_greedy(params, PROMPTS[1], 8)


def test_the_same_key_gives_the_same_text(params):
    prompts = jnp.array([PROMPTS[1], PROMPTS[1]])

    def sample(seed):
        return generate(MODEL, params, prompts, max_new_tokens=12, temperature=1.5, key=jax.random.key(seed)).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    first, second = sample(1)
    assert first != second  # rows draw for themselves
    knows_nothing = jax.tree.map(jnp.zeros_like, params)  # so that only the draws tell one step from another
    ids = generate(MODEL, knows_nothing, [[0]], max_new_tokens=32, key=KEY)[0].tolist()
    assert len(set(ids[1:])) > 8


# What is refused


@pytest.mark.parametrize(
    ("prompts", "more", "expected"),
    [
        ([], {}, "the prompt is empty"),
        ([[]], {}, "the prompt is empty"),
        ([[1], []], {}, "the prompt is empty"),
        (np.zeros((2, 0), int), {}, "the prompt is empty"),
        ([[1, 2], [3, VOCAB]], {}, f"prompt 1 has the token id {VOCAB}, outside the vocabulary of {VOCAB}"),
        ([[-1]], {}, "prompt 0 has the token id -1"),
        ([[2**31]], {}, "the token id 2147483648"),
        (np.array([[2**32 + 1]]), {}, "the token id 4294967297"),  # as 32 bits it would be 1
        ([[1.5]], {}, "a prompt is [1.5]; expected whole-number ids"),
        ([1, 2, 3], {}, "a prompt is 1; expected whole-number ids, one row a prompt"),
        (np.array([1, 2, 3]), {}, "one row a prompt"),
        (["hello"], {}, "a prompt is 'hello'; expected whole-number ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ([[1]], {"max_new_tokens": -2}, "max_new_tokens is -2"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5; expected 0 (greedy) or above"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": float("inf")}, "temperature is inf"),
        ([[1]], {"top_k": 0}, "top_k is 0; expected at least 1"),
        ([[1]], {"temperature": 1.0, "key": None}, "sampling needs a key: pass key=jax.random.key(seed)"),
    ],
)
def test_bad_input_is_one_clear_line(params, prompts, more, expected):
    with pytest.raises(InputError) as error:
        generate(MODEL, params, prompts, **{"max_new_tokens": 2, "key": KEY, **more})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_tied_and_half_precision_models_generate(params):
    cfg = dataclasses.replace(CFG, tie_weights=True, dtype="bfloat16", unroll=None)
    tied = {name: value for name, value in params.items() if name != "out_head"}
    ids = generate(GPTModel(cfg), tied, jnp.array([[1, 2]]), max_new_tokens=3, temperature=0.0)
    assert ids.shape == (1, 5)
