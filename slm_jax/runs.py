"""Reading runs: a model with its tokenizer from a run's folder, or from weights of another program."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.data.chat_template import own_template, template_from_dict
from slm_jax.data.templates import Template
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import new_folder, read_json, user_path
from slm_jax.model import DType, GPTConfig, Params, param_shapes
from slm_jax.nn.blocks import merge_params
from slm_jax.nn.lora import split_adapters
from slm_jax.nn.sharding import spread
from slm_jax.tokenizer import FILE_NAME, GPT2Tokenizer, Tokenizer, load_tokenizer, tokenizer_from_dict
from slm_jax.tokenizer.gguf_header import is_gguf
from slm_jax.tokenizer.pretrained import read_chat_template
from slm_jax.training.checkpoint import Checkpoints, best_step, load_params, read_metadata
from slm_jax.training.hardware import best_dtype
from slm_jax.training.manifest import find_damage, saved_steps
from slm_jax.training.run_folder import FROZEN, RunFolder
from slm_jax.training.step import TrainState
from slm_jax.training.trainable import from_leaf_table, whole_params
from slm_jax.weights.hub import find_weights
from slm_jax.weights.reader import read_weights
from slm_jax.weights.trees import read_tree, tree_fingerprint


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its tokenizer.

    Attributes:
        folder: folder of the run, or file or folder of the weights.
        step: step of the checkpoint; None: weights of another program.
        model_config: configuration of the model, computing in this device's dtype.
        params: parameters of the model.
        tokenizer: tokenizer of the model.
        template: template of the conversations that the model was trained on; None: it was not.
    """

    folder: Path
    step: int | None
    model_config: GPTConfig
    params: Params
    tokenizer: Tokenizer
    template: Template | None = None


def load_run(folder: str | Path, step: int | str = "best") -> Run:
    """Load a run's model and tokenizer.

    Args:
        folder: such as ``runs/tiny``, or ``runs/tiny@800`` with the step.
        step: a step, ``"best"`` (the lowest validation loss) or ``"latest"``.

    Raises:
        MissingInputError: no run there, or no checkpoint of that step.
        InputError: a damaged checkpoint; an invalid step.
    """
    return _from_checkpoint(*get_checkpoint(folder, step))


