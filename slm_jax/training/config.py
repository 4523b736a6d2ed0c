"""Configuration of training: one frozen dataclass for each section, and the keys that every run has.

The defaults are the ``tiny`` recipe.
"""

import dataclasses
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from slm_jax.config import (
    AboveZero,
    Execution,
    NotNegative,
    Positive,
    Rate,
    Seed,
    check,
    execution_keys,
    flatten,
    to_dict,
)
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.errors import InputError
from slm_jax.files import is_url, user_path
from slm_jax.model import GPTConfig, get_gpt_config
from slm_jax.nn.architecture import MLP, AttentionKind, DType, Norm, Positions, Preset, Remat, RopeScaling


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Attributes:
        kind: adamw (Loshchilov & Hutter 2019), or muon (Jordan et al. 2024) for the matrices of the blocks, with AdamW
            for embeddings, heads, adapters, norms and biases.
        learning_rate: AdamW's peak learning rate.
        muon_learning_rate: Muon's peak learning rate; it follows the same schedule.
        schedule: cosine (decay after the warm-up), constant, or wsd (warm-up, stable, decay).
        warmup_steps: steps in which the learning rate rises linearly to its peak.
        decay_steps: wsd: length of the final decay (null: a tenth of all steps); cosine: step at which the decay ends
            (null: the last step).
        final_learning_rate: AdamW's learning rate at the end of the decay; null: a tenth of the peak.
        weight_decay: decoupled decay of weight matrices and embeddings, times the learning rate; not of norms, biases.
        beta1: AdamW: decay rate of the first moment.
        beta2: AdamW: decay rate of the second moment.
        eps: AdamW: added to the square root of the second moment.
        clip_norm: largest global norm of the gradients; null: no clipping.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: AboveZero = 4e-3
    muon_learning_rate: AboveZero = 0.02
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: NotNegative = 100
    decay_steps: NotNegative | None = None
    final_learning_rate: Annotated[float, Ge(0)] | None = None
    weight_decay: Annotated[float, Ge(0)] = 0.1
    beta1: Rate = 0.9
    beta2: Rate = 0.99
    eps: AboveZero = 1e-8
    clip_norm: AboveZero | None = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and batches of training, which ends after ``steps`` or ``epochs``, whichever comes first.

    Attributes:
        steps: total number of optimizer steps.
        epochs: total number of passes over the training data.
        batch_size: sequences (windows, texts or rows) per optimizer step, over all devices.
        accumulate: micro-batches per batch, to save memory; must divide batch_size.
        eval_every: steps between evaluations of the whole validation split.
        eval_batch_size: sequences per batch in evaluation; null: batch_size.
        log_every: steps between lines of metrics.jsonl.
        profile: steps FROM:TO, such as 100:105, whose profile is written to the run's folder; null: none.
    """

    steps: Execution[Positive | None] = 800
    epochs: Execution[AboveZero | None] = None
    batch_size: Positive = 8
    accumulate: Execution[Positive] = 1
    eval_every: Execution[Positive] = 200
    eval_batch_size: Execution[Positive | None] = 32
    log_every: Execution[Positive] = 10
    profile: Execution[str | None] = None

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The steps of ``profile``: 100:105 are the five from step 100 to step 105; an InputError for another form."""
        if self.profile is None:
            return None
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", self.profile)
        if match is None or int(match[1]) >= int(match[2]):
            raise InputError(f"train.profile is {self.profile!r}; expected FROM:TO, such as 100:105")
        return int(match[1]), int(match[2])


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run.

    Attributes:
        every: steps between checkpoints.
        keep: number of latest checkpoints kept, besides the one with the lowest validation loss.
        mirror: second folder for runs, such as a mounted drive or gs://bucket/runs, to which finished checkpoints are
            copied; a run resumes from the latest checkpoint of either folder; null: none.
    """

    every: Positive = 200
    keep: Positive = 2
    mirror: str | None = None


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Other places that the lines of metrics.jsonl are sent to.

    Attributes:
        tensorboard: whether to write TensorBoard files in the run's folder (needs the extra tensorboard).
        wandb: Weights & Biases: online, offline (in the run's folder, for wandb sync) or disabled (needs the extra
            wandb).
        wandb_project: project in Weights & Biases.
    """

    tensorboard: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "slm_jax"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh.

    Attributes:
        data: devices over which batches are split; -1: all that the other axes leave.
        fsdp: devices over which batches, parameters and optimizer state are split.
        tensor: devices over which heads, hidden features and vocabulary are split; must divide model.n_heads.
        replica: slices of a TPU pod, or groups of devices with a slow network between; batches are split over them.
    """

    data: Annotated[int, Ge(-1)] = -1
    fsdp: Positive = 1
    tensor: Positive = 1
    replica: Positive = 1


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text sampled during training.

    Attributes:
        every: steps between samples; 0: none. With task instruction, an instruction is answered at each evaluation.
        prompt: start of the sample; null: the first tokens of the validation text, or its first instruction.
        max_new_tokens: tokens to generate.
        temperature: below 1 is more predictable, above 1 more random, 0 always takes the likeliest token.
        top_k: number of likeliest tokens to draw from; null: all.
    """

    every: NotNegative = 200
    prompt: str | None = None
    max_new_tokens: Positive = 100
    temperature: Annotated[float, Ge(0)] = 0.8
    top_k: Positive | None = 50


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of frozen matrices (Hu et al. 2021), for ``trainable: lora``.

    Attributes:
        rank: rank of the change of a matrix.
        alpha: scale; the change is multiplied by alpha / rank.
        targets: patterns of the matrices to adapt: attn/q, attn/k, attn/v, attn/out_proj, ff/gate, ff/fc,
            ff/proj, out_head, class_head. A classification head that none matches is trained whole.
        drop_rate: dropout on the input of an adapter.
    """

    rank: Positive = 8
    alpha: AboveZero = 16.0
    targets: tuple[str, ...] = ("attn/*", "ff/*")
    drop_rate: Rate = 0.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model: a preset with any of its fields replaced; null means the preset's value, or the tokenizer's.

    Attributes:
        preset: shape of the model.
        vocab_size: number of token ids.
        context_length: largest number of tokens that the model can attend to.
        emb_dim: width of the residual stream; divisible by n_heads, unless head_dim is given.
        n_heads: attention heads per block.
        n_kv_heads: heads of keys and values, each for a group of heads; divides n_heads.
        head_dim: width of a head; null: emb_dim / n_heads.
        qk_norm: whether queries and keys are normalised in each head (Qwen3).
        n_layers: transformer blocks.
        drop_rate: dropout on embeddings, attention weights and both shortcut branches; 0 switches it off.
        qkv_bias: whether the query, key and value projections have a bias.
        tie_weights: whether the output head is the transposed token embedding.
        bias: false drops every bias, including those of the layer norms.
        norm: layernorm, or rmsnorm, which only scales (Llama).
        norm_eps: number added to the variance or the mean square.
        positions: learned position embeddings, or rope, which rotates queries and keys (Llama).
        rope_theta: base of RoPE's wavelengths.
        rope_scaling: how RoPE is stretched to a longer context: none, linear, or by wavelength (llama3).
        rope_factor: by how much it is stretched.
        rope_low_freq_factor: llama3; wavelengths above rope_original_context over this are stretched.
        rope_high_freq_factor: llama3; wavelengths below rope_original_context over this stay as they are.
        rope_original_context: llama3; context length before it was stretched.
        mlp: feed-forward layer, gelu, or swiglu, which has a gate (Llama).
        hidden_dim: width inside the feed-forward layer; null: 4 · emb_dim.
        exact_gelu: whether GELU uses the error function, as in nanoGPT, instead of GPT-2's tanh approximation.
        param_dtype: dtype of the stored parameters.
        remat: activations that the backward pass recomputes: none, all but matrix products (dots), or all (full).
        attention: implementation; auto takes the fastest that the device and the call allow.
        unroll: whether blocks are compiled one by one rather than as a loop; null: only on a CPU without remat, where
            that is faster.
        dtype: dtype of activations; auto: bfloat16 where the hardware has it, else float32.
    """

    preset: Execution[Preset] = "tiny"
    vocab_size: Positive | None = None
    context_length: Positive | None = None
    emb_dim: Positive | None = None
    n_heads: Positive | None = None
    n_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    qk_norm: bool | None = None
    n_layers: Positive | None = None
    drop_rate: Rate | None = None
    qkv_bias: bool | None = None
    tie_weights: bool | None = None
    bias: bool | None = None
    norm: Norm | None = None
    norm_eps: AboveZero | None = None
    positions: Positions | None = None
    rope_theta: AboveZero | None = None
    rope_scaling: RopeScaling | None = None
    rope_factor: AboveZero | None = None
    rope_low_freq_factor: AboveZero | None = None
    rope_high_freq_factor: AboveZero | None = None
    rope_original_context: Positive | None = None
    mlp: MLP | None = None
    hidden_dim: Positive | None = None
    exact_gelu: bool | None = None
    param_dtype: DType | None = None
    remat: Execution[Remat | None] = None
    attention: Execution[AttentionKind | None] = None
    unroll: Execution[bool | None] = None
    dtype: Execution[Literal["auto", "float32", "bfloat16", "float16"]] = "auto"


