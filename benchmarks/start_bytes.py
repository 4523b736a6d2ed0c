"""Count the bytes of a token file that four processes read until they train, as a multiple of its size.

    python benchmarks/start_bytes.py

Counted are the bytes of read calls (rchar in /proc/PID/io), summed over the processes. What a start reads anyway, such
as Python's modules, is that of a start with a small token file; compiled programs are not cached. Not counted are the
windows of the first rows, which are mapped: the pages of a few tokens each, where the page cache decides how much is
read around them. Linux only.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from slm_jax.data.builtin import python_docs
from slm_jax.data.token_file import write_token_file
from slm_jax.tokenizer import BPETokenizer

OPTIONS = {
    "data.validation_fraction": 0.0002,
    "model.n_layers": 2,
    "model.emb_dim": 512,
    "model.n_heads": 8,
    "model.context_length": 16,
    "train.batch_size": 4,
    "train.steps": 100_000,
    "train.eval_every": 100_000,
    "train.log_every": 1,
    "checkpoint.every": 100_000,  # one at the end: its SHA-256 would count
    "sample.every": 0,
    "join_timeout": 300,
}


def make_tokens(path: Path, n_tokens: int) -> None:
    """Write a token file of random ids."""
    tokenizer = BPETokenizer.train(python_docs()[:20], vocab_size=512)
    rng = np.random.default_rng(0)
    with write_token_file(path, tokenizer, "random") as writer:
        for first in range(0, n_tokens, 1 << 20):
            writer.write(rng.integers(512, size=min(1 << 20, n_tokens - first)).astype(np.uint16))


def read_until_training(folder: Path, source: Path, run: str, *, count: int, fsdp: int) -> int:
    """Start ``count`` processes; return the bytes that they have read at the first logged step; end them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    options = {**OPTIONS, "data.source": f"tokens:{source}", "runs_dir": folder, "run": run, "mesh.fsdp": fsdp}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PLATFORMS": "cpu"}
    processes = []
    try:
        for index in range(count):
            env = {**os.environ, **job, "JAX_PROCESS_ID": str(index), "JAX_ENABLE_COMPILATION_CACHE": "false"}
            command = [sys.executable, "-m", "slm_jax", "train", *words]
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL))
        while _last_step(folder / run / "metrics.jsonl") < 1:
            if any(process.poll() is not None for process in processes):
                raise RuntimeError("a process has ended")
            time.sleep(0.02)
        return sum(_bytes_read(_training(process.pid)) for process in processes)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _training(pid: int) -> int:
    """Return the process that trains, which is the child of its supervisor."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def _bytes_read(pid: int) -> int:
    return int(re.findall(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[0])


def main() -> int:
    """Measure on two meshes; exit with 0 only if at most 1.5 times the file is read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    options = parser.parse_args()
    count, good = options.processes, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = folder / "small.bin", folder / "large.bin"
        make_tokens(small, 100_000)
        make_tokens(large, options.tokens)
        least = read_until_training(folder, small, "small", fsdp=1, count=count)
        for mesh, fsdp in (("data", 1), ("fsdp", count)):
            read = read_until_training(folder, large, mesh, fsdp=fsdp, count=count)
            started = (read - least) / large.stat().st_size
            print(
                f"{mesh}={count}, start: {started:.2f} times the token file of {large.stat().st_size / 1e6:.0f} MB",
                flush=True,
            )
            good &= started <= 1.5
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
