"""Checkpoints of a run, through Orbax v1: asynchronous, complete, verified.

A checkpoint is a folder ``checkpoints/<step>`` with the items ``params`` (what is trained) and ``state`` (optimizer,
step, key), and JSON that names everything else a run needs: configuration, identity, tokenizer, data state. Orbax
commits a checkpoint by renaming it, so one that exists is whole. It keeps no checksums; two kinds are added here: the
SHA-256 of each file, and by several processes a checksum of each array: what each has loaded of them is verified
without reading it again.
"""

import errno
import json
import math
import operator
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from slm_jax.errors import InputError
from slm_jax.files import replace_text, sha256
from slm_jax.model import Params
from slm_jax.training.progress import format_bytes
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.step import TrainState

CHECKSUMS = "sha256.json"
METADATA = "_CHECKPOINT_METADATA"  # Orbax's name
_ARRAYS = "d"  # Orbax's name of folders with the values of arrays
FORMAT = 2  # of the params tree and the metadata; 1 had query, key and value in one kernel


class DamagedCheckpoint(InputError):
    """A checkpoint whose arrays are not those that were saved."""


class Checkpoints:
    """The checkpoints of one run: the latest ``keep``, and the one with the lowest validation loss.

    A context manager, which waits for the pending save. One save at a time runs in the background; an error in it is
    raised by the next call. On the first host ``on_saved`` is called there after each finished checkpoint.
    """

    def __init__(self, folder: Path, keep: int = 2, on_saved: Callable[[], None] = lambda: None):
        policies = ocp.training.preservation_policies
        loss = operator.itemgetter("validation_loss")
        best = policies.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self.folder = folder.resolve()
        self._on_saved = on_saved
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )
        self._started: list[int] = []
        self._pool = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
        self._checkpointer.close()

    def save(self, state: TrainState, metadata: dict[str, Any], validation_loss: float | None = None) -> None:
        """Start saving a state under its step; its arrays are copied before this returns, so that it may be donated.

        ``metadata`` is JSON-able; ``validation_loss`` is that of these parameters, if it was just measured.
        """
        self.wait()
        # Checked: a save that runs out of space midway ends in a heap of tracebacks.
        if shutil.disk_usage(self.folder).free < 1.1 * checkpoint_bytes(state):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        step = int(state.step)
        exists = step in self.saved_steps()
        self._started.append(step)
        items = _items(state)
        response = self._checkpointer.save_checkpointables_async(
            step,
            items,
            force=True,
            overwrite=exists,
            metrics=None if validation_loss is None else {"validation_loss": validation_loss},
            custom_metadata={
                **metadata,
                "checksums": checksums(items) if jax.process_count() > 1 else {},
                "format": FORMAT,
                "validation_loss": validation_loss,
            },
        )
        self._saving = self._pool.submit(self._finish, response, step)

    def _finish(self, response: Any, step: int) -> None:
        response.result()
        if jax.process_index() == 0:
            write_checksums(self.folder / str(step))
            self._on_saved()

    def wait(self) -> None:
        """Wait for the save under way; raise the error that it met, if any."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def saved_steps(self) -> list[int]:
        """Return the steps saved or being saved, ascending."""
        return sorted({*saved_steps(self.folder), *self._started})

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a step, with the shapes, dtypes and shardings of ``like`` (arrays or shapes).

        DamagedCheckpoint: several processes saved it, and this is not what they saved.
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


def saved_steps(folder: Path) -> list[int]:
    """Return the steps that have a committed checkpoint, ascending; a half-deleted one does not count."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and (path / METADATA).is_file())


def read_metadata(folder: Path, step: int) -> dict[str, Any]:
    """Return the metadata saved with a step, ``validation_loss`` included; an InputError if they are damaged."""
    path = folder / str(step) / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not a checkpoint of slm_jax ({error!r}); choose another step") from None
    return parse_metadata(content, path)


def parse_metadata(content: bytes, where: object) -> dict[str, Any]:
    """Return the metadata in the bytes of a checkpoint's metadata file; an InputError if they are damaged."""
    try:
        metadata = json.loads(content)["custom_metadata"]
        if type(loss := metadata["validation_loss"]) not in (float, int, type(None)):
            raise TypeError(f"validation_loss is {loss!r:.40}")
        for key in ("config", "model", "tokenizer"):
            if not isinstance(metadata.get(key, {}), dict):
                raise TypeError(f"{key} is {metadata[key]!r:.40}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not a checkpoint of slm_jax ({error!r}); choose another step") from None
    if (found := metadata.pop("format", 1)) != FORMAT:
        raise InputError(f"{where}: checkpoint format {found}, from another version of slm_jax; expected {FORMAT}")
    return metadata


def best_step(folder: Path) -> int | None:
    """Return the step with the lowest validation loss; without any, the latest; None without checkpoints."""
    return lowest({step: read_metadata(folder, step)["validation_loss"] for step in saved_steps(folder)})


def lowest(losses: dict[int, float | None]) -> int | None:
    """Return the step with the lowest validation loss; without any, the latest; None without steps."""
    measured = {step: loss for step, loss in losses.items() if loss is not None and not math.isnan(loss)}
    return min(measured, key=lambda step: measured[step], default=max(losses, default=None))


