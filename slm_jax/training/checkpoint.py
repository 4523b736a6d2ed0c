"""Checkpoints of a run: arrays through Orbax v1; asynchronous, complete, verified.

A checkpoint is a folder ``checkpoints/<step>`` with the items ``params`` (trained parameters) and ``state`` (optimizer,
step, key), JSON with everything else that a run needs (configuration, identity, tokenizer, data state), and a manifest
with its step and the size and SHA-256 of each file. Orbax writes into ``.saving``; the manifest is written there last,
all files are synced to the disk, and a rename commits the checkpoint. A folder whose manifest is missing or does not
match is not a checkpoint. Several processes also save a checksum of each array, so that each of them can verify what it
has loaded without reading the files again.
"""

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Required, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from slm_jax.errors import InputError, SaveError
from slm_jax.files import Object, parse_json
from slm_jax.model import DType, Params
from slm_jax.training.manifest import (
    METADATA,
    REMOVED,
    SAVING,
    commit,
    discard,
    find_damage,
    saved_steps,
    write_manifest,
)
from slm_jax.training.progress import format_bytes
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.step import TrainState

FORMAT = 2  # version of the params tree and the metadata; in 1, query, key and value were one kernel


class Metadata(TypedDict, total=False):
    """Metadata of a checkpoint; tasks add their own."""

    validation_loss: Required[float | None]
    format: int
    config: Object
    model: Object
    identity: Object
    environment: Object
    tokenizer: Object
    template: Object
    trainable: str
    leaves: dict[str, list[int | DType]]
    frozen_sha256: str | None
    checksums: dict[str, int]
    logs: dict[str, tuple[int, str]]
    classes: list[str]
    pooling: str
    max_length: int


class _File(TypedDict):
    custom_metadata: Metadata


class DamagedCheckpoint(InputError):
    """A checkpoint whose arrays differ from those that were saved."""


