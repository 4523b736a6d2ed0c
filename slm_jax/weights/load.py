"""``load_gpt2``: weights in any form that slm_jax knows."""

from pathlib import Path
from typing import Any

from slm_jax.files import user_path
from slm_jax.model import DType, GPTConfig, Params
from slm_jax.weights.hub import PINS, find_by_name
from slm_jax.weights.ours import find_checkpoint, read_checkpoint
from slm_jax.weights.reader import read_weights

_ALIASES = {"gpt2-small": "gpt2"}


def load_gpt2(
    source: str | Path,
    *,
    n_heads: int | None = None,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    sharding: Any = None,
) -> tuple[GPTConfig, Params]:
    """Load a GPT-2's configuration and parameters.

    Args:
        source: a file or folder of Hugging Face's (``model.safetensors``, its shards' index, ``pytorch_model.bin``),
            nanoGPT's (``ckpt.pt``) or the book's weights; our own ``runs/x``, ``runs/x@800``, ``runs/x@best``,
            ``runs/x@latest`` or ``runs/x/checkpoints/800``; or ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``
            (a path of that name goes first, then ``$SLM_JAX_DATA``, then Hugging Face's cache, then a download).
        n_heads: attention heads, where the weights do not state them and are of none of OpenAI's four shapes.
        dtype: what the returned configuration computes in.
        param_dtype: what the parameters are converted to.
        sharding: a ``jax.sharding.Sharding`` for every leaf, or a tree of them; None: JAX's default device.

    Returns:
        The configuration and the params tree (shapes: ``slm_jax.model.param_shapes``). Dropout is 0, except in
        weights of our own, which carry theirs.

    Raises:
        MissingInputError: nothing there, or a download that is not possible.
        InputError: weights that are not GPT-2's, incomplete or damaged, in one line that names file and tensor.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return read_weights(find_weights(source), n_heads, dtype, param_dtype, sharding)
    cfg, params, _ = read_checkpoint(*checkpoint, dtype, param_dtype, n_heads, sharding)
    return cfg, params


def find_weights(source: str | Path) -> Path:
    """Return the file or folder of weights that a path or a name stands for, downloading it if need be."""
    name = _ALIASES.get(str(source), str(source))
    path = user_path(source)
    return path if path.exists() or name not in PINS else find_by_name(name)
