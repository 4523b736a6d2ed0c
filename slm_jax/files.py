"""Small files and new folders: read strictly, written atomically."""

import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slm_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def user_path(text: str | Path) -> Path:
    """Return the path that a user gave, ``~`` expanded; refuse an impossible one, such as of an unknown ``~user``."""
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


def read_json(file: Path, remedy: str = "download or export it again") -> dict[str, Any]:
    """Read a file that is one JSON object without duplicate keys; ``remedy`` says what to do if it is not."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("duplicate key")
        return content

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected one JSON object; {remedy}")
    return content


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(path: Path, error: OSError) -> InputError:
    """Return what to raise for a file or folder that cannot be written."""
    return InputError(f"{path}: cannot be written: {error.strerror or error}")


# Files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new name beside the path; that file replaces the path at the end, or disappears after an error."""
    if not path.name:
        raise InputError(f"{path}: is a folder; expected a file in it")
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old file or the new one; OSError: it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_png(figure: "Figure", path: Path) -> None:
    """Write a picture atomically: a reader sees the old file or the new one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with replacing(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically, and its folder, or raise an InputError; a link stays, its target is replaced."""
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise unwritable(path, error) from None


def check_new_file(target: str | Path, option: str, example: str) -> Path:
    """Return the path of a file to be written, its folder new or not, or refuse it; cheap, for before long work."""
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
    """Return the absolute path of a new or empty folder to be made, or refuse it; cheap, for before long work."""
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
    """Give a folder beside the target; it becomes the target at the end, or disappears after an error."""
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


# Network


def check_reachable(url: str, seconds: float) -> None:
    """Raise an OSError unless the server of ``url``, or the proxy that leads to it, takes a connection in time.

    Libraries that download limit neither the name lookup nor the sum of their tries at a server's addresses.
    """
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    server = urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else url)
    address = (server.hostname or "", server.port or {"http": 80, "https": 443}.get(server.scheme, 1080))  # else SOCKS
    outcome: list[OSError | None] = [TimeoutError(f"no answer from {address[0]} in {seconds:g} s")]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)  # is left behind if it hangs
    thread.start()
    thread.join(seconds)
    if outcome[-1]:
        raise outcome[-1]
