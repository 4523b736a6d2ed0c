"""Kill a run with SIGKILL at random moments, resume it, and compare it bit for bit with one that was never broken.

    python benchmarks/kill_and_resume.py --kills 20

Compared are all parameters, the optimizer's state, the dropout key, the data state, every logged number but the times,
and the samples. Each trial kills one run once, at a random moment between its start and its end.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from slm_jax.data.builtin import python_docs
from slm_jax.training.checkpoint import read_metadata
from slm_jax.training.manifest import saved_steps

OPTIONS = {
    "tokenizer.kind": "char",
    "model.n_layers": 2,
    "model.emb_dim": 32,
    "model.context_length": 32,
    "model.unroll": "false",
    "model.drop_rate": 0.1,
    "train.batch_size": 8,
    "train.accumulate": 2,
    "train.eval_every": 20,
    "train.eval_batch_size": 64,
    "train.log_every": 1,
    "checkpoint.every": 15,
    "sample.every": 40,
    "sample.max_new_tokens": 40,
    "optimizer.warmup_steps": 10,
}
TIMES = ("seconds", "tokens_per_second", "mfu")


def command(folder: Path, name: str, steps: int) -> list[str]:
    """Return the command that starts or resumes the run."""
    where = {"data.source": f"text:{folder / 'text.txt'}", "runs_dir": folder, "run": name}
    pairs = [part for key, value in {**OPTIONS, **where}.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "slm_jax", "train", *pairs, "--train.steps", str(steps)]


def train(folder: Path, name: str, steps: int) -> float:
    """Run to the end; return the seconds it took."""
    began = time.monotonic()
    done = subprocess.run(command(folder, name, steps), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr}")
    return time.monotonic() - began


def kill_once(folder: Path, name: str, steps: int, after: float) -> int:
    """Start the run, kill it, and return the step of the last checkpoint that it left (-1: none)."""
    process = subprocess.Popen(command(folder, name, steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return max(saved_steps(folder / name / "checkpoints"), default=-1)


def arrays(checkpoint: Path) -> Any:
    """Return all arrays of a checkpoint, on one device, wherever they were when they were saved."""
    saved, place = (
        ocp.checkpointables_metadata(checkpoint).metadata,
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        {name: saved[name] for name in ("params", "state")},
    )
    return ocp.load_checkpointables(checkpoint, like)


def outcome(run: Path) -> dict[str, Any]:
    """Return all that must be equal of a finished run."""
    checkpoints = run / "checkpoints"
    step = saved_steps(checkpoints)[-1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": step,
        "arrays": arrays(checkpoints / str(step)),
        "data": read_metadata(checkpoints, step)["data"],
        "metrics": [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
        "samples": samples.read_text() if (samples := run / "samples.md").exists() else None,
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Name every place in which two outcomes differ by a bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}/{i}")]
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        a, b = np.asarray(one), np.asarray(other)
        return [] if (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) else [where]
    return [] if one == other and type(one) is type(other) else [where]


def main() -> int:
    """Run the trials; exit with 0 only if all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n".join(python_docs())[:60_000], encoding="utf-8")
        # The first run fills the compile cache, so that the moments spread over the training itself.
        train(folder, "warm-up", options.steps)
        seconds = train(folder, "unbroken", options.steps)
        expected = outcome(folder / "unbroken")
        equal = 0
        for i in range(options.kills):
            moment = moments.uniform(0.3, 1.0) * seconds
            step = kill_once(folder, f"killed-{i}", options.steps, moment)
            train(folder, f"killed-{i}", options.steps)
            found = differences(expected, outcome(folder / f"killed-{i}"))
            equal += not found
            verdict = "equal" if not found else f"DIFFERENT: {', '.join(found[:5])}"
            print(f"killed after {moment:4.1f} s, last checkpoint {step:>3}: {verdict}", flush=True)
    print(f"{equal}/{options.kills} bitwise equal to the unbroken run of {options.steps} steps ({seconds:.1f} s)")
    return 0 if equal == options.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
