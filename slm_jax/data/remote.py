"""Token files in object storage: copied once into the user's cache, because training reads them in random order."""

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import Bucket, cache_folder, new_folder, unwritable


def local_copy(url: str, parts: Callable[[bytes], dict[str, int]], check: Callable[[Path], object]) -> Path:
    """Return the path of a local copy of a token file or its shards, with the JSON file; make it if necessary.

    A changed file is copied again; changes are detected by its JSON file, or if it has none, by the storage's version.

    Args:
        url: URL of the token file, such as ``gs://bucket/FILE.bin``.
        parts: returns the names and sizes in bytes of the files that a JSON file lists.
        check: called with the path of a new copy; raises an InputError if it is damaged.

    Raises:
        MissingInputError: no such file.
        InputError: no access, a full disk, a damaged file, a missing package.
    """
    bucket, name = _split(url)
    about = read_description(url)
    if about is None:
        try:
            size, version = bucket.version(name)
        except OSError as error:
            raise _unreadable(url, error) from None
        files, state = {name: size}, version.encode()
    else:
        files, state = parts(about), about
    target = cache_folder() / "tokens" / hashlib.sha256(b"%s %s" % (url.encode(), state)).hexdigest()[:16]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):  # other processes wait for this copy
            if not target.is_dir():
                size = sum(files.values())
                _check_room(url, size, target)
                print(f"copying {url} ({size / 1e9:,.2f} GB) to {target}, once", file=sys.stderr)
                with new_folder(target) as partial:
                    _download(bucket, url, {name: partial / name for name in files})
                    if about is not None:
                        (partial / f"{name}.json").write_bytes(about)
                    _check(url, partial / name, check)
    except InputError:
        raise
    except OSError as error:
        raise unwritable(target, error) from None
    return target / name


def read_description(url: str) -> bytes | None:
    """Return the content of a token file's JSON file; None if it has none. InputError: as for `local_copy`."""
    bucket, name = _split(url)
    try:
        return bucket.read(f"{name}.json")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(url, error) from None


def _split(url: str) -> tuple[Bucket, str]:
    folder, _, name = url.rpartition("/")
    return Bucket(folder), name


def _unreadable(url: str, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f"{url}: does not exist, or not all of it")
    return InputError(f"{url}: cannot be read: {error.strerror}")


def _check_room(url: str, size: int, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < 1.01 * size:
        room = f"{free / 1e9:,.1f} GB free in {target.parent}"
        raise InputError(f"{url}: {size / 1e9:,.1f} GB, and {room}; set XDG_CACHE_HOME to a folder with more room")


def _download(bucket: Bucket, url: str, files: dict[str, Path]) -> None:
    try:
        bucket.download(files)
    except OSError as error:
        raise _unreadable(url, error) from None


def _check(url: str, copy: Path, check: Callable[[Path], object]) -> None:
    try:
        check(copy)
    except InputError as error:
        raise InputError(str(error).replace(str(copy.parent), url.rpartition("/")[0])) from None
