"""A params tree, or a part of one, as a safetensors file: every leaf is stored under its path with its SHA-256."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import parse_json, user_path

Params = dict[str, Any]

DIGESTS = "sha256"  # metadata key


def write_tree(file: Path, tree: Params) -> Path:
    """Write a tree of arrays in one step: the file is complete, or absent."""
    # np.ascontiguousarray would turn a scalar into an array of one.
    tensors = {path: np.asarray(leaf, order="C") for path, leaf in flatten_dict(tree, sep="/").items()}
    write_tensors(file, tensors, {})
    return file


def write_tensors(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write tensors with their SHA-256 digests and further text ``metadata`` in one step."""
    digests = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
    partial = file.with_name(f"{file.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # safetensors creates a file that only its owner can read
    try:
        save_file(tensors, partial, {**metadata, DIGESTS: json.dumps(digests)})
    except SafetensorError as error:  # a full disk, for example: the text says so
        partial.unlink(missing_ok=True)
        raise OSError(errno.EIO, " ".join(str(error).split()), str(file)) from None
    partial.chmod(mode)
    with partial.open("r+b") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)


def read_tree(file: Path) -> Params:
    """Read a file of :func:`write_tree` as NumPy arrays."""
    file = user_path(file)
    if not file.is_file():
        raise MissingInputError(f"{file}: no such file; expected parameters that slm_jax wrote")
    with _opened(file) as (tensors, text):
        digests = parse_json(text, f"{file}: metadata {DIGESTS!r}", "restore the file", dict[str, str])
        flat = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        for name in sorted(flat.keys() | digests.keys()):
            if name not in flat or hashlib.sha256(_bytes(flat[name])).hexdigest() != digests.get(name):
                raise InputError(f"{file}: {name} is {'damaged' if name in flat else 'missing'}; restore the file")
    return unflatten_dict(flat, sep="/")


def tree_fingerprint(file: Path) -> str:
    """Return a SHA-256 of the digests of a file's leaves, which :func:`read_tree` verifies."""
    with _opened(file) as (_, text):
        return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, str]]:
    try:
        with safe_open(file, "numpy") as tensors:
            yield tensors, (tensors.metadata() or {})[DIGESTS]
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{file}: cannot be read as parameters of slm_jax ({error}); restore the file") from None


def _bytes(tensor: np.ndarray) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
