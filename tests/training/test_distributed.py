"""What must hold of joining: under each launcher the right processes find each other, with the right devices."""

import http.server
import os
import signal
import threading
from typing import ClassVar

import jax
import pytest
from jax._src import clusters
from jax._src import distributed as jax_distributed
from refusals import refused

from slm_jax.training import distributed
from slm_jax.training.distributed import initialize_distributed, join_arguments
from slm_jax.training.process import StopRequest

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
TWO_OF_THREE = {**ADDRESS, "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.9", "JOB_COMPLETION_INDEX": "2"}
SLICES = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.9",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8080",
}
PREFIXES = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS_ID", "TPU_", "MEGASCALE", "CUDA_VISIBLE")
EIGHT = "0,1,2,3,4,5,6,7"


def slurm(nodes, per_node, process_id, **more):
    """The environment of a task that srun started on 8 GPUs a node."""
    return {
        "SLURM_JOB_ID": "4096",
        "SLURM_STEP_NODELIST": "10.0.0.[1-2]" if nodes == 2 else "10.0.0.1",
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_STEP_NUM_TASKS": str(nodes * per_node),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else str(per_node),
        "SLURM_PROCID": str(process_id),
        "SLURM_NODEID": str(process_id // per_node),
        "SLURM_LOCALID": str(process_id % per_node),
        "SLURM_GPUS_ON_NODE": "8",
        "CUDA_VISIBLE_DEVICES": EIGHT,
        **more,
    }


def open_mpi(size, rank, local_size, **more):
    names = {"SIZE": size, "RANK": rank, "LOCAL_SIZE": local_size, "LOCAL_RANK": rank % local_size}
    return {**{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}, **more}


ORTE = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1,10.1.0.1:34911"}


@pytest.fixture
def join(monkeypatch):
    """JAX's own detection, in a given environment and without a network: what it would connect, and with what."""

    class Connection:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def join(environ):
        for name in os.environ:
            if name.startswith(PREFIXES):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        state, config = jax_distributed.State(), {}
        monkeypatch.setattr(jax_distributed.config, "update", config.__setitem__)
        state.initialize(**join_arguments(os.environ))
        return (
            state.process_id,
            state.num_processes,
            state.coordinator_address,
            config.get("jax_cuda_visible_devices", "all"),
        )

    for name in ("get_distributed_runtime_service", "get_distributed_runtime_client", "create_preemption_sync_manager"):
        monkeypatch.setattr(jax_distributed._jax, name, lambda *args, **kwargs: Connection())
    return join


@pytest.mark.parametrize(
    ("environ", "process", "count", "address", "gpus"),
    [
        (TWO_OF_THREE, 2, 3, "10.0.0.1:1234", "all"),
        ({**TWO_OF_THREE, "JAX_LOCAL_DEVICE_IDS": "4,5"}, 2, 3, "10.0.0.1:1234", "4,5"),
        ({**slurm(2, 1, 1), **TWO_OF_THREE}, 2, 3, "10.0.0.1:1234", "all"),  # what the user sets is what counts
        (slurm(2, 1, 1), 1, 2, "10.0.0.1:61440", "all"),
        (slurm(1, 8, 3), 3, 8, "10.0.0.1:61440", "3"),
        (slurm(2, 8, 11), 11, 16, "10.0.0.1:61440", "3"),
        (slurm(2, 2, 3), 3, 4, "10.0.0.1:61440", "4,5,6,7"),
        (slurm(1, 8, 3, CUDA_VISIBLE_DEVICES="3"), 3, 8, "10.0.0.1:61440", "all"),  # srun --gpus-per-task 1
        (slurm(1, 2, 1, CUDA_VISIBLE_DEVICES="4,5,6,7"), 1, 2, "10.0.0.1:61440", "all"),  # srun --gpus-per-task 4
        ({**slurm(2, 1, 1), **ADDRESS}, 1, 2, "10.0.0.1:1234", "all"),
        (open_mpi(2, 1, 1, **ORTE), 1, 2, "10.0.0.1:61441", "all"),
        (open_mpi(16, 11, 8, **ORTE), 11, 16, "10.0.0.1:61441", "3"),
        (open_mpi(4, 3, 2, **ORTE, CUDA_VISIBLE_DEVICES=EIGHT), 3, 4, "10.0.0.1:61441", "4,5,6,7"),
        (open_mpi(2, 1, 1, **ADDRESS), 1, 2, "10.0.0.1:1234", "all"),  # Open MPI 5
        ({**INDEXED, **ADDRESS, "JAX_NUM_PROCESSES": "4"}, 2, 4, "10.0.0.1:1234", "all"),
        (slurm(2, 1, 1, SLURM_NTASKS="16"), 1, 2, "10.0.0.1:61440", "all"),  # a step smaller than its job
        (SLICES, 1, 2, "10.0.0.1:8476", "all"),
    ],
    ids=str,
)
def test_a_process_joins_its_job_with_the_gpus_that_are_its_own(join, environ, process, count, address, gpus):
    assert join(environ) == (process, count, address, gpus)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "2"},  # the shell of a batch job, outside srun
        {**slurm(2, 1, 0), "SLURM_STEP_NUM_TASKS": "1"},  # the shell of salloc, a step of its own
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", **INDEXED},
        {"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"},  # Colab
        {"TPU_WORKER_ID": "0", "TPU_SKIP_MDS_QUERY": "1"},  # Kaggle
        {**INDEXED, "JAX_NUM_PROCESSES": "1"},
    ],
    ids=str,
)
def test_one_process_stays_alone_and_asks_nobody(monkeypatch, environ):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    monkeypatch.setattr(distributed.urllib.request, "build_opener", lambda *_: pytest.fail("network access"))
    monkeypatch.setattr(distributed, "on_tpu_vm", lambda: "TPU_SKIP_MDS_QUERY" in environ)
    assert not initialize_distributed(environ)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (ADDRESS, "JAX_COORDINATOR_ADDRESS is set; expected JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is ''; expected HOST:PORT"),
        ({**TWO_OF_THREE, "JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "expected HOST:PORT"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "3"}, "expected JAX_PROCESS_ID, too .0 to 2"),
        ({**TWO_OF_THREE, "JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID is 'first'; expected a whole number"),
        ({**TWO_OF_THREE, "JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID is 3; expected 0 to 2"),
        (slurm(1, 3, 0), "3 tasks share the 8 GPUs of a node; expected a divisor of 8"),
        ({"JAX_NUM_PROCESSES": "0", **ADDRESS}, "JAX_NUM_PROCESSES is '0'; expected a whole number from 1 on"),
        ({**TWO_OF_THREE, "JAX_COORDINATOR_ADDRESS": "10.0.0.1:70000"}, "expected HOST:PORT"),
        ({**TWO_OF_THREE, "JAX_LOCAL_DEVICE_IDS": "0;1"}, "JAX_LOCAL_DEVICE_IDS is '0;1'; expected"),
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID is set; expected JAX_NUM_PROCESSES"),
        ({**slurm(2, 1, 1), "JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID is set; expected JAX_NUM_PROCESSES"),
        ({**slurm(2, 1, 1), "JAX_COORDINATOR_ADDRESS": "node1"}, "expected HOST:PORT"),
        (slurm(1, 8, 3, SLURM_PROCID=""), "SLURM_PROCID is ''; expected a whole number"),
        (slurm(1, 8, 3, SLURM_PROCID="8"), "SLURM_PROCID is 8; expected 0 to 7"),
        (slurm(2, 1, 1, SLURM_JOB_ID="x"), "SLURM_JOB_ID is 'x'"),
        (slurm(2, 1, 1, SLURM_NODEID="2"), "SLURM_STEP_TASKS_PER_NODE is '1.x2.', this is task 0 of node 2"),
        (slurm(2, 8, 1, SLURM_STEP_TASKS_PER_NODE="8"), "contradict"),
        (slurm(1, 8, 3, SLURM_STEP_NUM_TASKS="eight"), "SLURM_STEP_NUM_TASKS is 'eight'"),
        (open_mpi(2, 1, 1, OMPI_COMM_WORLD_SIZE="two"), "OMPI_COMM_WORLD_SIZE is 'two'"),
        (open_mpi(2, 2, 3, **ORTE), "OMPI_COMM_WORLD_RANK is 2; expected 0 to 1"),
        (open_mpi(2, 1, 1, **ORTE, OMPI_COMM_WORLD_LOCAL_RANK="1"), "LOCAL_RANK is 1; expected 0 to 0"),
        ({**SLICES, "MEGASCALE_NUM_SLICES": "x"}, "MEGASCALE_NUM_SLICES is 'x'"),
        ({**SLICES, "MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID is 2; expected 0 to 1"),
        ({**SLICES, "MEGASCALE_COORDINATOR_ADDRESS": ""}, "expected MEGASCALE_COORDINATOR_ADDRESS, too"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is ''; expected a whole number"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, "TPU_WORKER_ID is 2; expected 0 to 1"),
        (INDEXED, "an indexed Kubernetes job .* set JAX_NUM_PROCESSES"),
        (open_mpi(2, 1, 1), "mpirun -x JAX_COORDINATOR_ADDRESS"),
    ],
    ids=str,
)
def test_a_job_that_cannot_be_joined_is_refused_in_one_line(monkeypatch, environ, words):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    with refused(words):
        initialize_distributed(environ)


def test_what_jax_cannot_detect_is_one_line(monkeypatch):
    def initialize(**_):
        raise RuntimeError("Kubernetes API Error: 403\nIt appears that the service account")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with refused("cannot be found: Kubernetes API Error: 403 It appears"):
        initialize_distributed(TWO_OF_THREE)


# Cloud TPUs


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of a virtual machine on Google's cloud."""

    attributes: ClassVar[dict[str, str]] = {}

    def do_GET(self):
        text = self.attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
        self.send_response(404 if text is None or self.headers["Metadata-Flavor"] != "Google" else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def tpu_vm(monkeypatch):
    """This machine as a TPU VM; returns its attributes, to be filled."""
    pytest.importorskip("requests")  # which JAX asks with
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(distributed, "on_tpu_vm", lambda: True)
    for module in (clusters.cluster, clusters.cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(Metadata, "attributes", attributes := {"tpu-env": ""})
    yield attributes
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", ["a:0:10.0.0.1,b:1:10.0.0.2", "10.0.0.1,10.0.0.2"])
def test_a_pod_started_with_gcloud_joins_by_its_metadata(join, tpu_vm, workers):
    if ":" not in workers and jax.__version_info__ < (0, 9):
        pytest.skip("this JAX reads the older format only")
    tpu_vm |= {"agent-worker-number": "1", "worker-network-endpoints": workers}
    process, count, address, gpus = join({})
    assert (process, count, address.split(":")[0], gpus) == (1, 2, "10.0.0.1", "all")


def test_slices_of_one_host_each_join_by_their_metadata(join, tpu_vm):
    slices = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n"
    tpu_vm |= {"agent-worker-number": "0", "worker-network-endpoints": "b:0:10.0.0.2", "tpu-env": slices}
    assert join({})[:2] == (1, 2)


@pytest.mark.parametrize(
    ("environ", "process", "count"),
    [
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}, 1, 2),
        (
            {
                "TPU_WORKER_HOSTNAMES": "10.0.0.3,10.0.0.4",
                "TPU_WORKER_ID": "1",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8080",
                **INDEXED,
            },
            3,
            4,
        ),
    ],
    ids=["slice", "two slices"],
)
def test_the_pods_of_a_tpu_job_set_join(join, tpu_vm, environ, process, count):
    assert join(environ)[:2] == (process, count)
    assert join(environ)[2].startswith("10.0.0.1:")


@pytest.mark.parametrize("attributes", [{}, {"worker-network-endpoints": "a:0:10.0.0.1"}])
def test_a_tpu_vm_of_one_host_stays_alone(tpu_vm, attributes):
    tpu_vm |= attributes
    assert join_arguments(os.environ) == {}


def test_joining_does_not_take_sigterm_away(monkeypatch):
    """JAX's preemption service does; a job that the scheduler ends would then stop without saving."""

    def initialize(**_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert initialize_distributed(TWO_OF_THREE)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
