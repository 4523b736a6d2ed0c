"""What a training task provides to the loop: batches, parameters, loss, measurements and reports."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import jax
import numpy as np

from slm_jax.model import GPTConfig, Params
from slm_jax.tokenizer import Tokenizer
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.step import Batch, LossFn

if TYPE_CHECKING:  # Grain takes a second to import
    from slm_jax.data.windows import EvalBatches, TrainBatches
    from slm_jax.training.resume import Start

Moment = Literal["before", "after"]
REFERENCES = "references"


@dataclasses.dataclass(frozen=True)
class EvaluationSums:
    """Sums over the batches of an evaluation: weighted loss in nats, weights, and the task's own metrics."""

    loss_sum: float
    weight_sum: float
    metrics: dict[str, np.ndarray | np.floating]

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.loss_sum / self.weight_sum


Evaluate = Callable[["EvalBatches"], EvaluationSums]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a run."""

    trainable: Params  # arrays, or shapes when a run resumes; not used if there is init
    frozen: Params  # parameters of the same model that are not trained
    init: Callable[[jax.Array], Params] | None = None  # makes the parameters of a new model from a key
    opt_state: Any = None  # initial optimizer state for trainable, as arrays on the host; None: a new one
    # Other models by name, such as the policy that preference tuning starts from; never trained.
    references: Mapping[str, Params] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> Params:
        """What the loss receives as ``frozen``: the frozen tree, with reference models under ``references``."""
        return {**self.frozen, REFERENCES: dict(self.references)} if self.references else self.frozen


class ModelShapes(NamedTuple):
    """What ``slm-jax plan`` and ``bench`` need to know about a task without its data."""

    params: Params  # the whole tree
    init: Callable[[jax.Array], Params]  # makes it from a key
    loss_fn: LossFn
    row: Mapping[str, jax.ShapeDtypeStruct]  # one row of a batch; inputs are its tokens
    n_outputs: int  # columns of the logits
    notes: tuple[str, ...] = ()  # assumptions, one per line


def token_row(seq: int, packed: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a row of ``seq`` tokens that a language model is trained on."""
    dtypes = {"inputs": "int32", "targets": "int32", "weights": "float32"}
    dtypes |= {"segment_ids": "int32", "positions": "int32"} if packed else {}
    return {name: jax.ShapeDtypeStruct((seq,), dtype) for name, dtype in dtypes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """One kind of training, with its data and model loaded; a subclass is registered in :mod:`slm_jax.tasks`."""

    unit: ClassVar[Literal["token", "text"]] = "token"  # the loss is a mean over these
    unused_keys: ClassVar[tuple[str, ...]] = ()  # prefixes of unused keys, besides other tasks' sections
    samples_at_evaluation: ClassVar[bool] = False  # instead of at sample.every
    score: ClassVar[str | None] = None  # metric between 0 and 1, shown and drawn beside the validation loss
    written: ClassVar[Mapping[str, str]] = {}  # files that it writes into the run's folder, with descriptions
    measures: ClassVar[bool] = False  # whether measure() measures anything

    config: BaseRunConfig
    model_config: GPTConfig
    params: Parameters
    tokenizer: Tokenizer  # the model's tokenizer, saved with the run
    train_batches: "TrainBatches"  # element i is the global batch of step i (see make_batch)
    total_steps: int
    tokens_per_step: int  # on average
    fingerprint: str  # SHA-256 of the data; a run resumes only with the same data
    evaluation_batches: Mapping[str, "EvalBatches"] = dataclasses.field(default_factory=dict)  # by split
    longest: int | None = None  # width of the widest batch of all splits; None: all have the width of the first
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON, saved with each checkpoint
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # additional text files in the run's folder
    bytes_per_token: float | None = None  # UTF-8 bytes per token of the validation text, if known
    notes: tuple[str, ...] = ()  # notes on the data for the user, one per line

    @classmethod
    @abc.abstractmethod
    def build(cls, config: Any, start: "Start", stop: Callable[[], None] = lambda: None) -> "Task":
        """Load data, tokenizer and model; ``stop`` is called between the phases, and may raise to stop early.

        Raises:
            InputError: data, tokenizer, base and model do not fit together.
        """

    @classmethod
    @abc.abstractmethod
    def shapes(cls, config: Any, cfg: GPTConfig) -> ModelShapes:
        """Return the shapes of the model that this task trains, without reading data."""

    @classmethod
    def check_data(cls, config: Any) -> None:
        """Raise an InputError for unusable data, before a base is trained for them."""
        return

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the run: the keys that its task uses, the resolved shape of its model, and its data."""
        keys, model = self.config.identity, self.model_config
        shape = {key: getattr(model, key.removeprefix("model.")) for key in keys if key.startswith("model.")}
        used = {key: value for key, value in {**keys, **shape}.items() if not key.startswith(self.unused_keys)}
        return {**used, "data.sha256": self.fingerprint}

    @property
    @abc.abstractmethod
    def loss_fn(self) -> LossFn:
        """The loss, see :mod:`slm_jax.training.step`; a key of None means no dropout."""

    def validation_batches(self) -> "EvalBatches":
        """Return one pass over the validation split, in global batches."""
        return self.evaluation_batches["validation"]

    def make_batch(self, drawn: Batch, params: Params, step: int) -> Batch:
        """Return the batch of a step, from an element of ``train_batches`` and the model's current parameters.

        Most tasks train on ``drawn`` unchanged; a task that learns from its own samples generates them here, with the
        key for ``batches`` and the step.
        """
        return drawn

    def batch_shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the widest batch of ``rows`` rows, for which the step is compiled."""
        return {
            name: jax.ShapeDtypeStruct((rows, *(self.longest or width for width in value.shape[1:])), value.dtype)
            for name, value in self.train_batches[0].items()
        }

    def figures(self, sums: EvaluationSums) -> dict[str, float]:
        """Return the metrics that are logged beside the loss of an evaluation."""
        return {k: float(v) / sums.weight_sum for k, v in sums.metrics.items() if np.ndim(v) == 0}

    def sample(self, params: Params, key: jax.Array) -> str | None:
        """Return a text sampled during training; None: this run makes no samples."""
        return None

    def measure(self, params: Params, evaluate: Evaluate, moment: Moment, folder: Path | None) -> dict[str, Any]:
        """Measure the model before the first step, or the best checkpoint after the last.

        Returns figures by split, including ``test``, for ``summary.json``. ``params`` has all parameters of the model;
        additional files go to the run's ``folder``, which is None on hosts that do not write.
        """
        raise NotImplementedError

    def report(self, before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
        """Return lines for the user on the measurements before (None: unknown) and after training."""
        return []

    def next_commands(self) -> tuple[str, ...]:
        """Return commands to try when the run is done."""
        return ()


Purpose = Literal["params", "dropout", "sampling", "batches"]


def purpose_key(seed: int, purpose: Purpose, step: int | None = None) -> jax.Array:
    """Return the random key for a purpose and a step (the order of the data has its own generator)."""
    key = jax.random.fold_in(jax.random.key(seed), get_args(Purpose).index(purpose))
    return key if step is None else jax.random.fold_in(key, step)
