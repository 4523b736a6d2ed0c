"""What XLA's compilers for TPUs and GPUs make of real runs, and how far slm-jax plan's formulas are from it.

    python benchmarks/compilers.py                      # TPUs: pip install libtpu; GPUs: pip install "jax[cuda13]"
    python benchmarks/compilers.py --only cpu           # cases whose name or device contains a text
    python benchmarks/compilers.py --only recipes+v5e:2x2
    python benchmarks/compilers.py --device v5e-16 --words "--model.preset gpt2-medium --mesh.fsdp 16 …"

No device is needed, and nothing is run. A case compiles the training step, the evaluation, the first state and the
generation of a run as ``slm-jax train`` does, in half a minute to ten minutes on 2 CPU cores. A line of JSON has, for
each program, the memory of a device by the compiler and what the formulas differ from it; likewise what each device
sends; kernels and how often they run; and the size of all arrays in the step's collectives, as a multiple of the
parameters in bfloat16.
"""

import argparse
import collections
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax

from slm_jax.errors import InputError
from slm_jax.tasks.config import FinetuneConfig, parse_args
from slm_jax.tools.plan.cluster import find_cluster
from slm_jax.tools.plan.compilers import Compiled, cluster_devices, compile_run, prepare_environment
from slm_jax.tools.plan.estimate import make_plan

_7B = (
    "--tokenizer.kind bpe --tokenizer.vocab_size 32000 --model.n_layers 32 --model.n_heads 32 --model.emb_dim 4096 "
    "--model.context_length 2048 --model.tie_weights false --model.remat full"
)


def _run(rows: int, words: str) -> str:
    return f"--train.batch_size {rows} --train.eval_batch_size {rows} {words}"


def _gpt2(size: str, rows: int, *words: str) -> str:
    return _run(rows, " ".join(["--tokenizer.kind gpt2 --model.preset", f"gpt2-{size}", *words]))


def _gpus(size: str, rows: int, more: str = "") -> dict[str, tuple[str, str]]:
    meshes = {"data 8": "", "fsdp 8": "--mesh.fsdp 8", "fsdp 4, tensor 2": "--mesh.fsdp 4 --mesh.tensor 2"}
    return {f"{size}, {name}": ("h100x8", _gpt2(size, rows, mesh, more)) for name, mesh in meshes.items()}


_MICRO = "--train.accumulate 4 --train.eval_batch_size 32"
_ROOT = Path(__file__).parents[1]
_RECIPES = {
    "tiny": "--config configs/tiny.yaml",
    "GPT-2 124M": "--config configs/gpt2_124m.yaml",
    "LoRA": "finetune --config configs/sft_instruction.yaml --base gpt2 --trainable lora --model.drop_rate 0",
    "classifier": "finetune --config configs/classify_imdb.yaml",
}
# A name, a device, and the words after slm-jax (train, if it is left out).
CASES = {
    "tiny": ("cpu", _run(8, "--model.preset tiny")),
    "mini": ("cpu", _run(8, "--model.preset mini")),
    "mini, accumulate 4": ("cpu", _run(8, "--model.preset mini --train.accumulate 4")),
    "mini in a loop, remat dots": ("cpu", _run(8, "--model.preset mini --model.unroll false --model.remat dots")),
    "small, 256 tokens": ("cpu", _gpt2("small", 4, "--model.context_length 256")),
    "small in a loop, 256 tokens": ("cpu", _gpt2("small", 4, "--model.context_length 256 --model.unroll false")),
    "small in a loop, remat full": ("cpu", _gpt2("small", 8, "--model.unroll false --model.remat full")),
    "small, one chip": ("v5e-1", _gpt2("small", 16)),
    "small, one chip, 4,096 tokens": ("v5e-1", _gpt2("small", 4, "--model.context_length 4096")),
    "small, one chip, remat dots": ("v5e-1", _gpt2("small", 16, "--model.remat dots")),
    "small, one chip, 40 rows, remat dots": ("v5e-1", _gpt2("small", 40, "--model.remat dots")),
    "medium, one chip": ("v5e-1", _gpt2("medium", 8)),
    "medium, one chip, remat dots": ("v5e-1", _gpt2("medium", 16, "--model.remat dots")),
    "small, data 4": ("v5e-4", _gpt2("small", 32)),
    "small, data 4, accumulate 4": ("v5e-4", _gpt2("small", 128, _MICRO)),
    "small, fsdp 4": ("v5e-4", _gpt2("small", 32, "--mesh.fsdp 4")),
    "small, fsdp 4, accumulate 4": ("v5e-4", _gpt2("small", 128, "--mesh.fsdp 4", _MICRO)),
    "medium, fsdp 16": ("v5e-16", _gpt2("medium", 64, "--mesh.fsdp 16")),
    "xl, fsdp 64": ("v5e-64", _gpt2("xl", 256, "--mesh.fsdp 64", "--model.remat dots")),
    "7b, fsdp 64": ("v5e-64", _run(128, f"{_7B} --mesh.fsdp 64")),
    "7b, fsdp 2, tensor 4": ("v5p:2x2x2", _run(8, f"{_7B} --mesh.fsdp 2 --mesh.tensor 4")),
    "small, data 8, accumulate 4": ("h100x8", _gpt2("small", 256, _MICRO)),
    **_gpus("small", 64),
    **_gpus("medium", 64),
    **_gpus("xl", 64, "--model.remat full"),
    **{
        f"recipes: {name}, {device}": (device, words)
        for device in ("v5e:2x2", "v5e:8x8", "h100x8")
        for name, words in _RECIPES.items()
    },
}


