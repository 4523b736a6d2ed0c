"""Train every task on meshes of eight devices, in one process and in several, and compare with one device.

    python benchmarks/mesh_losses.py

Each case is a whole ``slm-jax train`` or ``finetune``: 20 steps with dropout and two micro-batches on pretended CPU
devices. Reported are the greatest relative difference of a loss, of training or validation, from one device; whether
each step's batch had the same rows on the devices; with accumulation 2 and 4 (without dropout) the greatest difference
from accumulation 1 on the same mesh; and whether a state that 2 × 2 × 2 devices saved is restored bit for bit, and
trains as on one device from there.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from slm_jax.cli import main as slm_jax
from slm_jax.commands import finetune as finetune_command
from slm_jax.commands import train as train_command
from slm_jax.data.builtin import prose_or_code, python_docs
from slm_jax.training import loop
from slm_jax.training.checkpoint import Checkpoints
from slm_jax.training.record import RunLog

STEPS, BAR, BAR_ACCUMULATED = 20, 1e-5, 1e-6
# XLA optimises less, which compiles faster; NPROC: with fewer threads the devices' collectives can deadlock.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
OPTIONS = {
    "data.validation_fraction": 0.1, "model.drop_rate": 0.1, "train.steps": STEPS, "train.batch_size": 32,
    "train.accumulate": 2, "train.eval_every": 10, "train.eval_batch_size": 32, "train.log_every": 1,
    "checkpoint.every": 10, "sample.every": 0, "model.unroll": "false", "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 5, "optimizer.decay_steps": STEPS,
}  # fmt: skip
# A model of eight heads, with as odd a vocabulary as GPT-2's.
MODEL = {
    "tokenizer.kind": "bpe", "tokenizer.vocab_size": 389, "model.n_layers": 2, "model.emb_dim": 64,
    "model.n_heads": 8, "model.context_length": 16,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "pretraining": MODEL,
    "classification, last block": {"task": "classification", "classification.pad_to": "longest"},
    "instruction, LoRA": {
        "task": "instruction", "trainable": "lora", "lora.drop_rate": 0.1, "instruction.template": "phi3",
        "instruction.too_long": "truncate", "instruction.responses": 0,
    },
}  # fmt: skip
RESTORED = ("pretraining", "instruction, LoRA")  # the tasks whose states move to other meshes


class Case(NamedTuple):
    """Where a run is trained; eight devices in all, but for one alone."""

    name: str
    mesh: dict[str, int]
    processes: int = 1
    interleaved: bool = False  # hosts, as on TPU slices of four and more


ONE = Case("1 device", {})
SAVER = Case("data 2 × fsdp 2 × tensor 2", {"data": 2, "fsdp": 2, "tensor": 2})
MESHES = (
    Case("data 8", {}),
    Case("fsdp 8", {"fsdp": 8}),
    Case("tensor 8", {"tensor": 8}),
    Case("data 2 × fsdp 4", {"fsdp": 4}),
    Case("data 2 × tensor 4", {"tensor": 4}),
    SAVER,
    Case("replica 2 × data 2 × fsdp 2", {"replica": 2, "fsdp": 2}),
)
JOBS = (
    Case("2 processes, fsdp 8", {"fsdp": 8}, 2),
    Case("4 processes, interleaved, data 2 × fsdp 2 × tensor 2", SAVER.mesh, 4, True),
)


class Run(NamedTuple):
    """A run to be made."""

    name: str
    task: str
    case: Case
    changes: dict[str, Any] | None = None

    def words(self, folder: Path) -> list[str]:
        """Return the command."""
        command = "train" if self.task == "pretraining" else "finetune"
        options = {**OPTIONS, **TASKS[self.task], "runs_dir": folder, "run": self.name}
        options |= {f"mesh.{axis}": size for axis, size in self.case.mesh.items()} | (self.changes or {})
        if command == "finetune":
            options |= {"base": folder / run_name("pretraining", ONE)}
        options["data.source"] = f"{'text' if command == 'train' else 'jsonl'}:{folder / data_file(self.task)}"
        return [command, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def run_name(task: str, case: Case, kind: str = "") -> str:
    """Return the name of a run."""
    return "".join(letter if letter.isalnum() else "-" for letter in f"{kind}{task} on {case.name}")


def data_file(task: str) -> str:
    """Return the name of a task's file of data."""
    return {"pretraining": "text.txt"}.get(task, f"{task.partition(',')[0]}.jsonl")


