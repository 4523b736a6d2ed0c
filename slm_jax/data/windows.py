"""Token arrays to batches: windows at fixed strides or random offsets, in an order that is f(seed, step).

A batch is a dict of ``inputs`` and ``targets`` (int32, (batch, context), targets one token on) and ``weights``
(float32, 1 where a target counts).
"""

from collections.abc import Iterator

import grain
import numpy as np

from slm_jax.errors import InputError

Batch = dict[str, np.ndarray]


class RandomOffset(grain.transforms.RandomMap):
    """Draw where a window starts (nanoGPT's sampling)."""

    def __init__(self, n_offsets: int):
        self._n_offsets = n_offsets

    def random_map(self, element: int, rng: np.random.Generator) -> int:
        """Return an offset from 0 to ``n_offsets`` - 1; ``element`` only counts the draws."""
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
        context_length: tokens of a window; its targets reach one further.
        batch_size: windows of a batch. Batches go on across the end of an epoch, so no window is left out.
        sampling: ``stride`` or ``random``.
        stride: tokens between windows' starts under ``stride``; None: ``context_length``.
        shuffle: whether ``stride`` windows are shuffled anew each epoch.
        seed: of offsets and shuffling.

    Raises:
        InputError: fewer tokens than one window.
    """
    check_window(tokens.size, context_length, "training")
    if sampling == "random":
        starts = grain.MapDataset.range(1).seed(seed).repeat().random_map(RandomOffset(tokens.size - context_length))
    else:
        starts = grain.MapDataset.source(window_starts(tokens.size, context_length, stride)).seed(seed)
        starts = (starts.shuffle() if shuffle else starts).repeat()
    return starts.batch(batch_size, drop_remainder=True).map(lambda starts: _windows(tokens, starts, context_length))


def steps_per_epoch(n_tokens: int, *, context_length: int, batch_size: int, sampling: str, stride: int | None) -> float:
    """Return how many batches cover the windows once (``sampling`` stride), or as many tokens as there are (random)."""
    if sampling == "stride":
        return len(window_starts(n_tokens, context_length, stride)) / batch_size
    return (n_tokens - 1) / (context_length * batch_size)


def window_starts(n_tokens: int, context_length: int, stride: int | None) -> np.ndarray:
    """Return where the windows of a strided pass start, each with one more token behind it for the last target.

    ``stride`` is the distance of two starts in tokens; None: ``context_length``.
    """
    return np.arange(0, n_tokens - context_length, stride or context_length)


def validation_batches(tokens: np.ndarray, *, context_length: int, batch_size: int) -> Iterator[Batch]:
    """Yield all ``tokens`` once, in windows that do not overlap, so that every token but the first is a target once.

    What fills the last window and the last batch has weight 0.
    """
    starts = np.arange(0, tokens.size - 1, context_length)
    filled = np.append(starts, np.full(-len(starts) % batch_size, tokens.size))
    for first in range(0, len(filled), batch_size):
        yield _windows(tokens, filled[first : first + batch_size], context_length)


def check_window(n_tokens: int, context_length: int, split: str) -> None:
    """Check that a split has enough tokens.

    Raises:
        InputError: not even one window (training) or one target (validation).
    """
    if n_tokens == 0:
        raise InputError(f"empty text: the {split} split has no tokens; expected at least {context_length + 1}")
    needed = context_length + 1 if split == "training" else 2
    if n_tokens < needed:
        raise InputError(
            f"the {split} split has {n_tokens} tokens, fewer than one window of {needed}; "
            "use a longer text or a smaller model.context_length"
        )


def _windows(tokens: np.ndarray, starts: np.ndarray, context_length: int) -> Batch:
    """Cut a batch of windows; past the end of the tokens they are filled with zeros of weight 0."""
    tokens = np.asarray(tokens)  # each slice of a np.memmap would make a new one, which takes longer than the copy
    rows = np.zeros((len(starts), context_length + 1), np.int32)
    for row, start in zip(rows, starts.tolist(), strict=True):
        chunk = tokens[start : start + context_length + 1]
        row[: chunk.size] = chunk
    counts = np.arange(context_length) < (tokens.size - 1 - starts)[:, None]
    return {"inputs": rows[:, :-1] * counts, "targets": rows[:, 1:].copy(), "weights": counts.astype(np.float32)}
