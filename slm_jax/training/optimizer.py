"""AdamW and Muon, weight decay for matrices only, clipping by the global norm, and learning-rate schedules."""

import functools
import math

import optax
from jaxtyping import Array
from optax import contrib

from slm_jax.errors import InputError
from slm_jax.nn.axes import Axes, Params, map_axes
from slm_jax.training.config import OptimizerConfig


def make_schedule(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: a linear warm-up, then the configured schedule.

    ``cosine`` falls from the peak to the final rate at ``decay_steps`` and stays there (Loshchilov & Hutter 2017);
    ``wsd`` stays at the peak and falls linearly over the last ``decay_steps`` (Hu et al. 2024); ``constant`` stays.
    """
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    final = peak / 10 if cfg.final_learning_rate is None else cfg.final_learning_rate
    if cfg.schedule == "cosine":
        end = total_steps if cfg.decay_steps is None else cfg.decay_steps
        if end <= warmup:
            if cfg.decay_steps is not None:
                raise InputError(f"optimizer.decay_steps is {end}; expected more than optimizer.warmup_steps {warmup}")
            warmup = max(0, end - 1)  # a trial run that is shorter than its recipe's warm-up
        course = optax.cosine_decay_schedule(peak, end - warmup, alpha=final / peak)
    elif cfg.schedule == "wsd":
        decay = max(1, total_steps // 10) if cfg.decay_steps is None else cfg.decay_steps
        if warmup + decay > total_steps:
            steps = f"optimizer.warmup_steps {warmup} and the decay of {decay} steps"
            raise InputError(f"{steps} are more than the run's {total_steps}; expected at most that")
        fall = optax.linear_schedule(peak, final, decay)
        course = optax.join_schedules([optax.constant_schedule(peak), fall], [total_steps - warmup - decay])
    else:
        course = optax.constant_schedule(peak)
    # The first update uses peak/warmup, not 0: a step with rate 0 would be wasted.
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, course], [warmup])


def decay_mask(params: Params) -> Params:
    """Return a tree that is True where weight decay applies: matrices, adapters' matrices and embeddings."""
    return map_axes(lambda axes, _: axes is not None and axes.is_matrix, params)


def muon_or_adam(params: Params) -> Params:
    """Return a tree with ``muon`` for the matrices of the blocks (stacked over layers) and ``adam`` for the rest.

    Muon is not meant for embeddings and heads (Jordan et al. 2024), nor for the thin matrices of adapters.
    """

    def label(axes: Axes | None, _: object) -> str:
        return "muon" if axes and axes.stack and axes.is_matrix and not axes.is_adapter else "adam"

    return map_axes(label, params)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Return the configured optimizer without its learning rate: the training step multiplies by ``-rate(step)``.

    This way a schedule depends on the step of the run, not on a count in the optimizer's state, which does not change
    when a step is skipped.
    """
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    direction = optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps)
    if cfg.kind == "muon":
        direction = optax.partition({"muon": _scale_by_muon(cfg), "adam": direction}, muon_or_adam)
    return optax.chain(clip, direction, optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask))


def _scale_by_muon(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Return Muon for stacks of matrices, scaled for a training step that multiplies by AdamW's learning rate."""
    rate = cfg.muon_learning_rate / cfg.learning_rate

    def numbers(axes: Axes | None, _: object) -> contrib.MuonDimensionNumbers:
        assert axes is not None
        first = len(axes.stack)
        outputs = first + len(axes.inputs)
        return contrib.MuonDimensionNumbers(tuple(range(first, outputs)), tuple(range(outputs, len(axes.names))))

    def scale(axes: Axes | None, update: Array) -> Array:
        assert axes is not None
        n_in, n_out = (math.prod(update.shape[axis] for axis in part) for part in numbers(axes, update))
        return rate * math.sqrt(max(1, n_out / n_in)) * update

    return optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=functools.partial(map_axes, numbers)),
        optax.stateless(lambda updates, _: map_axes(scale, updates)),
    )
