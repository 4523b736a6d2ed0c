"""The compiled programs of a run: the first state, the training step and the evaluation step.

The training loop and ``slm-jax bench`` both use it, so that ``bench`` measures what is trained.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slm_jax.errors import InputError
from slm_jax.model import Params
from slm_jax.nn.sharding import state_shardings
from slm_jax.nn.target import target
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.hardware import device_memory, run_dtype
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.progress import format_bytes
from slm_jax.training.sharding import (
    batch_sharding,
    compiler_options,
    host_rows,
    put_batch,
    put_params,
    row_shards,
)
from slm_jax.training.step import Batch, LossFn, TrainState, make_eval_step, make_train_step
from slm_jax.training.task import EvaluationSums, Parameters, purpose_key

if TYPE_CHECKING:  # Grain takes a second to import
    from slm_jax.data.windows import EvalBatches

SAVE_MEMORY = (
    "raise --train.accumulate, lower --train.batch_size, --train.eval_batch_size or the length of rows "
    "(--model.context_length, in fine-tuning max_length), set --model.remat full, or with several devices "
    "--mesh.fsdp to their number"
)


@runtime_checkable
class Compilable(Protocol):
    """The part of a task that is needed to compile its programs; parameters may be arrays or shapes."""

    @property
    def params(self) -> Parameters:
        """The parameters."""

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""

    @property
    def loss_fn(self) -> LossFn:
        """The loss, see :mod:`slm_jax.training.step`."""

    def batch_shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the widest batch of ``rows`` rows."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled steps of a run."""

    mesh: Mesh
    state: TrainState  # shapes of the training state, with shardings
    frozen: Params  # the same for the parameters that are not trained, including references
    train_step: "CompiledByShape"  # (state, frozen, batch) -> (state, metrics); donates the state
    eval_step: "CompiledByShape"  # (trainable, frozen, batch) -> sums, without dropout
    eval_rows: int  # rows of an evaluation batch, a multiple of the number of shards
    init: Future[Any] | None  # key -> state of a new model; None: the parameters come from elsewhere
    compiling: tuple[Future[Any], Future[Any]]  # both steps for the widest batches
    stop: Callable[[], None]  # called before each evaluation batch; may raise to stop early

    def wait(self) -> int:
        """Wait for both steps; return the bytes that the larger one needs on a device (0: unknown); refuse too many."""
        needed, there = max(device_bytes(step.result()) for step in self.compiling), device_memory()
        if there is not None and needed > there:
            problem = f"a training step needs {format_bytes(needed)} on each device, which has {format_bytes(there)}"
            raise InputError(f"{problem}; {SAVE_MEMORY}")
        return needed

    def evaluate(self, trainable: Params, frozen: Params, batches: "EvalBatches") -> EvaluationSums:
        """Evaluate batches, for which each process makes its own rows, and return the sums."""
        sums = []
        for batch in batches.of_rows(host_rows(self.mesh, self.eval_rows)):
            self.stop()
            sums.append(self.eval_step(trainable, frozen, put_batch(self.mesh, batch)))
        each = jax.tree.map(lambda value: np.asarray(value, np.float64), jax.device_get(sums))
        loss_sum, weight_sum, metrics = jax.tree.map(lambda *values: np.sum(values, axis=0), *each)
        return EvaluationSums(float(loss_sum), float(weight_sum), metrics)


def abstract_state(config: BaseRunConfig, task: Compilable, mesh: Mesh) -> TrainState:
    """Return the shapes of a run's training state, with their shardings; nothing is compiled."""
    # Jitted, and with the same mesh set as for compiling, so that the initialisation is traced only once.
    init = jax.jit(task.params.init) if task.params.init else (lambda _: task.params.trainable)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda key: _state(config, init(key)), jax.random.key(0))
    return with_shardings(shapes, state_shardings(mesh, shapes))