@dataclasses.dataclass(frozen=True)
class BaseRunConfig:
    """The keys that every run has; :class:`slm_jax.tasks.config.RunConfig` adds the sections of the tasks.

    Raises:
        InputError: a value out of range, or values that do not fit together.

    Attributes:
        task: what the model is trained for.
        seed: seed of initialisation, data order, dropout and samples.
        run: name of the run and its folder; null: the name of the recipe.
        runs_dir: folder of the runs, on a disk.
        resume: auto resumes the run if it exists; never refuses an existing run; must refuses a new one.
        restarts: how often the command starts again by itself, from the last checkpoint, after it was killed or lost
            another process.
        join_timeout: seconds that a process waits at the start for the others of its job.
        base: weights to start from: a run, run@step, pretrained weights or a name such as gpt2; null: a new model.
        base_optimizer: whether to start from the optimizer state of the base, too; only for a base that is a run.
        trainable: parameters to train: all, the head, the last_block (with final norm and head), the last_n_blocks
            (likewise), or low-rank adapters (lora).
        trainable_blocks: number of blocks for last_n_blocks.
        model: the model; with a base, only drop_rate and the keys of its execution.
        tokenizer: the tokenizer.
        data: the data.
        optimizer: the optimizer.
        train: the training.
        checkpoint: the checkpoints.
        logging: other places for metrics.
        mesh: the device mesh.
        sample: samples during training.
        lora: low-rank adapters.
    """

    task: str = "pretraining"
    seed: Seed = 0
    run: Execution[str | None] = None
    runs_dir: Execution[str] = "runs"
    resume: Execution[Literal["auto", "never", "must"]] = "auto"
    restarts: Execution[NotNegative] = 0
    join_timeout: Execution[Annotated[int, Ge(10)]] = 120
    base: str | None = None
    base_optimizer: bool = False
    trainable: Literal["all", "head", "last_block", "last_n_blocks", "lora"] = "all"
    trainable_blocks: Positive = 2
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: Execution[CheckpointConfig] = dataclasses.field(default_factory=CheckpointConfig)
    logging: Execution[LoggingConfig] = dataclasses.field(default_factory=LoggingConfig)
    mesh: Execution[MeshConfig] = dataclasses.field(default_factory=MeshConfig)
    sample: Execution[SampleConfig] = dataclasses.field(default_factory=SampleConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        check(self)
        check_run_name(self.name)
        train, mirror, rows = self.train, self.checkpoint.mirror, self.train.batch_size
        _ = train.profile_steps  # refuses another form
        accumulate = f"train.accumulate is {train.accumulate}; expected a divisor of train.batch_size {rows}"
        base = f"trainable is {self.trainable} and base is null; expected a base or --trainable all"
        in_storage = (
            f"runs_dir is {self.runs_dir!r}; expected a folder on a disk: to keep runs in object storage, leave it out "
            f"and use --checkpoint.mirror {self.runs_dir}"
        )
        for wrong, message in (
            (not self.mesh.data, "mesh.data is 0; expected -1 (all devices) or at least 1"),
            (not self.runs_dir.strip(), f"runs_dir is {self.runs_dir!r}; expected a folder"),
            (is_url(self.runs_dir), in_storage),
            (mirror is not None and not mirror.strip(), f"checkpoint.mirror is {mirror!r}; expected a folder"),
            (train.steps is None and train.epochs is None, "train.steps and train.epochs are both null; expected one"),
            (train.batch_size % train.accumulate, accumulate),
            (self.trainable != "all" and self.base is None, base),
            (self.trainable == "lora" and not self.lora.targets, "lora.targets is empty; expected a pattern: attn/*"),
        ):
            if wrong:
                raise InputError(message)
        self.gpt_config(vocab_size=1)  # refuses an impossible shape before any text is read

    @property
    def name(self) -> str:
        """The run's name."""
        return self.default_run if self.run is None else self.run

    @property
    def default_run(self) -> str:
        """The name of a run without a recipe."""
        return "tiny"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return user_path(self.runs_dir) / self.name

    @property
    def mirror_folder(self) -> Path | None:
        """The run's folder in the mirror; None without one, or if the mirror is in object storage."""
        mirror = self.checkpoint.mirror
        return None if mirror is None or is_url(mirror) else user_path(mirror) / self.name

    @property
    def mirror_url(self) -> str | None:
        """The run's folder in a mirror in object storage; None without one."""
        mirror = self.checkpoint.mirror
        return f"{mirror.rstrip('/')}/{self.name}" if mirror is not None and is_url(mirror) else None

    @property
    def identity(self) -> dict[str, Any]:
        """What is trained on what, JSON-able: all keys but those marked as execution and those that are not read."""
        # The section of a task has its name.
        sections = {f.name for f in dataclasses.fields(self)} - {f.name for f in dataclasses.fields(BaseRunConfig)}
        used = {
            "lora.": self.trainable == "lora",
            "trainable_blocks": self.trainable == "last_n_blocks",
            "optimizer.muon_": self.optimizer.kind == "muon",
            **{f"{section}.": section == self.task for section in sections},
        }
        unused, execution = tuple(prefix for prefix in used if not used[prefix]), execution_keys(self)
        base = None if self.base is None else str(Path(self.base))  # "./runs/x" is "runs/x"
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in flatten({**to_dict(self), "base": base}).items()
            if key not in execution and not key.startswith(unused)
        }

    def gpt_config(self, vocab_size: int, dtype: DType = "float32") -> GPTConfig:
        """Return the model's configuration for a tokenizer of ``vocab_size`` ids, computing in ``dtype``.

        Raises an InputError for a ``model.vocab_size`` below that, and for a shape that no model can have.
        """
        section = dataclasses.asdict(self.model)
        overrides = {k: v for k, v in section.items() if v is not None and k not in ("preset", "dtype")}
        if overrides.setdefault("vocab_size", vocab_size) < vocab_size:
            given = overrides["vocab_size"]
            raise InputError(f"model.vocab_size is {given}; expected at least the tokenizer's {vocab_size} token ids")
        if overrides["vocab_size"] > vocab_size:
            overrides["unpadded_vocab_size"] = vocab_size
        return get_gpt_config(self.model.preset, dtype=dtype, **overrides)


def check_run_name(name: str) -> None:
    """Raise an InputError for a run's name that is not a folder inside the folder of runs."""
    is_folder = name.strip() and not Path(name).is_absolute() and ".." not in Path(name).parts and not is_url(name)
    if not is_folder or any(unicodedata.category(character) == "Cc" for character in name):
        raise InputError(
            f"run is {name!r}; expected a folder name inside runs_dir, without control characters, such as my-run"
        )
