"""What XLA's compilers for TPUs and GPUs make of real runs, and how far slm-jax plan's formulas are from it.

    python benchmarks/compilers.py                      # TPUs: pip install libtpu; GPUs: pip install "jax[cuda13]"
    python benchmarks/compilers.py --only v5e-4         # cases whose name contains a text
    python benchmarks/compilers.py --device v5e-16 --flags "--model.preset gpt2-medium --mesh.fsdp 16 …"

No device is needed, and nothing is run. A case compiles the training step, the evaluation and the first state of a run
as ``slm-jax train`` does, in half a minute to six minutes on 2 CPU cores. A line of JSON has, for each program, the
memory of a device by the compiler and what the formulas differ from it; likewise what each device sends; kernels and
how often they run; and the size of all arrays in the step's collectives, as a multiple of the parameters in bfloat16.
"""

import argparse
import json
import shlex
import sys
import time
from typing import Any

import jax

from slm_jax.errors import InputError
from slm_jax.tasks.config import parse_args
from slm_jax.tools.plan.cluster import find_cluster
from slm_jax.tools.plan.compilers import Compiled, cluster_devices, compile_run, prepare_environment
from slm_jax.tools.plan.estimate import make_plan, resolve

_GPT2 = "--tokenizer.kind gpt2 --model.preset"
_7B = (
    "--tokenizer.kind bpe --tokenizer.vocab_size 32000 --model.n_layers 32 --model.n_heads 32 --model.emb_dim 4096 "
    "--model.context_length 2048 --model.tie_weights false --model.remat full"
)
CASES = {
    "small data": ("v5e-4", f"{_GPT2} gpt2-small --train.batch_size 32 --train.eval_batch_size 32"),
    "small fsdp": ("v5e-4", f"{_GPT2} gpt2-small --train.batch_size 32 --train.eval_batch_size 32 --mesh.fsdp 4"),
    "small fsdp, accumulate 4": (
        "v5e-4",
        f"{_GPT2} gpt2-small --train.batch_size 128 --train.eval_batch_size 32 --train.accumulate 4 --mesh.fsdp 4",
    ),
    "medium fsdp": ("v5e-16", f"{_GPT2} gpt2-medium --train.batch_size 64 --train.eval_batch_size 64 --mesh.fsdp 16"),
    "xl fsdp": (
        "v5e-64",
        f"{_GPT2} gpt2-xl --train.batch_size 256 --train.eval_batch_size 256 --mesh.fsdp 64 --model.remat dots",
    ),
    "7b fsdp": ("v5e-64", f"{_7B} --train.batch_size 128 --train.eval_batch_size 128 --mesh.fsdp 64"),
    "small data, 8 GPUs": ("h100x8", f"{_GPT2} gpt2-small --train.batch_size 64 --train.eval_batch_size 64"),
    "small fsdp, 8 GPUs": (
        "h100x8",
        f"{_GPT2} gpt2-small --train.batch_size 64 --train.eval_batch_size 64 --mesh.fsdp 8",
    ),
    "medium fsdp, 8 GPUs": (
        "h100x8",
        f"{_GPT2} gpt2-medium --train.batch_size 64 --train.eval_batch_size 64 --mesh.fsdp 8",
    ),
}


def main() -> int:
    """Compile the cases, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a case's name or device")
    parser.add_argument("--device", help="instead of the cases: a device with a number, as in slm-jax plan")
    parser.add_argument("--flags", default="", help="with --device: options of slm-jax train")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    cases = {"given": (options.device, options.flags)} if options.device else CASES
    for name, (device, flags) in cases.items():
        if options.only in name or options.only in device:
            print(json.dumps({"case": name, "device": device, **measure(device, flags)}), flush=True)
    return 0


def measure(device: str, flags: str) -> dict[str, Any]:
    """Compile one run, and compare it with its plan."""
    start = time.monotonic()
    cluster = find_cluster(device)
    prepare_environment(cluster)
    try:
        devices = cluster_devices(cluster)
    except InputError as error:
        return {"skipped": str(error)}
    config = parse_args(shlex.split(flags))
    plan = make_plan(config, device)
    config, shapes, _ = resolve(config, cluster)
    programs = {program.name: program for program in compile_run(config, shapes, cluster, devices)}
    step, evaluation = programs["training step"], programs["evaluation"]
    planned = plan.by_remat[plan.remat].memory.total
    sent = sum(sent for _, sent, _ in plan.step.exchanges) if plan.step else 0.0
    return {
        "flags": flags,
        "step": _line(step, planned, sent),
        "evaluation": _line(evaluation, plan.evaluation_bytes - plan.by_remat[plan.remat].memory.optimizer, None),
        "first state": _line(programs["first state"], None, None),
        "multiple": round(sum(one.count * one.n_bytes for one in step.collectives) / (2 * plan.n_params), 2),
        "largest": [(one.kind, one.count, round(one.n_bytes / 1e6, 2), one.source) for one in step.collectives[:4]],
        "seconds": round(time.monotonic() - start),
    }


def _line(program: Compiled, planned_bytes: float | None, planned_sent: float | None) -> dict[str, Any]:
    if program.n_bytes is None:
        return {"problem": program.problem}
    found: dict[str, Any] = {"GB": round(program.n_bytes / 1e9, 3), "sent MB": round(program.sent / 1e6, 1)}
    if planned_bytes is not None:
        found["plan"] = f"{planned_bytes / program.n_bytes - 1:+.1%}"
    if planned_sent:
        found["plan sent"] = f"{planned_sent / program.sent - 1:+.1%}" if program.sent else "nothing is sent"
    return {**found, "kernels": program.kernels}


if __name__ == "__main__":
    sys.exit(main())
