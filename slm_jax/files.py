"""Small files and new folders: read strictly, written atomically; folders in object storage."""

import collections
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from slm_jax.errors import InputError

Object = dict[str, Any]  # of JSON, with any keys
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # a pair of them may be one character
_MOST_JSON_BYTES = 1 << 26  # the largest tokenizer.json of a public model has 34 MB


def user_path(text: str | Path) -> Path:
    """Return the path that a user gave, ``~`` expanded; refuse an impossible one, such as an unknown ``~user``."""
    if is_url(text):
        works = "object storage works for checkpoint.mirror and for token files (tokens:gs://BUCKET/FILE.bin)"
        raise InputError(f"{text}: expected a path on this machine; {works}")
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (RuntimeError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(text)!r}: cannot be used as a path: {reason}") from None
    return path


def cache_folder() -> Path:
    """Return ``slm_jax`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``; OSError: the user has no home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "slm_jax"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, str(error), "~/.cache") from None


def read_json(file: Path, remedy: str = "download or export it again", kind: Any = Object) -> Any:
    """Read a JSON file; ``remedy`` says what to do if it is not valid JSON of type ``kind`` (see `check_kind`)."""
    try:
        with file.open("rb") as stream:
            data = stream.read(_MOST_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); {remedy}") from None
    if len(data) > _MOST_JSON_BYTES:
        raise InputError(f"{file}: too long; expected JSON of at most {_MOST_JSON_BYTES:,} bytes")
    return parse_json(data, file, remedy, kind)


def parse_json(data: bytes | str, where: object, remedy: str = "", kind: Any = Object) -> Any:
    """Parse JSON, as `read_json`, and refuse duplicate keys; messages begin with ``where``."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_unique)
        if kind is not Any and _HALF_CHARACTER.search(text):  # rows name the field
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # also lone surrogates, too many digits, too deep nesting
        start = f": {data.strip()[:60]!r:.60}" if isinstance(data, str) else ""
        raise InputError(f"{where}: not JSON ({error}){start}{remedy and '; '}{remedy}") from None
    return check_kind(content, kind, where, remedy)


def _unique(pairs: list[tuple[str, Any]]) -> Object:
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r:.60} occurs twice")
    return content


def check_kind(content: Any, kind: Any, where: object, remedy: str = "") -> Any:
    """Return a file's content unchanged if it is of type ``kind``, such as a TypedDict (extra keys are allowed).

    InputError: it is not; the message names the first value of a wrong type.
    """
    try:
        msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at ")
        place = place.strip("`").removeprefix("$").removeprefix(".")
        what = f"{place}{place and ': '}{what[0].lower()}{what[1:]}"
        raise InputError(f"{where}: {what}{remedy and '; '}{remedy}") from None
    return content


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the error for a file or folder that cannot be written."""
    return InputError(f"{path}: cannot be written: {error.strerror or error}")


# Files


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk, if the system supports it."""
    if os.name == "nt":  # cannot sync folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some mounted drives
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new path beside ``path``; its file replaces ``path`` at the end, or is removed after an error."""
    if not path.name:
        raise InputError(f"{path}: is a folder; expected a file in it")
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename = path  # instead of the partial file, or of None for a write to a full disk
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old or the new file; OSError: it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        sync(partial)


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically and create its folder; of a link, replace the target. InputError: not possible."""
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise unwritable(path, error) from None


def check_new_file(target: str | Path, option: str, example: str) -> Path:
    """Return the path of a file to be written, or refuse it. A cheap check before long work; its folder may be new."""
    path = user_path(target)
    if not str(target) or (path.exists() and not path.is_file()):
        raise InputError(f"{option} is {str(target)!r}; expected a file, such as {example}")
    _check_writable(path.resolve(), path)
    return path


