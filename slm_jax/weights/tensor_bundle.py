"""TensorFlow's checkpoints (version 2, "tensor bundles"), read without TensorFlow.

``NAME.index`` is a sorted table in LevelDB's format, from the name of each tensor to its dtype, shape and place;
``NAME.data-00000-of-00001`` holds the values. Source: TensorFlow, ``tensor_bundle.proto`` and ``lib/io/format.cc``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from slm_jax.errors import InputError, MissingInputError
from slm_jax.weights.tensor_files import AGAIN, Tensor, TensorFiles

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER_BYTES, _TRAILER_BYTES = 48, 5  # of the table; of a block: its kind of compression and a checksum
# Of a table: hundreds of tensors need a tenth. A hostile one of this size costs a second and 200 MB.
_MOST_BYTES, _MOST_KEY_BYTES, _MOST_DIMENSIONS = 1 << 20, 512, 8
_CRC_LANES = 4096
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    9: np.dtype("<i8"),
    14: jnp.bfloat16.dtype,
    19: np.dtype("<f2"),
}
Fields = dict[int, list[int | bytes]]


def open_bundle(index: Path) -> TensorFiles:
    """Open a checkpoint by its index, without reading any tensor.

    Raises:
        MissingInputError: a file with values is missing.
        InputError: the index or a file with values is damaged or truncated, or of a kind that OpenAI's are not.
    """
    try:
        entries = _read_table(index.read_bytes() if index.stat().st_size <= _MOST_BYTES else b"")
        header = _parse(entries.pop(b""))
        n_shards = _number(header, 1)
        if _number(header, 2):
            raise InputError(f"{index}: its values are big-endian; expected little-endian")
        tensors = {}
        for key, value in entries.items():
            tensor = _tensor(index, key.decode(), _parse(value), n_shards)
            tensors[tensor.name] = tensor
    except InputError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        raise InputError(f"{index}: not the index of a TensorFlow checkpoint, or damaged; {AGAIN}") from None
    return TensorFiles(index, tensors)


def _tensor(index: Path, name: str, entry: Fields, n_shards: int) -> Tensor:
    code, offset, size = _number(entry, 1), _number(entry, 4), _number(entry, 5)
    dims = [_parse(dim) for shape in entry.get(2, []) for dim in _parse(shape).get(2, [])]
    shape = tuple(_number(dim, 1) for dim in dims)
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError
    file = index.with_name(f"{index.stem}.data-{_number(entry, 3):05}-of-{n_shards:05}")
    if code not in _DTYPES or 7 in entry:  # text, or a tensor in slices
        return Tensor(
            index, name, shape, f"of a type ({code}) or in slices that are not supported", partial(nullcontext, None)
        )
    dtype = _DTYPES[code]
    if not file.is_file():
        raise MissingInputError(f"{file}: this file is missing; {index.name} needs it")
    if size != math.prod(shape) * dtype.itemsize or offset + size > file.stat().st_size:
        raise InputError(f"{file}: too short for tensor {name}, which {index.name} lists; {AGAIN}")
    if shape[:1] == (1,) and len(shape) == 3:  # OpenAI's matrices are convolutions over one position
        shape = shape[1:]
    checksum = entry.get(6, [b""])[-1]
    return Tensor(file, name, shape, dtype.name, partial(_mapped, file, name, dtype, offset, shape, checksum))


@contextmanager
def _mapped(
    file: Path, name: str, dtype: np.dtype, offset: int, shape: tuple[int, ...], checksum: int | bytes
) -> Iterator[np.ndarray]:
    values = np.memmap(file, dtype, "r", offset, shape)
    if _checksum(values.reshape(-1).view(np.uint8)) != checksum:
        raise InputError(f"{file}: tensor {name} is damaged: its CRC-32C is wrong; {AGAIN}")
    yield values


def _read_table(data: bytes) -> dict[bytes, bytes]:
    """Return the entries of a table of LevelDB's: an index block, which lists the blocks with the entries."""
    if data[-8:] != _MAGIC:
        raise ValueError
    footer = data[-_FOOTER_BYTES:]
    _, at = _varint(footer, 0)  # the place of a block that is not needed
    _, at = _varint(footer, at)
    blocks = _read_block(data, footer[at:])
    if sum(_varint(place, _varint(place, 0)[1])[0] for place in blocks.values()) > len(data):
        raise ValueError
    return {key: value for place in blocks.values() for key, value in _read_block(data, place).items()}


