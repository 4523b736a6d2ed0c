"""A params tree, or a part of one, as one safetensors file: each leaf under its path, with its SHA-256."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import user_path

Params = dict[str, Any]

DIGESTS = "sha256"


def write_tree(file: Path, tree: Params) -> Path:
    """Write a tree of arrays; the file is there whole, or not at all."""
    # Not ascontiguousarray, which makes a scalar an array of one.
    tensors = {path: np.asarray(leaf, order="C") for path, leaf in flatten_dict(tree, sep="/").items()}
    write_tensors(file, tensors, {})
    return file


def write_tensors(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write tensors with a SHA-256 each, and texts beside them as ``metadata``, in one step.

    Raises:
        OSError: a place that cannot be written, or is full.
    """
    digests = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
    partial = file.with_name(f"{file.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # safetensors makes a file that only its owner can read
    try:
        save_file(tensors, partial, {**metadata, DIGESTS: json.dumps(digests)})
    except SafetensorError as error:  # a full disk, for one: it says which only in words
        partial.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from None
    partial.chmod(mode)
    with partial.open("r+b") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)


def read_tree(file: Path) -> Params:
    """Read what :func:`write_tree` wrote, as NumPy arrays.

    Raises:
        MissingInputError: no such file.
        InputError: another file, or a damaged one.
    """
    file = user_path(file)
    if not file.is_file():
        raise MissingInputError(f"{file}: no such file; expected parameters that slm_jax wrote: restore it")
    try:
        with safe_open(file, "numpy") as tensors:
            digests = json.loads((tensors.metadata() or {})[DIGESTS])
            flat = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read as parameters of slm_jax ({error}); restore or make it again"
        ) from None
    for name, leaf in flat.items():
        if hashlib.sha256(_bytes(leaf)).hexdigest() != digests.get(name):
            raise InputError(f"{file}: {name} is damaged: its SHA-256 is not the one noted; restore the file")
    if missing := sorted(digests.keys() - flat.keys()):
        raise InputError(f"{file}: {missing[0]} is missing; restore the file")
    return unflatten_dict(flat, sep="/")


def tree_fingerprint(file: Path) -> str:
    """Return a SHA-256 over what a file says of its leaves' contents; :func:`read_tree` checks that it is true.

    Raises:
        InputError: a file that cannot be read as parameters of slm_jax.
    """
    try:
        with safe_open(file, "numpy") as tensors:
            return hashlib.sha256((tensors.metadata() or {})[DIGESTS].encode()).hexdigest()
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{file}: cannot be read as parameters of slm_jax ({error}); restore it") from None


def _bytes(tensor: np.ndarray) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
