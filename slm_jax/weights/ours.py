"""Our own checkpoints as weights: a run's folder, one of its steps, or a checkpoint's folder."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from slm_jax.errors import InputError, MissingInputError
from slm_jax.lora import split_adapters
from slm_jax.model import DType, GPTConfig, Params, param_shapes
from slm_jax.param_file import read_tree, tree_fingerprint
from slm_jax.trainable import from_leaf_table, merge_params, whole_params
from slm_jax.training.checkpoint import METADATA, best_step, find_damage, load_params, read_metadata, saved_steps
from slm_jax.training.run_folder import FROZEN, split_step


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
    path, named = split_step(source)
    if named is not None and not (path / "checkpoints").is_dir():
        raise MissingInputError(f"{path}: no run with checkpoints there; expected a folder such as runs/tiny")
    if path.parent.name == "checkpoints" and path.name.isdecimal() and (path / METADATA).is_file():
        return path.parent.parent, int(path.name)
    if not (path / "checkpoints").is_dir():
        return None
    return path, _choose(path / "checkpoints", step if named is None else named)


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
    classifier: bool = False,
) -> tuple[GPTConfig, Params, dict[str, Any]]:
    """Load a checkpoint's model and what was saved beside it.

    Args:
        folder: the run's folder.
        step: of the checkpoint.
        dtype: what to compute in.
        param_dtype: what to hold parameters in; None: as they were trained.
        n_heads: what the caller takes for the number of attention heads.
        sharding: of every leaf, or a tree of them; None: JAX's default device.
        classifier: whether a classifier is expected, whose params have a class_head, or a language model.

    Raises:
        InputError: a damaged checkpoint; one with another number of heads; a model of the other kind.
    """
    checkpoint = folder / "checkpoints" / str(step)
    metadata = read_metadata(checkpoint.parent, step)
    # Its shape, not how it was executed: that was for another device, perhaps.
    execution = {"dtype": dtype, "attention": "auto", "remat": "none", "unroll": None}
    held = {} if param_dtype is None else {"param_dtype": param_dtype}
    try:
        cfg = GPTConfig(**{**metadata["model"], **execution, **held})
        shapes = from_leaf_table(metadata["leaves"]) if "leaves" in metadata else param_shapes(cfg)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = find_damage(checkpoint) or f"{checkpoint}: its metadata describe no model of slm_jax ({error!r})"
        raise InputError(f"{problem}; choose another step") from None
    if n_heads not in (None, cfg.n_heads):
        raise InputError(f"{folder}: n_heads is given as {n_heads}, and the run has {cfg.n_heads}; leave it out")
    if classifier != ("classes" in metadata):
        raise InputError(
            f"{folder}: is no classifier; expected a run of slm-jax finetune with task: classification"
            if classifier
            else f"{folder}: is a classifier and writes no text; use slm-jax classify, or slm_jax.load_classifier"
        )
    if metadata.get("trainable", "all") == "all":
        if param_dtype is not None:
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), shapes)
        return cfg, load_params(checkpoint.parent, step, shapes, sharding), metadata
    trained = load_params(checkpoint.parent, step, shapes)
    params = _with_frozen(folder, trained, cfg, metadata)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), params)
    return cfg, params if sharding is None else jax.device_put(params, sharding), metadata


def read_adapters(folder: Path, step: int) -> Params:
    """Load the adapters alone of a run that was trained with ``trainable: lora``, not merged with their matrices.

    Args:
        folder: the run's folder.
        step: of the checkpoint.

    Raises:
        InputError: a run without adapters; a damaged checkpoint.
    """
    metadata = read_metadata(folder / "checkpoints", step)
    trained = metadata.get("trainable", "all")
    if trained != "lora":
        raise InputError(f"{folder}: has no adapters, as trainable was {trained}; expected a run with trainable: lora")
    params = load_params(folder / "checkpoints", step, from_leaf_table(metadata["leaves"]))
    return split_adapters(merge_params(read_frozen(folder, metadata), params))[1]


def read_frozen(folder: Path, metadata: dict[str, Any]) -> Params:
    """Read the parameters that a run does not train, as NumPy arrays.

    Args:
        folder: the run's folder.
        metadata: of the checkpoint that they go with.

    Raises:
        InputError: the file is missing, damaged, or another run's.
    """
    file = folder / FROZEN
    params = read_tree(file)
    if metadata.get("frozen_sha256") not in (None, tree_fingerprint(file)):
        raise InputError(f"{file}: is not what this run was trained with; restore it, or start anew with --run NAME")
    return params


def _with_frozen(folder: Path, trained: Params, cfg: GPTConfig, metadata: dict[str, Any]) -> Params:
    """Return the whole model: what was trained, merged with what the run keeps of its base."""
    file, frozen = folder / FROZEN, read_frozen(folder, metadata)
    try:
        params = whole_params(trained, frozen)
        found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file}: does not belong to the run's checkpoints; restore it") from None
    for path, leaf in flatten_dict(param_shapes(cfg), sep="/").items():
        if found.get(path) != leaf.shape and not (path.startswith("out_head") and "class_head" in params):
            raise InputError(
                f"{file}: with it {path} has the shape {found.get(path)}, expected {leaf.shape}; restore it"
            )
    return params
