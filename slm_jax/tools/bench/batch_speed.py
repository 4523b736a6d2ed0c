"""The speed of the data pipeline alone: from the text, or the token file, to the device."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax

from slm_jax.config import to_dict
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.pretraining import Pretraining
from slm_jax.tools.bench.result import Result
from slm_jax.tools.bench.timing import Clock, Timing, time_calls
from slm_jax.training.resume import Start
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.sharding import check_batch_size, host_rows, make_mesh, put_batch


def measure(config: RunConfig, *, warmup: int, repeats: int, batches: int, step_ms: float | None = None) -> Result:
    """Measure the batches of pretraining as the training loop reads them; ``step_ms`` of a step gives their share."""
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh.size, config.train.batch_size, config.train.accumulate)
    began = time.perf_counter()
    task = Pretraining.build(config, Start(RunFolder(config.folder), None, {}))
    ready_seconds = time.perf_counter() - began
    rows = host_rows(config.train.batch_size)
    source = task.train_batches.map(lambda batch: {key: value[rows] for key, value in batch.items()})
    iterator = iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    reading = per_batch(iterator, warmup=warmup, repeats=repeats, batches=batches)
    batch = next(iterator)
    placing = time_calls(lambda: jax.block_until_ready(put_batch(mesh, batch)), warmup=warmup, repeats=repeats)
    rate = task.tokens_per_step / reading.median
    share = None if step_ms is None else 1e3 * reading.median / step_ms
    bars = {"a batch": 1e3 * reading.median, "a batch to the device": 1e3 * placing.median}
    return Result(
        what="data",
        config=to_dict(config),
        figures={
            "ready_seconds": ready_seconds,
            "batch_seconds": reading.to_dict(),
            "batches_per_repeat": batches,
            "tokens_per_batch": task.tokens_per_step,
            "tokens_per_second": rate,
            "bytes_per_batch": sum(value.nbytes for value in batch.values()),
            "placing_seconds": placing.to_dict(),
            "step_ms": step_ms,
            "share_of_step": share,
        },
        rows={
            "until batches can be read": f"{ready_seconds:.2f} s",
            "a batch": str(reading),
            "tokens": f"{rate:,.0f} a second ({task.tokens_per_step:,} a batch)",
            "a batch to the device": str(placing),
            "share of a step": "pass --step-ms, from slm-jax bench train" if share is None else f"{share:.2%}",
        },
        unit="ms",
        series={"a batch": reading.milliseconds},
        bars=bars if step_ms is None else {**bars, "a training step": step_ms},
        notes=("One thread reads batches while the device computes: they cost time only beyond a whole step.",),
    )


def per_batch(
    iterator: Iterator[Any], *, warmup: int, repeats: int, batches: int, clock: Clock = time.perf_counter
) -> Timing:
    """Time reads of several batches, since single ones may be prefetched; return the seconds of one in each repeat."""
    timing = time_calls(
        lambda: sum(1 for _ in itertools.islice(iterator, batches)), warmup=warmup, repeats=repeats, clock=clock
    )
    return Timing(tuple(seconds / batches for seconds in timing.seconds))
