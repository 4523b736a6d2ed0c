"""Token arrays to batches: windows at fixed strides or random offsets, in an order that is f(seed, step).

A batch is a dict of ``inputs`` and ``targets`` (int32, (batch, context), targets one token on) and ``weights``
(float32, 1 where a target counts, else 0).
"""

from collections.abc import Callable, Iterator

import grain
import numpy as np

from slm_jax.errors import InputError

Batch = dict[str, np.ndarray]


def endless_batches(
    n: int, make: Callable[[np.ndarray], Batch], *, batch_size: int, seed: int, shuffle: bool = True
) -> grain.MapDataset:
    """Return the endless sequence of batches of ``n`` items; element ``i`` is the batch of step ``i``.

    Batches continue across the end of an epoch, so no item is left out.

    Args:
        n: number of items.
        make: makes a batch of the items with the given indices, (batch_size,).
        batch_size: items per batch.
        seed: seed of the order.
        shuffle: whether each epoch has its own random order.
    """
    order = grain.MapDataset.range(n).seed(seed)
    order = (order.shuffle() if shuffle else order).repeat()
    return order.batch(batch_size, drop_remainder=True).map(make)


class _RandomOffset(grain.transforms.RandomMap):
    """Draw where a window starts (nanoGPT's sampling), from 0 to ``n_offsets`` - 1."""

    def __init__(self, n_offsets: int):
        self._n_offsets = n_offsets

    def random_map(self, element: int, rng: np.random.Generator) -> int:
        return int(rng.integers(self._n_offsets))


def train_batches(
    tokens: np.ndarray,
    *,
    context_length: int,
    batch_size: int,
    sampling: str,
    stride: int | None,
    shuffle: bool,
    seed: int,
) -> grain.MapDataset:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    Args:
        tokens: 1-D token ids.
        context_length: tokens per window; its targets reach one token further.
        batch_size: windows per batch.
        sampling: ``stride`` or ``random``.
        stride: tokens between the starts of ``stride`` windows; None: ``context_length``.
        shuffle: whether ``stride`` windows have a new random order each epoch.
        seed: seed of offsets and order.

    Raises:
        InputError: fewer tokens than one window.
    """
    check_window(tokens.size, context_length, "training")
    if sampling == "random":
        starts = grain.MapDataset.range(1).seed(seed).repeat().random_map(_RandomOffset(tokens.size - context_length))
        return starts.batch(batch_size, drop_remainder=True).map(lambda at: _windows(tokens, at, context_length))
    strided = window_starts(tokens.size, context_length, stride)
    return endless_batches(
        len(strided),
        lambda windows: _windows(tokens, strided[windows], context_length),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def steps_per_epoch(n_tokens: int, *, context_length: int, batch_size: int, sampling: str, stride: int | None) -> float:
    """Return how many batches cover the windows once (``sampling`` stride), or as many tokens as there are (random)."""
    if sampling == "stride":
        return len(window_starts(n_tokens, context_length, stride)) / batch_size
    return (n_tokens - 1) / (context_length * batch_size)


def window_starts(n_tokens: int, context_length: int, stride: int | None) -> np.ndarray:
    """Return the starts of the windows of a strided pass, each followed by one more token for the last target."""
    return np.arange(0, n_tokens - context_length, stride or context_length)


def validation_batches(tokens: np.ndarray, *, context_length: int, batch_size: int) -> Iterator[Batch]:
    """Yield all ``tokens`` in windows that don't overlap, so that every token but the first is a target once.

    Padding of the last window and the last batch has weight 0.
    """
    starts = np.arange(0, tokens.size - 1, context_length)
    filled = np.append(starts, np.full(-len(starts) % batch_size, tokens.size))
    for first in range(0, len(filled), batch_size):
        yield _windows(tokens, filled[first : first + batch_size], context_length)


def check_window(n_tokens: int, context_length: int, split: str) -> None:
    """Raise InputError if a split has less than one window (training) or one target (validation)."""
    needed = context_length + 1 if split == "training" else 2
    if n_tokens < needed:
        raise InputError(
            f"the {split} split has {n_tokens} tokens, fewer than one window of {needed}; "
            "use a longer text or a smaller model.context_length"
        )


def _windows(tokens: np.ndarray, starts: np.ndarray, context_length: int) -> Batch:
    """Cut a batch of windows; past the end of the tokens, padding is 0 with weight 0."""
    tokens = np.asarray(tokens)  # slicing a np.memmap makes a new one, which is slower than the copy
    rows = np.zeros((len(starts), context_length + 1), np.int32)
    for row, start in zip(rows, starts.tolist(), strict=True):
        chunk = tokens[start : start + context_length + 1]
        row[: chunk.size] = chunk
    counts = np.arange(context_length) < (tokens.size - 1 - starts)[:, None]
    return {"inputs": rows[:, :-1] * counts, "targets": rows[:, 1:].copy(), "weights": counts.astype(np.float32)}
