"""What must hold of generation: greedy is a naive loop, draws follow softmax, rows know nothing of each other."""

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from slm_jax.generation.config import Sampling
from slm_jax.generation.decode import _Decoder, _pieces, generate, stream, stream_text
from slm_jax.model import GPTConfig, GPTModel, param_shapes
from slm_jax.nn.blocks import split_blocks, unstack_blocks
from slm_jax.tokenizer import BPETokenizer, CharTokenizer

CONTEXT, VOCAB = 6, 16
CFG = GPTConfig(
    vocab_size=VOCAB, context_length=CONTEXT, emb_dim=16, n_heads=2, n_layers=2, tie_weights=False, unroll=False
)
MODEL = GPTModel(CFG)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the next token depends on the whole context."""
    rng = np.random.default_rng(4)
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


GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3], [1, 2, 3, 4], [9, 8, 7, 6, 5, 4], [5, 0, 1, 2, 11]]  # one fills the context


@pytest.mark.parametrize(
    "form", [lambda p: p, lambda p: split_blocks(p, 1), unstack_blocks], ids=["stacked", "two segments", "unstacked"]
)
def test_greedy_is_the_naive_loop_even_past_the_context_whatever_the_form_of_the_stack(params, form):
    """Each row of a ragged batch is as if alone."""
    for prompt, row in zip(PROMPTS, greedy(form(params), PROMPTS, 9), strict=True):
        assert row.dtype == jnp.int32
        assert row.tolist() == naive_greedy(params, prompt, 9)
        assert len(set(row[len(prompt) :].tolist())) > 1  # not one token over and over


@pytest.mark.parametrize("prompts", [np.array([PROMPTS[1]]), jnp.array([PROMPTS[1]])], ids=["numpy", "jax"])
def test_an_array_gives_an_array_with_its_prompts_also_of_a_tied_model_in_half_precision(params, prompts):
    ids = greedy(params, prompts, 9)
    assert isinstance(ids, jax.Array)
    assert ids.dtype == jnp.int32
    assert ids.tolist() == [naive_greedy(params, PROMPTS[1], 9)]
    half = GPTModel(dataclasses.replace(CFG, tie_weights=True, dtype="bfloat16", unroll=None))
    tied = {name: value for name, value in params.items() if name != "out_head"}
    assert generate(half, tied, prompts, max_new_tokens=3, temperature=0.0).shape == (1, 7)


def test_any_of_several_ids_ends_a_row_which_then_repeats_the_first(params):
    free = [naive_greedy(params, prompt, 10) for prompt in PROMPTS]
    several = [free[1][len(PROMPTS[1]) + 2], free[0][len(PROMPTS[0]) + 4]]
    for prompt, unstopped, row in zip(PROMPTS, free, greedy(params, PROMPTS, 10, eos_id=several), strict=True):
        added = unstopped[len(prompt) :]
        n = next((i + 1 for i, id_ in enumerate(added) if id_ in several), 10)
        assert row.tolist() == [*prompt, *added[:n], *[several[0]] * (10 - n)]


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
    assert greedy(params, [[5, 5]], 1, eos_id=5)[0].tolist() == naive_greedy(params, [5, 5], 1)  # none in the prompt
    two, first = jnp.array([PROMPTS[1]] * 2), free[1][len(PROMPTS[1])]  # which ends both at once
    ids = greedy(params, two, 500, eos_id=first)
    assert ids.shape == (2, len(PROMPTS[1]) + 500)
    assert (ids[:, len(PROMPTS[1]) :] == first).all()
    assert len(list(stream(MODEL, params, [PROMPTS[1]], GREEDY, max_new_tokens=500, eos_id=first))) == 1


def test_a_stream_yields_a_token_a_row_as_they_come(params):
    columns = list(stream(MODEL, params, PROMPTS, GREEDY, max_new_tokens=9))
    assert [column.shape for column in columns] == [(4, 1)] * 9
    rows = [row[len(prompt) :].tolist() for prompt, row in zip(PROMPTS, greedy(params, PROMPTS, 9), strict=True)]
    assert np.concatenate(columns, axis=1).tolist() == rows


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


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, None), (1.0, 5), (2.0, None), (2.0, 5)])
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


def test_a_rows_draws_are_those_of_its_own_single_run(params):
    keys = jax.random.split(KEY, len(PROMPTS))
    options = {"max_new_tokens": 9, "temperature": 1.5, "top_k": 10, "repetition_penalty": 1.3}
    together = generate(MODEL, params, PROMPTS, key=keys, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(MODEL, params, [prompt], key=jax.random.key_data(keys[i : i + 1]), **options)  # old style
        assert together[i].tolist() == alone[0].tolist()
    one_key = generate(MODEL, params, PROMPTS, key=KEY, **options)
    third = generate(MODEL, params, [PROMPTS[2]], key=jax.random.fold_in(KEY, 2)[None], **options)
    assert one_key[2].tolist() == third[0].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_pad_the_vocabulary_are_never_chosen(params, temperature):
    cfg = dataclasses.replace(CFG, unpadded_vocab_size=5)
    kernel = params["out_head"]["kernel"].at[:, 5:].multiply(20)  # they would win
    padded = {**params, "out_head": {"kernel": kernel}}
    options = {"max_new_tokens": 20, "temperature": temperature, "repetition_penalty": 1.1, "key": KEY}
    prompts = jnp.array([[1, 2, 3]] * 8)
    assert generate(MODEL, padded, prompts, **options)[:, 3:].max() >= 5
    assert generate(GPTModel(cfg), padded, prompts, **options)[:, 3:].max() < 5


def test_a_penalty_remembers_the_prompt_and_what_was_written(params):
    """Even what has slid out of the window."""
    prompt = [1, 2, 3]
    ids = list(prompt)
    for _ in range(12):
        logits = np.array(forward()({"params": params}, jnp.array([ids[-CONTEXT:]]))[0, -1])
        for token in set(ids):
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        ids.append(int(logits.argmax()))
    assert greedy(params, [prompt], 12, repetition_penalty=1.5)[0].tolist() == ids
    assert naive_greedy(params, prompt, 12) != ids


def test_stop_ends_each_row_when_its_context_is_full(params):
    prompts = PROMPTS[:2] + PROMPTS[3:]
    rows = greedy(params, prompts, 20, past_context="stop")
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.tolist() == naive_greedy(params, prompt, CONTEXT - len(prompt))
    assert greedy(params, jnp.array([[1, 2, 3]]), 20, past_context="stop").shape == (1, CONTEXT)
    columns = list(stream(MODEL, params, prompts, GREEDY, max_new_tokens=20, past_context="stop"))
    assert len(columns) == CONTEXT - 1
    assert columns[-1][:, 0].tolist() == [rows[0][-1], -1, -1]  # the others have ended


def test_few_programs_are_compiled_whatever_the_lengths(params):
    """One for the steps from the cache, whatever prompt, number of tokens, temperature or form of the call."""
    cfg = dataclasses.replace(CFG, context_length=128)
    model = GPTModel(cfg)
    longer = {**params, "pos_emb": {"embedding": jnp.zeros((128, CFG.emb_dim))}}
    before = _Decoder.cached_steps._cache_size(), _Decoder.prefill._cache_size()
    for length, n, temperature in ((1, 3, 1.0), (9, 20, 0.5), (16, 5, 2.0)):
        generate(model, longer, [[1] * length], max_new_tokens=n, temperature=temperature, key=KEY)
        list(stream(model, longer, [[1] * length], Sampling(int(temperature) or 1), max_new_tokens=n, key=KEY))
    after = _Decoder.cached_steps._cache_size(), _Decoder.prefill._cache_size()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


TEXT = "the cat sat on the mat. the dog sat on the log. "
CHARS = CharTokenizer().build_vocab(TEXT + "é\n")


@pytest.fixture(scope="module")
def chars():
    """A model over characters."""
    cfg = GPTConfig(vocab_size=CHARS.vocab_size, context_length=16, emb_dim=16, n_heads=2, n_layers=1, unroll=False)
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.6, leaf.shape), leaf.dtype), param_shapes(cfg))
    return GPTModel(cfg), params


def written(chars, prompt="the ", n=60, seed=0, **more):
    model, params = chars
    key = jax.random.key(seed)
    return list(stream_text(model, params, CHARS, prompt, Sampling(), max_new_tokens=n, key=key, **more))


def test_text_comes_in_pieces_and_stops_at_a_stop_string(chars):
    whole = "".join(written(chars))
    assert len(whole) > 20
    assert len(written(chars)) > 20
    for start, length in ((3, 1), (5, 2), (10, 4)):
        stop = whole[start : start + length]
        pieces = written(chars, stop=("no such text", stop))
        assert "".join(pieces) == whole[: whole.index(stop)]
    # what only begins like a stop string is given back
    assert "".join(written(chars, stop=(whole[4:8] + "\0", whole[-1] + "\0"))) == whole


def test_text_ends_at_the_end_of_text_and_begins_anywhere(chars):
    model, params = chars
    assert written(chars, stop="at") == written(chars, stop=("at",))
    eager = {**params, "tok_emb": {"embedding": params["tok_emb"]["embedding"].at[CHARS.eot_id].multiply(8)}}
    lengths = {len("".join(written((model, eager), n=200, seed=seed))) for seed in range(6)}
    assert min(lengths) < 150
    assert len("".join(written(chars, prompt=""))) > 0


def test_characters_of_several_tokens_come_whole_and_a_stop_string_may_begin_in_one_and_end_in_the_next():
    tokenizer = BPETokenizer()  # bytes
    assert list(_pieces(tokenizer, tokenizer.encode("€"), iter("€b€".encode()[:-1]), ()))[-2:] == ["b", "\ufffd"]
    assert [piece for piece in _pieces(tokenizer, [], iter("a€b".encode()), ()) if piece] == ["a", "€", "b"]
    for text, stop, expected in (
        ("hi\n€ world", ("\n€",), "hi"),
        ("€€!", ("€!", "zz"), "€"),
        ("abcabd", ("abd",), "abc"),
        ("aab", ("ab", "aab"), ""),
    ):
        assert "".join(_pieces(tokenizer, [], iter(text.encode()), stop)) == expected


@pytest.mark.parametrize(
    ("prompts", "more", "expected"),
    [
        ([[1], []], {}, "the prompt is empty"),
        ([[1, 2], [3, VOCAB]], {}, f"prompt 1: token 1 has id {VOCAB}, outside"),
        (np.array([[2**32 + 1]]), {}, "id 4294967297"),  # would be 1 in 32 bits
        ([1, 2, 3], {}, "a prompt is 1; expected integer ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"temperature": 1.0, "key": None}, "no key to sample with"),
        ([[1]], {"key": jnp.ones(2)}, "expected a random key"),
        ([[1]], {"eos_id": VOCAB}, f"eos_id is {VOCAB}"),
        ([[1]], {"eos_id": [0, VOCAB]}, f"eos_id is {VOCAB}"),
        ([[1]], {"key": jax.random.split(KEY, 3)}, "key has the shape (3,)"),
        ([[1], [0] * 7], {}, "prompt 1 has 7 tokens; expected at most 6"),
        ([[0] * 6], {"past_context": "stop"}, "prompt 0 has 6 tokens; expected at most 5"),
    ],
)
def test_bad_input_is_one_clear_line(params, prompts, more, expected):
    with refused(re.escape(expected)):
        generate(MODEL, params, prompts, **{"max_new_tokens": 2, "key": KEY, **more})
    with refused(r"no blocks.*params"):
        greedy({"params": params}, [[1]], 2)
