"""Text from a model: the prompt in one pass, then token after token from a cache of keys and values.

The loop over tokens runs on the device. While a text fits the model's context, each step computes one token and takes
the others' keys and values from the cache. Position embeddings are absolute: once the context is full and the window
of tokens slides, every token in it changes its position, so the whole window is recomputed for each token.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slm_jax.errors import InputError, located
from slm_jax.generation.config import Numbers, Sampling
from slm_jax.generation.sampler import choose_tokens
from slm_jax.model import GPTConfig, GPTModel, Params, init_cache
from slm_jax.nn.blocks import segment_lengths, unstack_blocks
from slm_jax.nn.cache import KVCache
from slm_jax.nn.sharding import on_mesh_of
from slm_jax.tokenizer import Tokenizer

PastContext = Literal["slide", "stop"]
NO_ID = -1  # stands for "no end-of-text id"


def generate(
    model: GPTModel,
    params: Params,
    prompts: Any,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    past_context: PastContext = "slide",
    key: jax.Array | None = None,
) -> Any:
    """Continue prompts independently of each other (the book's chapters 4 and 5).

    Args:
        model: the model.
        params: its parameters, in any form that the model runs; ``unstack_blocks(params)`` saves a copy per call. The
            devices of a mesh that they are split over compute together.
        prompts: ids (batch, seq), or a list of lists of ids of different lengths.
        max_new_tokens: number of tokens to add.
        temperature, top_k, top_p, min_p, repetition_penalty: see
            :class:`slm_jax.generation.config.Sampling`; temperature 0 is greedy and needs no key.
        eos_id: after this id a row only repeats it; several: after any of them a row only repeats the first; None: rows
            never stop.
        past_context: what to do when a text fills the context: ``slide`` continues from its last ``context_length``
            tokens, ``stop`` ends it.
        key: random key, from which row i takes ``fold_in(key, i)``, or an array of one key per row.

    Returns:
        For an array int32 (batch, seq + max_new_tokens), prompt included; for a list a list of 1-D arrays. With
        ``stop`` no row is longer than the context.

    Raises:
        InputError: a prompt that is empty, longer than the context or has an id outside the vocabulary; a number out
            of range; no key to sample with.
    """
    ragged = isinstance(prompts, Sequence)
    rows = [_as_row(row) for row in (prompts if ragged else np.atleast_1d(prompts))]  # one transfer from a device
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    portions = stream(
        model, params, rows, sampling, max_new_tokens=max_new_tokens, eos_id=eos_id, past_context=past_context, key=key,
        chunk=model.cfg.context_length,
    )  # fmt: skip
    added = np.concatenate(list(portions), axis=1)
    if eos_ids := _as_ids(eos_id):  # all rows ended early
        added = np.pad(added, ((0, 0), (0, max_new_tokens - added.shape[1])), constant_values=eos_ids[0])
    longest = model.cfg.context_length if past_context == "stop" else None
    outputs = [np.concatenate([row, new])[:longest] for row, new in zip(rows, added, strict=True)]
    return [jnp.asarray(row, jnp.int32) for row in outputs] if ragged else jnp.asarray(np.stack(outputs), jnp.int32)


def stream(
    model: GPTModel,
    params: Params,
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None,
    past_context: PastContext = "slide",
    key: jax.Array | None = None,
    chunk: int = 1,
) -> Iterator[np.ndarray]:
    """Yield the next tokens of every prompt, int32 (batch, n), until all have ended or ``max_new_tokens`` are made.

    n is at most ``chunk``. A row that has ended yields the first ``eos_id``, or ``NO_ID`` without one. Other arguments
    and errors as for :func:`generate`; errors are raised immediately, not at the first token.
    """
    rows, eos_ids = [_as_row(row) for row in prompts], _as_ids(eos_id)
    _check(model, params, rows, max_new_tokens, eos_ids, past_context)
    if not sampling.is_greedy and key is None:
        raise InputError("no key to sample with; expected key=jax.random.key(seed), or temperature=0 (greedy)")
    keys = None if sampling.is_greedy else _row_keys(key, len(rows))
    rules = _Rules(sampling.numbers(), keys, np.array(eos_ids or [NO_ID], np.int32))
    decoder = _Decoder(model, None if sampling.is_greedy else sampling.top_k or None, past_context == "stop")
    return decoder.portions(params, rows, rules, int(max_new_tokens), chunk)


def stream_text(
    model: GPTModel,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    past_context: PastContext = "slide",
    key: jax.Array | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, up to the end of the text or the first of ``stop``.

    A prompt is a text (an empty one is the start of a document), or ids. Incomplete characters, and text that may be
    the start of a stop string, are held back. Other arguments and errors as for :func:`generate`.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    prompt_ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    eos_ids = end_ids(tokenizer, stop)
    n_ids = tokenizer.vocab_size
    if n_ids < (model.cfg.unpadded_vocab_size or model.cfg.vocab_size):  # the other ids have no text
        model = GPTModel(dataclasses.replace(model.cfg, unpadded_vocab_size=n_ids))
    portions = stream(
        model, params, [prompt_ids], sampling,
        max_new_tokens=max_new_tokens, eos_id=eos_ids, past_context=past_context, key=key,
    )  # fmt: skip
    new_ids = itertools.takewhile(lambda id_: id_ not in (*eos_ids, NO_ID), (int(each[0, 0]) for each in portions))
    return _pieces(tokenizer, prompt_ids, new_ids, stop)


def end_ids(tokenizer: Tokenizer, stop: Sequence[str] = ()) -> tuple[int, ...]:
    """Return the ids that end a text: the tokenizer's, and those of stop texts that are special tokens."""
    special = tokenizer.special_tokens
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *(special[text] for text in stop if text in special)]))


