"""All that must be equal of two runs, bit for bit, and where they differ."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from slm_jax.training.checkpoint import read_metadata
from slm_jax.training.manifest import saved_steps

TIMES = ("seconds", "tokens_per_second", "mfu")


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
