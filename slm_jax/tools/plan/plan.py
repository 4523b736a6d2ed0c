"""What a run will need of a device that is not here, and what to change where it does not fit."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, get_args

import jax

from slm_jax.errors import InputError
from slm_jax.model import DType, Remat
from slm_jax.nn.fused_attention import choose_implementation
from slm_jax.nn.target import Target, compiling_for
from slm_jax.tasks.base import run_dtype
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.plan.memory import Memory, State, Work, evaluation_memory, state_bytes, step_memory
from slm_jax.tools.plan.shapes import Shapes, find_shapes
from slm_jax.training.hardware import Device, device_memory, find_device, flops_per_token
from slm_jax.training.progress import count_leaves
from slm_jax.training.sharding import check_batch_size, mesh_sizes

ASSUMED_MFU = 0.4  # of accelerators, for models that keep one busy
CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022)
_MOST_ROWS = 2**20


@dataclasses.dataclass(frozen=True)
class Fit:
    """A step under one policy of what is computed again.

    Attributes:
        memory: of the step as configured, on one device.
        fits: whether that fits.
        largest_rows: the most sequences at a time that fit on one device; 0: not even one.
        accumulate: the least ``train.accumulate`` with which the configured batch fits; None: none does.
    """

    memory: Memory
    fits: bool
    largest_rows: int
    accumulate: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs; bytes and FLOP/s of one device, tokens a second of all.

    Attributes:
        device: its name on the command line.
        n_devices: how many share each batch.
        dtype: what is computed in there.
        attention: the implementation there.
        optimizer: adamw or muon.
        n_params: parameters, a tied head once.
        n_trained: those that are trained.
        vocab_size, seq: token ids; tokens of a row.
        rows: sequences of a micro-batch on one device, as configured.
        remat: as configured.
        memory_limit: bytes that a program gets of the device; None: not known.
        by_remat: the step under each policy.
        evaluation_bytes: what an evaluation takes.
        flops_per_token: of training; None where only a part is trained.
        peak_flops: in ``dtype``; None: not known, as of a CPU.
        mfu: the share of it that is assumed.
        tokens_per_second: expected then.
        tokens: of the run; None: only the text tells.
        hours: of the run.
        hours_for_20: for 20 tokens a parameter.
        fits: whether training and evaluation fit as configured.
        changes: flags under which it fits, where it does not, nearest to the configuration first.
        notes: what was assumed or should be known, a line each.
    """

    device: str
    n_devices: int
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
    evaluation_bytes: float
    flops_per_token: float | None
    peak_flops: float | None
    mfu: float | None
    tokens_per_second: float | None
    tokens: float | None
    hours: float | None
    hours_for_20: float | None
    fits: bool
    changes: tuple[str, ...]
    notes: tuple[str, ...]


def make_plan(
    config: RunConfig, device: str, n_devices: int = 1, mfu: float | None = None, tokens: float | None = None
) -> Plan:
    """Plan a run: no accelerator is needed, no text read, no array made.

    Args:
        config: the run's.
        device: a name of :data:`slm_jax.training.hardware.DEVICES`, or ``cpu``, this machine's.
        n_devices: how many share each batch.
        mfu: the share of the peak FLOP/s that is reached; None: 0.4, an assumption.
        tokens: to train on; None: as many as the configured steps take.

    Raises:
        InputError: an unknown device; devices that cannot share the batch; a base of unknown shape.
    """
    known = None if device.lower() == "cpu" else find_device(device)
    if known is None and mfu is not None:
        raise InputError("mfu is a share of the peak FLOP/s, and a CPU's are not known; leave it out")
    target = Target("cpu") if known is None else Target(known.platform, known.capability)
    limit = device_memory(jax.devices("cpu")[0]) if known is None else known.memory * known.usable
    with compiling_for(*target):
        dtype = run_dtype(config)
    config = _changed(config, dtype=dtype)
    shapes = find_shapes(config)
    mesh_sizes(config.mesh, n_devices)
    check_batch_size(n_devices, config.train.batch_size, config.train.accumulate)
    fit = functools.partial(_fit, shapes, target=target, limit=limit, n_devices=n_devices)
    work = _work(config, shapes, target, n_devices)
    by_remat = {remat: fit(_changed(config, remat=remat)) for remat in get_args(Remat)}
    evaluation = _evaluation_bytes(config, shapes, target, n_devices)
    fits = by_remat[work.cfg.remat].fits and (limit is None or evaluation <= limit)
    n_params, n_trained = count_leaves(shapes.frozen) + count_leaves(shapes.trainable), count_leaves(shapes.trainable)

    whole = not shapes.frozen and config.task != "classification"
    flops = flops_per_token(shapes.cfg) if whole else None
    share = None if known is None else mfu or ASSUMED_MFU
    peak = None if known is None else known.peak(dtype)
    rate = n_devices * peak * share / flops if peak and share and flops else None
    if tokens is None and config.train.steps is not None:
        tokens = float(config.train.steps * config.train.batch_size * shapes.seq)
    return Plan(
        device=device.lower(),
        n_devices=n_devices,
        dtype=dtype,
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
        evaluation_bytes=evaluation,
        flops_per_token=flops,
        peak_flops=peak,
        mfu=share,
        tokens_per_second=rate,
        tokens=tokens,
        hours=tokens / rate / 3600 if tokens and rate else None,
        hours_for_20=CHINCHILLA * n_params / rate / 3600 if rate else None,
        fits=fits,
        changes=() if fits or limit is None else tuple(_changes(config, shapes, target, limit, n_devices)),
        notes=(*shapes.notes, *_notes(config, known, work, n_devices, flops)),
    )


def _changed(config: RunConfig, **model: Any) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def _with_accumulate(config: RunConfig, accumulate: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=accumulate))