def _pieces(
    tokenizer: Tokenizer, prompt_ids: list[int], new_ids: Iterable[int], stop: tuple[str, ...]
) -> Iterator[str]:
    ids, shown = list(prompt_ids), len(tokenizer.decode(prompt_ids))
    text = ""  # new and not shown yet
    for token in new_ids:
        ids.append(token)
        text = tokenizer.decode(ids)[shown:]
        ends = [text.find(end) for end in stop if end in text]
        if ends:
            yield text[: min(ends)]
            return
        whole = text.rstrip("\ufffd")  # bytes of an incomplete character
        ready = len(whole) - _held_back(whole, stop)
        if ready > 0:
            yield text[:ready]
            shown, text = shown + ready, text[ready:]
    yield text


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """Return how many characters at the end of a text may be the start of a stop string."""
    longest = max(map(len, stop), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)


class _Text(NamedTuple):
    window: Any  # int32 (batch, context), the last tokens of each row, padded on the right
    lengths: Any  # int32 (batch,), number of tokens in the window
    ended: Any  # bool (batch,)
    seen: Any  # bool (batch, vocab), the tokens that each row contains; None without a repetition penalty
    n_new: Any  # int32 (), number of tokens added to each row


class _Rules(NamedTuple):
    """What determines the next token, as values, so that a change doesn't recompile."""

    numbers: Numbers
    keys: Any  # (batch,), one per row; None if greedy
    eos_ids: Any  # (n,), or NO_ID


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """The compiled parts of generation; its fields are their static arguments."""

    model: GPTModel
    top_k: int | None
    stop_when_full: bool

    def portions(
        self, params: Params, rows: list[np.ndarray], rules: _Rules, max_new_tokens: int, chunk: int
    ) -> Iterator[np.ndarray]:
        """Yield new tokens in portions (batch, n), n at most ``chunk``, until all are made or every row has ended."""
        context = self.model.cfg.context_length
        longest = max(row.size for row in rows)
        capacity = round_up(min(longest + max_new_tokens - 1, context), 128, context)  # the last token is not cached
        params = unstack_blocks(params)
        text = _start(self.model.cfg, rows, keeps_seen=rules.numbers["repetition_penalty"] is not None)
        # A cached step writes the newest token of each row into the cache. When the longest row has no room left, the
        # window slides, or the row has ended and no longer matters.
        n_cached = max_new_tokens if self.stop_when_full else min(max_new_tokens, context - longest + 1)
        cache, n_made, ended = None, 0, False
        while n_made < max_new_tokens and not ended:
            with on_mesh_of(params):
                if not n_made:
                    text, cache = self.prefill(params, text, rules, round_up(longest, 16, capacity), capacity)
                elif n_made < n_cached:
                    text, cache = self.cached_steps(params, text, cache, rules, min(chunk, n_cached - n_made))
                else:
                    cache = None  # free its memory
                    text = self.sliding_steps(params, text, rules, min(chunk, max_new_tokens - n_made))
            made: _Text = jax.device_get(text._replace(seen=None))  # blocks: once per portion
            columns = made.lengths[:, None] + np.arange(n_made - made.n_new, 0)
            yield np.take_along_axis(made.window, columns, axis=1)
            n_made, ended = int(made.n_new), made.ended.all()

    @functools.partial(jax.jit, static_argnames=("self", "length", "capacity"))
    def prefill(self, params: Params, text: _Text, rules: _Rules, length: int, capacity: int) -> tuple[_Text, KVCache]:
        """Write the prompts, of at most ``length`` tokens, into a new cache in one pass, and add a token to each."""
        cache = init_cache(self.model.cfg, params, text.window.shape[0], capacity)
        hidden, cache = self._hidden(params, text.window[:, :length], cache=cache)
        return self._add_tokens(params, text, hidden, rules), cache

    @functools.partial(jax.jit, static_argnames=("self",), donate_argnames=("cache",))
    def cached_steps(
        self, params: Params, text: _Text, cache: KVCache, rules: _Rules, n: Int[Array, ""] | int
    ) -> tuple[_Text, KVCache]:
        """Add ``n`` tokens to each row, or fewer if all end, each from one token and the cache."""

        def step(carry: tuple[_Text, KVCache]) -> tuple[_Text, KVCache]:
            text, cache = carry
            # The cache holds all but the newest token; entries after them come from padding.
            cache = cache._replace(lengths=text.lengths - 1)
            newest = jnp.take_along_axis(text.window, cache.lengths[:, None], axis=1)
            hidden, cache = self._hidden(params, newest, cache=cache)
            return self._add_tokens(params, text, hidden, rules), cache

        last = text.n_new + n
        return jax.lax.while_loop(lambda carry: (carry[0].n_new < last) & ~carry[0].ended.all(), step, (text, cache))

    @functools.partial(jax.jit, static_argnames=("self",))
    def sliding_steps(self, params: Params, text: _Text, rules: _Rules, n: Int[Array, ""] | int) -> _Text:
        """Add ``n`` tokens to each row, or fewer if all end, each from the whole window."""

        def step(text: _Text) -> _Text:
            return self._add_tokens(params, text, self._hidden(params, text.window), rules)

        last = text.n_new + n
        return jax.lax.while_loop(lambda text: (text.n_new < last) & ~text.ended.all(), step, text)

    def _hidden(self, params: Params, tokens: Int[Array, "batch seq"], **options: Any) -> Any:
        return self.model.apply({"params": params}, tokens, method="hidden", **options)

    def _add_tokens(self, params: Params, text: _Text, hidden: Float[Array, "batch seq emb"], rules: _Rules) -> _Text:
        """Choose each row's next token from the hidden state of its newest one, and append it."""
        if hidden.shape[1] > 1:
            hidden = jnp.take_along_axis(hidden, text.lengths[:, None, None] - 1, axis=1)
        logits: Any = self.model.apply({"params": params}, hidden, method="logits")
        n_ids = self.model.cfg.unpadded_vocab_size
        seen = None if text.seen is None else text.seen[:, :n_ids]
        keys = None if rules.keys is None else jax.vmap(jax.random.fold_in, (0, None))(rules.keys, text.n_new)
        tokens = choose_tokens(logits[:, 0, :n_ids], rules.numbers, self.top_k, keys, seen)
        tokens = jnp.where(text.ended, rules.eos_ids[0], tokens)
        context = text.window.shape[1]
        full = text.lengths == context
        window = jnp.where(full[:, None], jnp.roll(text.window, -1, axis=1), text.window)
        lengths = jnp.minimum(text.lengths + 1, context)
        ended = text.ended | jnp.isin(tokens, rules.eos_ids)
        if self.stop_when_full:
            ended = ended | (lengths == context)
        rows = jnp.arange(len(tokens))
        return _Text(
            window=window.at[rows, lengths - 1].set(tokens),
            lengths=lengths,
            ended=ended,
            seen=None if text.seen is None else text.seen.at[rows, tokens].set(True),
            n_new=text.n_new + 1,
        )