def main() -> int:
    """Compile the cases, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a case's name or device; + joins several")
    parser.add_argument("--device", help="instead of the cases: a device with a number, as in slm-jax plan")
    parser.add_argument("--words", default="", help="with --device: what follows slm-jax train, or finetune and more")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.chdir(_ROOT)  # the recipes lie there
    cases = {"given": (options.device, options.words)} if options.device else CASES
    for name, (device, words) in cases.items():
        if all(part in f"{name}, {device}" for part in options.only.split("+")):
            print(json.dumps({"case": name, "device": device, **measure(device, shlex.split(words))}), flush=True)
    return 0


def measure(device: str, words: list[str]) -> dict[str, Any]:
    """Compile one run, and compare it with its plan."""
    start = time.monotonic()
    cluster = find_cluster(device)
    prepare_environment(cluster)
    config = parse_args(words[1:], FinetuneConfig) if words[0] == "finetune" else parse_args(words)
    try:
        devices, plan = cluster_devices(cluster), make_plan(config, device)
    except InputError as error:  # no compiler here, or a mesh that the model's heads refuse
        return {"left out": str(error)}
    programs = {program.name: program for program in compile_run(config, cluster, devices)}
    step, memory = programs["training step"], plan.by_remat[plan.remat].memory
    sent = plan.step.sent if plan.step else None
    planned = {"training step": (memory.total, sent), "evaluation": (plan.evaluation_bytes - memory.optimizer, None)}
    counts: collections.Counter[str] = collections.Counter()
    for one in step.collectives:
        counts[f"{one.kind} of {one.group_size}"] += round(one.count)
    return {
        "words": " ".join(words),
        "dtype": plan.dtype,
        **{
            name: _line(program, plan.memory_limit, *planned.get(name, (None, None)))
            for name, program in programs.items()
        },
        "multiple": round(sum(one.count * one.n_bytes for one in step.collectives) / (2 * plan.n_params), 2),
        "collectives": counts,
        "largest": [(one.kind, one.count, round(one.n_bytes / 1e6, 2), one.source) for one in step.collectives[:6]],
        "planned": plan.step and [(one.what, one.kind, round(one.sent / 1e6, 1)) for one in plan.step.exchanges],
        "seconds": round(time.monotonic() - start),
    }


def _line(
    program: Compiled, limit: float | None, planned_bytes: float | None, planned_sent: float | None
) -> dict[str, Any]:
    if program.n_bytes is None:
        return {"problem": program.problem}
    found: dict[str, Any] = {"GB": round(program.n_bytes / 1e9, 3), "sent MB": round(program.sent / 1e6, 1)}
    if limit is not None:
        found["fits"] = program.n_bytes <= limit
    if planned_bytes is not None:
        found["plan"] = f"{planned_bytes / program.n_bytes - 1:+.1%}"
    if planned_sent:
        found["plan sent"] = f"{planned_sent / program.sent - 1:+.1%}" if program.sent else "nothing is sent"
    return {**found, "kernels": program.kernels}


if __name__ == "__main__":
    sys.exit(main())
