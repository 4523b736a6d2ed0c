"""How the processes of a job find each other: each launcher describes the job in its own way, and JAX connects them.

One function per launcher, tried in the order of ``LAUNCHERS``:

==================== ================================================ ==================================================
started by           recognized by                                    local devices of a process
==================== ================================================ ==================================================
anything             ``JAX_NUM_PROCESSES`` and its two companions     all, or ``JAX_LOCAL_DEVICE_IDS``
Open MPI (mpirun)    ``OMPI_COMM_WORLD_SIZE``                         as under Slurm
Slurm (srun)         ``SLURM_STEP_NODELIST``                          alone on its node: all GPUs; else its share
GKE, TPU slices      ``TPU_WORKER_HOSTNAMES``, ``MEGASCALE_*``        the TPU chips of its host
Cloud TPU VM         the metadata server, asked only on a TPU VM      the TPU chips of its host
Kubernetes, indexed  ``JOB_COMPLETION_INDEX``                         all GPUs of its pod
==================== ================================================ ==================================================
"""

import importlib.util
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import jax

from slm_jax.errors import InputError

Environ = Mapping[str, str]
_PORT = 8476  # JAX's port on TPUs
Arguments = dict[str, Any]  # for jax.distributed.initialize, which detects the rest; empty: a single process


def initialize_distributed(environ: Environ = os.environ, timeout: int = 120) -> bool:
    """Join the other processes of the job that the environment describes; return whether there are any.

    Waits ``timeout`` seconds for them.

    Raises:
        InputError: the description is incomplete or wrong.
        JaxRuntimeError: a process is missing.
    """
    if jax.distributed.is_initialized():  # by an earlier run of this process
        return True
    if arguments := join_arguments(environ):
        _join(arguments, timeout)
    return bool(arguments)


def join_arguments(environ: Environ) -> Arguments:
    """Return the arguments for joining the job that the environment describes; empty for a single process.

    InputError: the description is incomplete or wrong.
    """
    found = (launcher(environ) for launcher in LAUNCHERS)
    arguments = next((arguments for arguments in found if arguments is not None), None)
    if arguments is None and "JAX_COORDINATOR_ADDRESS" in environ:
        raise InputError("JAX_COORDINATOR_ADDRESS is set; expected JAX_NUM_PROCESSES and JAX_PROCESS_ID, too")
    devices = environ.get("JAX_LOCAL_DEVICE_IDS", "")
    if arguments and not re.fullmatch(r"(\d+(,\d+)*)?", devices):
        raise InputError(f"JAX_LOCAL_DEVICE_IDS is {devices!r}; expected numbers of devices, such as 0,1")
    return arguments or {}