def _work(config: RunConfig, shapes: Shapes, target: Target, n_devices: int) -> Work:
    """Return what one device computes at a time."""
    cfg = dataclasses.replace(shapes.cfg, remat=config.model.remat or shapes.cfg.remat)
    attention = choose_implementation(
        cfg.attention,
        cfg.dtype,
        cfg.emb_dim // cfg.n_heads,
        cfg.drop_rate > 0,
        config.data.packing and shapes.seq % 2 == 1,
        target,
    )
    stacks = [tree for name, tree in shapes.trainable.items() if name.startswith("blocks")]
    trained_blocks = jax.tree.leaves(stacks[0])[0].shape[0] if stacks else 0
    accumulate = config.train.accumulate
    rows = config.train.batch_size // (n_devices * accumulate)
    return Work(cfg, target, attention, rows, shapes.seq, shapes.n_outputs, trained_blocks, accumulate)


def _state(config: RunConfig, shapes: Shapes) -> State:
    return state_bytes(shapes.trainable, shapes.frozen, config.mesh.fsdp, muon=config.optimizer.kind == "muon")


def _memory(config: RunConfig, shapes: Shapes, target: Target, n_devices: int) -> Memory:
    return step_memory(_work(config, shapes, target, n_devices), _state(config, shapes))


def _evaluation_bytes(config: RunConfig, shapes: Shapes, target: Target, n_devices: int) -> float:
    rows = -(-(config.train.eval_batch_size or config.train.batch_size) // n_devices)
    work = dataclasses.replace(_work(config, shapes, target, n_devices), rows=rows)
    return evaluation_memory(work, _state(config, shapes))


def _fit(shapes: Shapes, config: RunConfig, target: Target, limit: float | None, n_devices: int) -> Fit:
    memory = _memory(config, shapes, target, n_devices)
    if limit is None:
        return Fit(memory, True, 0, config.train.accumulate)
    return Fit(
        memory,
        memory.total <= limit,
        _largest_rows(config, shapes, target, limit, n_devices),
        _least_accumulate(config, shapes, target, limit, n_devices),
    )


def _least_accumulate(config: RunConfig, shapes: Shapes, target: Target, limit: float, n_devices: int) -> int | None:
    """Return the fewest micro-batches with which the configured batch fits; None: not even single rows do."""
    share = config.train.batch_size // n_devices
    for accumulate in range(1, share + 1):
        if share % accumulate == 0:
            memory = _memory(_with_accumulate(config, accumulate), shapes, target, n_devices)
            if memory.total <= limit:
                return accumulate
    return None


def _largest_rows(config: RunConfig, shapes: Shapes, target: Target, limit: float, n_devices: int) -> int:
    """Return the most rows at a time that fit on one device, by bisection."""
    state = _state(config, shapes)
    work = _work(config, shapes, target, n_devices)

    def fits(rows: int) -> bool:
        return step_memory(dataclasses.replace(work, rows=rows), state).total <= limit

    low, high = 0, _MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _changes(config: RunConfig, shapes: Shapes, target: Target, limit: float, n_devices: int) -> Iterator[str]:
    """Yield flags that were computed to make the run fit, nearest to the configuration first."""
    asked = rows = config.train.eval_batch_size or config.train.batch_size
    while rows > n_devices and _evaluation_bytes(_with_eval(config, rows), shapes, target, n_devices) > limit:
        rows //= 2
    evaluation = [f"--train.eval_batch_size {rows}"] if rows < asked else []
    if _memory(config, shapes, target, n_devices).total <= limit:
        yield from evaluation
        return
    for flags in _step_changes(config, shapes, target, limit, n_devices):
        yield " ".join([flags, *evaluation])


def _with_eval(config: RunConfig, rows: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batch_size=rows))


def _step_changes(config: RunConfig, shapes: Shapes, target: Target, limit: float, n_devices: int) -> Iterator[str]:
    sharded = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=n_devices))
    candidates = {
        "": config,
        "--model.remat dots": _changed(config, remat="dots"),
        "--model.remat full": _changed(config, remat="full"),
    }
    if n_devices > config.mesh.fsdp and config.mesh.data == -1:
        candidates[f"--mesh.fsdp {n_devices}"] = sharded
        candidates[f"--mesh.fsdp {n_devices} --model.remat full"] = _changed(sharded, remat="full")
    for flags, changed in candidates.items():
        accumulate = _least_accumulate(changed, shapes, target, limit, n_devices)
        if accumulate is None:
            continue
        parts = [flags] if flags else []
        if accumulate > config.train.accumulate:
            parts.append(f"--train.accumulate {accumulate}")
        yield " ".join(parts)


def _notes(config: RunConfig, known: Device | None, work: Work, n_devices: int, flops: float | None) -> Iterator[str]:
    if known is not None and known.platform == "gpu":
        yield (
            f"memory: JAX gives a program {known.usable:.0%} of a GPU's; more with the environment variable "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
        )
    if known is None:
        yield "speed: nobody knows a CPU's in advance; train prints tokens a second after some steps"
    elif flops is None:
        yield "speed: not predicted where only a part is trained, or a classifier"
    if known is not None and work.cfg.dtype == "bfloat16" and (known.capability or 8) < 8:
        yield f"dtype: a {known.name} only emulates bfloat16, and will be far slower; --model.dtype auto is float32"
    if known is not None and work.cfg.dtype == "float32" and (known.platform == "tpu" or (known.capability or 0) >= 8):
        what = "bfloat16" if known.platform == "tpu" else "TF32"
        yield f"dtype: float32 arrays are multiplied in {what} there, which is JAX's default"
    if n_devices > 1:
        yield "speed: as if devices never waited for each other"
