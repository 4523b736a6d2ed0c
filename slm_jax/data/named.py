"""``named:`` sources: well-known small files, from $SLM_JAX_DATA or downloaded once, always verified by SHA-256.

Downloads are stored in `slm_jax/data` under $XDG_CACHE_HOME, by default `~/.cache`.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from slm_jax.data.file_sources import Json, TextFiles, Tsv, unreadable
from slm_jax.data.rows import OnRead, Pieces, Row, Source, ignore_bytes
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import cache_folder, check_reachable, replacing, sha256

CONNECT_SECONDS = 2.0  # to look up and reach the server; without a network a name lookup alone can hang for minutes
READ_SECONDS = 20.0  # without data from a connected server


class NamedFile(NamedTuple):
    """A file, its URL and SHA-256, and the columns of a table without a header line."""

    file: str
    url: str
    sha256: str
    header: tuple[str, ...] = ()


_GITHUB = "https://raw.githubusercontent.com"
_BOOK = f"{_GITHUB}/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57"

NAMED_FILES: dict[str, NamedFile] = {
    "the-verdict": NamedFile(  # public domain (Edith Wharton, 1908)
        file="the-verdict.txt",
        url=f"{_BOOK}/ch02/01_main-chapter-code/the-verdict.txt",
        sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    ),
    "tinyshakespeare": NamedFile(  # public domain
        file="tinyshakespeare.txt",
        url=f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "sms-spam": NamedFile(  # CC BY 4.0 (SMS Spam Collection, UCI)
        file="sms-spam.tsv",
        url=f"{_GITHUB}/justmarkham/pycon-2016-tutorial/5339710562cc46c4a32a369d63f1e8751a18a54e/data/sms.tsv",
        sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        header=("label", "text"),
    ),
    "instruction-data": NamedFile(  # Apache-2.0
        file="instruction-data.json",
        url=f"{_BOOK}/ch07/01_main-chapter-code/instruction-data.json",
        sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
    ),
    "instruction-preference": NamedFile(  # Apache-2.0
        file="instruction-data-with-preference.json",
        url=f"{_BOOK}/ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
        sha256="305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    ),
}


class Named(Source):
    """One of the named files, read in its own format."""

    scheme, form, names = "named", "named:NAME", NAMED_FILES

    @property
    def has_rows(self) -> bool:
        return not NAMED_FILES[self.name].file.endswith(".txt")

    def rows(self, columns: Sequence[str] = (), on_read: OnRead = ignore_bytes) -> Iterator[Row]:
        return self._file().rows(columns, on_read)

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        return self._file().texts(column, on_read)

    def _file(self) -> Source:
        entry = NAMED_FILES[self.name]
        readers: dict[str, type[Source]] = {".txt": TextFiles, ".tsv": Tsv, ".json": Json}
        return readers[Path(entry.file).suffix](str(named_file(self.name)), header=entry.header)


def named_file(name: str) -> Path:
    """Return the path of a named file with its pinned content, downloaded into the cache unless $SLM_JAX_DATA has it.

    Raises:
        MissingInputError: the file could not be downloaded (offline, within five seconds).
        InputError: the file has other content, or the cache cannot be written.
    """
    entry, folder = NAMED_FILES[name], os.environ.get("SLM_JAX_DATA")
    given = Path(folder).expanduser() / entry.file if folder else None
    path = given if given and given.exists() else cache_folder() / "data" / entry.file
    try:
        digest = sha256(path) if path.is_file() else None
    except OSError as error:
        raise unreadable(path, error) from error
    if digest == entry.sha256:
        return path
    if path == given:
        raise InputError(f"{path}: SHA-256 is {digest}, expected {entry.sha256} of {entry.url}")
    content = _download(name, entry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; set XDG_CACHE_HOME") from error
    return path


def _download(name: str, entry: NamedFile) -> bytes:
    import requests

    remedy = f"put the file as {entry.file} into a folder and set SLM_JAX_DATA to that folder"
    try:
        check_reachable(entry.url, CONNECT_SECONDS)
        response = requests.get(entry.url, timeout=(CONNECT_SECONDS, READ_SECONDS))
        response.raise_for_status()
    except OSError as error:  # requests' errors are OSErrors, too
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"not in SLM_JAX_DATA ({os.environ.get('SLM_JAX_DATA') or 'not set'})"
        what = f"{where} and not downloadable from {entry.url} ({reason})"
        raise MissingInputError(f"named:{name}: {what}; {remedy}") from error
    if (digest := hashlib.sha256(response.content).hexdigest()) != entry.sha256:
        what = f"{entry.url} gave a file with SHA-256 {digest}, expected {entry.sha256} (a login page?)"
        raise InputError(f"named:{name}: {what}; {remedy}")
    return response.content
