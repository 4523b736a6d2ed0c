"""GGUF as a container: metadata and a table of tensors, all checked against the file's length before it is believed.

The header is parsed here because it may lie; the package ``gguf`` only dequantizes. Source: ggml, ``docs/gguf.md``.
"""

import dataclasses
import importlib.util
import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from slm_jax.errors import InputError
from slm_jax.weights.tensor_files import AGAIN, Tensor

MAGIC = b"GGUF"
MISSING = "needs the package gguf: pip install 'slm_jax[gguf]'"
_VERSIONS = (2, 3)
_MAX_ELEMENTS = 1 << 22  # of an array; the largest vocabularies have 262 thousand tokens, and about as many merges
_MAX_TEXT = 1 << 26  # bytes
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"},
    **{6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_TEXT, _ARRAY = 8, 9


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


def is_gguf(file: Path) -> bool:
    """Return whether a path is a file that begins as GGUF does."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_metadata(file: Path) -> dict[str, Any]:
    """Read the metadata of a GGUF file: numbers, booleans, texts, arrays of numbers (NumPy), lists of texts."""
    return open_file(file)[0]


def open_file(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read metadata and the table of tensors; no tensor is read.

    Raises:
        InputError: the file is damaged, of another version, or quantized in a way that is not supported.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(file, data)
        n_tensors, n_entries = _start(header)
        metadata = _metadata(header, n_entries)
        infos: dict[str, _Info] = {}
        for _ in range(n_tensors):
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


class _Header:
    """The position up to which a header was read; nothing is taken from beyond the file's end."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position = file, data, 0

    def damaged(self, problem: str) -> InputError:
        return InputError(f"{self.file}: a damaged GGUF file: {problem}; {AGAIN}")

    def take(self, n_bytes: int, what: str) -> bytes:
        self.check_room(n_bytes, what)
        self.position += n_bytes
        return self.data[self.position - n_bytes : self.position]

    def check_room(self, n_bytes: int, what: str) -> None:
        left = len(self.data) - self.position
        if n_bytes > left:
            raise self.damaged(f"{what} takes {n_bytes:,} bytes at {self.position:,}, where {left:,} are left")

    def number(self, dtype: str, what: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def text(self, what: str, errors: str = "strict") -> str:
        length = self.number("<u8", what)
        if length > _MAX_TEXT:
            raise self.damaged(f"{what} has {length:,} bytes; expected at most {_MAX_TEXT:,}")
        try:
            return self.take(length, what).decode(errors=errors)
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None


def _start(header: _Header) -> tuple[int, int]:
    """Return the numbers of tensors and of metadata entries."""
    if header.take(4, "the magic number") != MAGIC:
        raise InputError(f"{header.file}: does not begin with GGUF; {AGAIN}")
    version = header.number("<u4", "the version")
    if version not in _VERSIONS:
        raise InputError(f"{header.file}: GGUF version {version}; expected 2 or 3, little-endian")
    n_tensors, n_entries = header.number("<u8", "the header"), header.number("<u8", "the header")
    # An entry has at least a length, a type and a byte; a tensor a length, one dimension, a type and an offset.
    header.check_room(13 * n_entries, f"metadata of {n_entries:,} entries")
    header.check_room(32 * n_tensors, f"a table of {n_tensors:,} tensors")
    return n_tensors, n_entries


def _metadata(header: _Header, n_entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        key = header.text("a metadata key")
        what = f"metadata {key[:60]!r}"
        if key in metadata:
            raise header.damaged(f"{what} is there twice")
        kind = header.number("<u4", what)
        if kind == _ARRAY:
            metadata[key] = _array(header, what)
        elif kind == _TEXT:
            metadata[key] = header.text(what, "replace")
        elif kind in _SCALARS:
            metadata[key] = _plain(header.take(np.dtype(_SCALARS[kind]).itemsize, what), _SCALARS[kind])
        else:
            raise header.damaged(f"{what} has the unknown type {kind}")
    return metadata


def _plain(data: bytes, dtype: str) -> Any:
    """Return a number; a float32 as the shortest decimal that means it, 1e-05 instead of 9.999999747378752e-06."""
    value = np.frombuffer(data, dtype)[0]
    return float(str(value)) if dtype == "<f4" else value.item()


def _array(header: _Header, what: str) -> Any:
    kind, length = header.number("<u4", what), header.number("<u8", what)
    if length > _MAX_ELEMENTS:
        raise header.damaged(f"{what} has {length:,} elements; expected at most {_MAX_ELEMENTS:,}")
    if kind == _TEXT:
        header.check_room(8 * length, what)
        return [header.text(what, "replace") for _ in range(length)]
    if kind not in _SCALARS:
        raise header.damaged(f"{what} is an array of the type {kind}, which is not supported")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(header.take(length * dtype.itemsize, what), dtype)


def _tensor_info(header: _Header) -> tuple[str, _Info]:
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


def _check_places(header: _Header, infos: Mapping[str, _Info], start: int) -> None:
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
