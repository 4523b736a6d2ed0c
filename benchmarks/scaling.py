"""Measure how a training step's time and memory grow, and write SCALING.md, its picture and results/scaling.json.

    python benchmarks/scaling.py                            # about eight minutes, when nothing else runs
    python benchmarks/scaling.py --seconds-per-point 5 --out /tmp/scaling

Each step is measured in a process of its own, so that its memory is its own, on the device that JAX computes on. What
does not fit there, or takes longer than the time given, is computed: memory as slm-jax plan does, time from the FLOPs.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from reader import VOCABULARY, grown_bytes, own_bytes, time_batches, write_ids
from scaling_page import draw, page

from slm_jax.data.token_file import check_ids, open_token_file
from slm_jax.data.windows import train_batches
from slm_jax.errors import InputError
from slm_jax.files import replace_text
from slm_jax.model import DType
from slm_jax.tasks.config import parse_args
from slm_jax.tools.bench.instruments import Ceilings, find_ceilings, output_of, peak_memory, start_python, time_calls
from slm_jax.tools.bench.result import describe_machine
from slm_jax.tools.bench.training import StepTimer, compile_step
from slm_jax.tools.plan.estimate import ASSUMED_MFU, Plan, make_plan
from slm_jax.training.hardware import DEVICES, device_here, find_device
from slm_jax.training.process import keep_freed_memory

Ladder = Literal["parameters", "context", "batch"]
_ENOUGH_REPEATS = 7
_LEAST_STEPS = 4  # one to warm up, three measured
_ROWS, _CONTEXT = 8, 1_024  # of the batches that are read from token files


@dataclasses.dataclass(frozen=True)
class Point:
    """A training step to measure.

    Attributes:
        ladder: what grows along it.
        name: of the shape, for a person.
        flags: of ``slm-jax plan`` and ``slm-jax bench train``.
    """

    ladder: Ladder
    name: str
    flags: tuple[str, ...]


def point(ladder: Ladder, name: str, tokenizer: Sequence[str], batch: int, context: int, **model: Any) -> Point:
    """Return a point of these fields of the model."""
    fields = {"model.context_length": context, **{f"model.{key}": value for key, value in model.items()}}
    flags = [*tokenizer, "--train.batch_size", str(batch)]
    for key, value in fields.items():
        flags += [f"--{key}", str(value)]
    return Point(ladder, name, tuple(flags))


_GPT2 = ("--tokenizer.kind", "gpt2")
_BPE = ("--tokenizer.kind", "bpe", "--tokenizer.vocab_size", "4096")
POINTS = (
    point("parameters", "tiny, 4 × 128", _BPE, 2, 256, preset="tiny"),
    point("parameters", "mini, 6 × 256", _BPE, 2, 256, preset="mini"),
    point("parameters", "8 × 384", _BPE, 2, 256, preset="mini", n_layers=8, emb_dim=384, n_heads=6),
    point("parameters", "12 × 512", _BPE, 2, 256, preset="mini", n_layers=12, emb_dim=512, n_heads=8),
    *(
        point("parameters", f"GPT-2 {size}, {shape}", _GPT2, 2, 256, preset=f"gpt2-{size}")
        for size, shape in (
            ("small", "12 × 768"),
            ("medium", "24 × 1,024"),
            ("large", "36 × 1,280"),
            ("xl", "48 × 1,600"),
        )
    ),
    *(
        point("context", "tiny", _BPE, 8192 // context, context, preset="tiny")
        for context in (256, 512, 1024, 2048, 4096, 8192)
    ),
    *(point("batch", "mini", _BPE, batch, 256, preset="mini") for batch in (1, 2, 4, 8, 16, 32)),
)
GIGABYTES = (0.01, 0.1, 1.0, 10.0)


def main() -> int:
    """Measure everything, and write the page; 2 on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds-per-point", type=float, default=20, help="longer steps are computed, not measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the page")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # what the processes of the points are called with
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.step:
            keep_freed_memory()  # as every command does
            print(json.dumps(measure_step(json.loads(options.step), options.seconds_per_point)))
        elif options.tokens:
            print(json.dumps(measure_reader(options.tokens)))
        else:
            write(options.out, POINTS, GIGABYTES, options.seconds_per_point)
    except InputError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


