"""Measure how fast training batches are cut from a large token file: tokens a second, and memory.

    python benchmarks/reader.py --gigabytes 1

The file's first 32 MB are random uint16 ids, one in 500 the end-of-text id, so that packing has documents to pack; the
rest is a hole, which takes no disk. Its ids are checked first, as before training, so it lies in the system's file
cache. Batches are read as the training loop reads them, through Grain's one thread, with nothing else to do. Prints
JSON, a row for each way of cutting and shape: the median time of a batch, its quartiles, tokens a second; and how much
the process's own memory, without the mapped file, grew while it read.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from slm_jax.data.token_file import check_ids, map_ids
from slm_jax.data.windows import PackedRows, endless_batches, train_batches
from slm_jax.tools.bench.instruments import Timing, process_bytes
from slm_jax.tools.bench.training import per_batch

SHAPES = ((12, 64), (8, 128), (32, 1024))
VOCABULARY, EOT = 50_257, 50_256
TOKENS_READ = 20_000_000  # at most, in each row
BATCHES_READ = 2_000  # at most
RANDOM_IDS = 1 << 24  # at the beginning of a file


def write_ids(path: Path, n_bytes: int) -> None:
    """Write random ids, and behind the first 32 MB of them a hole, which takes no disk and reads as zeros."""
    generator = np.random.default_rng(0)
    ids = generator.integers(EOT, size=min(RANDOM_IDS, n_bytes // 2), dtype=np.uint16)
    ids[generator.random(ids.size, np.float32) < 1 / 500] = EOT
    with path.open("wb") as file:
        ids.tofile(file)
        file.truncate(n_bytes // 2 * 2)


def own_bytes() -> int | None:
    """Return the memory that this process has for itself, without pages of files; None: the system does not say."""
    return process_bytes("RssAnon")


def grown_bytes(before: int | None) -> int | None:
    """Return how much more memory this process has for itself than before; None: the system does not say."""
    now = own_bytes()
    return None if now is None or before is None else now - before


def time_batches(dataset: grain.MapDataset, *, repeats: int, batches: int) -> Timing:
    """Time so many batches at once, read as the training loop reads them; return the seconds of one in each repeat."""
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    return per_batch(iterator, warmup=1, repeats=repeats, batches=batches)


def datasets(tokens: np.ndarray, batch_size: int, context: int, pack: int) -> Iterator[tuple[str, grain.MapDataset]]:
    """Yield the ways of cutting; packing takes only the first ``pack`` tokens, whose documents it must find first."""
    order: dict[str, Any] = {"batch_size": batch_size, "shuffle": True, "seed": 0}
    for sampling in ("random", "stride"):
        yield sampling, train_batches(tokens, context_length=context, sampling=sampling, stride=None, **order)
    rows = PackedRows(tokens[:pack], EOT, context)
    yield "packing", endless_batches(len(rows), rows.batch, **order)


def measure(dataset: grain.MapDataset, tokens_per_batch: int) -> dict[str, Any]:
    """Read batches in ten portions, after one that warms up; return the figures of one batch."""
    before = own_bytes()
    batches = min(BATCHES_READ, TOKENS_READ // tokens_per_batch) // 10
    reading = time_batches(dataset, repeats=10, batches=batches)
    return {
        "milliseconds": round(1e3 * reading.median, 3),
        "quartiles": [round(1e3 * seconds, 3) for seconds in reading.quartiles],
        "tokens_per_second": round(tokens_per_batch / reading.median),
        "memory_grew_bytes": grown_bytes(before),
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
        check_ids(tokens, VOCABULARY, path)
        for batch_size, context in SHAPES:
            for name, dataset in datasets(tokens, batch_size, context, pack=RANDOM_IDS):
                figures = measure(dataset, batch_size * context)
                print(json.dumps({"cut": name, "batch": [batch_size, context], **figures}), flush=True)


if __name__ == "__main__":
    main()