def write_data(folder: Path) -> None:
    """Write a text, labelled texts and instructions."""
    (folder / data_file("pretraining")).write_text("\n".join(python_docs())[:60_000], encoding="utf-8")
    texts = prose_or_code()
    sums = [{"instruction": f"double {i}", "output": f"{2 * i}."} for i in range(200)]
    for task, rows in (("classification", texts[:: len(texts) // 200]), ("instruction", sums)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / data_file(task)).write_text("".join(lines), encoding="utf-8")


# In the processes that train


def work(folder: Path, runs: list[Run]) -> int:
    """Train runs one after another; write what was seen of each beside it."""
    for run in runs:
        with watched(run.case.interleaved) as seen:
            if status := slm_jax(run.words(folder)):
                return status
        (folder / f"{run.name}.{jax.process_index()}.json").write_text(json.dumps(seen))
    return 0


@contextlib.contextmanager
def watched(interleaved: bool) -> Iterator[dict[str, dict[str, Any]]]:
    """Note the rows of every batch on this process's devices, and the digests of saved and restored states."""
    seen: dict[str, dict[str, Any]] = {"rows": {}, "saved": {}, "restored": {}}
    make_mesh, put_batch, save, restore = loop.make_mesh, loop.put_batch, Checkpoints.save, Checkpoints.restore
    step = 0

    def placed(mesh: Mesh, batch: Any) -> Any:
        nonlocal step
        step += 1
        result = put_batch(mesh, batch)
        for name, array in result.items():
            for shard in array.addressable_shards:
                for row, content in enumerate(np.asarray(shard.data), shard.index[0].start or 0):
                    key, digest = f"{step} {name} {row}", hashlib.sha256(content.tobytes()).hexdigest()
                    assert seen["rows"].setdefault(key, digest) == digest, f"{key} differs between devices"
        return result

    def saved(self: Checkpoints, state: Any, *rest: Any) -> None:
        seen["saved"][str(int(state.step))] = state_digest(state)
        save(self, state, *rest)

    def restored(self: Checkpoints, at: int, like: Any) -> Any:
        nonlocal step
        step, state = at, restore(self, at, like)
        seen["restored"][str(step)] = state_digest(state)
        return state

    def meshed(*arguments: Any) -> Mesh:
        mesh = make_mesh(*arguments)
        by_process = [[d for d in mesh.devices.flat if d.process_index == p] for p in range(jax.process_count())]
        order = np.array(list(zip(*by_process, strict=True))).reshape(mesh.devices.shape)
        return Mesh(order, mesh.axis_names, axis_types=mesh.axis_types) if interleaved else mesh

    with (
        mock.patch.multiple(loop, make_mesh=meshed, put_batch=placed),
        mock.patch.multiple(Checkpoints, save=saved, restore=restored),
        mock.patch.object(train_command, "needs_supervisor", return_value=False),  # which trains in a child
        mock.patch.object(finetune_command, "needs_supervisor", return_value=False),
        mock.patch.object(RunLog, "draw"),  # no pictures, which would take a second each
    ):
        yield seen


def state_digest(state: Any) -> str:
    """Return a digest of all numbers of a training state, wherever they are."""
    parts = (state.step, state.trainable, state.opt_state, jax.random.key_data(state.key))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parts):
        digest.update(np.asarray(multihost_utils.process_allgather(leaf, tiled=True)).tobytes())
    return digest.hexdigest()


# In the process that compares


def train(folder: Path, runs: list[Run]) -> None:
    """Train runs, all on as many devices and processes, in new processes."""
    case, devices = runs[0].case, 1 if runs[0].case == ONE else 8
    (folder / "work.json").write_text(json.dumps(runs))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    here = devices // case.processes
    flags = f"{os.environ.get('XLA_FLAGS', FLAGS)} --xla_force_host_platform_device_count={here}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": str(4 * here)}
    env["JAX_NUM_PROCESSES"], env["JAX_COORDINATOR_ADDRESS"] = str(case.processes), address
    logs = [folder / f"process-{index}.log" for index in range(case.processes)]
    processes = []
    for index, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, __file__, "--work", folder]
            one = {**env, "JAX_PROCESS_ID": str(index)}
            processes.append(subprocess.Popen(command, env=one, stdout=out, stderr=out))
    try:
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise RuntimeError("\n".join(log.read_text()[-3000:] for log in logs))
    finally:
        for process in processes:
            process.kill()


