"""A model with its tokenizer: a run, read back from its folder, or any GPT-2 weights."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import new_folder, read_json
from slm_jax.model import GPTConfig, Params
from slm_jax.templates import Template
from slm_jax.tokenizer import FILE_NAME, GPT2Tokenizer, Tokenizer, load_tokenizer, tokenizer_from_dict
from slm_jax.training.checkpoint import Checkpoints, read_metadata
from slm_jax.training.hardware import best_dtype
from slm_jax.training.step import TrainState
from slm_jax.weights.load import find_weights, load_gpt2
from slm_jax.weights.ours import find_checkpoint, read_checkpoint


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its tokenizer.

    Attributes:
        folder: the run's folder, or the weights' file or folder.
        step: the checkpoint's step; None: weights that are no checkpoint of ours.
        model_config: the model's configuration, computing in this device's dtype.
        params: the model's parameters.
        tokenizer: the model's tokenizer.
        template: how the model was shown instructions; None: it was not.
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

    Returns:
        The model's configuration, parameters and tokenizer, with folder and step.

    Raises:
        MissingInputError: no run there, or no checkpoint of that step.
        InputError: a damaged checkpoint; a step that is none.
    """
    checkpoint = find_checkpoint(folder, step)
    if checkpoint is None:
        raise MissingInputError(f"{folder}: no run with checkpoints there; expected a folder such as runs/tiny")
    return _from_checkpoint(*checkpoint)


def load_model(source: str | Path, tokenizer: Tokenizer | None = None, *, n_heads: int | None = None) -> Run:
    """Load a model and its tokenizer from anything that :func:`slm_jax.weights.load_gpt2` takes.

    Args:
        source: a run, a checkpoint, a file or folder of weights, or a name such as ``gpt2``.
        tokenizer: the model's; None: the run's, the one saved in the folder, or GPT-2's if the vocabulary is GPT-2's.
        n_heads: attention heads, where the weights do not state them and are of none of OpenAI's four shapes.

    Returns:
        The model's configuration, parameters and tokenizer; ``step`` is None for weights that are no run's.

    Raises:
        MissingInputError: nothing there, or a download that is not possible.
        InputError: weights that are damaged or not GPT-2's; no tokenizer, or one with more ids than the model.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        return _from_checkpoint(*checkpoint, tokenizer, n_heads)
    path = find_weights(source)
    cfg, params = load_gpt2(path, n_heads=n_heads, dtype=best_dtype())
    tokenizer = tokenizer or _tokenizer_beside(path, cfg)
    return Run(path, None, _with_vocabulary(cfg, tokenizer, path), params, tokenizer)


def find_tokenizer(source: str | Path, cfg: GPTConfig) -> Tokenizer:
    """Return the tokenizer of a run, the one that lies beside weights, or GPT-2's where nothing speaks against it.

    Raises:
        InputError: there is none.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        return _saved_tokenizer(read_metadata(checkpoint[0] / "checkpoints", checkpoint[1]))
    return _tokenizer_beside(find_weights(source), cfg)


def save_run(folder: Path, run: Run) -> None:
    """Write a model as a run with one checkpoint, of step 0, which has no optimizer's state to go on with.

    Raises:
        InputError: a folder in use, or one that cannot be written.
    """
    state = TrainState(step=jnp.int32(0), trainable=run.params, opt_state=(), key=jax.random.key(0))
    metadata = {
        "config": {},
        "model": dataclasses.asdict(run.model_config),
        "identity": {"task": "imported weights"},  # equal to that of no training
        "tokenizer": run.tokenizer.to_dict(),
        **({} if run.template is None else {"template": run.template.to_dict()}),
    }
    with new_folder(folder) as partial:
        run.tokenizer.save(partial / "tokenizer")
        with Checkpoints(partial / "checkpoints") as checkpoints:
            checkpoints.save(state, metadata)


def _from_checkpoint(folder: Path, step: int, tokenizer: Tokenizer | None = None, n_heads: int | None = None) -> Run:
    cfg, params, metadata = read_checkpoint(folder, step, best_dtype(), n_heads=n_heads)
    tokenizer = tokenizer or _saved_tokenizer(metadata)
    template = Template.from_dict(metadata["template"]) if "template" in metadata else None
    return Run(folder, step, _with_vocabulary(cfg, tokenizer, folder), params, tokenizer, template)


def _saved_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_dict(metadata.get("tokenizer", {}))


def _with_vocabulary(cfg: GPTConfig, tokenizer: Tokenizer, path: Path) -> GPTConfig:
    if tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(
            f"{path}: the model has a vocabulary of {cfg.vocab_size} and the tokenizer of {tokenizer.vocab_size}; "
            "pass the tokenizer that the model was trained with"
        )
    padded = tokenizer.vocab_size < cfg.vocab_size
    return dataclasses.replace(cfg, unpadded_vocab_size=tokenizer.vocab_size if padded else None)


# Of GPT-2's vocabulary, {token: id}: the JSON with sorted keys and no spaces.
_GPT2_VOCAB_SHA256 = "e35d8b86ebd35ebd260d040aa455e09759f7e675f4dbb7f3d727516f27eca190"


def _tokenizer_beside(path: Path, cfg: GPTConfig) -> Tokenizer:
    folder = path if path.is_dir() else path.parent
    saved = folder / "tokenizer" / FILE_NAME
    if saved.is_file():
        return load_tokenizer(saved)
    vocab_size = cfg.unpadded_vocab_size or cfg.vocab_size
    if vocab_size != GPT2Tokenizer().vocab_size:
        raise InputError(
            f"{path}: no tokenizer with these weights, and a vocabulary of {vocab_size} is not GPT-2's; "
            f"pass the tokenizer, or save it as {saved}"
        )
    vocabulary = _vocabulary(folder)
    if vocabulary is not None:
        canonical = json.dumps(vocabulary, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(canonical.encode()).hexdigest() != _GPT2_VOCAB_SHA256:
            raise InputError(f"{folder}: its tokenizer is as large as GPT-2's and not GPT-2's; pass the tokenizer")
    return GPT2Tokenizer()


def _vocabulary(folder: Path) -> object:
    """Return the vocabulary that Hugging Face's tokenizer files in a folder hold; None without such files."""
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model")
        return model.get("vocab") if isinstance(model, dict) else model
    return None