def _read_block(data: bytes, place: bytes) -> dict[bytes, bytes]:
    """Return the entries of a block; a key is stored without what it shares with the key before it."""
    start, at = _varint(place, 0)
    size, _ = _varint(place, at)
    block = data[start : start + size]
    behind = data[start + size : start + size + _TRAILER_BYTES]
    if behind != b"\0" + _checksum(np.frombuffer(block + b"\0", np.uint8)):  # 0: TensorFlow never compresses an index
        raise ValueError
    end = size - 4 * (1 + int.from_bytes(block[-4:], "little"))  # behind it are the places of some entries
    entries, key, at = {}, b"", 0
    while at < end:
        shared, at = _varint(block, at)
        n_key, at = _varint(block, at)
        n_value, at = _varint(block, at)
        if shared > len(key) or shared + n_key > _MOST_KEY_BYTES or at + n_key + n_value > end:
            raise ValueError
        key = key[:shared] + block[at : at + n_key]
        entries[key] = block[at + n_key : at + n_key + n_value]
        at += n_key + n_value
    return entries


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at a byte, seven bits in each, and where the next thing begins."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
        if shift > 63:
            raise ValueError


def _parse(message: int | bytes) -> Fields:
    """Return the values of a protocol buffer's fields by their numbers."""
    if not isinstance(message, bytes):
        raise TypeError
    fields: Fields = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            fields.setdefault(tag >> 3, []).append(value)
            continue
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(message):
            raise ValueError
        fields.setdefault(tag >> 3, []).append(message[at : at + size])
        at += size
    return fields


def _number(fields: Fields, field: int) -> int:
    """Return a field that is a whole number, 0 if it is absent."""
    number = fields.get(field, [0])[-1]
    if not isinstance(number, int):
        raise TypeError
    return number


def _checksum(data: UInt8[np.ndarray, " bytes"]) -> bytes:
    """Return the CRC-32C of bytes as it is stored: masked, because the CRC of data with CRCs is weak."""
    crc = crc32c(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def crc32c(data: UInt8[np.ndarray, " bytes"]) -> int:
    """Return the CRC-32C of bytes, computed in many lanes at once and then joined: CRCs are linear."""
    tables, crc = _crc_tables(), 0xFFFFFFFF
    n_words = len(data) // (4 * _CRC_LANES)
    if n_words:
        words = data[: 4 * _CRC_LANES * n_words].view("<u4").reshape(_CRC_LANES, n_words)
        lanes = np.zeros(_CRC_LANES, np.uint32)
        lanes[0] = crc
        behind = np.uint32(1) << np.arange(32, dtype=np.uint32)  # what a lane's length of zeros makes of each bit
        for i in range(n_words):
            lanes = _add_word(tables, lanes ^ words[:, i])
            behind = _add_word(tables, behind)
        while len(lanes) > 1:
            lanes = _combine(behind, lanes[::2]) ^ lanes[1::2]
            behind = _combine(behind, behind)
        crc = int(lanes[0])
    for byte in data[4 * _CRC_LANES * n_words :].tolist():
        crc = int(tables[0][(crc ^ byte) & 255]) ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_tables() -> list[np.ndarray]:
    """Return what a byte becomes behind which 0, 1, 2 and 3 bytes follow."""
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ np.uint32(0x82F63B78) * (table & 1)
    tables = [table]
    for _ in range(3):
        tables.append(table[tables[-1] & 255] ^ tables[-1] >> 8)
    return tables


def _add_word(tables: list[np.ndarray], crcs: np.ndarray) -> np.ndarray:
    return tables[3][crcs & 255] ^ tables[2][crcs >> 8 & 255] ^ tables[1][crcs >> 16 & 255] ^ tables[0][crcs >> 24]


def _combine(behind: np.ndarray, crcs: np.ndarray) -> np.ndarray:
    bits = crcs[:, None] >> np.arange(32, dtype=np.uint32) & 1
    return np.bitwise_xor.reduce(behind * bits, axis=1)
