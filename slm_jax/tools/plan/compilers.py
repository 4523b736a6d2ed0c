"""XLA's own compilers for TPUs and NVIDIA GPUs, used on a machine that has neither device.

The compiler for TPUs is the package libtpu; the one for GPUs comes with JAX's CUDA plugin. Both compile for a device
from its description and report a program's memory, collectives and kernels, but not how long it runs.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from slm_jax.errors import InputError
from slm_jax.generation.decode import compile_generation
from slm_jax.model import GPTModel
from slm_jax.nn.axes import STACK
from slm_jax.nn.blocks import join_blocks, merge_params, segment_lengths, unstack_blocks
from slm_jax.nn.sharding import state_shardings
from slm_jax.nn.target import compiling_for
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.plan.cluster import GPUS_PER_HOST, Cluster
from slm_jax.tools.plan.communication import compiled_seconds
from slm_jax.tools.plan.estimate import Shapes, resolve
from slm_jax.tools.plan.hlo import Collective, find_collectives, find_kernels
from slm_jax.training.batch_size import fit_batch
from slm_jax.training.program import compile_program, device_bytes, with_shardings
from slm_jax.training.sharding import make_mesh, row_shards

# XLA's descriptions of GPUs, which its compiler asks a device for where there is one.
_DESCRIPTIONS = {"h100": "h100.txtpb", "h200": "h100.txtpb"}  # the same chip; only the memory is larger
# So that libtpu does not look for this machine's TPU, warn that there is none, or wait for another process that has it.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CUDNN = 91_000  # the version that the description names
# Without a device no kernels can be timed.
_GPU_FLAGS = "--xla_gpu_autotune_level=0"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program; bytes of one device.

    Attributes:
        name: training step, evaluation, first state, or generation: the next token of one text.
        n_bytes: what it takes in total; None: it does not fit, or cannot be compiled.
        problem: the compiler's own line, if it failed.
        collectives: the largest first.
        kernels: how often it calls each.
        wire_seconds: the least time of its collectives.
    """

    name: str
    n_bytes: int | None
    problem: str | None = None
    collectives: tuple[Collective, ...] = ()
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    wire_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON; of the groups of a collective only their number."""
        rows = [{**vars(one), "groups": len(one.groups), "sent": one.sent} for one in self.collectives]
        return {**vars(self), "sent": self.sent, "collectives": rows}

    @property
    def sent(self) -> float:
        """The bytes that each device sends."""
        return sum(one.sent for one in self.collectives)


def compile_run(config: RunConfig, cluster: Cluster, devices: Sequence[Any]) -> list[Compiled]:
    """Compile the programs of a run as training does, for devices of :func:`cluster_devices`."""
    config, shapes, target = resolve(config, cluster)
    with compiling_for(*target), _without_a_device(cluster):
        mesh = make_mesh(config.mesh, devices)
        config, _ = fit_batch(config, row_shards(mesh))
        program = compile_program(config, shapes, mesh, needs_init=True)
        wanted: dict[str, Callable[[], Any]] = dict(
            zip(("training step", "evaluation"), (one.result for one in program.compiling), strict=True)
        )
        if program.init is not None:
            wanted["first state"] = program.init.result
        if shapes.generates:
            wanted["generation"] = functools.partial(_compile_generation, shapes, mesh)
        return [_result(name, compiled, cluster, mesh) for name, compiled in wanted.items()]


def _compile_generation(shapes: Shapes, mesh: Mesh) -> Any:
    """Compile the next token of a text that fills the context, from parameters that lie as in training."""
    params = join_blocks(merge_params(shapes.params.frozen, shapes.params.trainable))
    shardings = state_shardings(mesh, params)
    unstacked = jax.eval_shape(unstack_blocks, params)
    shardings |= dict.fromkeys(segment_lengths(unstacked), shardings.pop(STACK))
    with jax.set_mesh(mesh):
        return compile_generation(GPTModel(shapes.cfg), with_shardings(unstacked, shardings))


def _result(name: str, get: Callable[[], Any], cluster: Cluster, mesh: Mesh) -> Compiled:
    try:
        compiled = get()
        text = compiled.as_text()  # which a compiler newer than this JAX may not be able to give
    except jax.errors.JaxRuntimeError as error:
        return Compiled(name, None, problem=_first_line(str(error)))
    collectives = tuple(find_collectives(text))
    seconds = compiled_seconds(cluster.device, collectives, mesh) if cluster.device else 0.0
    return Compiled(name, device_bytes(compiled), None, collectives, find_kernels(text), seconds)


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "unknown error")


def cluster_devices(cluster: Cluster) -> list[Any]:
    """Return the devices to compile for; an InputError if their compiler is not installed or does not know them."""
    here = jax.devices("cpu")  # JAX finds its plugins, too
    if cluster.device is None:
        return here[:1]
    get = _gpus if cluster.is_gpu else _tpus
    try:
        devices = get(cluster)
    except InputError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        problem = f"the compiler does not know {cluster.name}: {_first_line(str(error))}"
        raise InputError(problem) from None
    if len(devices) != cluster.n_devices:
        raise InputError(f"{cluster.name} has {cluster.n_devices} devices; the compiler counts {len(devices)}")
    return devices


def _tpus(cluster: Cluster) -> list[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError("compiling for a TPU needs its compiler: pip install libtpu; or leave out --compile")
    if not cluster.topology:
        raise InputError(f"device is {cluster.name}; to compile, expected a slice, such as {cluster.name}-8")
    assert cluster.device is not None
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    topology = "x".join(map(str, cluster.topology))
    options: dict[str, Any] = {"num_slices": cluster.n_slices} if cluster.n_slices > 1 else {}
    if cluster.device.name == "v4":  # as Google Cloud sets them up: both cores of a chip are one device
        options["chip_config_name"] = "megacore"
    if cluster.topology == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{cluster.device.name}:{topology}"
    return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)


def _gpus(cluster: Cluster) -> list[Any]:
    from jax.experimental import topologies

    assert cluster.device is not None
    if not any(_has_plugin(name) for name in ("xla_cuda13", "xla_cuda12")):
        raise InputError(
            "compiling for a GPU needs JAX's CUDA plugin: pip install 'jax[cuda13]'; or leave out --compile"
        )
    file = _DESCRIPTIONS.get(cluster.device.name)
    if file is None:
        raise InputError(f"device is {cluster.name}; to compile, expected one of {', '.join(_DESCRIPTIONS)}")
    inside = min(cluster.n_devices, GPUS_PER_HOST)
    topology = f"1x{cluster.n_devices // inside}x{inside}"  # slices, hosts, GPUs of a host
    description = (Path(__file__).parent / file).read_text()
    found = topologies.get_topology_desc(topology, platform="cuda", target_config=description, topology=topology)
    return list(found.devices)


def _has_plugin(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.{name}") is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def _without_a_device(cluster: Cluster) -> Iterator[None]:
    """JAX asks the GPU here for its version of cuDNN; answer for the one that is compiled for."""
    if not cluster.is_gpu:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as module

    check, module.check_cudnn_version = module.check_cudnn_version, lambda: _CUDNN
    try:
        yield
    finally:
        module.check_cudnn_version = check


def prepare_environment(cluster: Cluster) -> None:
    """Set what XLA reads once, before JAX compiles anything."""
    if cluster.is_gpu and "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_GPU_FLAGS}".strip()
    # Programs for devices elsewhere cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
