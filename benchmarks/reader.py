"""Measure how fast training batches are cut from a large token file: tokens a second, and memory.

    python benchmarks/reader.py --gigabytes 1

The file holds random uint16 ids, one in 500 the end-of-text id, so that packing has documents to pack; it is made in a
temporary folder, so it lies in the system's file cache as one does that was just written. Batches are read as the
training loop reads them, through Grain's one thread, with nothing else to do. Prints JSON, a row for each way of
cutting and shape: the median time of a batch, its quartiles, tokens a second; and how much the process's own memory,
without the mapped file, grew while it read.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from slm_jax.data.packing import PackedRows, packed_batches
from slm_jax.data.token_file import map_ids
from slm_jax.data.windows import train_batches

SHAPES = ((12, 64), (8, 128), (32, 1024))
VOCABULARY, EOT = 50_257, 50_256
TOKENS_READ = 20_000_000  # at most, in each row
BATCHES_READ = 2_000  # at most


def write_ids(path: Path, n_bytes: int) -> None:
    """Write random ids of so many bytes."""
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for begin in range(0, n_bytes // 2, 1 << 24):
            n = min(1 << 24, n_bytes // 2 - begin)
            ids = generator.integers(EOT, size=n, dtype=np.uint16)
            ids[generator.random(n, np.float32) < 1 / 500] = EOT
            file.write(ids.tobytes())


def own_memory() -> int:
    """Return the bytes of the process's memory that belong to no file; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def datasets(tokens: np.ndarray, batch_size: int, context: int, pack: int) -> Iterator[tuple[str, grain.MapDataset]]:
    """Yield the ways of cutting; packing takes only the first ``pack`` tokens, whose documents it must find first."""
    order: dict[str, Any] = {"batch_size": batch_size, "shuffle": True, "seed": 0}
    for sampling in ("random", "stride"):
        yield sampling, train_batches(tokens, context_length=context, sampling=sampling, stride=None, **order)
    yield "packing", packed_batches(PackedRows(tokens[:pack], EOT, context), **order)


def measure(dataset: grain.MapDataset, tokens_per_batch: int) -> dict[str, Any]:
    """Read batches in ten portions; return the figures of one batch."""
    batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    n = min(BATCHES_READ, TOKENS_READ // tokens_per_batch) // 10
    for _ in range(10):
        next(batches)
    before = own_memory()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(n):
            next(batches)
        seconds.append((time.perf_counter() - began) / n)
    low, median, high = statistics.quantiles(seconds, n=4)
    return {
        "milliseconds": round(1e3 * median, 3),
        "quartiles": [round(1e3 * low, 3), round(1e3 * high, 3)],
        "tokens_per_second": round(tokens_per_batch / median),
        "memory_grew_bytes": own_memory() - before,
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the token file (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.bin"
        write_ids(path, int(args.gigabytes * 1e9))
        tokens = map_ids(path, np.dtype("<u2"))
        for batch_size, context in SHAPES:
            for name, dataset in datasets(tokens, batch_size, context, pack=20_000_000):
                figures = measure(dataset, batch_size * context)
                print(json.dumps({"cut": name, "batch": [batch_size, context], **figures}), flush=True)


if __name__ == "__main__":
    main()
