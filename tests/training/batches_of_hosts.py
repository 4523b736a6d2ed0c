"""Prints, for meshes that lay hosts out in different ways, this process's rows of a batch, and the batch as a whole."""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from slm_jax.nn.sharding import ROWS
from slm_jax.training.distributed import initialize_distributed
from slm_jax.training.sharding import host_rows, put_batch

LAYOUTS = {  # the order of the devices, two of each process; and how many devices share a row
    "in order": ([0, 1, 2, 3, 4, 5], 1),
    "interleaved": ([0, 2, 4, 1, 3, 5], 1),
    "rows of two hosts": ([0, 2, 1, 3, 4, 5], 2),
    "one host has all rows": ([0, 1, 2, 3, 4, 5], 3),
    "all hosts have all rows": ([0, 2, 4, 1, 3, 5], 6),
}
AXES = (*ROWS, "others")


def show(layout: str) -> dict[str, list[int]]:
    order, n_sharing = LAYOUTS[layout]
    sizes = (len(order) // n_sharing, *(1 for _ in AXES[2:]), n_sharing)
    devices = np.array(jax.devices())[order].reshape(sizes)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    whole = np.arange(12)
    rows = host_rows(mesh, len(whole))
    placed = put_batch(mesh, {"x": whole[rows]})["x"]
    return {"rows": rows.tolist(), "whole": multihost_utils.process_allgather(placed, tiled=True).tolist()}


if __name__ == "__main__":
    initialize_distributed()
    print(json.dumps({layout: show(layout) for layout in LAYOUTS}))
