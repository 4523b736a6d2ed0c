"""Count the bytes that four processes read to restore a checkpoint that they have saved, as a multiple of its size.

    python benchmarks/restore_bytes.py

Counted are the bytes of read calls (rchar in /proc/PID/io) during the restore, with the parameters copied to each
process (data) and split over them (fsdp). Linux only.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


def work(folder: Path) -> None:
    """Save and restore in this process of the job; print the bytes that it has read."""
    import jax
    import jax.numpy as jnp

    from slm_jax.training.checkpoint import Checkpoints
    from slm_jax.training.config import MeshConfig
    from slm_jax.training.distributed import initialize_distributed
    from slm_jax.training.sharding import make_mesh, state_shardings
    from slm_jax.training.step import TrainState

    def first(key: jax.Array) -> TrainState:
        params = {"blocks": {"ff": {"fc": {"kernel": jax.random.normal(key, (4, 1024, 4096))}}}}
        return TrainState(jnp.int32(1), params, jax.tree.map(jnp.square, params), key)

    initialize_distributed()
    for name, config in {"data": MeshConfig(), "fsdp": MeshConfig(fsdp=jax.device_count())}.items():
        shardings = state_shardings(make_mesh(config), jax.eval_shape(first, jax.random.key(0)))
        state = jax.jit(first, out_shardings=shardings)(jax.random.key(0))
        with Checkpoints(folder / name) as checkpoints:
            checkpoints.save(state, {})
            checkpoints.wait()
            before = _read()
            checkpoints.restore(1, state)
            print(f"{name}: {_read() - before}", flush=True)


def _read() -> int:
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def main() -> int:
    """Measure both; exit with 0 only if at most 1.2 times the checkpoint is read."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as name:
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "4", "JAX_PLATFORMS": "cpu"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, name],
                env={**os.environ, **job, "JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for index in range(4)
        ]
        shown = re.findall(r"^(\w+): (\d+)$", "".join(process.communicate()[0] for process in processes), re.MULTILINE)
        ratios = {}
        for mesh in ("data", "fsdp"):
            size = sum(path.stat().st_size for path in (Path(name) / mesh / "1").rglob("*") if path.is_file())
            ratios[mesh] = sum(int(count) for found, count in shown if found == mesh) / size
            print(f"{mesh}=4: {ratios[mesh]:.2f} times the checkpoint of {size / 1e6:.0f} MB")
    return 0 if max(ratios.values()) <= 1.2 else 1


if __name__ == "__main__":
    raise SystemExit(work(Path(sys.argv[1])) if len(sys.argv) > 1 else main())