def write(folder: Path, points: Sequence[Point], gigabytes: Sequence[float], seconds: float) -> None:
    """Measure or compute all points, and write SCALING.md, scaling.png and results/scaling.json into a folder."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is left to the points' processes
    began, load = time.time(), os.getloadavg()[0]
    device = plan_device()
    dtype: DType = "float32" if device == "cpu" else "bfloat16"
    ceilings = find_ceilings(dtype, None, "measured" if device == "cpu" else None)
    rows = [step_row(point, device, ceilings, seconds) for point in points]
    content = {
        "machine": {key: value for key, value in describe_machine().items() if key != "system"},
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "load_at_start": load,
        "ceilings": dataclasses.asdict(ceilings),
        "dtype": dtype,
        "assumed_mfu": ASSUMED_MFU,
        "seconds_per_point": seconds,
        "steps": estimated(rows),
        "readers": [reader_row(size) for size in gigabytes],
        "accelerators": accelerators(),
        "seconds": time.time() - began,
    }
    (folder / "results").mkdir(parents=True, exist_ok=True)
    replace_text(folder / "results" / "scaling.json", json.dumps(content, indent=1) + "\n")
    replace_text(folder / "SCALING.md", page(content))
    draw(content, folder / "scaling.png")


def plan_device() -> str:
    """Return what slm-jax plan calls the device that JAX computes on.

    Raises:
        InputError: an accelerator that it does not know.
    """
    if jax.default_backend() == "cpu":
        return "cpu"
    device = device_here()
    if device is None:
        known = ", ".join(dict.fromkeys(device.name for device in DEVICES))
        raise InputError(
            f"limits and memory of {jax.devices()[0].device_kind} are not known; expected a CPU or one of {known}; "
            "add it to slm_jax/training/hardware.py, or set JAX_PLATFORMS=cpu"
        )
    return device.name


def step_row(point: Point, device: str, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """Plan a point, and measure it where it fits and is fast enough; ``seconds`` and ``bytes`` are None where not."""
    plan = make_plan(parse_args(point.flags), device)
    memory = plan.by_remat[plan.remat].memory
    tokens = plan.rows * plan.seq
    flops = (plan.flops_per_token or 0) * tokens
    # Parameters and Adam's moments are read once and written once, whatever the step does.
    bounds = ceilings.bounds(flops, 2 * (memory.parameters + memory.optimizer))
    measured: dict[str, Any] = {"seconds": None, "bytes": None, "repeats": ()}
    if memory.total < 0.8 * (plan.memory_limit or 0) and _LEAST_STEPS * bounds["arithmetic"] < seconds:
        arguments = ["--step", json.dumps(point.flags), "--seconds-per-point", str(seconds)]
        measured = json.loads(output_of(start_python([__file__, *arguments])))
    return {
        **dataclasses.asdict(point),
        "parameters": plan.n_params,
        "batch": plan.rows,
        "context": plan.seq,
        "tokens": tokens,
        "flops": flops,
        "bounds_seconds": bounds,
        "planned_bytes": memory.total,
        **measured,
    }


def measure_step(flags: Sequence[str], seconds: float) -> dict[str, Any]:
    """Measure a step in this process: after one that warms up as many as still fit into the time, 3 to 7."""
    step = compile_step(parse_args(flags))
    with peak_memory() as memory:
        timer = StepTimer(step)
        first = time_calls(timer.step_and_wait, warmup=0, repeats=1).median
        repeats = int(np.clip(seconds / first - 1, _LEAST_STEPS - 1, _ENOUGH_REPEATS))
        timing = time_calls(timer.step_and_wait, warmup=0, repeats=repeats)
    return {"seconds": timing.median, "repeats": timing.seconds, "bytes": memory.n_bytes}


def estimated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give what was not measured the time that the FLOPs take at the share of the peak of the last that was."""
    result, share = [], 1.0
    for row in rows:
        bounds = row["bounds_seconds"]
        if row["seconds"] is None:
            result.append({**row, "estimated_seconds": max(bounds["arithmetic"] / share, *bounds.values())})
        else:
            share = bounds["arithmetic"] / row["seconds"]
            result.append(row)
    return result


def reader_row(gigabytes: float) -> dict[str, Any]:
    """Measure the reader on a file of so many GB, in a folder that is deleted afterwards; say why where it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        n_bytes = int(gigabytes * 1e9)
        if shutil.disk_usage(folder).free < 2 * n_bytes:
            return {"gigabytes": gigabytes, "missing": "no room on this disk"}
        try:
            write_ids(path, n_bytes)
            return {"gigabytes": gigabytes, **json.loads(output_of(start_python([__file__, "--tokens", str(path)])))}
        except (InputError, OSError) as error:  # the steps took minutes, and are still to be written
            print(f"the reader of {gigabytes:g} GB: {error}", file=sys.stderr)
            return {"gigabytes": gigabytes, "missing": "failed"}


def measure_reader(path: Path) -> dict[str, Any]:
    """Measure in this process how long a token file takes to open, how fast batches come, and the memory of both."""
    before = own_bytes()
    began = time.perf_counter()
    tokens = open_token_file(path).tokens
    check_ids(tokens, VOCABULARY, path)
    opened = time.perf_counter() - began
    source = train_batches(
        tokens, context_length=_CONTEXT, batch_size=_ROWS, sampling="random", stride=None, shuffle=True, seed=0
    )
    reading = time_batches(source, repeats=5, batches=200)
    return {
        "tokens": tokens.size,
        "open_seconds": opened,
        "batch_seconds": reading.to_dict(),
        "tokens_per_second": _ROWS * _CONTEXT / reading.median,
        "own_bytes": grown_bytes(before),
    }


def accelerators() -> list[dict[str, Any]]:
    """Compute what GPT-2's sizes need of accelerators that are not here, 8 × 1,024 tokens a step in bfloat16."""
    rows = []
    for size, remat in (("small", "none"), ("medium", "none"), ("large", "dots"), ("xl", "full")):
        for name in ("a100-40g", "h100", "v5e"):
            flags = [*_GPT2, "--model.preset", f"gpt2-{size}", "--train.batch_size", "8", "--model.remat", remat]
            config = parse_args(flags)
            plan = make_plan(config, name)
            rows.append({"device": name, "size": size, "flags": flags, **_of_plan(plan)})
    return rows


def _of_plan(plan: Plan) -> dict[str, Any]:
    fit, device = plan.by_remat[plan.remat], find_device(plan.device)
    ceilings = Ceilings(plan.peak_flops, device.bandwidth, "data sheet")
    state = fit.memory.parameters + fit.memory.optimizer
    flops = (plan.flops_per_token or 0) * plan.rows * plan.seq
    return {
        "bytes": fit.memory.total,
        "limit_bytes": plan.memory_limit,
        "largest_rows": fit.largest_rows,
        "remat": plan.remat,
        "attention": plan.attention,
        "bounds_seconds": ceilings.bounds(flops, 2 * state),
        "tokens_per_second": plan.tokens_per_second,
    }


if __name__ == "__main__":
    sys.exit(main())
