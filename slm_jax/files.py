"""Small files and new folders: read strictly, written whole or not at all."""

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

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def user_path(text: str | Path) -> Path:
    """Return the path that a user gave, ``~`` expanded, whether or not something is there.

    Raises:
        InputError: what can be no path, or cannot be looked at: an unknown ``~user``, a NUL, a loop of links.
    """
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (RuntimeError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(text)!r}: cannot be used as a path: {reason}; choose another") from None
    return path


def cache_folder() -> Path:
    """Return ``slm_jax`` in the user's cache folder: ``$XDG_CACHE_HOME``, or ``~/.cache`` where that is not set.

    Raises:
        OSError: the user has no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "slm_jax"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, str(error), "~/.cache") from None


def read_json(file: Path, remedy: str = "download or export it again") -> dict[str, Any]:
    """Read a file that is one JSON object; a key that is there twice is refused.

    Args:
        file: the file.
        remedy: of whatever is wrong with it.

    Raises:
        InputError: not such a file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key is there twice")
        return content

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected one JSON object; {remedy}")
    return content


def check_new_file(target: str | Path, option: str, example: str) -> Path:
    """Return the path of a file that is to be written, if it can be; cheap, so that long work may begin with it.

    Args:
        target: what the user gave; its folder need not be there.
        option: the option it was given with, such as ``out``.
        example: a name that would do.

    Raises:
        InputError: what is no file, or is where nothing can be written.
    """
    path = user_path(target)
    if not str(target) or (path.exists() and not path.is_file()):
        raise InputError(f"{option} is {str(target)!r}; expected a file, such as {example}")
    parent = next(parent for parent in path.resolve().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{path}: cannot write there ({parent}); choose another place with --{option}")
    return path


def write_file(path: Path, text: str) -> None:
    """Write a text file in one step, and its folder; a link stays, and the file that it leads to is replaced.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise unwritable(path, error) from None


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: who reads it sees the old one or the new one.

    Raises:
        InputError: the path ends in no name.
        OSError: it cannot be written.
    """
    partial = partial_path(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def partial_path(path: Path) -> Path:
    """Return a new name beside a file, to write it under until it is whole; nobody else takes the same.

    Raises:
        InputError: the path ends in no name, such as ``.`` or ``/``.
    """
    if not path.name:
        raise InputError(f"{path}: is a folder; expected a file in it")
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


def unwritable(path: Path, error: OSError, what: str = "place") -> InputError:
    """Return what to raise for a file or folder that cannot be written; ``what``: to choose another one of."""
    free = "free space there or " if error.errno in _FULL else ""
    return InputError(f"{path}: cannot be written: {error.strerror or error}; {free}choose another {what}")


def write_png(figure: "Figure", path: Path) -> None:
    """Write a picture in one step: a reader sees the old file or the new one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_suffix(".partial.png")
    FigureCanvasAgg(figure).print_png(str(partial))
    partial.replace(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_new_folder(target: str | Path) -> Path:
    """Return the target, absolute, if :func:`new_folder` can make it; cheap, so that long work may begin with it.

    Raises:
        InputError: what is no new or empty folder, or is where nothing can be written.
    """
    target = user_path(target)
    try:
        target = target.resolve()
        if target == Path.cwd():
            raise InputError(f"{target}: is the current folder; name a new one")
        if os.path.ismount(target):
            raise InputError(f"{target}: is the root of a file system; name a new folder in it")
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{target}: exists and is not an empty folder; choose a new folder or move this one away")
        parent = next(parent for parent in target.parents if parent.exists())
    except OSError as error:
        raise InputError(f"{target}: cannot be looked at: {error.strerror}; choose another folder") from None
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{target}: {parent} is no folder that can be written to; choose another folder")
    return target


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Give a folder beside the target that becomes the target when all went well, and else disappears.

    Raises:
        InputError: as :func:`check_new_folder`, and whatever keeps the folder from being written.
    """
    target = check_new_folder(target)
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")  # short: beside a name of any length it fits
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if os.name == "nt" and target.exists():  # elsewhere a rename replaces an empty folder in one step
            target.rmdir()
        partial.rename(target)
    except InputError:  # a MissingInputError is an OSError, too
        raise
    except OSError as error:
        raise unwritable(target, error, "folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_reachable(url: str, seconds: float) -> None:
    """Raise an OSError unless the server of ``url``, or the proxy that leads to it, takes a connection in time.

    Libraries that download bound neither the name lookup nor the sum of their tries at a server's addresses; this
    tries first, in a thread that is left behind if it hangs.
    """
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    server = urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else url)
    address = (server.hostname or "", server.port or {"http": 80, "https": 443}.get(server.scheme, 1080))  # else SOCKS
    outcome: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    error = outcome[0] if outcome else TimeoutError(f"no answer from {address[0]} in {seconds:g} s")
    if error:
        raise error
