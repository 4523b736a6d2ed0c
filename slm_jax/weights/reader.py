"""Weights of any format to a configuration and a params tree: recognised, checked and read in the same way."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from slm_jax.errors import InputError, located
from slm_jax.files import parse_json, read_json
from slm_jax.model import PRESETS, GPTConfig, Params, param_shapes
from slm_jax.nn.axes import HEAD
from slm_jax.nn.sharding import spread
from slm_jax.weights.names import TOKENS, Format, Slot, leaf_shapes
from slm_jax.weights.registry import describe, formats
from slm_jax.weights.tensor_files import (
    AGAIN,
    FLOATS,
    OURS,
    OURS_FIELDS,
    Ours,
    Tensor,
    TensorFiles,
    find_file,
    open_tensors,
)
from slm_jax.weights.trees import DIGESTS


def read_weights(
    path: Path, n_heads: int | None, dtype: Any, param_dtype: Any, sharding: Any = None
) -> tuple[GPTConfig, Params]:
    """Read weights of any format; arguments as for :func:`slm_jax.runs.load_pretrained`."""
    cfg, files, names, digests = _open(path, n_heads, dtype, param_dtype)
    sharding = spread(sharding, param_shapes(cfg))
    return cfg, _read(files, names, digests, leaf_shapes(cfg), cfg.param_dtype, sharding)


def read_config(path: Path) -> GPTConfig:
    """Return the configuration of weights of any format without reading their values."""
    return _open(path, None, "float32", "float32")[0]


def _open(
    path: Path, n_heads: int | None, dtype: Any, param_dtype: Any
) -> tuple[GPTConfig, TensorFiles, Mapping[str, Slot], dict[str, str]]:
    """Return the configuration, the checked tensors, where each belongs, and their SHA-256 if they are stated."""
    form, files = _recognise(open_tensors(find_file(path)))
    if form.class_head in files.tensors:
        raise InputError(f"{files.file}: a classifier (tensor {form.class_head}); expected a language model")
    stated, digests = _our_metadata(files)
    fields, files = _fields(form, files, stated)
    with located(files.file):
        cfg = GPTConfig(**{"n_heads": 1, **fields, "dtype": dtype, "param_dtype": param_dtype})
        names, shapes = form.read_names(cfg, files), leaf_shapes(cfg)
    # If the number of heads isn't stated, the tensors' shapes don't depend on it; check them before asking for it.
    _check_tensors(files, {name: slot.shape(shapes) for name, slot in names.items()}, form.title)
    with located(files.file):
        return dataclasses.replace(cfg, n_heads=_heads(fields, n_heads)), files, names, digests


def _recognise(files: TensorFiles) -> tuple[Format, TensorFiles]:
    if files.form is not None:
        return files.form, files
    config = files.file.parent / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    for form in formats():
        if model_type not in (None, form.model_type):
            continue
        names = {name: new for name in files.tensors if (new := form.clean(name)) is not None}
        cleaned = dataclasses.replace(files, tensors={new: files.tensors[name] for name, new in names.items()})
        if form.recognise(cleaned):
            for name, new in names.items():
                if cleaned.tensors[new].name != name:
                    raise InputError(f"{files.file}: tensor {new} is there twice, also as {name}; expected it once")
            return form, cleaned
    titles = ", ".join(form.title for form in formats())
    raise InputError(f"{files.file}: {describe(files.tensors, model_type)}; expected the weights of {titles}")


def _our_metadata(files: TensorFiles) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields and the SHA-256 digests that our own exports state as JSON; nothing for other files."""
    if OURS not in files.metadata:
        return {}, {}
    content = parse_json(files.metadata[OURS], f"{files.file}: metadata {OURS!r}", AGAIN, Ours)
    digests = parse_json(files.metadata.get(DIGESTS, ""), f"{files.file}: metadata {DIGESTS!r}", AGAIN, dict[str, str])
    return {name: content[name] for name in OURS_FIELDS}, digests


def _fields(form: Format, files: TensorFiles, ours: dict[str, Any]) -> tuple[dict[str, Any], TensorFiles]:
    """Return the GPTConfig fields, and the tensors without a head that only repeats the embedding."""
    stated = {**ours, **form.stated_fields(files)}
    seen = form.tensor_fields(files)
    for field, value in seen.items():
        if stated.get(field, value) != value:
            raise InputError(f"{files.file}: {field} is {stated[field]!r} as stated, but {value!r} by its tensors")
    fields = {**stated, **seen}
    if "tie_weights" not in fields:
        tensors = dict(files.tensors)
        head = tensors.pop(form.name_of(HEAD), None)
        fields["tie_weights"] = head is None or _equal(head, tensors.get(form.name_of(TOKENS)))
        if fields["tie_weights"]:
            files = dataclasses.replace(files, tensors=tensors)
    if fields.get("vocab_size") == 50_304:
        fields.setdefault("unpadded_vocab_size", 50_257)  # GPT-2's, padded as nanoGPT does
    return fields, files


