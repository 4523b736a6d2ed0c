"""An estimate of what a run needs of a device that may be elsewhere, and of what to change if it does not fit.

The shapes of a run are found without its weights and without its text.
"""

import bisect
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import jax
from flax.traverse_util import flatten_dict

from slm_jax.data.sources import parse_source
from slm_jax.data.token_file import TokenSource
from slm_jax.errors import InputError
from slm_jax.files import user_path
from slm_jax.model import DType, GPTConfig, Params, Remat, axis_sizes, get_gpt_config
from slm_jax.nn.axes import count, find_axes, map_axes
from slm_jax.nn.blocks import merge_params
from slm_jax.nn.fused_attention import choose_implementation
from slm_jax.nn.sharding import param_spec
from slm_jax.nn.target import Target, compiling_for
from slm_jax.runs import find_checkpoint
from slm_jax.tasks.base import as_configured
from slm_jax.tasks.config import RunConfig, get_task
from slm_jax.tokenizer import get_tokenizer
from slm_jax.tools.plan.cluster import Cluster, find_cluster
from slm_jax.tools.plan.communication import StepTime, step_exchanges, step_time
from slm_jax.tools.plan.memory_model import Memory, State, Work, evaluation_memory, state_bytes, step_memory
from slm_jax.training.batch_size import fit_batch
from slm_jax.training.checkpoint import read_metadata
from slm_jax.training.config import MeshConfig
from slm_jax.training.hardware import Device, device_memory, flops_per_token, run_dtype
from slm_jax.training.program import compile_program, device_bytes
from slm_jax.training.sharding import describe_heads, make_mesh, mesh_sizes
from slm_jax.training.step import LossFn
from slm_jax.training.task import Parameters
from slm_jax.training.trainable import split_params
from slm_jax.weights.hub import PINS
from slm_jax.weights.reader import read_config

ASSUMED_MFU = 0.4  # of accelerators, for models that keep one busy
CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022)
_MOST_ROWS = 2**20
_MOST_COMPILED = 3_000_000  # parameters of a model that XLA compiles in seconds
GPT2_IDS = 50_257
_MANY_STEPS = 10**6  # of a run that ends after epochs


