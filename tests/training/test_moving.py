"""What must hold of a run that moves from machine to machine through its mirror: it reads as one that never moved.

Each machine is a process with its own devices and a runs_dir of its own, and is killed while it trains.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slm_jax.training.checkpoint import read_metadata
from slm_jax.training.manifest import find_damage, saved_steps

ROOT = Path(__file__).parents[2]
STEPS = 80
RUN = {
    "run": "moving",
    "train.steps": STEPS,
    "tokenizer.kind": "char",
    "model.n_layers": 1,
    "model.emb_dim": 16,
    "model.n_heads": 2,
    "model.context_length": 16,
    "train.batch_size": 8,
    "train.eval_every": 40,
    "train.eval_batch_size": 64,
    "train.log_every": 1,
    "checkpoint.every": 10,
    "checkpoint.keep": 20,
    "sample.every": 0,
    "optimizer.warmup_steps": 10,
    "optimizer.learning_rate": 3e-3,
}
# One GPU with little memory; a TPU with eight chips; a CPU.
MACHINES = (
    ({"model.dtype": "float32", "train.accumulate": 2}, {}),
    (
        {"model.dtype": "bfloat16", "mesh.fsdp": 8},
        {
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
            "NPROC": "16",
        },
    ),
    ({"model.dtype": "float32", "model.remat": "full"}, {}),
)


def start(folder, name, machine):
    """Start or resume the run on a machine; with the mirror, if it is one of several."""
    options, environment = machine
    mirror = {} if name == "unbroken" else {"checkpoint.mirror": folder / "drive"}
    values = {**RUN, "data.source": f"text:{folder / 'text.txt'}", "runs_dir": folder / name, **mirror, **options}
    args = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    return subprocess.Popen(
        [sys.executable, "-m", "slm_jax", "train", *args],
        env={**env, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-4000:]
    return " ".join(out.split())


def kill_after(process, drive, step):
    """Kill it without warning once the mirror has the checkpoint of a step; return the latest that it then has."""
    until = time.monotonic() + 240
    while not any(found >= step for found in saved_steps(drive)):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    out, _ = process.communicate()
    assert process.returncode == -9, "it was done before it was killed"
    return max(step for step in saved_steps(drive) if find_damage(drive / str(step)) is None), " ".join(out.split())


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The unbroken run's folder, the last machine's, the steps that the run moved at, and what each machine said."""
    folder = tmp_path_factory.mktemp("moving")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "saw"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 4000)))
    unbroken = start(folder, "unbroken", ({"model.dtype": "float32"}, {}))
    drive = folder / "drive" / "moving" / "checkpoints"
    (folder / "drive").mkdir()
    first, _ = kill_after(start(folder, "first", MACHINES[0]), drive, 20)
    second, said_second = kill_after(start(folder, "second", MACHINES[1]), drive, first + 20)
    said_third = finish(start(folder, "third", MACHINES[2]))
    finish(unbroken)
    return folder, (first, second), (said_second, said_third)


def rows(folder, split):
    lines = (folder / "moving" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.mark.slow
def test_a_run_that_moved_twice_reads_as_one_that_never_did(moved):
    folder, (first, second), _ = moved
    assert 20 <= first < second < STEPS
    one, other = rows(folder / "unbroken", "train"), rows(folder / "third", "train")
    for key in ("step", "tokens"):
        assert [row[key] for row in other] == [row[key] for row in one]
    rates = ([row["learning_rate"] for row in found] for found in (other, one))
    np.testing.assert_allclose(*rates, rtol=1e-6)
    assert [row["step"] for row in rows(folder / "third", "val")] == [0, 40, STEPS]
    assert rows(folder / "drive", "train") == other
    # Every step has seen its own batch: from batch to batch the losses differ by far more than between machines.
    one, other = (np.array([row["loss"] for row in found]) for found in (one, other))
    np.testing.assert_allclose(other[:first], one[:first], rtol=1e-4)
    difference = np.abs(other - one)
    assert difference.max() < 0.005
    assert np.median(difference[second:]) < 0.1 * np.median(np.abs(np.diff(one)))
    for step in (first, second, STEPS):
        data = [read_metadata(folder / name / "moving" / "checkpoints", step)["data"] for name in ("drive", "unbroken")]
        assert data[0] == data[1]


@pytest.mark.slow
def test_each_machine_says_where_it_goes_on_and_that_it_is_another(moved):
    _, (first, second), (said_second, said_third) = moved
    assert f"step {first} was copied from" in said_second
    assert "(devices 1; here devices 8): the run resumes, but not bit for bit" in said_second
    assert f"resuming from step {second}" in said_third
    assert "(devices 8; here devices 1): the run resumes, but not bit for bit" in said_third
    for said in (said_second, said_third):
        assert said.count("warning") == 1