def _heads(fields: Mapping[str, Any], given: int | None) -> int:
    """Return the number of heads, which no shape determines: stated, given, or that of the GPT-2 of this shape."""
    shape = (fields.get("emb_dim"), fields.get("n_layers"))
    presets = {(p["emb_dim"], p["n_layers"]): p["n_heads"] for name, p in PRESETS.items() if name.startswith("gpt2")}
    stated = fields.get("n_heads", given)
    if given not in (None, stated):
        raise InputError(f"n_heads is given as {given}, but the weights' configuration states {stated}")
    heads = presets.get(shape) if stated is None else stated
    if heads is None:
        raise InputError("the number of attention heads is not stated; pass n_heads")
    if type(heads) is not int:
        raise InputError(f"n_heads is {heads!r}; expected a whole number")
    return heads


def _equal(left: Tensor, right: Tensor | None) -> bool:
    kind = (left.shape, left.dtype)
    if right is None or kind != (right.shape, right.dtype) or len(left.shape) != 2 or left.dtype not in FLOATS:
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(left.chunks(), right.chunks(), strict=True))


def _check_tensors(files: TensorFiles, expected: Mapping[str, tuple[int, ...]], title: str) -> None:
    missing = [name for name in expected if name not in files.tensors]
    unknown = [tensor.name for name, tensor in files.tensors.items() if name not in expected]
    for names, problem in ((missing, "missing"), (unknown, f"unknown to {title}")):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{files.file}: tensors {problem}: {', '.join(names[:3])}{rest}; {AGAIN}")
    for name, shape in expected.items():
        tensor = files.tensors[name]
        if tensor.shape != shape:
            raise InputError(f"{tensor.file}: tensor {tensor.name} has the shape {tensor.shape}; expected {shape}")
        if tensor.dtype not in FLOATS:
            raise InputError(f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}; expected {', '.join(FLOATS)}")


def _read(
    files: TensorFiles,
    names: Mapping[str, Slot],
    digests: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    sharding: Any,
) -> Params:
    place = _placement(sharding, shapes)
    # Leaves that share a tensor are read together. The largest come first, while little else is in memory: that bounds
    # the peak where a device makes a copy.
    groups = {slot.paths for slot in names.values()}
    placed = {}
    for paths in sorted(groups, key=lambda paths: (-sum(math.prod(shapes[path]) for path in paths), paths)):
        leaves = {path: _aligned(shapes[path], np.dtype(dtype)) for path in paths}
        for name, slot in names.items():
            if slot.paths == paths:
                _fill(leaves, slot, files.tensors[name], digests)
        for path in paths:
            placed[path] = jax.block_until_ready(place(path, leaves.pop(path)))
    for path in shapes.keys() - placed.keys():  # no tensor fills it
        placed[path] = place(path, np.zeros(shapes[path], np.dtype(dtype)))
    return unflatten_dict(placed, sep="/")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Make an array at a multiple of 64 bytes, which JAX's CPU device uses without a copy."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + n_bytes].view(dtype).reshape(shape)


def _fill(leaves: Mapping[str, np.ndarray], slot: Slot, tensor: Tensor, digests: Mapping[str, str]) -> None:
    """Copy a tensor to its place, converted, and check every value."""
    digest = hashlib.sha256()
    dtype = leaves[slot.paths[0]].dtype
    start = 0
    several = len(slot.paths) > 1
    for chunk in [np.concatenate(list(tensor.chunks()))] if several else tensor.chunks():
        with np.errstate(over="ignore"):
            rows = chunk.astype(dtype, copy=False)
        if not np.isfinite(rows).all():
            finite = np.isfinite(chunk).all()
            problem = f"is too large for {dtype}; use float32" if finite else "holds NaN or infinity"
            raise InputError(f"{tensor.file}: tensor {tensor.name} {problem}")
        slot.write(leaves, start, rows)
        if digests:
            digest.update(np.ascontiguousarray(chunk).view(np.uint8).data)
        start += len(chunk)
    if digests and digests.get(tensor.name) != digest.hexdigest():
        raise InputError(f"{tensor.file}: tensor {tensor.name} is damaged: its SHA-256 is wrong; {AGAIN}")


def _placement(sharding: Any, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str, np.ndarray], jax.Array]:
    if sharding is None:
        return lambda path, leaf: jax.device_put(leaf)
    tree = isinstance(sharding, Mapping)
    by_path = flatten_dict(sharding, sep="/") if tree else dict.fromkeys(shapes, sharding)
    if missing := sorted(set(shapes) - set(by_path)):
        raise InputError(f"sharding has no {missing[0]}; expected one for each leaf of the params tree, or one for all")
    # Each process places its own parts; device_put would first compare the whole leaf between processes.
    return lambda path, leaf: jax.make_array_from_callback(leaf.shape, by_path[path], lambda index: leaf[index])
