"""How a batch is made to fit any number of devices: with fewer micro-batches, or with empty rows of weight 0.

The losses do not change, as they are sums that are divided once by the sum of the weights.
"""

import dataclasses
from typing import TypeVar

import grain
import numpy as np
from jaxtyping import Int

from slm_jax.data.windows import TrainBatches, fill_up
from slm_jax.training.config import BaseRunConfig

Config = TypeVar("Config", bound=BaseRunConfig)


def fit_batch(config: Config, n_shards: int) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration with a batch that ``n_shards`` devices share evenly, and lines about any change.

    ``train.accumulate`` is lowered to a number of micro-batches that can be split evenly, none larger on a device than
    the configured one. If there is none, ``train.batch_size`` grows by the empty rows that
    :func:`slm_jax.data.windows.fill_up` adds.
    """
    rows, configured = config.train.batch_size, config.train.accumulate
    most = rows // configured  # rows of a micro-batch

    def filled(accumulate: int) -> int:
        return -(-rows // (n_shards * accumulate)) * n_shards * accumulate

    fitting = [n for n in range(1, configured + 1) if filled(n) <= most * n_shards * n]
    accumulate = min(fitting, key=lambda n: (filled(n), -n))
    total = filled(accumulate)
    changes = []
    if accumulate != configured:
        changes.append(f"train.accumulate is {accumulate} instead of {configured}")
    if total != rows:
        nearest = [n for n in (rows // n_shards * n_shards, -(-rows // n_shards) * n_shards) if n]
        idle = f"{total - rows} of {total} rows are empty, {(total - rows) / total:.0%} of the work"
        changes.append(f"{idle} (none with train.batch_size {' or '.join(map(str, nearest))})")
    if not changes:
        return config, ()
    train = dataclasses.replace(config.train, batch_size=total, accumulate=accumulate)
    note = f"a batch of {rows} rows on {n_shards} devices: {'; '.join(changes)}"
    return dataclasses.replace(config, train=train), (note,)


def filled_rows(batches: TrainBatches, rows: Int[np.ndarray, " rows"], batch_size: int) -> grain.MapDataset:
    """Return only these rows (ascending) of each batch; rows from ``batch_size`` on are empty."""
    return batches.of_rows(rows[rows < batch_size]).map(lambda batch: fill_up(batch, len(rows)))