def compile_generation(model: GPTModel, params: Params) -> Any:
    """Compile the loop over tokens that continues one short prompt, greedily and up to the whole context.

    ``params`` are arrays or shapes with shardings, in the form that :func:`slm_jax.nn.blocks.unstack_blocks` makes.
    """
    length, context = min(16, model.cfg.context_length), model.cfg.context_length
    text = _start(model.cfg, [np.zeros(length, np.int32)], keeps_seen=False)
    rules = _Rules(Sampling(temperature=0).numbers(), None, np.array([NO_ID], np.int32))
    decoder = _Decoder(model, None, stop_when_full=False)
    prefill = _Decoder.prefill.lower(decoder, params, text, rules, length=length, capacity=context).compile()
    text, cache = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        prefill.out_info,
        prefill.output_shardings,
    )
    return _Decoder.cached_steps.lower(decoder, params, text, cache, rules, np.int32(1)).compile()


def _start(cfg: GPTConfig, rows: list[np.ndarray], keeps_seen: bool) -> _Text:
    lengths = np.array([row.size for row in rows], np.int32)
    window = np.zeros((len(rows), cfg.context_length), np.int32)
    seen = np.zeros((len(rows), cfg.vocab_size), bool)
    for i, row in enumerate(rows):
        window[i, : row.size] = row
        seen[i, row] = True
    return _Text(window, lengths, np.zeros(len(rows), bool), seen if keeps_seen else None, np.int32(0))