# --- Shapes ---


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a run, from which :func:`slm_jax.training.program.compile_program` compiles its programs."""

    cfg: GPTConfig
    params: Parameters  # shapes; init makes random trained ones
    make_frozen: Callable[[jax.Array], Params]  # random ones, from the same key
    loss_fn: LossFn
    row: Mapping[str, jax.ShapeDtypeStruct]  # of one row of a batch
    n_outputs: int  # columns of the logits: the vocabulary, or classes
    total_steps: int  # a large number if only the text decides
    notes: tuple[str, ...]  # assumptions, a line each

    @property
    def seq(self) -> int:
        return self.row["inputs"].size

    @property
    def generates(self) -> bool:
        """Whether it is a language model, and no classifier."""
        return self.n_outputs == self.cfg.vocab_size

    def batch_shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype) for name, leaf in self.row.items()}


class Share(NamedTuple):
    """What one device of a mesh has of a parameter."""

    path: str
    shape: tuple[int, ...]
    split: dict[str, str]  # named axes of the parameter, and the axes of the mesh that split them
    n_bytes: float


def find_shares(params: Params, sizes: Mapping[str, int]) -> Iterator[Share]:
    """Yield what a device has of each parameter (shapes) on a mesh with axes of these sizes."""
    for path, leaf in flatten_dict(params, sep="/").items():
        axes = find_axes(path)
        spec = param_spec(axes, leaf.shape, sizes)
        split = {name: along for name, along in zip(axes.names, spec, strict=False) if along} if axes else {}
        parts = math.prod(sizes[along] for along in split.values())
        yield Share(path, leaf.shape, split, leaf.size * leaf.dtype.itemsize / parts)


def find_shapes(config: RunConfig) -> Shapes:
    """Return the shapes of a run; an InputError for a base whose shape is unknown or differs."""
    if config.base is None:
        vocab_size, notes = _vocab_size(config)
        cfg = config.gpt_config(1 if vocab_size is None else vocab_size, run_dtype(config))
        if vocab_size is None:
            cfg = dataclasses.replace(cfg, unpadded_vocab_size=None)
    else:
        cfg, notes = _base_config(config, config.base)
        cfg = as_configured(cfg, config)
    model = get_task(config.task).shapes(config, cfg)

    def split(params: Params, key: jax.Array) -> tuple[Params, Params]:
        return (params, {}) if config.base is None else split_params(params, config, key)

    trainable, frozen = jax.eval_shape(split, model.params, jax.random.key(0))
    return Shapes(
        cfg=cfg,
        params=Parameters(trainable, frozen, init=lambda key: split(model.init(key), key)[0]),
        make_frozen=lambda key: split(model.init(key), key)[1],
        loss_fn=model.loss_fn,
        row=model.row,
        n_outputs=model.n_outputs,
        total_steps=config.train.steps or _MANY_STEPS,
        notes=(*notes, *model.notes),
    )


def _vocab_size(config: RunConfig) -> tuple[int | None, tuple[str, ...]]:
    """Return the number of token ids (None: model.vocab_size decides), and assumptions."""
    tokenizer, source = config.tokenizer, parse_source(config.data.source)
    if tokenizer.path is not None:
        return get_tokenizer(tokenizer.path).vocab_size, ()
    if (stated := source.vocab_size()) is not None:
        return stated, ()
    if tokenizer.kind == "gpt2":
        return GPT2_IDS, ()
    if isinstance(source, TokenSource):
        return GPT2_IDS, (f"assumed: GPT-2's {GPT2_IDS:,} token ids, as {source.name} does not exist yet",)
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size, ()
    size = config.model.vocab_size or get_gpt_config(config.model.preset).vocab_size
    note = f"assumed: {size:,} token ids; the text decides how many the tokenizer {tokenizer.kind} has"
    return None if config.model.vocab_size else size, (f"{note} (change with --model.vocab_size)",)


def _base_config(config: RunConfig, base: str) -> tuple[GPTConfig, tuple[str, ...]]:
    """Return the model of the base: a run's, of weights, one with a name, or the tiny recipe's before it is trained."""
    checkpoint = find_checkpoint(base)
    if checkpoint is not None:
        return GPTConfig(**read_metadata(checkpoint[0] / "checkpoints", checkpoint[1])["model"]), ()
    if base in PINS:
        return get_gpt_config(re.sub("-(instruct|chat)$", "", base)), ()
    tiny = RunConfig(run="tiny", runs_dir=config.runs_dir)
    if user_path(base) == tiny.folder:
        return tiny.gpt_config(tiny.tokenizer.vocab_size), (f"assumed: {base}, which does not exist yet, is tiny",)
    if user_path(base).exists():
        return read_config(user_path(base)), ()
    raise InputError(f"base {base} is no existing run; expected one (train it first), weights, or a name such as gpt2")


# --- The plan ---


@dataclasses.dataclass(frozen=True)
class Fit:
    """A step with one setting of ``model.remat``, on one device."""

    memory: Memory
    fits: bool
    largest_rows: int  # the most sequences at a time that fit; 0: not even one
    accumulate: int | None  # the smallest train.accumulate with which the configured batch fits; None: none does


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs; bytes and FLOP/s of one device, tokens a second of all.

    Attributes:
        device: kind of the devices; n_devices, n_hosts and n_slices count them all.
        mesh: sizes of its axes; shares: what each device has of each parameter.
        n_params, n_trained: all parameters (a tied head counts once), and the trained ones.
        seq, rows: tokens of a row; rows of a micro-batch on one device, as configured.
        memory_limit: bytes of the device that a program may use; None: unknown.
        by_remat: the step with each setting of model.remat, by the formulas of :mod:`slm_jax.tools.plan.memory_model`.
        xla_bytes: the larger of step and evaluation, as configured, by XLA's analysis; None: not compiled.
        flops_per_token: FLOPs of training on a token; None if only a part is trained.
        peak_flops: peak FLOP/s in ``dtype``; None: unknown, as of a CPU.
        mfu: assumed share of the peak.
        tokens_per_second: with communication during computation, as far as it is hidden by it.
        step: least times of a training step, and the MFU to expect; None: unknown.
        tokens, hours: of the run; None: the text decides.
        hours_for_20: time of 20 tokens a parameter.
        fits: whether training and evaluation fit as configured; by XLA's analysis where there is one.
        changes: options under which it fits, if it does not, nearest to the configuration first.
        notes: assumptions and hints, a line each.
    """

    device: str
    n_devices: int
    n_hosts: int
    n_slices: int
    mesh: dict[str, int]
    shares: tuple[Share, ...]
    dtype: DType
    attention: str
    optimizer: str
    n_params: int
    n_trained: int
    vocab_size: int
    seq: int
    rows: int
    remat: Remat
    memory_limit: float | None
    by_remat: dict[str, Fit]
    xla_bytes: float | None
    evaluation_bytes: float
    flops_per_token: float | None
    peak_flops: float | None
    mfu: float | None
    tokens_per_second: float | None
    step: StepTime | None
    tokens: float | None
    hours: float | None
    hours_for_20: float | None
    fits: bool
    changes: tuple[str, ...]
    notes: tuple[str, ...]


