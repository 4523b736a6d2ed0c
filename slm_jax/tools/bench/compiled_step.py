"""The training step that ``slm-jax train`` compiles for a recipe, on random tokens.

Text is read only where it decides how many token ids there are, and may be absent.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax.data.corpus import load_corpus
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, Params
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.timing import Clock, Timing
from slm_jax.tools.plan.shapes import Shapes, find_shapes
from slm_jax.training.hardware import flops_per_token
from slm_jax.training.program import compile_program, device_bytes
from slm_jax.training.sharding import check_batch_size, make_mesh, put_batch, state_shardings
from slm_jax.training.step import Batch, StepMetrics, TrainState
from slm_jax.training.task import purpose_key

_DOCUMENTS = 4  # of a packed row


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled training step.

    Attributes:
        compiled: ``(state, frozen, batch) -> (state, metrics)``; the state is donated.
        compile_seconds: tracing included.
        init: makes the state and the frozen parameters.
        batch: random tokens, on the host.
        flops_per_token: None if only a part is trained.
    """

    cfg: GPTConfig
    mesh: Mesh
    compiled: Any
    compile_seconds: float
    init: Callable[[], tuple[TrainState, Params]]
    batch: Batch
    flops_per_token: float | None
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch["inputs"].size

    @property
    def planned_bytes(self) -> int:
        """Bytes of one device that the step takes, by XLA's analysis; 0: unknown."""
        return device_bytes(self.compiled)

    @property
    def moved_bytes(self) -> int | None:
        """The fewest bytes that a device moves: it reads the step's arguments and writes its results once."""
        memory = self.compiled.memory_analysis()
        return None if memory is None else memory.argument_size_in_bytes + memory.output_size_in_bytes


def compile_step(config: RunConfig) -> CompiledStep:
    """Compile the training step of a run of pretraining for the devices here, as the training loop does."""
    shapes = find_shapes(config)
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh.size, config.train.batch_size, config.train.accumulate)
    began = time.perf_counter()
    program = compile_program(config, shapes, mesh)
    compiled = program.compiling[0].result()
    compile_seconds = time.perf_counter() - began
    program.wait()
    assert program.init is not None
    key, make_state = purpose_key(config.seed, "params"), program.init.result()
    make_frozen = jax.jit(shapes.make_frozen, out_shardings=state_shardings(mesh, shapes.params.frozen))
    return CompiledStep(
        cfg=shapes.cfg,
        mesh=mesh,
        compiled=compiled,
        compile_seconds=compile_seconds,
        init=lambda: (make_state(key), make_frozen(key)),
        batch=_random_batch(config, shapes),
        flops_per_token=None if shapes.params.frozen else flops_per_token(shapes.cfg),
        notes=shapes.notes,
    )


class StepTimer:
    """A training state, and steps of it that are timed."""

    def __init__(self, step: CompiledStep, clock: Clock = time.perf_counter):
        self._step, self._clock = step, clock
        self._state, self._frozen = step.init()
        self._batch = put_batch(step.mesh, step.batch)
        self._metrics: StepMetrics | None = None

    @property
    def loss(self) -> float:
        """The loss of the last step; NaN before the first."""
        return math.nan if self._metrics is None else float(self._metrics.loss)

    def step_and_wait(self) -> None:
        """Run a step on a batch that is on the devices already, and wait for all results."""
        self._state, self._metrics = self._step.compiled(self._state, self._frozen, self._batch)
        jax.block_until_ready((self._state, self._metrics))

    def queue(self, repeats: int) -> Timing:
        """Time steps as the training loop runs them: the next step is started before the last one's metrics are read.

        A step takes from the reading of the previous metrics to the reading of its own.
        """
        read, previous = [], None
        for _ in range(repeats + 2):
            batch = put_batch(self._step.mesh, self._step.batch)
            self._state, self._metrics = self._step.compiled(self._state, self._frozen, batch)
            if previous is not None:
                jax.device_get(previous)
                read.append(self._clock())
            previous = self._metrics
        jax.block_until_ready(self._state)
        return Timing(tuple(after - before for before, after in itertools.pairwise(read)))


def with_known_vocabulary(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """Set ``model.vocab_size``, with a note, where only the text has it; without the text plan's assumption stands."""
    section, tokenizer = config.model, config.tokenizer
    if section.vocab_size or config.base or tokenizer.path or tokenizer.kind not in ("char", "simple"):
        return config, ()
    try:
        n_ids = load_corpus(config.data, tokenizer).tokenizer.vocab_size
    except InputError:
        return config, ()
    note = f"{n_ids:,} token ids, counted in the text for the tokenizer {tokenizer.kind}"
    return dataclasses.replace(config, model=dataclasses.replace(section, vocab_size=n_ids)), (note,)


def _random_batch(config: RunConfig, shapes: Shapes) -> Batch:
    """Return a batch like the recipe's: random ids, every target counted, four documents in a packed row."""
    rows, seq, cfg = config.train.batch_size, shapes.seq, shapes.cfg
    n_ids = cfg.unpadded_vocab_size or cfg.vocab_size
    ids = np.random.default_rng(config.seed).integers(n_ids, size=(rows, seq + 1), dtype=np.int32)
    length, columns = -(-seq // _DOCUMENTS), np.arange(seq, dtype=np.int32)
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((rows, seq), np.float32),
        "segment_ids": np.tile(columns // length + 1, (rows, 1)),
        "positions": np.tile(columns % length, (rows, 1)),
    }
    return {name: batch[name] for name in shapes.row}
