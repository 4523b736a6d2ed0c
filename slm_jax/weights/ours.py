"""Our own checkpoints as weights: a run's folder, one of its steps, or a checkpoint's folder."""

from pathlib import Path
from typing import Any

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import user_path
from slm_jax.model import DType, GPTConfig, Params, param_shapes
from slm_jax.training.checkpoint import METADATA, best_step, find_damage, load_params, read_metadata, saved_steps


def find_checkpoint(source: str | Path, step: int | str = "best") -> tuple[Path, int] | None:
    """Return the run's folder and the step that a source names; None if it is no run.

    Args:
        source: ``runs/x``, ``runs/x@800``, ``runs/x@best``, ``runs/x@latest`` or ``runs/x/checkpoints/800``.
        step: which of a run, where the source does not say: a step, ``best`` (the lowest validation loss) or
            ``latest``.

    Raises:
        MissingInputError: a run without checkpoints, or without one of that step.
        InputError: a step that is none; what can be no path.
    """
    path = user_path(source)
    if not path.exists() and "@" in path.name:
        name, _, step = path.name.rpartition("@")
        path = path.with_name(name) if name else path
        if not (path / "checkpoints").is_dir():
            raise MissingInputError(f"{path}: no run with checkpoints there; expected a folder such as runs/tiny")
    if path.parent.name == "checkpoints" and path.name.isdecimal() and (path / METADATA).is_file():
        return path.parent.parent, int(path.name)
    if not (path / "checkpoints").is_dir():
        return None
    return path, _choose(path / "checkpoints", step)


def _choose(checkpoints: Path, step: int | str) -> int:
    steps = saved_steps(checkpoints)
    if not steps:
        raise MissingInputError(f"{checkpoints}: no checkpoint in this run yet; train it first")
    if step == "best":
        chosen = best_step(checkpoints)
        assert chosen is not None
    elif step == "latest":
        chosen = steps[-1]
    else:
        try:
            chosen = int(step)
        except ValueError:
            raise InputError(f"step is {step!r}; expected a number, best or latest") from None
    if chosen not in steps:
        raise MissingInputError(
            f"{checkpoints}: no checkpoint of step {chosen}; there are {', '.join(map(str, steps))}"
        )
    return chosen


def read_checkpoint(
    folder: Path,
    step: int,
    dtype: DType,
    param_dtype: DType | None = None,
    n_heads: int | None = None,
    sharding: Any = None,
) -> tuple[GPTConfig, Params, dict[str, Any]]:
    """Load a checkpoint's model and what was saved beside it.

    Args:
        folder: the run's folder.
        step: of the checkpoint.
        dtype: what to compute in.
        param_dtype: what to hold parameters in; None: as they were trained.
        n_heads: what the caller takes for the number of attention heads.
        sharding: of every leaf, or a tree of them; None: JAX's default device.

    Raises:
        InputError: a damaged checkpoint; one with another number of heads.
    """
    checkpoint = folder / "checkpoints" / str(step)
    metadata = read_metadata(checkpoint.parent, step)
    # Its shape, not how it was executed: that was for another device, perhaps.
    execution = {"dtype": dtype, "attention": "auto", "remat": "none", "unroll": None}
    held = {} if param_dtype is None else {"param_dtype": param_dtype}
    try:
        cfg = GPTConfig(**{**metadata["model"], **execution, **held})
        shapes = param_shapes(cfg)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = find_damage(checkpoint) or f"{checkpoint}: its metadata describe no model of slm_jax ({error!r})"
        raise InputError(f"{problem}; choose another step") from None
    if n_heads not in (None, cfg.n_heads):
        raise InputError(f"{folder}: n_heads is given as {n_heads}, and the run has {cfg.n_heads}; leave it out")
    return cfg, load_params(checkpoint.parent, step, shapes, sharding), metadata