def round_up(n: int, least: int, most: int) -> int:
    """Return the next power of two between ``least`` and ``most``, so that few lengths are compiled."""
    return min(max(1 << (n - 1).bit_length(), least), most)


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise InputError for an id outside the vocabulary, which JAX would silently clamp."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        where = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise InputError(f"token {where} has id {ids[where]}, outside the model's vocabulary of {vocab_size}")


def _row_keys(key: Any, n_rows: int) -> jax.Array:
    """Return one key per row, so that a row's draws don't depend on the others."""
    try:
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # jax.random.PRNGKey's
            key = jax.random.wrap_key_data(key)
    except (AttributeError, TypeError):
        raise InputError(f"key is {key!r:.60}; expected a random key: jax.random.key(seed)") from None
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n_rows))
    if key.shape != (n_rows,):
        raise InputError(f"key has the shape {key.shape}; expected one key, or {n_rows}")
    return key


def _as_row(prompt: Any) -> np.ndarray:
    """Return a prompt's ids with their own dtype: a cast could change ids."""
    try:
        row = np.asarray(prompt)
    except ValueError:  # nested lists of different lengths
        row = np.array(None)
    if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
        shown = " ".join(repr(prompt).split())
        raise InputError(f"a prompt is {shown:.60}; expected integer ids: an array (batch, seq) or a list of lists")
    return row


def _as_ids(eos_id: int | Sequence[int] | None) -> list[int]:
    return [] if eos_id is None else [*eos_id] if isinstance(eos_id, Sequence) else [eos_id]


def _check(
    model: GPTModel, params: Params, rows: list[np.ndarray], max_new_tokens: int, eos_ids: list[int], past_context: str
) -> None:
    if not segment_lengths(params):
        raise InputError('params has no blocks; expected the params tree, such as model.init(key, tokens)["params"]')
    if not rows or any(row.size == 0 for row in rows):
        raise InputError("the prompt is empty; expected at least one token, such as the end-of-text id")
    n_ids = model.cfg.unpadded_vocab_size or model.cfg.vocab_size
    longest = model.cfg.context_length - (past_context == "stop")
    for i, row in enumerate(rows):
        with located(f"prompt {i}"):
            check_ids(row, n_ids)
        if row.size > longest:
            raise InputError(f"prompt {i} has {row.size} tokens; expected at most {longest}, the model's context")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if wrong := [id_ for id_ in eos_ids if not 0 <= id_ < n_ids]:
        raise InputError(f"eos_id is {wrong[0]}; expected an id below {n_ids}, or None")
    if past_context not in get_args(PastContext):
        raise InputError(f"past_context is {past_context!r}; expected slide or stop")