def make_plan(
    config: RunConfig, device: str, n_devices: int = 1, mfu: float | None = None, tokens: float | None = None
) -> Plan:
    """Plan a run without its devices, its text or its weights.

    A small model on this machine's CPU is compiled, which takes seconds; everything else is computed from formulas.

    Args:
        config: configuration of the run.
        device: a name of :data:`slm_jax.training.hardware.DEVICES`, with or without a number (see
            :func:`slm_jax.tools.plan.cluster.find_cluster`), or ``cpu``, this machine's.
        n_devices: devices that share each batch, if the name has no number.
        mfu: share of the peak FLOP/s that is reached; None: 0.4, an assumption.
        tokens: tokens to train on; None: those of the configured steps.

    Raises:
        InputError: an unknown device; a base of unknown shape.
    """
    cluster = find_cluster(device, n_devices)
    known, n_devices = cluster.device, cluster.n_devices
    if known is None and mfu is not None:
        raise InputError("mfu is a share of the peak FLOP/s, which is unknown for a CPU; leave it out")
    config, shapes, target = resolve(config, cluster)
    sizes = mesh_sizes(config.mesh, n_devices)
    batch_tokens = config.train.batch_size * shapes.seq  # without the rows that fill the batch up
    config, fitted = fit_batch(config, n_devices // config.mesh.tensor)
    changes = (*describe_heads(config.mesh, axis_sizes(shapes.cfg)), *fitted)
    limit = device_memory(jax.devices("cpu")[0]) if known is None else known.memory * known.usable
    setting = _Setting(shapes, target, math.inf if limit is None else limit, n_devices)
    work = setting.work(config)
    by_remat = {remat: setting.fit(_replace(config, "model", remat=remat)) for remat in get_args(Remat)}
    xla_bytes = compiled_bytes(config, shapes) if known is None and n_devices == 1 else None
    evaluation = setting.evaluation(config)
    fits = (xla_bytes or max(by_remat[work.cfg.remat].memory.total, evaluation)) <= setting.limit
    n_trained = count(shapes.params.trainable)
    n_params = n_trained + count(shapes.params.frozen)

    flops = flops_per_token(shapes.cfg) if shapes.generates and not shapes.params.frozen else None
    share = None if known is None else mfu or ASSUMED_MFU
    peak = None if known is None else known.peak(work.cfg.dtype)
    step = None
    if known is not None and share and flops:
        exchanges = step_exchanges(work, shapes.params, sizes, cluster, known)
        step = step_time(work, exchanges, known, flops, share)
    rate = batch_tokens / step.overlapped if step else None
    if tokens is None and config.train.steps is not None:
        tokens = float(config.train.steps * batch_tokens)
    return Plan(
        device=cluster.name if known is None else known.name,
        n_devices=n_devices,
        n_hosts=cluster.n_hosts,
        n_slices=cluster.n_slices,
        mesh=sizes,
        shares=tuple(find_shares(merge_params(shapes.params.frozen, shapes.params.trainable), sizes)),
        dtype=work.cfg.dtype,
        attention=work.attention,
        optimizer=config.optimizer.kind,
        n_params=n_params,
        n_trained=n_trained,
        vocab_size=shapes.cfg.vocab_size,
        seq=shapes.seq,
        rows=work.rows,
        remat=work.cfg.remat,
        memory_limit=limit,
        by_remat=by_remat,
        xla_bytes=xla_bytes,
        evaluation_bytes=evaluation,
        flops_per_token=flops,
        peak_flops=peak,
        mfu=share,
        tokens_per_second=rate,
        step=step,
        tokens=tokens,
        hours=tokens / rate / 3600 if tokens and rate else None,
        hours_for_20=CHINCHILLA * n_params / rate / 3600 if rate else None,
        fits=fits,
        changes=() if fits else tuple(setting.changes(config)),
        notes=(*shapes.notes, *changes, *_notes(known, work, n_devices, flops)),
    )


def resolve(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, Shapes, Target]:
    """Return the configuration with the dtype of the devices, the shapes of its run, and what it is compiled for."""
    known = cluster.device
    target = Target("cpu") if known is None else Target(known.platform, known.capability)
    with compiling_for(*target):
        config = _replace(config, "model", dtype=run_dtype(config))
    return config, find_shapes(config), target


def _replace(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A model and its devices, for which configurations are tried; the limit of an unknown memory is infinite."""

    shapes: Shapes
    target: Target
    limit: float
    n_devices: int

    def parts(self, config: RunConfig) -> int:
        """Return the number of parts that a batch is split into."""
        return self.n_devices // config.mesh.tensor

    def work(self, config: RunConfig) -> Work:
        shapes = self.shapes
        cfg = dataclasses.replace(shapes.cfg, remat=config.model.remat or shapes.cfg.remat)
        odd = config.data.packing and shapes.seq % 2 == 1
        head_dim = axis_sizes(cfg)["head_dim"]
        attention = choose_implementation(cfg.attention, cfg.dtype, head_dim, cfg.drop_rate > 0, odd, self.target)
        layers = map_axes(lambda axes, leaf: leaf.shape[0] if axes and axes.stack else 0, shapes.params.trainable)
        accumulate, fsdp, tensor = config.train.accumulate, config.mesh.fsdp, config.mesh.tensor
        rows = config.train.batch_size // (self.parts(config) * accumulate)
        trained_blocks, n_outputs = max(jax.tree.leaves(layers)), -(-shapes.n_outputs // tensor)
        return Work(cfg, self.target, attention, rows, shapes.seq, n_outputs, trained_blocks, accumulate, tensor, fsdp)

    def state(self, config: RunConfig) -> State:
        params, muon = self.shapes.params, config.optimizer.kind == "muon"
        return state_bytes(params.trainable, params.frozen, config.mesh.fsdp, muon, config.mesh.tensor)

    def evaluation(self, config: RunConfig) -> float:
        rows = -(-(config.train.eval_batch_size or config.train.batch_size) // self.parts(config))
        return evaluation_memory(dataclasses.replace(self.work(config), rows=rows), self.state(config))

    def fit(self, config: RunConfig) -> Fit:
        work, state = self.work(config), self.state(config)

        def fits(**changes: Any) -> bool:
            return step_memory(dataclasses.replace(work, **changes), state).total <= self.limit

        share = config.train.batch_size // self.parts(config)
        divisors = (n for n in range(1, share + 1) if share % n == 0)
        return Fit(
            memory=step_memory(work, state),
            fits=fits(),
            largest_rows=bisect.bisect_left(range(1, _MOST_ROWS), True, key=lambda rows: not fits(rows=rows)),
            accumulate=next((n for n in divisors if fits(rows=share // n, accumulate=n)), None),
        )

    def changes(self, config: RunConfig) -> Iterator[str]:
        """Yield options with which the run fits, nearest to the configuration first."""
        asked = rows = config.train.eval_batch_size or config.train.batch_size
        while (
            rows > self.parts(config) and self.evaluation(_replace(config, "train", eval_batch_size=rows)) > self.limit
        ):
            rows //= 2
        evaluation = f"--train.eval_batch_size {rows}" if rows < asked else ""
        candidates = {
            "": config,
            "--model.remat dots": _replace(config, "model", remat="dots"),
            "--model.remat full": _replace(config, "model", remat="full"),
        }
        most = self.parts(config) // config.mesh.replica
        if most > config.mesh.fsdp and config.mesh.data == -1:
            sharded = _replace(config, "mesh", fsdp=most)
            flags = f"--mesh.fsdp {most}"
            candidates |= {flags: sharded, f"{flags} --model.remat full": _replace(sharded, "model", remat="full")}
        for flags, changed in candidates.items():
            accumulate = self.fit(changed).accumulate
            if accumulate is not None:
                more = f"--train.accumulate {accumulate}" if accumulate > config.train.accumulate else ""
                change = " ".join(filter(None, [flags, more, evaluation]))
                if not change:
                    continue  # it fits by the formulas, but not by XLA's analysis
                yield change
                if change == evaluation:
                    return  # only the evaluation does not fit


def compiled_bytes(config: RunConfig, shapes: Shapes) -> int | None:
    """Return the bytes of training step or evaluation here, the larger, by XLA; 0: unknown; None: slow to compile."""
    if count(shapes.params.trainable) + count(shapes.params.frozen) > _MOST_COMPILED:
        return None
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    program = compile_program(config, shapes, mesh, needs_init=False)
    return max(device_bytes(step.result()) for step in program.compiling)


def _notes(known: Device | None, work: Work, n_devices: int, flops: float | None) -> Iterator[str]:
    if known is not None and known.platform == "gpu":
        yield (
            f"memory: JAX gives a program {known.usable:.0%} of a GPU's; raise it with XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    if known is None:
        yield "speed: unknown for a CPU; train prints tokens a second after some steps"
    elif flops is None:
        yield "speed: not predicted for a classifier or for a part of a model"
    if known is not None and work.cfg.dtype == "bfloat16" and (known.capability or 8) < 8:
        yield f"dtype: a {known.name} only emulates bfloat16, which is far slower; --model.dtype auto is float32"
    if known is not None and work.cfg.dtype == "float32" and (known.platform == "tpu" or (known.capability or 0) >= 8):
        what = "bfloat16" if known.platform == "tpu" else "TF32"
        yield f"dtype: float32 arrays are multiplied in {what} there, JAX's default"
    if n_devices > 1 and flops is not None:
        yield "speed: assumes that devices communicate while they compute"
