"""GGUF as a container: metadata and a table of tensors, all checked against the file's length before it is believed.

The header is parsed by slm_jax because it may lie (its metadata, which hold the tokenizer, by
``slm_jax.tokenizer.gguf_header``); the package ``gguf`` only dequantizes. Source: ggml, ``docs/gguf.md``.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slm_jax.errors import InputError
from slm_jax.tokenizer.gguf_header import Header, open_header
from slm_jax.weights.tensor_files import Tensor

MISSING = "needs the package gguf: pip install 'slm_jax[gguf]'"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How values are stored: rows are cut into blocks of ``n_values`` values, ``n_bytes`` bytes each."""

    name: str
    n_values: int
    n_bytes: int
    dtype: Any = None  # NumPy's, if the values are not quantized


KINDS = {
    0: _Kind("F32", 1, 4, np.dtype("<f4")),
    1: _Kind("F16", 1, 2, np.dtype("<f2")),
    30: _Kind("BF16", 1, 2, jnp.bfloat16.dtype),
    2: _Kind("Q4_0", 32, 18),
    3: _Kind("Q4_1", 32, 20),
    6: _Kind("Q5_0", 32, 22),
    7: _Kind("Q5_1", 32, 24),
    8: _Kind("Q8_0", 32, 34),
    12: _Kind("Q4_K", 256, 144),
    13: _Kind("Q5_K", 256, 176),
    14: _Kind("Q6_K", 256, 210),
}


class _Info(NamedTuple):
    """What the table says about a tensor: its shape as in NumPy, and its offset from the first tensor."""

    kind: _Kind
    shape: tuple[int, ...]
    offset: int


def open_file(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read metadata and the table of tensors; no tensor is read.

    Raises:
        InputError: the file is damaged, of another version, or quantized in a way that is not supported.
    """
    with open_header(file) as header:
        metadata, infos = header.metadata, dict[str, _Info]()
        for _ in range(header.n_tensors):
            name, info = _tensor_info(header)
            if name in infos:
                raise header.damaged(f"tensor {name} is there twice")
            infos[name] = info
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise header.damaged(f"general.alignment is {alignment!r}; expected a power of two")
        start = math.ceil(header.position / alignment) * alignment
        _check_places(header, infos, start)
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(f"{file}: one of several parts; join them with: llama-gguf-split --merge")
    quantized = sorted({info.kind.name for info in infos.values() if info.kind.dtype is None})
    if quantized and importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file}: is quantized ({', '.join(quantized)}), which {MISSING}")
    return metadata, {name: _tensor(file, name, start, info) for name, info in infos.items()}


def _tensor_info(header: Header) -> tuple[str, _Info]:
    """Return a tensor's name and the rest of its entry, which has the shape in reverse."""
    name = header.text("a tensor's name")
    what = f"tensor {name[:60]!r}"
    n_axes = header.number("<u4", what)
    if not 1 <= n_axes <= 4:
        raise header.damaged(f"{what} has {n_axes} axes; expected 1 to 4")
    shape = tuple(header.number("<u8", what) for _ in range(n_axes))[::-1]
    number = header.number("<u4", what)
    if number not in KINDS:
        supported = ", ".join(kind.name for kind in KINDS.values())
        raise InputError(f"{header.file}: {what} has the quantization {_kind_name(number)}; expected {supported}")
    return name, _Info(KINDS[number], shape, header.number("<u8", what))


def _kind_name(number: int) -> str:
    try:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(number).name
    except (ImportError, ValueError):
        return f"number {number}"


def _check_places(header: Header, infos: Mapping[str, _Info], start: int) -> None:
    """Check that the tensors' bytes lie in the file, one tensor after the other."""
    end = start
    for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1].offset):
        what, place = f"tensor {name[:60]!r}", start + offset
        if min(shape) < 1 or shape[-1] % kind.n_values:
            raise header.damaged(f"{what} has the shape {shape}; expected rows of whole {kind.name} blocks")
        if place < end:
            raise header.damaged(f"{what} begins at {place:,}, within another tensor")
        n_bytes = math.prod(shape) // kind.n_values * kind.n_bytes
        end = place + n_bytes
        if end > len(header.data):
            raise header.damaged(f"{what} takes {n_bytes:,} bytes at {place:,} of a file of {len(header.data):,}")


def _tensor(file: Path, name: str, start: int, info: _Info) -> Tensor:
    kind, shape, offset = info
    dtype = "float32" if kind.dtype is None else kind.dtype.name
    return Tensor(file, name, shape, dtype, partial(_rows, file, start + offset, kind, shape))


@contextmanager
def _rows(file: Path, place: int, kind: _Kind, shape: tuple[int, ...]) -> Iterator[Any]:
    row_bytes = shape[-1] // kind.n_values * kind.n_bytes
    data = np.memmap(file, np.uint8, "r", place, (*shape[:-1], row_bytes))
    yield _Quantized(data, kind) if kind.dtype is None else data.view(kind.dtype)


class _Quantized:
    """Rows of a quantized tensor, of which slices are dequantized to float32."""

    def __init__(self, data: np.ndarray, kind: _Kind) -> None:
        self.data, self.kind = data, kind

    def __getitem__(self, rows: slice) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[self.kind.name]
        if self.data.ndim == 1:  # a vector is one row of blocks
            return dequantize(np.asarray(self.data), kind)[rows]
        return dequantize(np.asarray(self.data[rows]), kind)