def _check_writable(path: Path, given: Path) -> None:
    parent = next(parent for parent in path.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{given}: cannot be written: {parent} is not a writable folder")


# Folders


def check_new_folder(target: str | Path) -> Path:
    """Return the absolute path of a new or empty folder, or refuse it. A cheap check before long work."""
    given = user_path(target)
    try:
        path = given.resolve()
        if path == Path.cwd() or os.path.ismount(path):
            raise InputError(f"{path}: is the current folder or the root of a file system; expected a new folder")
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path}: exists; expected a new or empty folder")
        _check_writable(path, path)
    except OSError as error:
        raise unwritable(given, error) from None
    return path


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new folder beside the target; it becomes the target at the end, or is removed after an error."""
    path = check_new_folder(target)
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # short, so that it fits beside a name of any length
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if os.name == "nt" and path.exists():  # elsewhere a rename replaces an empty folder
            path.rmdir()
        partial.rename(path)
    except InputError:  # a MissingInputError is also an OSError
        raise
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Object storage

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


def is_url(text: object) -> bool:
    """Return whether a text is a URL of object storage, such as ``gs://bucket/runs``, not a path."""
    return isinstance(text, str) and re.match(r"[A-Za-z][\w+.-]+://", text) is not None


class Bucket:
    """A folder in object storage, such as ``gs://bucket/runs``, through fsspec; names are relative to it.

    Objects are written whole: there is no rename, no append and no lock. Errors of the storage become one-line
    OSErrors, FileNotFoundError if an object does not exist. InputError: a package is missing, or the URL has no bucket.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        scheme, _, name = self.url.partition("://")
        if not name.strip("/"):
            raise InputError(f"{url}: names no bucket; expected such as {scheme.rstrip(':/')}://BUCKET/FOLDER")
        try:
            from fsspec.core import url_to_fs

            with self._errors():
                self._fs, root = url_to_fs(self.url)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            remedy = f'pip install "slm-jax[{extra}]"' if extra else str(error)
            raise InputError(f"{url}: needs a package that is not installed: {remedy}") from None
        self._root = root.rstrip("/")

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        where = self._url(name)
        try:
            yield
        except (ImportError, InputError):
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "does not exist", where) from None
        except Exception as error:  # of any type: each storage has its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OSError(errno.EIO, reason, where) from None

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each object in and below the folder, by name."""
        with self._errors():
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                found = {}
        start = f"{self._root}/"
        return {
            path.removeprefix(start): about["size"]
            for path, about in found.items()
            if path.startswith(start) and not path.endswith("/")  # a web console's placeholder for an empty folder
        }

    def read(self, name: str) -> bytes:
        """Return the content of an object."""
        with self._errors(name):
            return self._fs.cat_file(self._path(name))

    def version(self, name: str) -> tuple[int, str]:
        """Return the size in bytes of an object, and a text that changes whenever the object does."""
        with self._errors(name):
            self._fs.invalidate_cache()
            return self._fs.size(self._path(name)), self._fs.ukey(self._path(name))

    def is_older(self, name: str, seconds: float) -> bool:
        """Return whether an object was written before a time, in seconds since the epoch."""
        with self._errors(name):
            return self._fs.modified(self._path(name)).timestamp() < seconds

    def upload(self, files: Mapping[str, Path]) -> None:
        """Upload files in parallel under their names, replacing existing objects; verify the sizes."""
        if not files:
            return
        with self._errors():
            self._fs.put([str(path) for path in files.values()], [self._path(name) for name in files])
        there = self.sizes()
        for name, path in files.items():
            if there.get(name) != (size := path.stat().st_size):
                raise OSError(errno.EIO, f"has {there.get(name)} bytes after an upload of {size}", self._url(name))

    def download(self, files: Mapping[str, Path]) -> None:
        """Download objects in parallel to files, whose folders are created."""
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._fs.get([self._path(name) for name in files], [str(path) for path in files.values()])

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        with self._errors(name), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def check_writable(self) -> None:
        """Raise an OSError unless objects can be written and removed."""
        name = f".{uuid.uuid4().hex}"
        with self._errors():
            self._fs.pipe_file(self._path(name), b"slm_jax can write here")
        self.remove(name)


# Network


def check_reachable(url: str, seconds: float) -> None:
    """Raise an OSError unless the server of ``url``, or its proxy, accepts a connection in time.

    Download libraries limit neither the time of the name lookup nor the total over a server's addresses.
    """
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    server = urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else url)
    address = (server.hostname or "", server.port or {"http": 80, "https": 443}.get(server.scheme, 1080))  # 1080: SOCKS
    outcome: list[OSError | None] = [TimeoutError(f"no answer from {address[0]} in {seconds:g} s")]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)  # abandoned if it hangs
    thread.start()
    thread.join(seconds)
    if outcome[-1]:
        raise outcome[-1]