def _join(arguments: Arguments, timeout: int) -> None:
    """Join, then restore the SIGTERM handler, which JAX replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout)
    except jax.errors.JaxRuntimeError:
        raise
    except (RuntimeError, ValueError, LookupError) as error:  # such as a bad answer of a Kubernetes cluster
        raise InputError(f"the other processes of the job cannot be found: {' '.join(str(error).split())}") from error
    if handler is not None:  # set from Python
        signal.signal(signal.SIGTERM, handler)


# Launchers: each returns None if it did not start this process


def _explicit(environ: Environ) -> Arguments | None:
    if "JAX_NUM_PROCESSES" not in environ:
        if "JAX_PROCESS_ID" in environ:
            raise InputError("JAX_PROCESS_ID is set; expected JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS, too")
        return None
    count = _whole_number(environ, "JAX_NUM_PROCESSES", least=1)
    if count == 1:
        return {}
    address = _address(environ)
    index = "JOB_COMPLETION_INDEX" if "JAX_PROCESS_ID" not in environ else "JAX_PROCESS_ID"  # the former in Kubernetes
    if index not in environ:
        raise InputError(f"JAX_NUM_PROCESSES is {count}; expected JAX_PROCESS_ID, too (0 to {count - 1})")
    return {"coordinator_address": address, **_given(count, _index(environ, index, "JAX_NUM_PROCESSES"))}


def _open_mpi(environ: Environ) -> Arguments | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ or _whole_number(environ, "OMPI_COMM_WORLD_SIZE") == 1:
        return None
    tasks = _whole_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    task = _index(environ, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    devices = {"local_device_ids": _local_devices(environ, tasks, task)}
    process_id = _index(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if "JAX_COORDINATOR_ADDRESS" in environ:
        count = _whole_number(environ, "OMPI_COMM_WORLD_SIZE")
        return {"coordinator_address": _address(environ), **_given(count, process_id), **devices}
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return {"cluster_detection_method": "ompi", **devices}
    if importlib.util.find_spec("mpi4py") is None:
        remedy = "install mpi4py, or pass mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT, the host of process 0"
        raise InputError(f"Open MPI 5 does not tell the processes where process 0 runs; {remedy}")
    return {"cluster_detection_method": "mpi4py", **devices}


def _slurm(environ: Environ) -> Arguments | None:
    # Only inside srun: the shell of sbatch or salloc is a single process, even if the job later starts several.
    total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if not {"SLURM_STEP_NODELIST", total} <= environ.keys() or (count := _whole_number(environ, total)) == 1:
        return None
    task, tasks = _whole_number(environ, "SLURM_LOCALID"), None
    if per_node := environ.get("SLURM_STEP_TASKS_PER_NODE"):  # such as 8(x2),4
        repeated = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
        nodes = [int(n) for n, times in repeated for _ in range(int(times or 1))]
        node = _whole_number(environ, "SLURM_NODEID")
        if sum(nodes) != count or node >= len(nodes) or task >= nodes[node]:
            task_of = f"task {task} of node {node}, and {total} {count}"
            raise InputError(
                f"SLURM_STEP_TASKS_PER_NODE is {per_node!r}, this is {task_of}; these contradict each other"
            )
        tasks = nodes[node]
    n_gpus = _whole_number(environ, "SLURM_GPUS_ON_NODE") if "SLURM_GPUS_ON_NODE" in environ else None
    process_id = _index(environ, "SLURM_PROCID", total)
    _whole_number(environ, "SLURM_JOB_ID")  # from which JAX derives the port of process 0
    found = {"num_processes": count, "process_id": process_id, "cluster_detection_method": "slurm"}
    if "JAX_COORDINATOR_ADDRESS" in environ:
        found["coordinator_address"] = _address(environ)
    return {**found, "local_device_ids": _local_devices(environ, tasks, task, n_gpus)}


def _gke_tpu(environ: Environ) -> Arguments | None:
    hosts, n_slices = environ.get("TPU_WORKER_HOSTNAMES"), _megascale_slices(environ)
    if n_slices > 1 and (hosts is not None or "KUBERNETES_SERVICE_HOST" in environ):
        slice_id = _index(environ, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES")
        if not (host := environ.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0]):
            raise InputError(f"MEGASCALE_NUM_SLICES is {n_slices}; expected MEGASCALE_COORDINATOR_ADDRESS, too")
        if hosts is None:  # one host per slice, which JAX does not detect
            return {"coordinator_address": f"{host}:{_PORT}", **_given(n_slices, slice_id)}
    if hosts is None:
        return None
    if (n_hosts := len(hosts.split(","))) > 1 and _whole_number(environ, "TPU_WORKER_ID") >= n_hosts:
        raise InputError(
            f"TPU_WORKER_ID is {environ['TPU_WORKER_ID']}; expected 0 to {n_hosts - 1} (TPU_WORKER_HOSTNAMES)"
        )
    return {"cluster_detection_method": "gketpu"} if n_hosts > 1 or n_slices > 1 else {}


def _tpu_vm(environ: Environ) -> Arguments | None:
    if not on_tpu_vm() or "TPU_SKIP_MDS_QUERY" in environ:  # Kaggle sets the latter
        return None
    several = "," in _metadata(environ, "worker-network-endpoints") or _megascale_slices(environ, ask=True) > 1
    return {"cluster_detection_method": "gcetpu"} if several else {}


def _kubernetes(environ: Environ) -> Arguments | None:
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return None
    if importlib.util.find_spec("kubernetes") is None:
        remedy = "set JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS (a pod that trains alone: JAX_NUM_PROCESSES=1)"
        raise InputError(f"an indexed Kubernetes job does not tell its pods how many they are; {remedy}")
    return {"cluster_detection_method": None}  # JAX asks the cluster; this method has no name


LAUNCHERS: tuple[Callable[[Environ], Arguments | None], ...] = (
    _explicit,
    _open_mpi,
    _slurm,
    _gke_tpu,
    _tpu_vm,
    _kubernetes,
)


# What they share


def _given(count: int, process_id: int) -> Arguments:
    return {"num_processes": count, "process_id": process_id, "cluster_detection_method": "deactivate"}


def _address(environ: Environ) -> str:
    address = environ.get("JAX_COORDINATOR_ADDRESS", "")
    port = re.search(r".:(\d{1,5})$", address)
    if port is None or not 0 < int(port[1]) < 2**16:
        raise InputError(f"JAX_COORDINATOR_ADDRESS is {address!r}; expected HOST:PORT of process 0")
    return address


def _local_devices(environ: Environ, tasks: int | None, task: int, n_gpus: int | None = None) -> list[int] | None:
    """Return the GPUs of a process in the form that ``jax.distributed.initialize`` takes; [] means all visible ones.

    ``tasks``: number of processes on this host; ``task``: index of this one; ``n_gpus``: GPUs of the job on this host;
    None: unknown. If None is returned, JAX gives each task one GPU.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    n_visible = n_gpus if visible is None else len(visible.split(","))
    if "JAX_LOCAL_DEVICE_IDS" in environ or tasks is None:
        return None
    if tasks == 1:
        return []
    if n_visible is None:
        return None
    if n_visible < (n_gpus or tasks):  # the launcher shows each task only its own GPUs
        return []
    share, left = divmod(n_visible, tasks)
    if left:
        raise InputError(f"{tasks} tasks share the {n_visible} GPUs of a node; expected a divisor of {n_visible}")
    return list(range(task * share, (task + 1) * share))


