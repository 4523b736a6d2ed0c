"""The step that ``slm-jax train`` compiles for a recipe, on random tokens.

Text is read only where nothing else tells how many token ids there are, and may be absent.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slm_jax.data.corpus import load_corpus
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, GPTModel, Params, init_params
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.tools.plan.shapes import find_shapes
from slm_jax.training.hardware import flops_per_token
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.program import check_fits, device_bytes
from slm_jax.training.sharding import batch_sharding, check_batch_size, compiler_options, make_mesh, state_shardings
from slm_jax.training.step import TrainState, make_train_step
from slm_jax.training.trainable import split_params

_DOCUMENTS = 4  # of a packed row
_MANY_STEPS = 10**6  # of a run that ends after epochs, which only its text could count


@dataclasses.dataclass(frozen=True)
class BenchStep:
    """A compiled training step and what it takes.

    Attributes:
        cfg: the model.
        mesh: the devices.
        compiled: ``(state, frozen, batch) -> (state, metrics)``; the state is donated.
        compile_seconds: of this step, tracing included.
        init: makes the state and the frozen parameters.
        batch: of random tokens, on the host.
        flops_per_token: of training; None where only a part is trained.
        notes: what had to be assumed, a line each.
    """

    cfg: GPTConfig
    mesh: Mesh
    compiled: Any
    compile_seconds: float
    init: Any
    batch: dict[str, np.ndarray]
    flops_per_token: float | None
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch["inputs"].size

    @property
    def planned_bytes(self) -> int:
        """What XLA says the step takes of one device; 0 where it does not say."""
        return device_bytes(self.compiled)

    @property
    def moved_bytes(self) -> int | None:
        """The bytes that a device must move at least: what the step is given is read once, its results written once."""
        memory = self.compiled.memory_analysis()
        return None if memory is None else memory.argument_size_in_bytes + memory.output_size_in_bytes


def compile_step(config: RunConfig) -> BenchStep:
    """Compile the training step of a run of pretraining for the devices here, as the training loop does.

    Raises:
        InputError: devices that cannot share the batch; a step that does not fit.
    """
    shapes = find_shapes(config)
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh.size, config.train.batch_size, config.train.accumulate)
    optimizer = make_optimizer(config.optimizer)
    schedule = make_schedule(config.optimizer, config.train.steps or _MANY_STEPS)
    train_step = make_train_step(make_loss_fn(GPTModel(shapes.cfg)), optimizer, schedule, config.train.accumulate)

    def init(key: jax.Array) -> tuple[TrainState, Params]:
        params = init_params(shapes.cfg, key)
        trainable, frozen = (params, {}) if config.base is None else split_params(params, config, key)
        return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), key), frozen

    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(init, key)
    shardings = state_shardings(mesh, abstract)
    state, frozen = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    batch = _random_batch(config, shapes.cfg, shapes.seq)
    batch_shapes = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=batch_sharding(mesh))
        for name, value in batch.items()
    }
    options = compiler_options(jax.default_backend(), mesh.size)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings[0], None), compiler_options=options)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jitted.lower(state, frozen, batch_shapes).compile()
    compile_seconds = time.perf_counter() - began
    check_fits(device_bytes(compiled))
    return BenchStep(
        cfg=shapes.cfg,
        mesh=mesh,
        compiled=compiled,
        compile_seconds=compile_seconds,
        init=functools.partial(jax.jit(init, out_shardings=shardings).lower(key).compile(), key),
        batch=batch,
        flops_per_token=None if frozen else flops_per_token(shapes.cfg),
        notes=shapes.notes,
    )


def with_known_vocabulary(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """Count the token ids where only the text tells how many there are; without the text plan's assumption stands.

    Returns:
        (config, notes): with ``model.vocab_size`` set if they were counted, and a line that says so.
    """
    section, tokenizer = config.model, config.tokenizer
    if section.vocab_size or config.base or tokenizer.path or tokenizer.kind not in ("char", "simple"):
        return config, ()
    try:
        n_ids = load_corpus(config.data, tokenizer).tokenizer.vocab_size
    except InputError:
        return config, ()
    note = f"{n_ids:,} token ids, as the text has for the tokenizer {tokenizer.kind}"
    return dataclasses.replace(config, model=dataclasses.replace(section, vocab_size=n_ids)), (note,)


def _random_batch(config: RunConfig, cfg: GPTConfig, seq: int) -> dict[str, np.ndarray]:
    """Return a batch as the recipe's are: random ids, every target counted; packed rows hold four documents each."""
    shape = (config.train.batch_size, seq)
    ids = np.random.default_rng(config.seed).integers(
        cfg.unpadded_vocab_size or cfg.vocab_size, size=(shape[0], seq + 1), dtype=np.int32
    )
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones(shape, np.float32)}
    if config.data.packing:
        length = -(-seq // _DOCUMENTS)
        columns = np.arange(seq, dtype=np.int32)
        batch["segment_ids"] = np.tile(columns // length + 1, (shape[0], 1))
        batch["positions"] = np.tile(columns % length, (shape[0], 1))
    return batch
