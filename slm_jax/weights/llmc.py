"""llm.c's checkpoints of GPT-2: a header of 256 integers, then 16 arrays, each with all layers.

Source: karpathy/llm.c, ``train_gpt2.py`` (how it is written) and ``dev/eval/export_hf.py`` (how it is read).
"""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from slm_jax.errors import InputError
from slm_jax.weights.names import POSITIONS, TOKENS, Format
from slm_jax.weights.tensor_files import AGAIN, Tensor, TensorFiles

MAGIC = (20240326).to_bytes(4, "little")
_HEADER_BYTES = 1024
_DTYPES = {3: np.dtype("<f4"), 5: jnp.bfloat16.dtype}  # by the version
_FIELDS = ("context_length", "unpadded_vocab_size", "n_layers", "n_heads", "emb_dim", "vocab_size")


class LlmC(Format):
    """llm.c's names, with the index of the layer."""

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        return dict(files.model_args)


FORMAT = LlmC(
    title="llm.c",
    top={"wte": TOKENS, "wpe": POSITIONS, "lnfw": "final_norm/scale", "lnfb": "final_norm/bias"},
    prefix="layer {}: ",
    block={
        "ln1w": "norm1/scale",
        "ln1b": "norm1/bias",
        "qkvw": "attn/q/kernel attn/k/kernel attn/v/kernel",
        "qkvb": "attn/q/bias attn/k/bias attn/v/bias",
        "attprojw": "attn/out_proj/kernel",
        "attprojb": "attn/out_proj/bias",
        "ln2w": "norm2/scale",
        "ln2b": "norm2/bias",
        "fcw": "ff/fc/kernel",
        "fcb": "ff/fc/bias",
        "fcprojw": "ff/proj/kernel",
        "fcprojb": "ff/proj/bias",
    },
    fixed={"bias": True, "qkv_bias": True, "tie_weights": True},
)


def open_file(file: Path) -> TensorFiles:
    """Open a file that begins with ``MAGIC``.

    Raises:
        InputError: another version, impossible sizes, or a file that is longer or shorter than they say.
    """
    with file.open("rb") as stream:
        header = np.frombuffer(stream.read(_HEADER_BYTES).ljust(_HEADER_BYTES, b"\0"), "<i4")
    version, sizes = int(header[1]), dict(zip(_FIELDS, header[2:8].tolist(), strict=True))
    if version not in _DTYPES:
        raise InputError(f"{file}: llm.c's version {version}; expected 3 (float32) or 5 (bfloat16)")
    if min(sizes.values()) < 1 or sizes["unpadded_vocab_size"] > sizes["vocab_size"]:
        raise InputError(f"{file}: its header states impossible sizes ({sizes}); {AGAIN}")
    dtype, size = _DTYPES[version], file.stat().st_size
    expected = _HEADER_BYTES + dtype.itemsize * sum(math.prod(shape) for shape in _shapes(sizes).values())
    if size != expected:
        raise InputError(f"{file}: {size:,} bytes; expected {expected:,} by its header; {AGAIN}")
    tensors, offset = {}, _HEADER_BYTES
    for name, shape in _shapes(sizes).items():
        values = np.memmap(file, dtype, "r", offset, shape)
        offset += values.nbytes
        layers = [(name, values)] if name in FORMAT.top else zip(_layer_names(name, len(values)), values, strict=True)
        for full, part in layers:
            tensors[full] = Tensor(file, full, part.shape, dtype.name, partial(nullcontext, part))
    if sizes["unpadded_vocab_size"] == sizes["vocab_size"]:
        del sizes["unpadded_vocab_size"]
    return TensorFiles(file, tensors, model_args=sizes)


def _layer_names(name: str, n_layers: int) -> list[str]:
    return [FORMAT.prefix.format(layer) + name for layer in range(n_layers)]


def _shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in the order of the file; matrices are (out, in)."""
    layers, width = sizes["n_layers"], sizes["emb_dim"]
    vectors = dict.fromkeys(("ln1w", "ln1b", "attprojb", "ln2w", "ln2b", "fcprojb"), (layers, width))
    shapes = {
        **vectors,
        "qkvw": (layers, 3 * width, width),
        "qkvb": (layers, 3 * width),
        "attprojw": (layers, width, width),
        "fcw": (layers, 4 * width, width),
        "fcb": (layers, 4 * width),
        "fcprojw": (layers, width, 4 * width),
        "wte": (sizes["vocab_size"], width),
        "wpe": (sizes["context_length"], width),
        "lnfw": (width,),
        "lnfb": (width,),
    }
    return {name: shapes[name] for name in ("wte", "wpe", *FORMAT.block, "lnfw", "lnfb")}
