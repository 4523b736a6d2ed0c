"""Text from a model: token after token, greedy or sampled.

This form computes the whole context again for each token; it needs nothing but ``model.apply``.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slm_jax.errors import InputError
from slm_jax.model import GPTModel, Params


def generate(
    model: GPTModel,
    params: Params,
    prompts: Any,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    key: jax.Array | None = None,
) -> Any:
    """Continue prompts; past the context length the model looks at the last ``context_length`` tokens.

    Args:
        model: the model.
        params: its parameters.
        prompts: ids (batch, seq), or a list of lists of ids of different lengths.
        max_new_tokens: how many tokens to add.
        temperature: divides the logits; 0 takes the likeliest token (greedy) and needs no key.
        top_k: draw only from this many of the likeliest tokens; None: from all.
        eos_id: after this id a row only repeats it; None: rows never stop.
        key: of the random draws.

    Returns:
        For an array int32 (batch, seq + max_new_tokens), prompt included; for a list a list of 1-D arrays.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a bad temperature or top_k, no key to sample with.
    """
    ragged = isinstance(prompts, Sequence)
    rows = [_as_row(row) for row in (prompts if ragged else np.asarray(prompts))]  # one transfer from a device
    new_tokens = list(stream(
        model, params, rows, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, eos_id=eos_id, key=key
    ))  # fmt: skip
    added = np.stack([np.asarray(column) for column in new_tokens], axis=1)
    if eos_id is not None and added.shape[1] < max_new_tokens:
        missing = max_new_tokens - added.shape[1]
        added = np.pad(added, ((0, 0), (0, missing)), constant_values=eos_id)
    outputs = [np.concatenate([row, more]) for row, more in zip(rows, added, strict=True)]
    return [jnp.asarray(row, jnp.int32) for row in outputs] if ragged else jnp.asarray(np.stack(outputs), jnp.int32)


def stream(
    model: GPTModel,
    params: Params,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Yield the next token of every prompt, int32 (batch,), until all have ended or ``max_new_tokens`` are made.

    Arguments and errors are those of :func:`generate`; errors are raised at once, not at the first token.
    """
    rows = [_as_row(row) for row in prompts]
    _check(model, rows, max_new_tokens, temperature, top_k, key)
    return _stream(model, params, rows, max_new_tokens, temperature, top_k, eos_id, key)


def _stream(
    model: GPTModel,
    params: Params,
    rows: list[np.ndarray],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    eos_id: int | None,
    key: jax.Array | None,
) -> Iterator[np.ndarray]:
    context = model.cfg.context_length
    lengths = jnp.array([min(row.size, context) for row in rows], jnp.int32)
    # The last `context` tokens of each row, filled up on the right, where causal attention never looks.
    window = jnp.array([np.pad(row[-context:], (0, context - min(row.size, context))) for row in rows], jnp.int32)
    finished = np.zeros(len(rows), bool)
    for step in range(max_new_tokens):
        step_key = None if temperature == 0 else jax.random.fold_in(key, step)  # type: ignore[arg-type]
        tokens, window, lengths = _next_tokens(
            model, params, window, lengths, step_key, jnp.float32(temperature), temperature == 0, top_k
        )
        values = np.array(tokens)
        if eos_id is not None:
            values[finished] = eos_id
            finished |= values == eos_id
        yield values
        if eos_id is not None and finished.all():
            return


@functools.partial(jax.jit, static_argnames=("model", "greedy", "top_k"))
def _next_tokens(
    model: GPTModel,
    params: Params,
    window: Int[Array, "batch context"],
    lengths: Int[Array, "batch"],
    key: jax.Array | None,
    temperature: Float[Array, ""],
    greedy: bool,
    top_k: int | None,
) -> tuple[Int[Array, "batch"], Int[Array, "batch context"], Int[Array, "batch"]]:
    """Choose each row's next token and append it, dropping the oldest token of a full window."""
    rows = jnp.arange(window.shape[0])
    hidden: Any = model.apply({"params": params}, window, method="hidden")
    last = hidden[rows, lengths - 1][:, None, :]
    logits: Any = model.apply({"params": params}, last, method="logits")
    logits = logits[:, 0]
    tokens = jnp.argmax(logits, axis=-1) if greedy else sample_tokens(logits, key, temperature, top_k)
    tokens = tokens.astype(jnp.int32)
    full = (lengths == window.shape[1])[:, None]
    window = jnp.where(full, jnp.roll(window, -1, axis=1), window)
    lengths = jnp.minimum(lengths + 1, window.shape[1])
    return tokens, window.at[rows, lengths - 1].set(tokens), lengths


def sample_tokens(
    logits: Float[Array, "batch vocab"], key: jax.Array | None, temperature: Float[Array, ""] | float, top_k: int | None
) -> Int[Array, "batch"]:
    """Draw one id a row from softmax(logits / temperature), from the ``top_k`` likeliest only (Fan et al. 2018)."""
    if top_k is not None and top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature, axis=-1)  # type: ignore[arg-type]


def _as_row(prompt: Any) -> np.ndarray:
    """Return one prompt's ids as they are (a cast could turn them into others); an empty one has no type to keep."""
    row = np.asarray(prompt)
    if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
        raise InputError(
            f"a prompt is {prompt!r:.60}; expected whole-number ids, one row a prompt: an array (batch, seq) or a list "
            "of lists, even for a single prompt"
        )
    return row


def _check(
    model: GPTModel,
    rows: list[np.ndarray],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    key: jax.Array | None,
) -> None:
    if not rows or any(row.size == 0 for row in rows):
        raise InputError("the prompt is empty; expected at least one token, such as the end-of-text id")
    for i, row in enumerate(rows):
        bad = row[(row < 0) | (row >= model.cfg.vocab_size)]
        if bad.size:
            raise InputError(
                f"prompt {i} has the token id {bad[0]}, outside the vocabulary of {model.cfg.vocab_size}; "
                "was it encoded with another tokenizer?"
            )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}; expected 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}; expected at least 1, or None for all tokens")
    if temperature > 0 and key is None:
        raise InputError("sampling needs a key: pass key=jax.random.key(seed), or temperature=0 for greedy")