def losses(folder: Path, name: str) -> dict[tuple[str, int], float]:
    """Return the losses of training and validation that a run logged."""
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {(row["split"], row["step"]): row["loss"] for row in rows if "loss" in row and row["split"] != "test"}


def difference(folder: Path, name: str, other: str) -> float:
    """Return the greatest relative difference between losses of two runs."""
    found, expected = losses(folder, name), losses(folder, other)
    assert found.keys() == expected.keys(), (name, other)
    assert len(expected) > STEPS
    return max(abs(found[key] - expected[key]) / abs(expected[key]) for key in expected)


def seen_in(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return what all processes of a run saw together."""
    whole: dict[str, dict[str, Any]] = {"rows": {}, "saved": {}, "restored": {}}
    for file in sorted(folder.glob(f"{name}.*.json")):
        for kind, values in json.loads(file.read_text()).items():
            for key, value in values.items():
                assert whole[kind].setdefault(key, value) == value, f"{name}: {key} differs between processes"
    assert whole["rows"], name
    return whole


def make_runs(folder: Path) -> None:
    """Train all runs."""
    accumulated = {n: {"model.drop_rate": 0, "train.accumulate": n} for n in (1, 2, 4)}
    train(folder, [Run(run_name(task, ONE), task, ONE) for task in TASKS])
    eight = [Run(run_name(task, case), task, case) for case in MESHES for task in TASKS]
    for case in MESHES:
        for n, changes in accumulated.items():
            eight.append(Run(run_name("pretraining", case, f"{n} "), "pretraining", case, changes))
    halves = [Run(run_name(task, SAVER, "half of "), task, SAVER, {"train.steps": STEPS // 2}) for task in RESTORED]
    train(folder, [*eight, *halves])
    moved = [case for case in (*MESHES, *JOBS) if case != SAVER]
    for half in halves:
        for case in moved:
            shutil.copytree(folder / half.name, folder / run_name(half.task, case, "resumed "))

    def resumed(case: Case) -> list[Run]:
        return [Run(run_name(task, case, "resumed "), task, case) for task in RESTORED]

    train(folder, [run for case in MESHES if case != SAVER for run in resumed(case)])
    for case in JOBS:
        train(folder, [*(Run(run_name(task, case), task, case) for task in TASKS), *resumed(case)])


def report(folder: Path) -> bool:
    """Print the table; return whether all is as it must be."""
    good = True
    print(f"| eight devices as | {' | '.join(TASKS)} | batches | accumulate 2, 4 | restored |")
    print("|---" * (len(TASKS) + 4) + "|")
    for case in (*MESHES, *JOBS):
        different = [difference(folder, run_name(task, case), run_name(task, ONE)) for task in TASKS]
        rows = [[seen_in(folder, run_name(task, each))["rows"] for task in TASKS] for each in (case, ONE)]
        same = rows[0] == rows[1]
        cells = [*(f"{number:.1e}" for number in different), "equal" if same else "DIFFERENT"]
        good &= same and max(different) <= BAR
        if case in MESHES:
            names = [run_name("pretraining", case, f"{n} ") for n in (1, 2, 4)]
            accumulated = max(difference(folder, name, names[0]) for name in names[1:])
            good &= accumulated <= BAR_ACCUMULATED
            cells.append(f"{accumulated:.1e}")
        else:
            cells.append("")
        if case != SAVER:
            half = str(STEPS // 2)
            saved = [seen_in(folder, run_name(task, SAVER, "half of "))["saved"][half] for task in RESTORED]
            names = [run_name(task, case, "resumed ") for task in RESTORED]
            bitwise = saved == [seen_in(folder, name)["restored"][half] for name in names]
            after = max(difference(folder, name, run_name(t, ONE)) for name, t in zip(names, RESTORED, strict=True))
            good &= bitwise and after <= BAR
            cells.append(f"{'bitwise' if bitwise else 'DIFFERENT'}, {after:.1e}")
        else:
            cells.append("(saved)")
        print(f"| {case.name} | {' | '.join(cells)} |")
    return good


def main() -> int:
    """Exit with 0 only if losses, batches and restored states are as on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        runs = json.loads((options.work / "work.json").read_text())
        return work(options.work, [Run(name, task, Case(*case), changes) for name, task, case, changes in runs])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        make_runs(folder)
        return 0 if report(folder) else 1


if __name__ == "__main__":
    sys.exit(main())