class Checkpoints:
    """The checkpoints of one run: the latest ``keep``, and the one with the lowest validation loss.

    A context manager that waits for the pending save when it exits. One save at a time runs in the background; the next
    call raises its error. On the first host, the background thread calls ``on_saved`` after each finished checkpoint.
    """

    def __init__(self, folder: Path, keep: int = 2, on_saved: Callable[[], None] = lambda: None):
        self.folder, self._keep, self._on_saved = folder.resolve(), keep, on_saved
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():  # left by an interrupted save
                if path.name.startswith((SAVING, REMOVED)):
                    shutil.rmtree(path, ignore_errors=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints can be saved")
        self._losses = dict.fromkeys(saved_steps(self.folder)) | _validation_losses(self.folder)
        self._pool = ThreadPoolExecutor(1)
        self._saving: tuple[int, Future[None]] | None = None
        self._bytes = 0

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self._wait(together=kind is None)
        finally:
            self._pool.shutdown()

    def save(self, state: TrainState, metadata: dict[str, Any], validation_loss: float | None = None) -> None:
        """Start saving a state under its step. Its arrays are copied before this returns, so it may be donated after.

        ``metadata`` must be JSON-able; ``validation_loss`` is the loss of these parameters, if it was just measured.
        """
        self.wait()
        step, items, self._bytes = int(state.step), _items(state), checkpoint_bytes(state)
        about = {
            **metadata,
            "checksums": checksums(items) if jax.process_count() > 1 else {},
            "format": FORMAT,
            "validation_loss": validation_loss,
        }
        with self._errors(step), _orbax(self.folder / SAVING) as path:
            # Checked now, because filling the disk midway fails late, and breaks other programs, too.
            if shutil.disk_usage(self.folder).free < 1.1 * self._bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            response = ocp.save_checkpointables_async(path, items, overwrite=True, custom_metadata=about)
        self._losses[step] = validation_loss
        self._saving = step, self._pool.submit(self._finish, response, step)

    def _finish(self, response: Any, step: int) -> None:
        response.result()
        kept = {step, *sorted(self._losses)[-self._keep :], lowest(self._losses)}
        if jax.process_index() == 0:
            write_manifest(self.folder / SAVING, step)
            commit(self.folder / SAVING, self.folder / str(step))
            for old in set(saved_steps(self.folder)) - kept:
                discard(self.folder / str(old))
            self._on_saved()
        self._losses = {step: loss for step, loss in self._losses.items() if step in kept}

    def wait(self) -> None:
        """Wait until the first host has committed the pending save; raise its error, if it failed."""
        self._wait(together=True)

    def _wait(self, together: bool) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        with self._errors(saving[0]):
            saving[1].result()
        if together and jax.process_count() > 1:
            multihost_utils.sync_global_devices("a checkpoint is committed")

    @contextmanager
    def _errors(self, step: int) -> Iterator[None]:
        """Turn an error of a save, which TensorStore raises with any type, into a one-line SaveError.

        With several processes, only file errors: the cause of others may be a lost process, which the watch reports.
        """
        try:
            yield
        except Exception as error:
            self._losses.pop(step, None)
            if jax.process_count() > 1 and not isinstance(error, OSError | InputError):
                raise
            place = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
            space = f"{format_bytes(self._bytes)} needed, {format_bytes(shutil.disk_usage(place).free)} free"
            if os.name != "nt" and (about := os.statvfs(place)).f_files and about.f_favail < 100:
                space += f" but only {about.f_favail} inodes (files)"
            saved = ", ".join(map(str, saved_steps(self.folder))) or "none"
            problem = f"step {step:,} cannot be saved: {_reason(error)}"
            raise SaveError(f"{self.folder}: {problem} ({space}); checkpoints there: {saved}") from None

    def saved_steps(self) -> list[int]:
        """Return the steps that are saved or being saved, ascending."""
        return sorted(self._losses)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a step, with the shapes, dtypes and shardings of ``like`` (arrays or shapes).

        DamagedCheckpoint: several processes saved it, and the loaded arrays differ from what they saved.
        """
        path = self.folder / str(step)
        items = _load(path, _items(like), "rename it to resume from an earlier one")
        if damage := _changed(path, items):
            raise DamagedCheckpoint(damage)
        state = items["state"]
        return like.replace(
            step=state["step"],
            trainable=items["params"],
            opt_state=state["opt_state"],
            key=jax.random.wrap_key_data(state["key"]),
        )


def _items(state: TrainState) -> dict[str, Any]:
    if isinstance(state.step, jax.ShapeDtypeStruct):
        key = jax.eval_shape(jax.random.key_data, state.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.step.sharding)
    else:
        key = jax.random.key_data(state.key)
    return {"params": state.trainable, "state": {"step": state.step, "opt_state": state.opt_state, "key": key}}


def _validation_losses(folder: Path) -> dict[int, float | None]:
    """Return the validation losses of the checkpoints whose metadata can be read."""
    losses = {}
    for step in saved_steps(folder):
        with suppress(InputError):
            losses[step] = read_metadata(folder, step)["validation_loss"]
    return losses


def read_metadata(folder: Path, step: int) -> dict[str, Any]:
    """Return the metadata saved with a step, including ``validation_loss``; InputError: they are damaged."""
    path = folder / str(step) / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not a checkpoint of slm_jax ({error!r}); choose another step") from None
    return parse_metadata(content, path)


def parse_metadata(content: bytes, where: object) -> dict[str, Any]:
    """Return the metadata from the content of a checkpoint's metadata file; InputError: they are damaged."""
    whole = parse_json(content, f"{where}: not a checkpoint of slm_jax", "choose another step", _File)
    metadata: dict[str, Any] = whole["custom_metadata"]
    if (found := metadata.pop("format", 1)) != FORMAT:
        raise InputError(f"{where}: checkpoint format {found}, from another version of slm_jax; expected {FORMAT}")
    return metadata


def best_step(folder: Path) -> int | None:
    """Return the step with the lowest validation loss, else the latest step; None without checkpoints."""
    return lowest({step: read_metadata(folder, step)["validation_loss"] for step in saved_steps(folder)})


def lowest(losses: dict[int, float | None]) -> int | None:
    """Return the step with the lowest validation loss, else the latest step; None without steps."""
    measured = {step: loss for step, loss in losses.items() if loss is not None and not math.isnan(loss)}
    return min(measured, key=lambda step: measured[step], default=max(losses, default=None))


def load_params(folder: Path, step: int, like: Params, sharding: Any = None) -> Params:
    """Load only the parameters of a step, with the shapes and dtypes of ``like`` (arrays or shapes).

    ``sharding``: one for every leaf, or a tree of them; None: the first device.
    """
    path = folder / str(step)
    others = ", ".join(str(saved) for saved in saved_steps(folder) if saved != step)
    another = f"choose another step of {others}" if others else "no other step was saved"
    if damage := find_damage(path, arrays=not has_checksums(path)):
        raise InputError(f"{damage}; {another}")
    items = _load(path, {"params": _placed(like, sharding)}, another)
    if damage := _changed(path, items):
        raise InputError(f"{damage}; {another}")
    return items["params"]


def load_opt_state(folder: Path, step: int, like: Any) -> Any:
    """Load only the optimizer state of a step, to the host; ``like`` has its shapes and dtypes (arrays or shapes)."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    like = {"step": jax.ShapeDtypeStruct((), "int32"), "key": key, "opt_state": like}
    remedy = "it was saved with another optimizer; leave base_optimizer out"
    items = _load(path := folder / str(step), {"state": _placed(like, None)}, remedy)
    if damage := _changed(path, items):
        raise InputError(f"{damage}; leave base_optimizer out")
    return jax.device_get(items["state"]["opt_state"])


def _placed(like: Any, sharding: Any) -> Any:
    """Return the shapes of a tree with their shardings; ``sharding`` as for :func:`load_params`."""
    if not isinstance(sharding, dict):
        place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding = jax.tree.map(lambda _: place, like)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, sharding)


def _load(path: Path, items: dict[str, Any], remedy: str) -> dict[str, Any]:
    """Load items of a checkpoint; ``items`` has their shapes, dtypes and shardings (arrays or shapes).

    Arrays that several processes need are read only once: each process reads a part, and they exchange the parts.
    """
    several = jax.process_count() > 1
    try:
        with _orbax(path) as literal:
            loaded = ocp.load_checkpointables(literal, jax.tree.map(_part, items) if several else items)
    except Exception as error:  # of any type: without checksums, Orbax parses whatever the files contain
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"{path}: its {' and '.join(items)} cannot be loaded ({cause}); {remedy}") from None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, items)
    return jax.jit(lambda tree: tree, out_shardings=shardings)(loaded) if several else loaded


class _LiteralPath(type(epath.Path())):  # type: ignore[misc]
    """A path that is taken literally: Orbax puts the whole path into a glob pattern, where ``[`` has a meaning."""

    def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
        return map(self._new, Path(self).glob(pattern))


@contextmanager
def _orbax(path: Path) -> Iterator[Path]:
    """Yield the absolute path in a context in which Orbax takes it literally.

    InputError: it has a backslash, which TensorStore replaces.
    """
    path = path.resolve()
    if "\\" in path.as_posix():
        raise InputError(f"{path}: the path has a backslash; expected one without")
    context = ocp.Context()
    context.file_options.path_class = _LiteralPath
    with context:
        yield path


def _part(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of an array with a sharding that also splits it over devices that hold copies of it.

    As Orbax does when it saves, this splits the first axis of a shard whose size is divisible by the number of copies.
    """
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = [() if names is None else names if isinstance(names, tuple) else (names,) for names in sharding.spec]
        spec += [()] * (leaf.ndim - len(spec))
        sizes, taken = sharding.mesh.shape, {name for names in spec for name in names}
        copies = [name for name in sharding.mesh.axis_names if name not in taken]
        n_copies = math.prod(sizes[name] for name in copies)
        for axis, size in enumerate(sharding.shard_shape(leaf.shape)):
            if size % n_copies == 0:
                spec[axis] += tuple(copies)
                sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
                break
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def checksums(tree: Any) -> dict[str, int]:
    """Return a checksum of each array's bits by its path and dtype; it does not depend on the mesh.

    All processes must call it together.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    names = [f"{jax.tree_util.keystr(path)} {leaf.dtype}" for path, leaf in leaves]
    return {name: int(found) for name, found in zip(names, sums, strict=True)}


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Mix the bits of each number with its index, as MurmurHash3 does, and add the results modulo 2**32."""
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    unsigned = np.dtype(f"uint{8 * min(4, leaf.dtype.itemsize)}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits ^ (place * np.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def has_checksums(path: Path) -> bool:
    """Return whether arrays are verified after loading, not before: if several processes saved and load them."""
    return jax.process_count() > 1 and bool(_read_checksums(path))


def _read_checksums(path: Path) -> dict[str, int]:
    return read_metadata(path.parent, int(path.name)).get("checksums", {})


def _changed(path: Path, items: dict[str, Any]) -> str | None:
    """Describe the first loaded array that differs from what was saved; None if all are intact."""
    if not has_checksums(path):
        return None
    expected = _read_checksums(path)
    changed = [name for name, found in checksums(items).items() if expected.get(name, found) != found]
    return f"{path} is damaged: {changed[0]} differs from what was saved" if changed else None


def _reason(error: Exception) -> str:
    """Return an error as one line; of TensorStore's message, only the operating system's part."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    system = re.search(r"[^:]*(?= \[os_error_code|\[OS error)", text)
    return (system[0].strip() if system else text)[:300] or type(error).__name__


def checkpoint_bytes(state: TrainState) -> int:
    """Return the bytes of one checkpoint: parameters and optimizer state (arrays or shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.trainable, state.opt_state)))


def check_disk(run: RunFolder, state: TrainState, frozen: Params, keep: int) -> None:
    """Refuse a disk without enough space for the checkpoints of a run and for its frozen parameters."""
    # The latest, the best and the one being written, minus those that exist already.
    missing = max(1, keep + 2 - len(saved_steps(run.checkpoints)))
    each = checkpoint_bytes(state)
    needed = each * missing + sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    if run.writes and (free := shutil.disk_usage(run.path).free) < needed:
        raise InputError(
            f"{run.path}: {format_bytes(free)} free; checkpoints of {format_bytes(each)} need {format_bytes(needed)} "
            "more: free some, lower --checkpoint.keep or use another --runs_dir"
        )