def load_params(folder: Path, step: int, like: Params, sharding: Any = None) -> Params:
    """Load only the parameters of a step, with the shapes and dtypes of ``like`` (arrays or shapes).

    ``sharding`` is that of every leaf, or a tree of them; None: the first device.
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
    """Load only the optimizer state of a step, to the host; ``like`` is the state, as arrays or shapes."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    like = {"step": jax.ShapeDtypeStruct((), "int32"), "key": key, "opt_state": like}
    remedy = "the optimizer is another; leave base_optimizer out"
    state = _load(folder / str(step), {"state": _placed(like, None)}, remedy)["state"]
    return jax.device_get(state["opt_state"])


def _placed(like: Any, sharding: Any) -> Any:
    """Return the shapes of a tree with their shardings; ``sharding`` as for :func:`load_params`."""
    if not isinstance(sharding, dict):
        place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding = jax.tree.map(lambda _: place, like)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, sharding)


def _load(path: Path, items: dict[str, Any], remedy: str) -> dict[str, Any]:
    """Load items of a checkpoint (arrays or shapes, with shardings).

    Of several processes each reads a part of what several need, and they exchange the parts: each byte is read once.
    """
    several = jax.process_count() > 1
    try:
        loaded = ocp.load_checkpointables(path.resolve(), jax.tree.map(_part, items) if several else items)
    except Exception as error:  # of any kind: without checksums Orbax runs into whatever the files hold
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"{path}: its {' and '.join(items)} cannot be loaded ({cause}); {remedy}") from None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, items)
    return jax.jit(lambda tree: tree, out_shardings=shardings)(loaded) if several else loaded


def _part(leaf: Any) -> jax.ShapeDtypeStruct:
    """Split an array (or shape) along the axis of the mesh that have copies of it, too, as Orbax saved it.

    Orbax splits the first axis of a shard that the number of copies divides.
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
    """Return a checksum of the bits of each array by its path and dtype, the same on any mesh.

    All processes call it together.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    names = [f"{jax.tree_util.keystr(path)} {leaf.dtype}" for path, leaf in leaves]
    return {name: int(found) for name, found in zip(names, sums, strict=True)}


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Mix the bits of each number with its place, as MurmurHash3 does, and add all modulo 2**32."""
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
    """Return whether arrays are verified as they were loaded, and not before: several processes saved and load them."""
    return jax.process_count() > 1 and bool(_read_checksums(path))


def _read_checksums(path: Path) -> dict[str, int]:
    return read_metadata(path.parent, int(path.name)).get("checksums", {})


def _changed(path: Path, items: dict[str, Any]) -> str | None:
    """Describe the first array loaded from a checkpoint that is not what was saved; None if there is none."""
    if not has_checksums(path):
        return None
    expected = _read_checksums(path)
    changed = [name for name, found in checksums(items).items() if expected.get(name, found) != found]
    return f"{path} is damaged: {changed[0]} is not what was saved" if changed else None


def write_checksums(folder: Path) -> None:
    """Write the size in bytes and the SHA-256 of every file of a checkpoint beside them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(CHECKSUMS)]
    sums = {str(path.relative_to(folder)): [path.stat().st_size, sha256(path)] for path in files}
    replace_text(folder / CHECKSUMS, json.dumps(sums, indent=1))


def find_damage(folder: Path, arrays: bool = True) -> str | None:
    """Describe the first file of a checkpoint that is missing or changed; None if there is none.

    Without ``arrays``, only the sizes of the files that hold them are compared: whoever loads them verifies them.
    Without checksums, as after a kill right after the commit, a checkpoint is only checked for its main files.
    """
    sums_file = folder / CHECKSUMS
    if not sums_file.is_file():
        needed = [folder / item / name for item in ("params", "state") for name in ("_METADATA", "manifest.ocdbt")]
        return next((f"{path} is missing from the checkpoint" for path in needed if not path.is_file()), None)
    try:
        sums = {name: (size, digest) for name, (size, digest) in json.loads(sums_file.read_text()).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        sums = {}
    if METADATA not in sums:
        return f"{sums_file} is damaged"
    for name, (size, digest) in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing from the checkpoint"
        if path.stat().st_size != size:
            return f"{path} is damaged: its size differs from the one recorded when it was saved"
        if (arrays or path.parent.name != _ARRAYS) and sha256(path) != digest:
            return f"{path} is damaged: its SHA-256 differs from the one recorded when it was saved"
    return None


def checkpoint_bytes(state: TrainState) -> int:
    """Return the bytes of one checkpoint: parameters and optimizer state (arrays or shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.trainable, state.opt_state)))


def check_disk(run: RunFolder, state: TrainState, frozen: Params, keep: int) -> None:
    """Refuse a disk without room for the checkpoints of a run and for its frozen parameters."""
    # The latest, the best and the one being written, less those that exist already.
    missing = max(1, keep + 2 - len(saved_steps(run.checkpoints)))
    each = checkpoint_bytes(state)
    needed = each * missing + sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    if run.writes and (free := shutil.disk_usage(run.path).free) < needed:
        raise InputError(
            f"{run.path}: {format_bytes(free)} free; checkpoints of {format_bytes(each)} need {format_bytes(needed)} "
            "more: free some, lower --checkpoint.keep or use another --runs_dir"
        )
