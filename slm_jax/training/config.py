"""Configuration of training: frozen dataclasses, one a section, and what every run has.

The defaults are the ``tiny`` recipe. Two kinds of key: *identity* keys say what is trained on what (they must agree for
a resume); *execution* keys say for how long, where and how often something is reported, and may change between two
starts of a run.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from slm_jax.config import AboveZero, Execution, NotNegative, Positive, Rate, Seed, check
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.errors import InputError
from slm_jax.files import user_path
from slm_jax.model import AttentionKind, DType, GPTConfig, Remat, get_gpt_config


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Attributes:
        kind: adamw (Loshchilov & Hutter 2019), or muon (Jordan et al. 2024) for the matrices of the blocks beside
            AdamW for all else: embeddings, heads, adapters, norms and biases.
        learning_rate: AdamW's peak rate.
        muon_learning_rate: Muon's peak rate, which takes the same course.
        schedule: cosine (after the warmup, down to the final rate), constant, or wsd (warmup, stable, decay).
        warmup_steps: steps in which the rate rises linearly to the peak.
        decay_steps: wsd: length of the final decay (default: a tenth of all steps); cosine: where the decay ends
            (default: the last step).
        final_learning_rate: AdamW's rate at the end of a decay; default: a tenth of the peak.
        weight_decay: decoupled decay of weight matrices and embeddings, times learning_rate; norms and biases never
            decay.
        beta1: AdamW: decay of the first moment.
        beta2: AdamW: decay of the second moment.
        eps: AdamW: added to the root of the second moment.
        clip_norm: the global norm that gradients are clipped to; null: no clipping.
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
    """How long and in what portions; training ends after ``steps`` or ``epochs``, whichever comes first.

    Attributes:
        steps: optimizer steps in all.
        epochs: passes over the training data in all.
        batch_size: sequences (windows, texts or rows) an optimizer step, over all devices.
        accumulate: micro-batches that a batch is cut into, to save memory; divides batch_size.
        eval_every: steps from one evaluation of the whole validation split to the next.
        eval_batch_size: sequences at a time in evaluation; null: batch_size.
        log_every: steps from one line of metrics.jsonl to the next.
        profile: FROM:TO, such as 100:105, the steps between which a profile is written to the run's folder; null: none.
    """

    steps: Execution[Positive | None] = 800
    epochs: Execution[AboveZero | None] = None
    batch_size: Positive = 8
    accumulate: Execution[Positive] = 1
    eval_every: Execution[Positive] = 200
    eval_batch_size: Execution[Positive | None] = 32
    log_every: Execution[Positive] = 10
    profile: Execution[str | None] = None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run while it goes on.

    Attributes:
        every: steps from one checkpoint to the next.
        keep: how many of the latest are kept, apart from the one of the lowest validation loss.
        mirror: a second folder for runs, such as a mounted drive's, that finished checkpoints are copied to; a run
            goes on from the latest checkpoint of either folder. null: none.
    """

    every: Positive = 200
    keep: Positive = 2
    mirror: str | None = None


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Where the lines of metrics.jsonl go, too.

    Attributes:
        tensorboard: whether to TensorBoard's files in the run's folder (needs the extra tensorboard).
        wandb: to Weights & Biases: online, offline (into the run's folder, for wandb sync), or disabled (needs the
            extra wandb).
        wandb_project: the project there.
    """

    tensorboard: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "slm_jax"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work.

    Attributes:
        data: devices over which batches are split; -1: all that the other axes leave.
        fsdp: devices over which parameters and optimizer state are split too.
        tensor: reserved; 1.
    """

    data: Annotated[int, Ge(-1)] = -1
    fsdp: Positive = 1
    tensor: Annotated[int, Ge(1), Le(1)] = 1


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text sampled while training.

    Attributes:
        every: steps from one sample to the next; 0: none. An instruction is answered at each evaluation instead.
        prompt: what the sample starts with; null: the first tokens of the validation text, or its first instruction.
        max_new_tokens: its length in tokens.
        temperature: below 1 safer, above 1 wilder, 0 always the likeliest token.
        top_k: how many of the likeliest tokens are drawn from; null: all.
    """

    every: NotNegative = 200
    prompt: str | None = None
    max_new_tokens: Positive = 100
    temperature: Annotated[float, Ge(0)] = 0.8
    top_k: Positive | None = 50


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021), trained with ``trainable: lora`` beside frozen matrices.

    Attributes:
        rank: of the two small matrices that stand for one large change.
        alpha: the change is multiplied by alpha / rank.
        targets: patterns of the matrices that get an adapter: attn/q, attn/k, attn/v, attn/out_proj, ff/fc, ff/proj,
            out_head, class_head. A classification head that none matches is trained whole.
        drop_rate: dropout on what goes into an adapter.
    """

    rank: Positive = 8
    alpha: AboveZero = 16.0
    targets: tuple[str, ...] = ("attn/*", "ff/*")
    drop_rate: Rate = 0.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model: a preset, and any of its fields replaced; null is the preset's value, or the tokenizer's.

    Attributes:
        preset: tiny, mini, gpt2-small, gpt2-medium, gpt2-large or gpt2-xl.
        vocab_size: number of token ids.
        context_length: the most tokens that the model can look at.
        emb_dim: width of the residual stream; divisible by n_heads.
        n_heads: attention heads a block.
        n_layers: transformer blocks.
        drop_rate: dropout on embeddings, attention weights and both shortcut branches; 0 switches it off.
        qkv_bias: whether the query, key and value projections have a bias.
        tie_weights: whether the output head is the token embedding, transposed.
        bias: False drops every bias, those of the layer norms too.
        exact_gelu: whether GELU is the error function's, as in nanoGPT, instead of GPT-2's tanh form.
        param_dtype: what parameters are stored in.
        remat: what the backward pass computes again instead of keeping: nothing, all but the matrix products, or all.
        attention: how attention is computed; auto takes the fastest that this device and call allow.
        unroll: whether the stack of blocks is compiled layer by layer rather than as a loop; null: on a CPU without
            remat, where that is faster.
        dtype: what activations are computed in; auto: bfloat16 where the hardware has it, else float32.
    """

    preset: Execution[Literal["tiny", "mini", "gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"]] = "tiny"
    vocab_size: Positive | None = None
    context_length: Positive | None = None
    emb_dim: Positive | None = None
    n_heads: Positive | None = None
    n_layers: Positive | None = None
    drop_rate: Rate | None = None
    qkv_bias: bool | None = None
    tie_weights: bool | None = None
    bias: bool | None = None
    exact_gelu: bool | None = None
    param_dtype: DType | None = None
    remat: Execution[Remat | None] = None
    attention: Execution[AttentionKind | None] = None
    unroll: Execution[bool | None] = None
    dtype: Execution[Literal["auto", "float32", "bfloat16", "float16"]] = "auto"


@dataclasses.dataclass(frozen=True)
class BaseRunConfig:
    """A whole run, without the sections of the tasks.

    Raises:
        InputError: a value outside its range, or values that do not go together.

    Attributes:
        task: the stage of training.
        seed: decides initialisation, data order, dropout and samples.
        run: the run's name and folder; default: the name of the recipe.
        runs_dir: where runs are kept.
        resume: auto goes on where the run stopped, if it exists; never refuses to; must insists.
        base: what to start from: a run, run@step, GPT-2 weights or a name such as gpt2; null: a new model.
        base_optimizer: whether the state of the base's optimizer is taken over, too, so that training goes on smoothly;
            for a base that is a run.
        trainable: what of it is trained: all, the head, the last_block (with final norm and head), the last_n_blocks,
            or low-rank adapters (lora).
        trainable_blocks: of last_n_blocks.
        model: the model; with a base only its dropout and how it is computed.
        tokenizer: the tokenizer.
        data: the data.
        optimizer: the optimizer.
        train: the training.
        checkpoint: the checkpoints.
        logging: where metrics go, too.
        mesh: the devices.
        sample: the samples.
        lora: the adapters.
    """

    task: str = "pretraining"
    seed: Seed = 0
    run: Execution[str | None] = None
    runs_dir: Execution[str] = "runs"
    resume: Execution[Literal["auto", "never", "must"]] = "auto"
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
        if not self.mesh.data:
            raise InputError("mesh.data is 0; expected -1 (all devices) or at least 1")
        if self.train.profile is not None:
            parse_profile(self.train.profile)
        for key, folder in (("runs_dir", self.runs_dir), ("checkpoint.mirror", self.checkpoint.mirror)):
            if folder is not None and not folder.strip():
                raise InputError(f"{key} is {folder!r}; expected a folder")
        check_run_name(self.name)
        if self.train.steps is None and self.train.epochs is None:
            raise InputError("train.steps and train.epochs are both null; expected at least one of them")
        if self.train.batch_size % self.train.accumulate:
            raise InputError(
                f"train.accumulate is {self.train.accumulate}, which does not divide train.batch_size "
                f"{self.train.batch_size}; expected a divisor of it"
            )
        if self.trainable != "all" and self.base is None:
            raise InputError(
                f"trainable is {self.trainable} and base is null; expected a base, as the rest of a new model would "
                "stay random, or --trainable all"
            )
        if self.trainable == "lora" and not self.lora.targets:
            raise InputError("lora.targets is empty; expected at least one pattern, such as attn/*")
        self.gpt_config(vocab_size=1)  # refuses now, before any text is read, a shape that no model can have

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
        """The run's folder in the mirror; None without one."""
        mirror = self.checkpoint.mirror
        return None if mirror is None else user_path(mirror) / self.name

    def gpt_config(self, vocab_size: int, dtype: DType = "float32") -> GPTConfig:
        """Return the model's configuration for a tokenizer of ``vocab_size`` ids, computing in ``dtype``.

        Raises:
            InputError: a ``model.vocab_size`` below that; a shape that no model can have.
        """
        section = dataclasses.asdict(self.model)
        overrides = {key: value for key, value in section.items() if value is not None}
        preset = overrides.pop("preset")
        del overrides["dtype"]
        if overrides.setdefault("vocab_size", vocab_size) < vocab_size:
            raise InputError(
                f"model.vocab_size is {overrides['vocab_size']}, but the tokenizer has {vocab_size} token ids; "
                "leave it null or make it at least that"
            )
        if overrides["vocab_size"] > vocab_size:
            overrides["unpadded_vocab_size"] = vocab_size
        return get_gpt_config(preset, dtype=dtype, **overrides)


def parse_profile(steps: str) -> tuple[int, int]:
    """Read ``100:105``: the five steps that lead from step 100 to step 105.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", steps)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"train.profile is {steps!r}; expected FROM:TO with FROM below TO, such as 100:105")
    return int(match[1]), int(match[2])


def check_run_name(name: str) -> None:
    """Check a run's name.

    Raises:
        InputError: a name that is no folder inside the folder of runs.
    """
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"run is {name!r}; expected a folder name inside runs_dir, such as my-run")
