"""Foreign weights to ours: recognised, checked and read the same way whatever the format."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from slm_jax.errors import InputError
from slm_jax.files import read_json
from slm_jax.model import PRESETS, GPTConfig, Params
from slm_jax.weights import book, huggingface, nanogpt
from slm_jax.weights.files import AGAIN, FLOATS, OURS, Tensor, TensorFiles, find_file, open_tensors
from slm_jax.weights.foreign import describe
from slm_jax.weights.names import NameMap, Slot, largest_first, leaf_shapes
from slm_jax.weights.trees import DIGESTS

OURS_FIELDS = ("n_heads", "drop_rate", "exact_gelu", "unpadded_vocab_size")


@runtime_checkable  # for the tests, which check every annotation
class Format(Protocol):
    """What each foreign format's module has."""

    NAME: str
    EMBEDDING: str
    POSITIONS: str
    HEAD: str

    def clean(self, name: str) -> str | None:
        """Return a tensor's name as the map has it; None for a buffer that is no weight."""

    def recognise(self, files: TensorFiles) -> bool:
        """Whether these tensors, cleaned, are of this format."""

    def shapes(self, files: TensorFiles) -> dict[str, Any]:
        """Return the GPTConfig fields that the tensors tell."""

    def stated(self, files: TensorFiles) -> dict[str, Any]:
        """Return the GPTConfig fields that are stated beside the tensors."""

    def names(self, cfg: GPTConfig) -> NameMap:
        """Return the name map of a model."""


FORMATS: dict[str, Format] = {"huggingface": huggingface, "nanogpt": nanogpt, "book": book}


def read_weights(
    path: Path, n_heads: int | None, dtype: Any, param_dtype: Any, sharding: Any = None
) -> tuple[GPTConfig, Params]:
    """Read weights of any foreign format; arguments and errors are those of ``load_gpt2``.

    Raises:
        InputError: weights that are not GPT-2's, incomplete or damaged.
    """
    files = open_tensors(find_file(path))
    form, files = _recognise(files)
    fields, files = _fields(form, files)
    try:
        cfg = GPTConfig(**{**fields, "n_heads": 1, "dtype": dtype, "param_dtype": param_dtype})
        name_map = form.names(cfg)
        shapes = leaf_shapes(cfg)
    except InputError as error:
        raise InputError(f"{files.file}: {error}") from None
    # First the shapes, which do not depend on the heads: who is asked for their number has a GPT-2.
    _check(form, files, {name: slot.shape(shapes) for name, slot in name_map.items()})
    try:
        cfg = dataclasses.replace(cfg, n_heads=_heads(fields, n_heads))
    except InputError as error:
        raise InputError(f"{files.file}: {error}") from None
    return cfg, _read(files, name_map, leaf_shapes(cfg), cfg.param_dtype, sharding)


def _bare(name: str) -> str:
    """Take off what torch.compile and data parallelism put in front of a name."""
    return re.sub(r"^(_orig_mod\.|module\.)+", "", name)


def _recognise(files: TensorFiles) -> tuple[Format, TensorFiles]:
    config = files.file.parent / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    for form in FORMATS.values() if model_type in (None, "gpt2") else ():
        cleaned: dict[str, Tensor] = {}
        twice = None
        for name, tensor in files.tensors.items():
            new = form.clean(_bare(name))
            if new in cleaned:
                twice = f"{tensor.file}: tensors {cleaned[new].name} and {name} are the same; expected {new} once"
            elif new is not None:
                cleaned[new] = tensor
        if form.recognise(dataclasses.replace(files, tensors=cleaned)):
            if twice:
                raise InputError(twice)
            return form, dataclasses.replace(files, tensors=cleaned)
    raise InputError(
        f"{files.file}: not GPT-2 but {describe(map(_bare, files.tensors), model_type)}; expected the weights of a "
        "GPT-2 in the names of Hugging Face, nanoGPT or the book"
    )


