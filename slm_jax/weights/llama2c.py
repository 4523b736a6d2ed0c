"""llama2.c's first format (``.bin``): seven int32, then float32 weights, all layers of a matrix one after the other.

The pairs that the rotation turns are interleaved. A negative vocabulary means an output head of its own. Source:
karpathy/llama2.c, ``run.c``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig
from slm_jax.nn.axes import HEAD
from slm_jax.weights.names import TOKENS, Format, Slot
from slm_jax.weights.tensor_files import AGAIN, Tensor, TensorFiles

_N_HEADER = 7
_MAX_SIZE = 1 << 24  # of one number in the header
_LATER = 0x616B3432  # the magic number of the versions 1 and 2, "ak42"


class Llama2C(Format):
    """Meta's names of Llama's tensors, which llama2.c's files have no room for but llama2.c's code uses."""

    def names(self, cfg: GPTConfig) -> dict[str, Slot]:
        turned = (".attention.wq.weight", ".attention.wk.weight")
        return {name: slot._replace(interleaved=name.endswith(turned)) for name, slot in super().names(cfg).items()}

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        return files.model_args


FORMAT = Llama2C(
    title="llama2.c",
    top={
        "tok_embeddings.weight": TOKENS,
        "norm.weight": "final_norm/scale",
        "output.weight": HEAD,
    },
    prefix="layers.{}.",
    block={
        "attention_norm.weight": "norm1/scale",
        "attention.wq.weight": "attn/q/kernel",
        "attention.wk.weight": "attn/k/kernel",
        "attention.wv.weight": "attn/v/kernel",
        "attention.wo.weight": "attn/out_proj/kernel",
        "ffn_norm.weight": "norm2/scale",
        "feed_forward.w1.weight": "ff/gate/kernel",
        "feed_forward.w2.weight": "ff/proj/kernel",
        "feed_forward.w3.weight": "ff/fc/kernel",
    },
    fixed={"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "bias": False},
)


def is_llama2c(start: bytes) -> bool:
    """Return whether a file's first bytes are a plausible header."""
    if len(start) < 4 * _N_HEADER:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, context = _header(start)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    return all(1 <= size <= _MAX_SIZE for size in sizes) and not dim % heads and not heads % kv_heads


def open_llama2c(file: Path) -> TensorFiles:
    """Open a file whose header is plausible without reading any weights; InputError: its length is another."""
    with file.open("rb") as stream:
        dim, hidden, n_layers, n_heads, kv_heads, vocab, context = _header(stream.read(4 * _N_HEADER))
    kv_dim = dim // n_heads * kv_heads
    stacked = {  # (layers, out, in) in the order of the file
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    angles = 2 * context * (dim // n_heads // 2)  # tables of the rotation, which follow from the sizes
    n_values = abs(vocab) * dim * (2 if vocab < 0 else 1) + dim + angles
    n_values += n_layers * sum(math.prod(shape) for shape in stacked.values())
    n_bytes = 4 * (_N_HEADER + n_values)
    if (found := file.stat().st_size) != n_bytes:
        what = f"has {found:,} bytes; expected {n_bytes:,} by its header, if it is one of llama2.c's"
        raise InputError(f"{file}: {what} ({n_layers} layers, dim {dim}); {AGAIN}")
    tensors: dict[str, Tensor] = {}
    place = 4 * _N_HEADER

    def add(name: str, *shape: int) -> None:
        nonlocal place
        tensors[name] = Tensor(file, name, shape, "float32", partial(_rows, file, place, shape))
        place += 4 * math.prod(shape)

    add("tok_embeddings.weight", abs(vocab), dim)
    for name, shape in stacked.items():
        for layer in range(n_layers):
            add(f"layers.{layer}.{name}.weight", *shape)
    add("norm.weight", dim)
    place += 4 * angles
    if vocab < 0:
        add("output.weight", abs(vocab), dim)
    fields = {
        **{"context_length": context, "n_heads": n_heads, "tie_weights": vocab > 0},
        **{
            "n_kv_heads": None if kv_heads == n_heads else kv_heads,
            "hidden_dim": None if hidden == 4 * dim else hidden,
        },
    }
    return TensorFiles(file, tensors, model_args=fields, form=FORMAT)


def check_version(file: Path, start: bytes) -> None:
    """Refuse the versions 1 and 2, which begin with a magic number."""
    if start[:4] == _LATER.to_bytes(4, "little"):
        version = int.from_bytes(start[4:8], "little")
        raise InputError(f"{file}: llama2.c's version {version}; expected version 0, which export.py writes by default")


def _header(start: bytes) -> list[int]:
    return np.frombuffer(start[: 4 * _N_HEADER], "<i4").tolist()


@contextmanager
def _rows(file: Path, place: int, shape: tuple[int, ...]) -> Iterator[Any]:
    yield np.memmap(file, "<f4", "r", place, shape)
