"""Kill, stop or leave out one of two processes that train one model, and see how the other one ends and resumes.

    python benchmarks/process_failures.py --trials 20

Each trial starts both processes, each with one CPU device, and does one thing to one of them. Measured are the seconds
until the other one has ended; it must exit with status 75 and one line on stderr that names the lost process and the
command. Then both start again, and the run must equal one that was never broken, bit for bit. In the trials named
"restarts" the processes start again by themselves (``--restarts 1``).
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from outcomes import differences, outcome

from slm_jax.data.builtin import python_docs

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
STEPS, JOIN_TIMEOUT = 100, 20
KINDS: dict[str, tuple[int, signal.Signals | None, int]] = {  # which process, what happens to it, restarts
    "SIGKILL of process 0": (0, signal.SIGKILL, 0),
    "SIGKILL of process 1": (1, signal.SIGKILL, 0),
    "SIGSTOP of process 0": (0, signal.SIGSTOP, 0),
    "SIGSTOP of process 1": (1, signal.SIGSTOP, 0),
    "process 0 is missing": (0, None, 0),
    "process 1 is missing": (1, None, 0),
    "SIGKILL of process 0, restarts": (0, signal.SIGKILL, 1),
    "SIGKILL of process 1, restarts": (1, signal.SIGKILL, 1),
    "SIGSTOP of process 1, restarts": (1, signal.SIGSTOP, 1),
}


class Job:
    """Two processes that train one run; the missing one is not started."""

    def __init__(self, folder: Path, name: str, restarts: int = 0, missing: int | None = None):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        options = {**OPTIONS, "data.source": f"text:{folder / 'text.txt'}", "runs_dir": folder, "run": name}
        options |= {"train.steps": STEPS, "train.eval_every": 50, "sample.every": 60, "restarts": restarts}
        options |= {} if missing is None else {"join_timeout": JOIN_TIMEOUT}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.run, self.errors = folder / name, [folder / f"{name}-{index}.err" for index in range(2)]
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for index in range(2):
            if index != missing:
                job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
                self.processes[index] = subprocess.Popen(
                    [sys.executable, "-m", "slm_jax", "train", *words],
                    env={**os.environ, **job, "JAX_PLATFORMS": "cpu"},
                    stdout=subprocess.DEVNULL,
                    stderr=self.errors[index].open("w"),
                )

    def wait(self, index: int, timeout: float = 900) -> float:
        """Wait for a process to end; return the seconds."""
        began = time.monotonic()
        self.processes[index].wait(timeout)
        return time.monotonic() - began

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged a step."""
        metrics = self.run / "metrics.jsonl"
        while not metrics.exists() or not any(row["step"] >= step for row in _rows(metrics)):
            if any(process.poll() is not None for process in self.processes.values()):
                raise RuntimeError("\n".join(error.read_text() for error in self.errors))
            time.sleep(0.02)

    def send(self, index: int, signum: signal.Signals) -> None:
        """Send a signal to the process that trains, which is a child where there is a supervisor."""
        pid = self.processes[index].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(children[0]) if children else pid, signum)

    def end(self) -> None:
        """Kill what still runs; the children of supervisors, also stopped ones, end with them."""
        for process in self.processes.values():
            process.kill()
            process.wait()


def _rows(metrics: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]


def finish(folder: Path, name: str) -> None:
    """Start both processes of a run, new or not, and wait for its end."""
    job = Job(folder, name)
    try:
        for index in (0, 1):
            job.wait(index)
        if any(process.returncode for process in job.processes.values()):
            raise RuntimeError("\n".join(error.read_text() for error in job.errors))
    finally:
        job.end()


def break_once(folder: Path, name: str, kind: str, step: int) -> tuple[float, list[str]]:
    """Break a run once; return the seconds until the other process has ended, and what is wrong with how it did."""
    victim, signum, restarts = KINDS[kind]
    survivor = 1 - victim
    job = Job(folder, name, restarts, missing=victim if signum is None else None)
    problems = []
    try:
        if signum is not None:
            job.wait_for_step(step)
            job.send(victim, signum)
        seconds = job.wait(survivor)
        status, lines = job.processes[survivor].returncode, job.errors[survivor].read_text().splitlines()
        if signum is not None:
            job.wait(victim)  # its parent kills it if it hangs
        if restarts:
            if status or job.processes[victim].returncode:
                problems.append(f"exit status {status}, {job.processes[victim].returncode}: {lines}")
        elif status != 75 or len(lines) != 1 or f"process {victim}" not in lines[0] or "slm-jax train" not in lines[0]:
            problems.append(f"exit status {status}, stderr {lines}")
    finally:
        job.end()
    return seconds, problems


def main() -> int:
    """Run the trials; exit with 0 only if all ended in time, with the line, and equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kinds", default="", help="only kinds with this text in their name")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n".join(python_docs())[:60_000], encoding="utf-8")
        finish(folder, "unbroken")
        expected = outcome(folder / "unbroken")
        good = 0
        kinds = [kind for kind in KINDS if options.kinds in kind]
        for i, kind in enumerate(itertools.islice(itertools.cycle(kinds), options.trials)):
            step = moments.randrange(20, STEPS - 40)
            seconds, problems = break_once(folder, f"broken-{i}", kind, step)
            if not KINDS[kind][2]:
                finish(folder, f"broken-{i}")
            problems += differences(expected, outcome(folder / f"broken-{i}"))[:5]
            good += not problems
            when = "" if KINDS[kind][1] is None else f" after step {step}"
            verdict = f"WRONG: {problems}" if problems else "equal"
            print(f"{kind}{when}: the other one ended in {seconds:.1f} s; resumed: {verdict}", flush=True)
    print(f"{good}/{options.trials} ended with the line and equal the unbroken run of {STEPS} steps")
    return 0 if good == options.trials else 1


if __name__ == "__main__":
    raise SystemExit(main())
