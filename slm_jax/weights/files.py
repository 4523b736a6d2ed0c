"""Files of tensors: safetensors, one or in shards, and PyTorch's pickles, told apart by their content."""

import dataclasses
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import read_json

INDEX = "model.safetensors.index.json"
OURS = "slm_jax"  # the key of what our own exports state in their metadata
CHUNK_BYTES = 16 << 20
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
FLOATS = tuple(_DTYPES.values())
AGAIN = "download or export it again"
_WRONG_KIND = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights; fetch them with: git lfs pull"),
    (
        (b"<!doctype", b"<html", b"<head", b"<!--"),
        "is an HTML page, not weights; download the file itself, not the page that shows it",
    ),
    (b"gguf", "is a GGUF file, which slm_jax does not read; expected safetensors or a PyTorch file"),
    (b"\x89hdf", "is an HDF5 file of TensorFlow, which slm_jax does not read; expected safetensors or a PyTorch file"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is asked for, a few rows at a time.

    Attributes:
        file: where it is.
        name: as the file has it.
        shape: its shape.
        dtype: NumPy's name of its dtype, or the file's name of one that is no float.
        rows: gives, for as long as it is open, what slices of the first axis can be taken from.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[], AbstractContextManager[Any]]

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the tensor in order of its first axis; mapped pages are let go at the end."""
        n_rows = self.shape[0]
        step = max(1, CHUNK_BYTES // max(1, 8 * math.prod(self.shape[1:])))
        with self.rows() as rows:
            for start in range(0, n_rows, step):
                yield rows[start : min(start + step, n_rows)]


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """All tensors of a model.

    Attributes:
        file: the file that holds them or lists their shards.
        tensors: by their names in the files.
        metadata: the text that safetensors files carry.
        model_args: nanoGPT's configuration.

    Raises:
        InputError: a tensor's name that cannot be printed.
    """

    file: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.tensors:
            if not name.isprintable():  # it would break up the errors that name it
                raise InputError(f"{self.file}: a tensor is called {name!r}; expected the names of a GPT-2: {AGAIN}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def find_file(path: Path) -> Path:
    """Return the file that holds a folder's weights (or lists their shards), or the path itself if it is a file.

    Raises:
        MissingInputError: neither a file nor a folder with weights.
        InputError: a folder whose weights are in a form that is not read.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingInputError(f"{path}: no such file or folder; expected weights, a run, or a name such as gpt2")
    for name in ("model.safetensors", INDEX, "pytorch_model.bin", "ckpt.pt"):
        if (path / name).is_file():
            return path / name
    for name in ("pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.ckpt.index"):
        if (path / name).is_file():
            raise InputError(
                f"{path / name}: slm_jax does not read this form; convert it to model.safetensors (load it with "
                "transformers and call save_pretrained)"
            )
    raise MissingInputError(
        f"{path}: no weights in this folder; expected model.safetensors, {INDEX}, pytorch_model.bin, ckpt.pt, "
        "or a run's checkpoints"
    )


def open_tensors(file: Path) -> TensorFiles:
    """Open a safetensors file, an index of shards or a PyTorch file; no tensor is read yet.

    Raises:
        MissingInputError: a shard is missing.
        InputError: a damaged file, another kind of file, a pickle without PyTorch to read it.
    """
    try:
        if file.name.endswith(".index.json"):
            return _open_shards(file)
        with file.open("rb") as stream:
            start = stream.read(64)
        if start[8:9] == b"{":  # first: a header's length may begin with any bytes, a pickle's included
            return TensorFiles(file, *_open_safetensors(file))
        if start.startswith((b"PK\x03\x04", b"\x80")):
            return _open_torch(file)
    except MissingInputError:  # an OSError, too
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not start:
        raise InputError(f"{file}: the file is empty (0 bytes); {AGAIN}")
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, message in _WRONG_KIND:
        if start.startswith(magic):
            raise InputError(f"{file}: this {message}")
    raise InputError(f"{file}: neither a safetensors nor a PyTorch file; {AGAIN}")


def _open_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "numpy") as opened:
            tensors = {}
            for name in opened.keys():  # noqa: SIM118 - not a dict
                rows = opened.get_slice(name)
                dtype = _DTYPES.get(rows.get_dtype(), rows.get_dtype())
                tensors[name] = Tensor(file, name, tuple(rows.get_shape()), dtype, partial(_mapped, file, name))
            return tensors, dict(opened.metadata() or {})
    except SafetensorError as error:
        cause = " ".join(str(error).split())
        raise InputError(f"{file}: a damaged safetensors file ({cause}); {AGAIN}") from None


@contextmanager
def _mapped(file: Path, name: str) -> Iterator[Any]:
    with safe_open(file, "numpy") as opened:
        yield opened.get_slice(name)


def _open_shards(index: Path) -> TensorFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map of tensors to files in it; {AGAIN}")
    for name, shard in weight_map.items():
        valid = isinstance(shard, str) and re.fullmatch(r"[^/\\:]+\.safetensors", shard) and shard.isprintable()
        if not valid or not name.isprintable():
            raise InputError(
                f"{index}: weight_map has {shard!r} for {name!r}; expected a .safetensors file in the same folder"
            )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not (index.parent / shard).is_file():
            raise MissingInputError(f"{index.parent / shard}: this shard is missing; {index.name} lists it")
        found = open_tensors(index.parent / shard)
        for name, tensor in found.tensors.items():
            if name in tensors:
                raise InputError(f"{tensor.file}: tensor {name} is in {tensors[name].file.name}, too; expected it once")
            tensors[name] = tensor
        metadata |= found.metadata
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise InputError(
                f"{index.parent / shard}: tensor {name} is not in it, though {index.name} says so; {AGAIN}"
            )
    return TensorFiles(index, tensors, metadata)


def _open_torch(file: Path) -> TensorFiles:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{file}: a pickle, which only PyTorch can read safely; install it (pip install -e '.[torch]') "
            "or convert the file to safetensors"
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        raise InputError(  # CVE-2025-32434
            f"{file}: PyTorch {torch.__version__} does not read pickles safely; expected 2.6 or later: "
            "pip install -U torch"
        )
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    if zipped:
        _check_crc(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PyTorch's own format, of before 1.6, cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of any kind: unpickling runs into whatever the bytes lead to
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds objects ({unsafe[1]}), which may run code" if unsafe else "it is damaged or no state dict"
        raise InputError(
            f"{file}: PyTorch does not load it with weights_only=True: {reason}; save model.state_dict(), or use "
            "safetensors"
        ) from None
    model_args = content.get("model_args") if isinstance(content, dict) else None
    for key in ("model", "model_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(f"{file}: no state dict in it; expected a dict of tensors: save model.state_dict()")
    tensors = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor; save model.state_dict()")
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise InputError(f"{file}: tensor {name} is sparse, nested or without values; save it dense: to_dense()")
        dtype = str(value.dtype).removeprefix("torch.")
        rows = _torch_rows(value) if dtype in FLOATS else None
        tensors[str(name)] = Tensor(file, str(name), tuple(value.shape), dtype, partial(nullcontext, rows))
    return TensorFiles(file, tensors, {}, model_args if isinstance(model_args, dict) else {})


def _check_crc(file: Path) -> None:
    """Refuse a zip file of which a bit has flipped: PyTorch does not look."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception:  # of any kind: whatever the bytes lead to
        damaged = "its list of contents"
    if damaged:
        raise InputError(f"{file}: damaged: {damaged!r} in it is not as it was written; {AGAIN}")


def _torch_rows(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy has none: the same bits
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16.dtype)
    return tensor.numpy()