def on_tpu_vm() -> bool:
    """Return whether JAX found TPU chips and libtpu, in which case it has set its platforms."""
    return "tpu" in (getattr(jax.config, "jax_platforms", None) or "")  # not in JAX's stubs


def _megascale_slices(environ: Environ, ask: bool = False) -> int:
    """Return the number of slices; with ``ask``, ask the metadata server if the environment does not say."""
    if environ.get("MEGASCALE_NUM_SLICES"):
        return _whole_number(environ, "MEGASCALE_NUM_SLICES")
    found = re.search(r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata(environ, "tpu-env") if ask else "", re.M)
    return int(found[1]) if found else 1


def _metadata(environ: Environ, key: str) -> str:
    """Return an attribute of this virtual machine from its metadata server; empty if there is none."""
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for pause in (0.5, 0.5, 0):
        try:
            with direct.open(request, timeout=5) as response:
                return str(response.read(), "utf-8")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                break
        except OSError:  # no such server, or no answer
            pass
        time.sleep(pause)
    return ""


def _index(environ: Environ, name: str, count: str) -> int:
    """Return a number from the environment; InputError: it is not below the number in ``count``."""
    number, n = _whole_number(environ, name), _whole_number(environ, count)
    if number >= n:
        raise InputError(f"{name} is {number}; expected 0 to {n - 1} ({count} is {n})")
    return number


def _whole_number(environ: Environ, name: str, least: int = 0) -> int:
    text = environ.get(name, "")
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise InputError(f"{name} is {text!r}; expected a whole number" + (f" from {least} on" if least else ""))
    return int(text)
