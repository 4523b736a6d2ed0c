"""Files of tensors: safetensors (one file, or shards with an index) and PyTorch's pickles, recognised by content."""

import dataclasses
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import read_json
from slm_jax.tokenizer.gguf_header import MAGIC

if TYPE_CHECKING:
    from slm_jax.weights.names import Format

INDEX = "model.safetensors.index.json"
AGAIN = "download or export it again"
OURS = "slm_jax"  # metadata key of what our own exports state about the model
CHUNK_BYTES = 16 << 20
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
FLOATS = tuple(_DTYPES.values())
_READABLE = (
    *("model.safetensors", INDEX, "pytorch_model.bin", "ckpt.pt", "flax_model.msgpack", "model.ckpt.index"),
    "model.gguf",
)
_WRONG_KIND = {
    b"version https://git-lfs": "a git-lfs pointer; fetch the weights with: git lfs pull",
    **dict.fromkeys((b"<!doctype", b"<html", b"<head", b"<!--"), "an HTML page; download the file itself"),
}


class Ours(TypedDict):
    """Fields of GPTConfig that our own exports state."""

    n_heads: int
    drop_rate: float
    exact_gelu: bool
    unpadded_vocab_size: int | None


OURS_FIELDS = tuple(Ours.__annotations__)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read on demand, a few rows at a time."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # NumPy's name; the file's own if it is not a float
    rows: Callable[[], AbstractContextManager[Any]]  # opens the tensor, so that slices of its first axis can be read

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the tensor in slices of its first axis; mapped pages are released at the end."""
        step = max(1, CHUNK_BYTES // max(1, 8 * math.prod(self.shape[1:])))
        with self.rows() as rows:
            for start in range(0, self.shape[0], step):
                yield rows[start : min(start + step, self.shape[0])]


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """All tensors of a model by name."""

    file: Path  # that holds the tensors, or the index that lists their shards
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of safetensors files
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)  # nanoGPT's configuration; GGUF's metadata
    form: "Format | None" = None  # the format, where the kind of file determines it


def find_file(path: Path) -> Path:
    """Return the file that holds a folder's weights (or lists their shards), or the path itself if it is a file."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingInputError(f"{path}: no such file or folder; expected weights, a run, or a name such as gpt2")
    for name in _READABLE:
        if (path / name).is_file():
            return path / name
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path}: a LoRA adapter (PEFT) without its base model; save merge_and_unload() of the model")
    raise MissingInputError(f"{path}: no weights in this folder; expected {', '.join(_READABLE)}, or a run")


def open_tensors(file: Path) -> TensorFiles:
    """Open a safetensors file, an index of shards or a PyTorch file without reading any tensor."""
    try:
        files = _open_shards(file) if file.name.endswith(".index.json") else _open_file(file)
    except MissingInputError:  # also an OSError
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    for name in files.tensors:
        if not name.isprintable():  # error messages of one line show names
            raise InputError(f"{file}: a tensor is called {name!r}; expected a printable name")
    return files


def _open_file(file: Path) -> TensorFiles:
    from slm_jax.weights import flax_msgpack, gguf, llama2c, llmc, tensor_bundle

    with file.open("rb") as stream:
        start = stream.read(64)
    if file.suffix == ".index":
        return tensor_bundle.open_bundle(file)
    if file.suffix == ".msgpack":
        return flax_msgpack.open_file(file)
    if start.startswith(llmc.MAGIC):
        return llmc.open_file(file)
    if start.startswith(MAGIC):
        return gguf.open_gguf(file)
    if start[8:9] == b"{":  # checked first: the header's length may begin with any bytes, even a pickle's
        return _open_safetensors(file)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _open_torch(file, zipped=start.startswith(b"PK"))
    if not start:
        raise InputError(f"{file}: the file is empty (0 bytes); {AGAIN}")
    llama2c.check_version(file, start)
    if llama2c.is_llama2c(start):
        return llama2c.open_llama2c(file)
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = next((kind for magic, kind in _WRONG_KIND.items() if start.startswith(magic)), None)
    raise InputError(f"{file}: {kind or f'neither safetensors nor GGUF, nor a PyTorch file; {AGAIN}'}")