def _fields(form: Format, files: TensorFiles) -> tuple[dict[str, Any], TensorFiles]:
    """Return the GPTConfig fields; a head that only repeats the embedding is taken out of the tensors."""
    ours = _our_metadata(files)
    stated, seen = {**ours, **form.stated(files)}, form.shapes(files)
    for field, value in seen.items():
        if field in stated and stated[field] != value:
            raise InputError(
                f"{files.file}: its configuration states {field} {stated[field]!r} and its tensors have {value!r}; "
                "they do not belong together"
            )
    fields = {**stated, **seen}
    if "tie_weights" not in fields:
        head = files.tensors.get(form.HEAD)
        fields["tie_weights"] = head is None or _equal(head, files.tensors.get(form.EMBEDDING))
        if fields["tie_weights"]:
            rest = {name: tensor for name, tensor in files.tensors.items() if name != form.HEAD}
            files = dataclasses.replace(files, tensors=rest)
    _check_found(files, form, fields)
    if fields.get("vocab_size") == 50_304 and "unpadded_vocab_size" not in fields:
        fields["unpadded_vocab_size"] = 50_257  # GPT-2's, rounded up as nanoGPT does
    return fields, files


def _check_found(files: TensorFiles, form: Format, fields: Mapping[str, Any]) -> None:
    """Refuse tensors that leave a size open, for which there would be no other to check them by."""
    for field, name in (("emb_dim", form.EMBEDDING), ("context_length", form.POSITIONS)):
        if not fields.get(field):
            found = files.tensors.get(name)
            problem = "is missing" if found is None else f"has the shape {found.shape}; expected two axes"
            (spelled,) = _spelled([name], form, files)
            raise InputError(f"{files.file}: tensor {spelled} {problem}: the file is incomplete or damaged; {AGAIN}")


def _spelled(names: list[str], form: Format, files: TensorFiles) -> list[str]:
    """Return names with what the file puts in front of the others."""
    fronts = [tensor.name.removesuffix(new) for new, tensor in files.tensors.items() if tensor.name.endswith(new)]
    front = max(fronts, key=len, default="")
    return [name if name == form.HEAD else front + name for name in names]


def _our_metadata(files: TensorFiles) -> dict[str, Any]:
    """Return the GPTConfig fields that our own exports carry beside the tensors."""
    if OURS not in files.metadata:
        return {}
    try:
        fields = json.loads(files.metadata[OURS])
        return {name: fields[name] for name in OURS_FIELDS}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{files.file}: the metadata {OURS!r} is damaged ({error!r}); {AGAIN}") from None


def _heads(fields: Mapping[str, Any], given: int | None) -> int:
    """Return the number of heads, which no shape tells: stated, or given, or of the GPT-2 of this shape."""
    shape = (fields.get("emb_dim"), fields.get("n_layers"))
    presets = {(p["emb_dim"], p["n_layers"]): p["n_heads"] for name, p in PRESETS.items() if name.startswith("gpt2")}
    stated = fields.get("n_heads")
    if given is not None and stated is not None and given != stated:
        raise InputError(f"n_heads is given as {given}, and the weights' configuration states {stated}; leave it out")
    heads = next((heads for heads in (stated, given, presets.get(shape)) if heads is not None), None)
    if heads is None:
        raise InputError(
            "the number of attention heads is not stated, and the shapes are of none of OpenAI's four models; "
            "pass n_heads"
        )
    if type(heads) is not int:
        raise InputError(f"n_heads is {heads!r}; expected a whole number")
    return heads


def _equal(left: Tensor, right: Tensor | None) -> bool:
    """Whether two tensors hold the same bits."""
    if (
        right is None
        or len(left.shape) != 2
        or left.shape != right.shape
        or left.dtype != right.dtype
        or left.dtype not in FLOATS
    ):
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(left.chunks(), right.chunks(), strict=True))


