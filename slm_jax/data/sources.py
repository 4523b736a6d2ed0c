"""Where text and token ids come from: `KIND:REST` → documents, or a memory-mapped file of ids."""

import codecs
import difflib
import glob
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt16

from slm_jax.data.builtin import python_docs
from slm_jax.data.named import NAMED_FILES, named_file, plain_text_names
from slm_jax.errors import InputError, MissingInputError

KINDS = {
    "builtin": "builtin:python-docs",
    "text": "text:GLOB",
    "named": "named:NAME",
    "tokens": "tokens:FILE.bin",
}
BUILTINS = {"python-docs": python_docs}

# Files of ids that have a header; read as bare ids, it would pass for tokens.
_NOT_HEADERLESS = {
    b"\x93NUMPY": "a NumPy .npy file; write the bare ids: np.load(FILE).astype('<u2').tofile('ids.bin')",
    (20240520).to_bytes(4, "little"): "an llm.c file, which has a header of 1024 bytes; cut it off: tail -c +1025 FILE",
}
_CHUNK = 1 << 22  # tokens checked at a time


def parse_source(source: str, kinds: Mapping[str, str] = KINDS) -> tuple[str, str]:
    """Split "text:books/*.txt" into ("text", "books/*.txt").

    Args:
        source: what the user gave.
        kinds: the kinds that are accepted, each with its form, such as "text:GLOB".

    Raises:
        InputError: no kind, or another, or nothing behind it.
    """
    accepted = ", ".join(kinds.values())
    kind, colon, rest = source.partition(":")
    if not colon or len(kind) == 1:  # a bare path; one letter is a Windows drive
        raise InputError(f"source {source!r} has no kind{_suggest_kind(source, kinds)}; expected {accepted}")
    if kind not in kinds:
        near = difflib.get_close_matches(kind.lower(), kinds, n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]}:{rest}?)" if near else ""
        raise InputError(f"source {source!r}: no kind {kind!r} here{hint}; expected {accepted}")
    if not rest.strip():
        raise InputError(f"source {source!r} says only the kind; expected {kinds[kind]}")
    return kind, rest


def is_token_source(source: str) -> bool:
    """Whether a source holds token ids (`read_tokens`) rather than text (`read_documents`)."""
    return parse_source(source)[0] == "tokens"


def read_documents(source: str) -> list[str]:
    """The documents of a text source, in a fixed order.

    `builtin:python-docs` is the text that ships with Python. `text:GLOB` is one document a file, sorted by path;
    `~` and `**` work, files without any text are left out, and so is a byte order mark; CR LF becomes LF.
    `named:NAME` is one document. Nothing else in the text is touched: a literal `<|endoftext|>` stays in it, and
    whether to split there, refuse it or encode it as plain characters is for the caller to decide.
    """
    kind, rest = parse_source(source)
    if kind == "tokens":
        raise InputError(f"source {source!r} holds token ids, expected text, such as {KINDS['text']}")
    if kind == "builtin":
        if rest not in BUILTINS:
            raise InputError(f"source {source!r}: nothing built in under that name; expected builtin:python-docs")
        return BUILTINS[rest]()
    if kind == "named":
        if rest in NAMED_FILES and not NAMED_FILES[rest].plain_text:
            raise InputError(
                f"source {source!r} is labelled data, for fine-tuning; "
                f"expected plain text: {', '.join(f'named:{name}' for name in plain_text_names())}"
            )
        return [read_text(named_file(rest))]
    documents = [text for path in _matching_files(rest) if (text := read_text(path)).strip()]
    if not documents:
        raise InputError(f"source {source!r}: empty text: no matching file holds more than white space")
    return documents


def read_tokens(path_source: str, vocab_size: int) -> UInt16[np.ndarray, " tokens"]:
    """The ids of `tokens:FILE.bin`: bare little-endian uint16, as nanoGPT writes them, memory-mapped read-only.

    Every id is compared with the vocabulary here, once (about a second a billion ids when the file is in memory):
    on the device an id out of range would silently become another one.
    """
    kind, rest = parse_source(path_source)
    if kind != "tokens":
        raise InputError(f"source {path_source!r} holds text, expected token ids: {KINDS['tokens']}")
    path = Path(rest).expanduser()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise _unreadable(path, error) from error
    if size == 0:
        raise InputError(f"{path}: the token file is empty; expected uint16 ids, two bytes each")
    for magic, what in _NOT_HEADERLESS.items():
        if start.startswith(magic):
            raise InputError(f"{path}: expected bare uint16 ids, found {what}")
    if size % 2:
        raise InputError(
            f"{path}: {size} bytes, an odd number; expected uint16 ids, two bytes each: "
            "the file was cut short or holds something else; write it again"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    for begin in range(0, len(tokens), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        if int(chunk.max()) >= vocab_size:
            where = int(np.argmax(chunk >= vocab_size))
            raise InputError(
                f"{path}: token {begin + where} has id {chunk[where]}, but the vocabulary has {vocab_size} "
                f"(ids 0 to {vocab_size - 1}); use the tokenizer that the file was made with, or encode the text again"
            )
    return tokens


def _suggest_kind(bare: str, kinds: Mapping[str, str]) -> str:
    known = "named" if bare in NAMED_FILES else "builtin" if f"builtin:{bare}" in kinds.values() else ""
    ending = "tokens" if bare.endswith(".bin") else Path(bare).suffix[1:].lower()
    near = [kind for kind in (known, ending, "text") if kind in kinds]
    return f" (did you mean {near[0]}:{bare}?)" if near and bare.strip() else ""


def _matching_files(pattern: str) -> list[Path]:
    literal = Path(pattern).expanduser()
    try:
        if literal.is_dir():
            raise InputError(f"{literal} is a folder, expected files, such as text:{literal / '**' / '*.txt'}")
        if literal.exists():  # before any globbing: a name may contain brackets
            return [literal]
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise _unreadable(literal, error) from error
    if not glob.has_magic(pattern):
        raise MissingInputError(f"{literal}: no such file (looked from {Path.cwd()}); check the path, or use text:GLOB")
    found = glob.glob(str(literal), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = [path for path in sorted(map(Path, found)) if not path.is_dir()]
    if not files:
        raise MissingInputError(
            f"{literal}: no file matches (looked from {Path.cwd()}); check the pattern, "
            "and quote it so that the shell leaves it alone"
        )
    return files


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark and with CR LF as LF.

    Raises:
        InputError: a file that cannot be read, or is in another encoding, or binary.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW.txt")
    skipped = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = skipped + error.start
        line = data.count(b"\n", 0, at) + 1
        raise InputError(
            f"{path}: not UTF-8: byte {at} (line {line}) is 0x{data[at]:02x}; if the file is text in another "
            f"encoding, convert it, such as: iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW.txt"
        ) from error
    nuls = text.count("\0")
    if nuls * 100 > len(text):
        raise InputError(f"{path}: {nuls} of {len(text)} characters are NUL: a binary file, expected text in UTF-8")
    return text.replace("\r\n", "\n")


def _unreadable(path: Path, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f"{path}: no such file (looked from {Path.cwd()}); check the path")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{path} is a folder, expected a file")
    return InputError(f"{path}: cannot be read: {error.strerror or error}; check what it is and its permissions")