def _open_safetensors(file: Path) -> TensorFiles:
    try:
        with safe_open(file, "numpy") as opened:
            tensors = {}
            for name in opened.keys():  # noqa: SIM118 - not a dict
                rows = opened.get_slice(name)
                dtype = _DTYPES.get(rows.get_dtype(), rows.get_dtype())
                tensors[name] = Tensor(file, name, tuple(rows.get_shape()), dtype, partial(_mapped, file, name))
            return TensorFiles(file, tensors, dict(opened.metadata() or {}))
    except SafetensorError as error:
        raise InputError(f"{file}: a damaged safetensors file ({' '.join(str(error).split())}); {AGAIN}") from None


@contextmanager
def _mapped(file: Path, name: str) -> Iterator[Any]:
    with safe_open(file, "numpy") as opened:
        yield opened.get_slice(name)


class _Index(TypedDict):
    weight_map: dict[str, str]


def shard_names(index: Path) -> list[str]:
    """Return the names of the shards that an index lists."""
    return list(dict.fromkeys(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, AGAIN, _Index)["weight_map"]
    if not weight_map:
        raise InputError(f"{index}: weight_map is empty; {AGAIN}")
    for name, shard in weight_map.items():
        if not re.fullmatch(r"[\w .-]+\.safetensors", shard) or not name.isprintable():
            raise InputError(f"{index}: weight_map has {shard!r} for {name!r}; expected a file beside the index")
    return weight_map


def _open_shards(index: Path) -> TensorFiles:
    weight_map = _weight_map(index)
    files = TensorFiles(index, {})
    for shard in dict.fromkeys(weight_map.values()):
        if not (index.parent / shard).is_file():
            raise MissingInputError(f"{index.parent / shard}: this shard is missing; {index.name} lists it")
        found = open_tensors(index.parent / shard)
        expected = {name for name, file in weight_map.items() if file == shard}
        if wrong := sorted(expected ^ found.tensors.keys()):
            verb = "lacks" if wrong[0] in expected else "holds"
            raise InputError(f"{found.file}: {verb} tensor {wrong[0]}, unlike what {index.name} lists; {AGAIN}")
        files.tensors.update(found.tensors)
        files.metadata.update(found.metadata)
    return files


def _open_torch(file: Path, zipped: bool) -> TensorFiles:
    try:
        import torch
    except ImportError:
        remedy = "pip install 'slm_jax[torch]', or convert it to safetensors"
        raise InputError(f"{file}: reading a pickle needs PyTorch: {remedy}") from None
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):  # CVE-2025-32434
        raise InputError(f"{file}: PyTorch {torch.__version__} cannot read pickles safely; expected 2.6 or later")
    if zipped:
        _check_crc(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The format that PyTorch wrote before 1.6 cannot be memory-mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of any type: it depends on the bytes
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds objects ({unsafe[1]}), which may run code" if unsafe else "it is damaged or no state dict"
        raise InputError(f"{file}: torch.load(weights_only=True) fails: {reason}; expected a state dict") from None
    content = content if isinstance(content, dict) else {}
    model_args = content.get("model_args")
    for key in ("model", "model_state_dict", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not content:
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
    return TensorFiles(file, tensors, model_args=model_args if isinstance(model_args, dict) else {})


def _check_crc(file: Path) -> None:
    """Refuse a zip file with a flipped bit; PyTorch does not check."""
    try:
        with zipfile.ZipFile(file) as archive:
            n_bytes = sum(info.file_size for info in archive.infolist())
            # PyTorch compresses nothing.
            damaged = "its directory" if n_bytes > file.stat().st_size else archive.testzip()
    except OSError:
        raise
    except Exception:  # of any type: it depends on the bytes
        damaged = "its directory"
    if damaged:
        raise InputError(f"{file}: damaged: {damaged!r} has a wrong checksum; {AGAIN}")


def _torch_rows(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own: the same bits
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16.dtype)
    return tensor.numpy()
