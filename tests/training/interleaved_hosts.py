"""``slm-jax``, but neighbouring devices of the mesh belong to different processes.

That is how ``jax.make_mesh`` orders the devices of TPU slices of four and more hosts.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax.cli import main
from slm_jax.commands import train
from slm_jax.training import loop


def interleave(mesh: Mesh) -> Mesh:
    devices = mesh.devices.ravel()
    of_process = [[d for d in devices if d.process_index == process] for process in range(jax.process_count())]
    interleaved = np.array(list(zip(*of_process, strict=True))).reshape(mesh.devices.shape)
    return Mesh(interleaved, mesh.axis_names, axis_types=mesh.axis_types)


if __name__ == "__main__":
    make_mesh = loop.make_mesh
    train.needs_supervisor = lambda restarts: False  # it would train in a child, which is the usual slm-jax
    loop.make_mesh = lambda *args: interleave(make_mesh(*args))
    sys.exit(main(sys.argv[1:]))
