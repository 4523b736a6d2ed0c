"""The manifest of a checkpoint: its step, and the size and SHA-256 of each file.

A folder without a manifest is not a checkpoint. The manifest is written last; then all files are synced to the disk,
and the folder is renamed to its step.
"""

import json
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from slm_jax.errors import InputError
from slm_jax.files import parse_json, replace_text, sha256, sync

CHECKSUMS = "sha256.json"  # the manifest
METADATA = "_CHECKPOINT_METADATA"  # Orbax's name
SAVING, REMOVED = ".saving", ".removed"  # prefixes of the names of unfinished and of removed checkpoints
_ARRAYS = "d"  # Orbax's name for folders with the values of arrays
_NEEDED = [METADATA, *(f"{item}/{name}" for item in ("params", "state") for name in ("_METADATA", "manifest.ocdbt"))]


class _Manifest(TypedDict):
    step: int
    files: dict[str, tuple[int, str]]  # size in bytes and SHA-256


def saved_steps(folder: Path) -> list[int]:
    """Return the steps with a checkpoint (a manifest), ascending."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.name.isdecimal() and (path / CHECKSUMS).is_file()]
    return sorted(int(name) for name in names if name == str(int(name)))


def write_manifest(folder: Path, step: int) -> None:
    """Write the manifest of a checkpoint, and sync all of its files to the disk.

    InputError: a file that is needed to read the checkpoint is missing.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(CHECKSUMS, None)
    if missing := [name for name in _NEEDED if name not in files]:
        raise InputError(f"{folder / missing[0]} was not written")
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(files, pool.map(lambda path: (path.stat().st_size, sha256(path)), files.values()), strict=True))
    replace_text(folder / CHECKSUMS, json.dumps({"step": step, "files": sums}, indent=1))
    sync_tree(folder)


def sync_tree(folder: Path) -> None:
    """Sync all files and folders in a folder to the disk."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(sync, (*folder.rglob("*"), folder)))


def commit(folder: Path, path: Path) -> None:
    """Rename a folder to its final path, replacing what is there, and sync the rename to the disk."""
    discard(path)
    folder.rename(path)
    sync(path.parent)


def discard(folder: Path) -> None:
    """Remove a folder if it exists; it is renamed first, so that a half-removed one never counts as a checkpoint."""
    removed = folder.with_name(f"{REMOVED}-{uuid.uuid4().hex[:8]}")
    with suppress(OSError):
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def find_damage(folder: Path, arrays: bool = True, step: int | None = None) -> str | None:
    """Describe the first file of a checkpoint that is missing or damaged; None if it is intact.

    Without ``arrays``, only the sizes of array files are compared, because loading verifies their content. ``step`` is
    the expected step, by default the folder's name.
    """
    manifest, step = folder / CHECKSUMS, int(folder.name) if step is None else step
    try:
        content = parse_json(manifest.read_bytes(), manifest, kind=_Manifest)
        sums, saved_as = content["files"], content["step"]
    except FileNotFoundError:
        return f"{manifest} is missing: the checkpoint was not saved completely"
    except (InputError, OSError) as error:
        return f"{manifest} is damaged ({error})"
    if missing := [name for name in _NEEDED if name not in sums]:
        return f"{manifest} is damaged: it does not list {missing[0]}"
    if saved_as != step:
        return f"{folder} is not step {step}: it was saved as step {saved_as}"
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda file: _damage(folder / file[0], *file[1], arrays=arrays), sums.items())
        return next((damage for damage in found if damage), None)


def _damage(path: Path, size: int, digest: str, *, arrays: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing from the checkpoint"
    if path.stat().st_size != size:
        return f"{path} is damaged: its size differs from the one recorded when it was saved"
    if arrays or path.parent.name != _ARRAYS:
        with suppress(OSError):
            if sha256(path) == digest:
                return None
        return f"{path} is damaged: its SHA-256 differs from the one recorded when it was saved"
    return None