def load_model(
    source: str | Path, tokenizer: Tokenizer | None = None, *, n_heads: int | None = None, sharding: Any = None
) -> Run:
    """Load a model and its tokenizer from anything that :func:`load_pretrained` reads.

    Args:
        source: a run, a checkpoint, a file or folder of weights, or a name such as ``gpt2``.
        tokenizer: tokenizer of the model; None: that of the run or the folder, or GPT-2's if the vocabulary is GPT-2's.
        n_heads: number of attention heads, if the weights do not state it and have none of OpenAI's four shapes.
        sharding: see :func:`load_pretrained`.

    Raises:
        MissingInputError: nothing there, or a download that is not possible.
        InputError: weights that are damaged or of another family; no tokenizer, or one with more ids than the model.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        return _from_checkpoint(*checkpoint, tokenizer, n_heads, sharding)
    path = find_weights(source)
    cfg, params = read_weights(path, n_heads, best_dtype(), "float32", sharding)
    tokenizer = tokenizer or _tokenizer_beside(path, cfg)
    return Run(path, None, _with_vocabulary(cfg, tokenizer, path), params, tokenizer, own_template(tokenizer))


def load_pretrained(
    source: str | Path,
    *,
    n_heads: int | None = None,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    sharding: Any = None,
) -> tuple[GPTConfig, Params]:
    """Load a model's configuration and parameters.

    Args:
        source: a file or folder of Hugging Face's GPT-2, Llama or Qwen3 (``model.safetensors``, its shards' index,
            ``pytorch_model.bin``), nanoGPT's (``ckpt.pt``) or the book's weights; our own ``runs/x``, ``runs/x@800``,
            ``runs/x@best``, ``runs/x@latest`` or ``runs/x/checkpoints/800``; or a name such as ``gpt2`` or
            ``smollm2-135m-instruct`` (``slm_jax.weights.hub.PINS`` has all; a path of that name goes first, then
            ``$SLM_JAX_DATA``, then Hugging Face's cache, then a download).
        n_heads: number of attention heads, if the weights do not state it and have none of OpenAI's four shapes.
        dtype: dtype that the returned configuration computes in.
        param_dtype: dtype of the parameters.
        sharding: a ``jax.sharding.Sharding`` for every leaf, a tree of them, or a ``jax.sharding.Mesh`` over whose axes
            ``fsdp`` and ``tensor`` leaves are split as in training; None: JAX's default device.

    Returns:
        The configuration and the params tree (shapes: ``slm_jax.model.param_shapes``). Dropout is 0, except for runs,
        which state theirs.

    Raises:
        MissingInputError: nothing there, or a download that is not possible.
        InputError: weights of another family, incomplete or damaged; names file and tensor.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return read_weights(find_weights(source), n_heads, dtype, param_dtype, sharding)
    return read_checkpoint(*checkpoint, dtype, param_dtype, n_heads, sharding)[:2]


load_gpt2 = load_pretrained  # its name when GPT-2 was the only family


def find_tokenizer(source: str | Path, cfg: GPTConfig) -> Tokenizer:
    """Return the tokenizer of a run, the one beside weights, or GPT-2's if the vocabulary is GPT-2's; else raise."""
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return _tokenizer_beside(find_weights(source), cfg)
    return tokenizer_from_dict(read_metadata(checkpoint[0] / "checkpoints", checkpoint[1]).get("tokenizer", {}))


def save_run(folder: Path, run: Run) -> None:
    """Write a model as a run with one checkpoint of step 0; training cannot resume from it."""
    state = TrainState(step=jnp.int32(0), trainable=run.params, opt_state=(), key=jax.random.key(0))
    metadata = {
        "config": {},
        "model": dataclasses.asdict(run.model_config),
        "identity": {"task": "imported weights"},  # no training has this identity
        "tokenizer": run.tokenizer.to_dict(),
        **({} if run.template is None else {"template": run.template.to_dict()}),
    }
    with new_folder(folder) as partial:
        run.tokenizer.save(partial / "tokenizer")
        with Checkpoints(partial / "checkpoints") as checkpoints:
            checkpoints.save(state, metadata)


def _from_checkpoint(
    folder: Path, step: int, tokenizer: Tokenizer | None = None, n_heads: int | None = None, sharding: Any = None
) -> Run:
    cfg, params, metadata = read_checkpoint(folder, step, best_dtype(), n_heads=n_heads, sharding=sharding)
    tokenizer = tokenizer or tokenizer_from_dict(metadata.get("tokenizer", {}))
    template = template_from_dict(metadata["template"]) if "template" in metadata else own_template(tokenizer)
    return Run(folder, step, _with_vocabulary(cfg, tokenizer, folder), params, tokenizer, template)


def _with_vocabulary(cfg: GPTConfig, tokenizer: Tokenizer, path: Path) -> GPTConfig:
    if tokenizer.vocab_size > cfg.vocab_size:
        problem = f"the model has a vocabulary of {cfg.vocab_size} and the tokenizer of {tokenizer.vocab_size}"
        raise InputError(f"{path}: {problem}; pass the tokenizer that the model was trained with")
    padded = tokenizer.vocab_size < cfg.vocab_size
    return dataclasses.replace(cfg, unpadded_vocab_size=tokenizer.vocab_size if padded else None)


# SHA-256 of GPT-2's vocabulary {token: id} as JSON with sorted keys and no spaces.
_GPT2_VOCAB_SHA256 = "e35d8b86ebd35ebd260d040aa455e09759f7e675f4dbb7f3d727516f27eca190"


def _tokenizer_beside(path: Path, cfg: GPTConfig) -> Tokenizer:
    folder, vocab_size = path if path.is_dir() else path.parent, cfg.unpadded_vocab_size or cfg.vocab_size
    saved, gpt2 = folder / "tokenizer" / FILE_NAME, GPT2Tokenizer()
    gguf = path if path.is_file() else path / "model.gguf"
    if saved.is_file():
        return load_tokenizer(saved)
    if is_gguf(gguf):
        return load_tokenizer(gguf)
    if vocab_size == gpt2.vocab_size and _may_be_gpt2s(folder):
        own = (folder / FILE_NAME).is_file() and read_chat_template(folder) is not None
        return load_tokenizer(folder / FILE_NAME) if own else gpt2
    llama2c = (f"tok{vocab_size}.bin", "tokenizer.bin") if path.suffix == ".bin" else ()
    for name in (FILE_NAME, "tokenizer.model", *llama2c):
        if (folder / name).is_file():
            return load_tokenizer(folder / name)
    if vocab_size == gpt2.vocab_size:
        raise InputError(f"{folder}: its tokenizer is as large as GPT-2's and not GPT-2's; pass the tokenizer")
    problem = f"no tokenizer with these weights, and a vocabulary of {vocab_size} is not GPT-2's"
    raise InputError(f"{path}: {problem}; pass the tokenizer, or save it as {saved}")


def _may_be_gpt2s(folder: Path) -> bool:
    """Return whether the vocabulary in the files of Hugging Face's tokenizer is GPT-2's, or there are none."""
    vocabulary: Any = None
    if (folder / "vocab.json").is_file():
        vocabulary = read_json(folder / "vocab.json")
    elif (folder / FILE_NAME).is_file():
        vocabulary = read_json(folder / FILE_NAME).get("model")
        vocabulary = vocabulary.get("vocab") if isinstance(vocabulary, dict) else vocabulary
    canonical = json.dumps(vocabulary, sort_keys=True, separators=(",", ":"))
    return vocabulary is None or hashlib.sha256(canonical.encode()).hexdigest() == _GPT2_VOCAB_SHA256


def find_run(name: str | Path) -> RunFolder:
    """Return the folder of a run; a name alone is also looked for in ``runs``."""
    path = user_path(name)
    for folder in (path, Path("runs") / path):
        # A removed run may leave a lock, empty folders and an unfinished save (.saving).
        saved = (file.is_file() for file in (folder / "checkpoints").glob("[!.]*/**/*"))
        if (folder / "config.yaml").is_file() or any(saved):
            return RunFolder(folder)
    near = path.parent if path.parent.is_dir() else Path("runs")
    runs = sorted(str(file.parent) for file in near.glob("*/config.yaml"))
    there = f"; there are {', '.join(runs[:8])}" if runs else ""
    raise MissingInputError(f"{path}: no run there; expected a run's folder, such as runs/tiny{there}")


def split_step(source: str | Path) -> tuple[Path, str | None]:
    """Split ``runs/tiny@800`` into folder and step; no step if the whole exists as a path, or has no ``@``."""
    path = user_path(source)
    name, at, step = path.name.rpartition("@")
    if path.exists() or not at:
        return path, None
    return path.parent / name if name else path, step


def get_checkpoint(source: str | Path, step: int | str = "best") -> tuple[Path, int]:
    """Return what :func:`find_checkpoint` returns, or raise a MissingInputError if there is no run."""
    checkpoint = find_checkpoint(source, step)
    if checkpoint is None:
        raise MissingInputError(f"{source}: no run with checkpoints there; expected a folder such as runs/tiny")
    return checkpoint


def find_checkpoint(source: str | Path, step: int | str = "best") -> tuple[Path, int] | None:
    """Return folder and step of the checkpoint that a source names; None if it is no run.

    A source is ``runs/x``, ``runs/x@800``, ``runs/x@best``, ``runs/x@latest`` or ``runs/x/checkpoints/800``; ``step``
    is chosen if it names none: a number, ``best`` (lowest validation loss) or ``latest``.
    """
    path, named = split_step(source)
    if path.parent.name == "checkpoints" and path.name.isdecimal() and path.is_dir():
        return path.parent.parent, int(path.name)
    checkpoints, step = path / "checkpoints", step if named is None else named
    if not checkpoints.is_dir():
        return None if named is None else get_checkpoint(path)
    steps = saved_steps(checkpoints)
    if not steps:
        raise MissingInputError(f"{checkpoints}: no checkpoint in this run yet; train it first")
    if step == "latest":
        return path, steps[-1]
    if step == "best":
        best = best_step(checkpoints)
        assert best is not None
        return path, best
    if not str(step).isdecimal():
        raise InputError(f"step is {step!r}; expected a number, best or latest")
    if int(step) not in steps:
        raise MissingInputError(f"{checkpoints}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return path, int(step)


def try_metadata(folder: RunFolder, steps: Iterable[int]) -> dict[str, Any]:
    """Return the metadata of the first of these checkpoints that can be read; empty if there is none."""
    for step in steps:
        with contextlib.suppress(InputError):
            return read_metadata(folder.checkpoints, step)
    return {}


def read_checkpoint(
    folder: Path,
    step: int,
    dtype: DType,
    param_dtype: DType | None = None,
    n_heads: int | None = None,
    sharding: Any = None,
    classifier: bool = False,
) -> tuple[GPTConfig, Params, dict[str, Any]]:
    """Load the model of a checkpoint and its metadata; arguments as for :func:`load_pretrained`.

    Parameters are of ``param_dtype``, by default as they were trained. ``classifier``: whether one is expected.
    """
    checkpoint = folder / "checkpoints" / str(step)
    metadata = read_metadata(checkpoint.parent, step)
    # Only the shape: it may have been executed on another device.
    changes = {"dtype": dtype, "attention": "auto", "remat": "none", "unroll": None}
    changes |= {} if param_dtype is None else {"param_dtype": param_dtype}
    try:
        cfg = GPTConfig(**{**metadata["model"], **changes})
        shapes = from_leaf_table(metadata["leaves"]) if "leaves" in metadata else param_shapes(cfg)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = find_damage(checkpoint) or f"{checkpoint}: its metadata describe no model of slm_jax ({error!r})"
        raise InputError(f"{problem}; choose another step") from None
    if n_heads not in (None, cfg.n_heads):
        raise InputError(f"{folder}: n_heads is given as {n_heads}, and the run has {cfg.n_heads}; leave it out")
    if classifier and not is_classifier(metadata):
        raise InputError(f"{folder}: is no classifier; expected a run of slm-jax finetune with task: classification")
    if is_classifier(metadata) and not classifier:
        raise InputError(f"{folder}: is a classifier; expected a language model (slm-jax classify uses a classifier)")
    if metadata.get("trainable", "all") == "all":
        if param_dtype is not None:
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), shapes)
        return cfg, load_params(checkpoint.parent, step, shapes, spread(sharding, shapes)), metadata
    params = whole_params(load_params(checkpoint.parent, step, shapes), read_frozen(folder, metadata))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), params)
    return cfg, params if sharding is None else jax.device_put(params, spread(sharding, params)), metadata


def is_classifier(metadata: dict[str, Any]) -> bool:
    """Return whether a checkpoint's model has a classification head instead of a language model's."""
    return "classes" in metadata


def read_adapters(folder: Path, step: int) -> Params:
    """Load only the adapters of a run that was trained with ``trainable: lora``, not merged."""
    metadata = read_metadata(folder / "checkpoints", step)
    trained = metadata.get("trainable", "all")
    if trained != "lora":
        raise InputError(f"{folder}: has no adapters, as trainable was {trained}; expected a run with trainable: lora")
    params = load_params(folder / "checkpoints", step, from_leaf_table(metadata["leaves"]))
    return split_adapters(merge_params(read_frozen(folder, metadata), params))[1]


def read_frozen(folder: Path, metadata: dict[str, Any]) -> Params:
    """Read the parameters that a run does not train, as NumPy arrays; ``metadata`` are those of its checkpoint."""
    file = folder / FROZEN
    params = read_tree(file)
    if metadata.get("frozen_sha256") != tree_fingerprint(file):
        raise InputError(f"{file}: is not what this run was trained with; restore it")
    return params
