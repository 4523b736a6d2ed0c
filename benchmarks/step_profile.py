"""Profile training steps and say what their time is spent on.

    python benchmarks/step_profile.py --shape gpt2-small-cpu
    python benchmarks/step_profile.py --device gpu --dtype bfloat16 --batch 32 --output profile.json --trace trace/

It takes the shapes of peers.py, and its options that say what slm_jax does. The steps are slm_jax's, after some that
warm up. On a GPU the table is of the kernels on its streams; on a CPU of XLA's operations on its threads, whose times
overlap where several compute. The share is of the wall time of the steps, so that on a GPU what is missing to 100% is
time in which it did nothing.
"""

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import peer_worker
import peers

STEPS = 3

# The first that matches counts; kernels of cuBLAS, cuDNN and Triton, and XLA's names of its fusions and operations.
KINDS = (
    ("attention", r"fmha|flash|cudnn.*(sdpa|attn|mha)|attention"),
    ("collectives and copies", r"memcpy|memset|copy|all-reduce|nccl|transpose"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|dot|matmul|convolution|[xy]nn_|_mm_"),
    ("embedding and scatter", r"gather|scatter|dynamic-slice|dynamic_slice|dynamic-update|dynamic_update"),
    ("reductions (norms, loss)", r"reduce|softmax|norm"),
    ("elementwise fusions", r"fusion|loop_|wrapped_|multiply|add|select|convert|broadcast|exponential|tanh"),
)


class Event(NamedTuple):
    """Something that a device or a thread did."""

    name: str
    began: float  # nanoseconds
    nanoseconds: float


def read_events(trace: Path) -> list[Event]:
    """Return the operations in a trace: of the GPU's streams if it has any, else of XLA's CPU threads."""
    from jax.profiler import ProfileData

    file = max(trace.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime_ns)  # a kept folder has older ones
    planes = list(ProfileData.from_file(str(file)).planes)
    gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    events = []
    for plane in gpu or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue  # XLA repeats the kernels there, grouped by module and operation
            for event in line.events:
                if gpu or "hlo_op" in dict(event.stats):
                    events.append(Event(event.name, event.start_ns, event.duration_ns))
    return events


def kind_of(name: str) -> str:
    """Return which of KINDS an operation is of."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def busy_nanoseconds(events: Iterable[Event]) -> float:
    """Return how long at least one of the events was going on."""
    busy = end = 0.0
    for event in sorted(events, key=lambda event: event.began):
        busy += max(0.0, event.began + event.nanoseconds - max(end, event.began))
        end = max(end, event.began + event.nanoseconds)
    return busy


def summarize(events: list[Event], wall_seconds: float, steps: int) -> dict[str, Any]:
    """Return milliseconds of a step by kind and by name, and the share of the wall time that is busy."""
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in events:
        milliseconds = event.nanoseconds / 1e6 / steps
        kinds[kind_of(event.name)] += milliseconds  # type: ignore[assignment]
        names[event.name] += milliseconds  # type: ignore[assignment]
    return {
        "step_ms": wall_seconds * 1e3 / steps,
        "busy_share": busy_nanoseconds(events) / 1e9 / wall_seconds,
        "kinds_ms": dict(kinds.most_common()),
        "longest_ms": dict(names.most_common(20)),
    }


def profile(work: peer_worker.Work, trace: Path) -> dict[str, Any]:
    """Profile STEPS steps of slm_jax in this process."""
    import jax

    run = peer_worker.slm_jax(work)
    run(STEPS)
    jax.profiler.start_trace(str(trace))
    began = time.perf_counter()
    run(STEPS)
    seconds = time.perf_counter() - began
    jax.profiler.stop_trace()
    return summarize(read_events(trace), seconds, STEPS)


def table(result: dict[str, Any]) -> str:
    """Return the kinds as a Markdown table, and the longest operations."""
    step = result["step_ms"]
    lines = ["| what | ms a step | share |", "|---|---|---|"]
    lines += [f"| {kind} | {ms:.2f} | {ms / step:.1%} |" for kind, ms in result["kinds_ms"].items()]
    lines += [f"| the step (busy {result['busy_share']:.1%}) | {step:.2f} | |", "", "The longest:", ""]
    lines += [f"- {ms:.2f} ms {name[:100]}" for name, ms in result["longest_ms"].items()]
    return "\n".join(lines)


def main() -> int:
    """Profile, print the table, and write what is asked for."""
    parser = argparse.ArgumentParser(
        parents=[peers.work_parser()], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, help="a folder to keep the trace in, for xprof")
    parser.set_defaults(compile=False)  # which is of PyTorch's models
    options = parser.parse_args()
    peers.check_work(parser, options)
    work = peers.make_work("slm_jax", options)
    peer_worker.set_up(work)
    with tempfile.TemporaryDirectory() as name:
        result = profile(work, options.trace or Path(name))
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