def _check(form: Format, files: TensorFiles, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse missing and unknown tensors, wrong shapes and dtypes."""
    if missing := _spelled([name for name in expected if name not in files.tensors], form, files):
        raise InputError(f"{files.file}: {_list('tensor', missing)} missing; the file is incomplete: {AGAIN}")
    if unknown := [tensor.name for name, tensor in files.tensors.items() if name not in expected]:
        raise InputError(
            f"{files.file}: {_list('tensor', unknown)} unknown to GPT-2; expected its {len(expected)} tensors only: "
            "take the others out, or load the file with the program that wrote it"
        )
    for name, shape in expected.items():
        tensor = files.tensors[name]
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.file}: tensor {tensor.name} has the shape {tensor.shape}; expected {shape}, "
                f"as the configuration and the other tensors have it: {AGAIN}"
            )
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}; expected one of {', '.join(FLOATS)}: "
                "use weights that are not quantised"
            )


def _list(noun: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{noun} {shown} is" if len(names) == 1 else f"{noun}s {shown} are"


def _read(
    files: TensorFiles, name_map: NameMap, shapes: Mapping[str, tuple[int, ...]], dtype: str, sharding: Any
) -> Params:
    digests = _digests(files)
    place = _placement(sharding, shapes)
    placed = {}
    for paths in largest_first(shapes, name_map):
        leaves = {path: _aligned(shapes[path], np.dtype(dtype)) for path in paths}
        for name, slot in name_map.items():
            if slot.paths == paths:
                _fill(leaves, slot, files.tensors[name], digests)
        # The largest first, while least is there: where a device makes a copy, that bounds the peak.
        for path in paths:
            placed[path] = jax.block_until_ready(place(path, leaves.pop(path)))
    return unflatten_dict(placed, sep="/")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Make an array at a multiple of 64 bytes: JAX's CPU device then takes it over without a copy."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + n_bytes].view(dtype).reshape(shape)


def _fill(leaves: Mapping[str, np.ndarray], slot: Slot, tensor: Tensor, digests: Mapping[str, str]) -> None:
    """Copy a tensor into its place, converted, and look at every value on the way."""
    digest = hashlib.sha256()
    dtype = leaves[slot.paths[0]].dtype
    start = 0
    for chunk in tensor.chunks():
        with np.errstate(over="ignore"):
            rows = chunk.astype(dtype, copy=False)
        if not np.isfinite(rows).all():
            if np.isfinite(chunk).all():
                raise InputError(f"{tensor.file}: tensor {tensor.name} is too large for {dtype}; use float32")
            raise InputError(
                f"{tensor.file}: tensor {tensor.name} holds NaN or infinity; the training diverged or the file is "
                "damaged: use another checkpoint"
            )
        slot.write(leaves, start, rows)
        if digests:
            digest.update(np.ascontiguousarray(chunk).view(np.uint8).data)
        start += len(chunk)
    if digests and digests.get(tensor.name) != digest.hexdigest():
        raise InputError(
            f"{tensor.file}: tensor {tensor.name} is damaged: its SHA-256 is not the one noted when it was written; "
            f"{AGAIN}"
        )


def _digests(files: TensorFiles) -> dict[str, str]:
    """Return the SHA-256 of every tensor, which our own exports carry; of others nothing."""
    if OURS not in files.metadata:
        return {}
    try:
        digests = json.loads(files.metadata[DIGESTS])
    except (KeyError, ValueError, RecursionError):
        digests = None
    if not isinstance(digests, dict) or not digests:
        raise InputError(f"{files.file}: the metadata {DIGESTS!r} is damaged; {AGAIN}")
    return digests


def _placement(sharding: Any, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str, np.ndarray], jax.Array]:
    if sharding is None:
        return lambda path, leaf: jax.device_put(leaf)
    tree = isinstance(sharding, Mapping)
    by_path = flatten_dict(sharding, sep="/") if tree else dict.fromkeys(shapes, sharding)
    if missing := sorted(set(shapes) - set(by_path)):
        raise InputError(f"sharding has no {missing[0]}; expected one for each leaf of the params tree, or one for all")
    # Each process places its own parts; device_put would first compare the whole leaf between them.
    return lambda path, leaf: jax.make_array_from_callback(leaf.shape, by_path[path], lambda index: leaf[index])