def compile_program(
    config: BaseRunConfig,
    task: Compilable,
    mesh: Mesh,
    *,
    needs_init: bool = True,
    stop: Callable[[], None] = lambda: None,
) -> Program:
    """Start compiling the programs of a run in the background, for the exact shapes of its widest batches.

    ``needs_init``: whether to compile the initialisation, which a resume does not need. ``stop``: see :class:`Program`.
    """
    state = abstract_state(config, task, mesh)
    frozen = with_shardings(task.params.passed, state_shardings(mesh, task.params.passed))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(
        task.loss_fn,
        make_optimizer(config.optimizer),
        make_schedule(config.optimizer, task.total_steps),
        config.train.accumulate,
        run_dtype(config),
    )
    options = compiler_options(target().platform, mesh.size)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    train_step = CompiledByShape(jitted, state, frozen)
    eval_step = CompiledByShape(jax.jit(make_eval_step(task.loss_fn)), state.trainable, frozen)
    rows, shards = config.train.batch_size, row_shards(mesh)
    eval_rows = math.ceil((config.train.eval_batch_size or rows) / shards) * shards
    with jax.set_mesh(mesh):  # for kernels that the compiler cannot split over devices
        batches = [task.batch_shapes(rows), task.batch_shapes(eval_rows)]
        widest, widest_eval = (with_shardings(b, dict.fromkeys(b, batch_sharding(mesh))) for b in batches)
        compiling = (train_step.begin(widest), eval_step.begin(widest_eval))
        new_state = None
        if task.params.init is not None and needs_init:
            init = jax.jit(task.params.init)
            jitted_init = jax.jit(lambda key: _state(config, init(key)), out_shardings=shardings)
            # A shape, because the key is on a local device, and the mesh may have devices that are not here.
            key = jax.eval_shape(lambda: purpose_key(config.seed, "params"))
            new_state = compile_in_background(jitted_init.lower(key))
    return Program(mesh, state, frozen, train_step, eval_step, eval_rows, new_state, compiling, stop)


def first_state(config: BaseRunConfig, params: Parameters, program: Program) -> TrainState:
    """Return the state before the first step: of a new model, or with the given parameters."""
    if program.init is not None:
        return program.init.result()(purpose_key(config.seed, "params"))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    make = jax.jit(lambda trainable: _state(config, trainable), out_shardings=shardings, donate_argnums=0)
    state = make(put_params(program.mesh, params.trainable))
    return state if params.opt_state is None else state.replace(opt_state=put_params(program.mesh, params.opt_state))


def _state(config: BaseRunConfig, trainable: Params) -> TrainState:
    opt_state = make_optimizer(config.optimizer).init(trainable)
    return TrainState(jnp.int32(0), trainable, opt_state, purpose_key(config.seed, "dropout"))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Return a tree of shapes, each with its sharding."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def compile_in_background(lowered: Any) -> Future[Any]:
    """Compile a program in a thread, as XLA does not hold Python's lock.

    Programs for a GPU are compiled one after another, since XLA picks kernels by timing them.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lowered.compile)
    pool.shutdown(wait=jax.default_backend() == "gpu")
    return future


class CompiledByShape:
    """A jitted step that is compiled ahead of time, once per shape of its last argument, the batch.

    ``arguments``: the other arguments, as arrays or shapes with shardings.
    """

    def __init__(self, step: Any, *arguments: Any):
        self._step, self._arguments = step, arguments
        self._compiled: dict[tuple[Any, ...], Future[Any]] = {}

    def begin(self, batch: Batch) -> Future[Any]:
        """Start compiling the step for a batch's shapes (arrays or shapes with shardings)."""
        shapes = tuple(sorted((name, value.shape) for name, value in batch.items()))
        if shapes not in self._compiled:
            self._compiled[shapes] = compile_in_background(self._step.lower(*self._arguments, batch))
        return self._compiled[shapes]

    def __call__(self, *arguments: Any) -> Any:
        """Run the step."""
        return self.begin(arguments[-1]).result()(*arguments)


@contextlib.contextmanager
def out_of_memory_as_input_error(remedy: str = SAVE_MEMORY) -> Iterator[None]:
    """Turn an out-of-memory error of the device or the machine into one line that says what to change."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        where = "" if isinstance(error, MemoryError) else "the device is "
        raise InputError(f"{where}out of memory; {remedy}") from None


def device_bytes(compiled: Any) -> int:
    """Return the bytes that a compiled step needs on one device, according to XLA; 0: unknown."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    parts = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return parts - memory.alias_size_in_bytes
