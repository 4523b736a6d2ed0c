"""What must hold of a run that moves from machine to machine through its mirror: it reads as one that never moved.

Each machine is a process with its own devices and a runs_dir of its own, and is killed while it trains.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pretraining import metrics, options

from slm_jax.training.checkpoint import find_damage, read_metadata, saved_steps

ROOT = Path(__file__).parents[2]
STEPS = 80
SMALL = {
    "run": "moving", "train.steps": STEPS, "train.accumulate": 1, "train.eval_every": 40, "model.emb_dim": 16,
    "model.drop_rate": 0, "checkpoint.keep": 20, "sample.every": 0, "optimizer.warmup_steps": 10,
    "optimizer.learning_rate": 3e-3,
}  # fmt: skip
# One GPU with little memory; a TPU with eight chips; a CPU.
MACHINES = (
    ({"model.dtype": "float32", "train.accumulate": 2}, {}),
    (
        {"model.dtype": "bfloat16", "mesh.fsdp": 8},
        {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8", "NPROC": "16"},
    ),
    ({"model.dtype": "float32", "model.remat": "full"}, {}),
)


def start(text, folder, name, machine):
    """Start or resume the run on a machine; with the mirror, if it is one of several."""
    more, environment = machine
    mirror = {} if name == "unbroken" else {"checkpoint.mirror": folder / "drive"}
    args = options(text, folder / name, **SMALL, **mirror, **more)
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


def rows(folder, split):
    return [row for row in metrics(folder / "moving") if row["split"] == split]


@pytest.mark.slow
def test_a_run_that_moved_twice_reads_as_one_that_never_did(text_file, tmp_path):
    unbroken = start(text_file, tmp_path, "unbroken", ({"model.dtype": "float32"}, {}))
    drive = tmp_path / "drive" / "moving" / "checkpoints"
    (tmp_path / "drive").mkdir()
    first, _ = kill_after(start(text_file, tmp_path, "first", MACHINES[0]), drive, 20)
    second, out_second = kill_after(start(text_file, tmp_path, "second", MACHINES[1]), drive, first + 20)
    out_third = finish(start(text_file, tmp_path, "third", MACHINES[2]))
    finish(unbroken)

    assert 20 <= first < second < STEPS
    one, other = rows(tmp_path / "unbroken", "train"), rows(tmp_path / "third", "train")
    for key in ("step", "tokens"):
        assert [row[key] for row in other] == [row[key] for row in one]
    rates = ([row["learning_rate"] for row in found] for found in (other, one))
    np.testing.assert_allclose(*rates, rtol=1e-6)
    assert [row["step"] for row in rows(tmp_path / "third", "val")] == [0, 40, STEPS]
    assert rows(tmp_path / "drive", "train") == other
    # Every step has seen its own batch: from batch to batch the losses differ by far more than between machines.
    one, other = (np.array([row["loss"] for row in found]) for found in (one, other))
    np.testing.assert_allclose(other[:first], one[:first], rtol=1e-4)
    difference = np.abs(other - one)
    assert difference.max() < 0.005
    assert np.median(difference[second:]) < 0.1 * np.median(np.abs(np.diff(one)))
    for step in (first, second, STEPS):
        runs = (tmp_path / name / "moving" / "checkpoints" for name in ("drive", "unbroken"))
        mine, theirs = (read_metadata(run, step)["data"] for run in runs)
        assert mine == theirs

    # Each machine says where it resumes and that it is another.
    assert f"step {first} was copied from" in out_second
    assert "(devices 1; here devices 8): the run resumes, but not bit for bit" in out_second
    assert f"resuming from step {second}" in out_third
    assert "(devices 8; here devices 1): the run resumes, but not bit for bit" in out_third
    assert out_second.count("warning") == out_third.count("warning") == 1
