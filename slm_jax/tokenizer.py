"""Text to token ids and back: words, characters, a trainable byte-level BPE, and GPT-2's own BPE.

Four tokenizers share one interface, `Tokenizer`; a vocabulary is built, trained or loaded, and saved as one JSON file.

Special tokens in text. `<|endoftext|>` marks the end of a document, and untrusted text must not be able to forge it.
`BPETokenizer` and `GPT2Tokenizer` refuse it in text, and `CharTokenizer` spells it out, unless the caller passes
`allow_special=True`; then it becomes `eot_id`. `SimpleTokenizer` follows the book, where it is a word like any other
and always becomes its id.
"""

import hashlib
import json
import operator
import os
import re
import reprlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable
from urllib.parse import urlsplit

from slm_jax.errors import InputError, MissingInputError, located
from slm_jax.files import check_reachable, read_json, sha256, write_file

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
FILE_NAME = "tokenizer.json"
CONNECT_SECONDS = 1.5
_LAST_CUT = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)

_T = TypeVar("_T")


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of every tokenizer; `from_dict`, `save` and `load` are the same for all."""

    kind: str
    _fields: tuple[str, ...] = ()  # of the saved dict, beside the kind; the arguments of the class

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: ids are 0 … vocab_size - 1."""

    @property
    def eot_id(self) -> int:
        """The id of `<|endoftext|>`, which ends a document."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Turn text into ids; `allow_special` lets `<|endoftext|>` in the text become `eot_id`."""

    def decode(self, ids: Iterable[Any]) -> str:
        """Turn ids (a list, a NumPy or JAX array) back into text."""

    def to_dict(self) -> dict[str, Any]:
        """Everything that defines this tokenizer, as plain JSON data."""

    @classmethod
    def from_dict(cls: type[_T], data: Mapping[str, Any]) -> _T:
        """Rebuild a tokenizer from the result of `to_dict`; InputError: anything else."""
        kind: Any = cls  # beartype, which the tests run with, takes neither Self nor a TypeVar bound to a protocol
        if data.get("kind") != kind.kind:
            raise InputError(f"kind is {data.get('kind')!r:.60}; expected {kind.kind!r} (or use load_tokenizer)")
        values = [data.get(name) for name in kind._fields]
        if set(data) != {"kind", *kind._fields} or not all(isinstance(value, list) for value in values):
            expected = "".join(f" and a list, {name}" for name in kind._fields)
            raise InputError(f"keys are {reprlib.repr(list(data))}; expected kind{expected}")
        return kind(*values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` if that names a file (`….json`), else to `path/tokenizer.json`; return the file."""
        file = Path(path)
        if file.is_dir() or (file.suffix != ".json" and not file.is_file()):
            file = file / FILE_NAME
        write_file(file, json.dumps(self.to_dict()) + "\n")
        return file

    @classmethod
    def load(cls: type[_T], path: str | os.PathLike[str]) -> _T:
        """Read a tokenizer of this kind from a file, a folder with `tokenizer.json`, or a run's folder."""
        kind: Any = cls
        return _load(path, kind.from_dict)


class _TableTokenizer(Tokenizer):
    """A list of strings whose positions are their ids, followed by the special tokens."""

    _special: tuple[str, ...] = (END_OF_TEXT,)

    def __init__(self, items: Iterable[Any] | None = None) -> None:
        self._tokens: list[str] = []
        if items is not None:
            self._fill(items)

    def _fill(self, items: Iterable[Any]) -> None:
        (name,), tokens = self._fields, [*items, *self._special]
        ids: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if not isinstance(token, str) or not token or (name == "chars" and len(token) > 1 and token != END_OF_TEXT):
                raise InputError(f"entry {i} of {name} is {reprlib.repr(token)}: expected one of the {name}")
            if ids.setdefault(token, i) != i:
                raise InputError(f"{token!r} occurs twice among {name} and special tokens: expected one id each")
        if len(tokens) == len(self._special):
            raise InputError(f"no {name} for a vocabulary: expected at least one")
        self._tokens, self._ids = tokens, ids

    @property
    def vocab_size(self) -> int:
        if not self._tokens:
            raise InputError(f"the {self.kind} tokenizer has no vocabulary yet: call build_vocab(text) first")
        return len(self._tokens)

    @property
    def eot_id(self) -> int:
        return self.vocab_size - len(self._special)

    def build_vocab(self, text: str) -> "_TableTokenizer":
        """Make the vocabulary from the words or characters of `text`, sorted, and return this tokenizer."""
        self._fill(sorted(set(self._split(text)).difference(self._special)))
        return self

    def _split(self, text: str) -> list[str]:
        return list(_check_text(text))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, self._fields[0]: self._tokens[: self.eot_id]}


class SimpleTokenizer(_TableTokenizer):
    """The book's word-level tokenizer: words and punctuation marks, and `<|unk|>` for every other word.

    `decode` joins with spaces, so line breaks and exact spacing are lost. A `<|endoftext|>` between spaces always
    becomes `eot_id`, as in the book; `allow_special` is ignored.
    """

    kind: str = "simple"
    _fields = ("words",)
    _special = (END_OF_TEXT, UNKNOWN)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Turn text into ids, unknown words into the id of `<|unk|>`."""
        unknown = self.vocab_size - 1
        return [self._ids.get(word, unknown) for word in self._split(text)]

    def decode(self, ids: Iterable[Any]) -> str:
        """Join the words with spaces, with none before a punctuation mark."""
        text = " ".join(self._tokens[i] for i in _check_ids(ids, self.vocab_size))
        return re.sub(r"""\s+([,.:;?!"()'])""", r"\1", text)

    def _split(self, text: str) -> list[str]:
        parts = re.split(r"""([,.:;?_!"()']|--|\s)""", _check_text(text))
        return [word for part in parts if (word := part.strip())]


class CharTokenizer(_TableTokenizer):
    """One id per character, sorted (nanoGPT's ids), then `<|endoftext|>`; the round trip is exact."""

    kind: str = "char"
    _fields = ("chars",)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Turn text into ids (`allow_special`: `<|endoftext|>` is one); InputError: a character without an id."""
        eot_id = self.eot_id
        documents = _check_text(text).split(END_OF_TEXT) if allow_special else [_check_text(text)]
        try:
            return _join([[self._ids[char] for char in document] for document in documents], eot_id)
        except KeyError as error:
            char = error.args[0]
            # A special token may hold the unknown character, too.
            plain = text.replace(END_OF_TEXT, self._tokens[0] * len(END_OF_TEXT)) if allow_special else text
            what = f"character {char!r} at offset {plain.index(char)} is not in the vocabulary of {eot_id} characters"
            raise InputError(f"{what}; use text of these, or tokenizer.kind: bpe") from None

    def decode(self, ids: Iterable[Any]) -> str:
        """Join the characters."""
        return "".join(self._tokens[i] for i in _check_ids(ids, self.vocab_size))


# White space as Unicode and tiktoken have it; Python's \s also takes the separators U+001C to U+001F.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_SPACE = re.compile(rf"(?<![{_SPACE}])[{_SPACE}]{{4096,}}(?=[{_SPACE}][^{_SPACE}])")


class _TiktokenTokenizer(Tokenizer):
    """Encoding and decoding through a `tiktoken.Encoding`, whose last id is `<|endoftext|>`.

    Bytes that are not UTF-8 (a cut character) are decoded to U+FFFD.
    """

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        raise NotImplementedError

    @property
    def eot_id(self) -> int:
        return self.vocab_size - 1

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        offset = _check_text(text).find(END_OF_TEXT)
        if offset >= 0 and not allow_special:
            raise InputError(f"the text has {END_OF_TEXT} at offset {offset}; remove it, or pass allow_special=True")
        return _join([self._encode_ordinary(document) for document in text.split(END_OF_TEXT)], self.eot_id)

    def _encode_ordinary(self, text: str) -> list[int]:
        # tiktoken's regex overflows its stack on a very long run of white space before a word. The run's last
        # character belongs to what follows, so a cut before it leaves every token as it was.
        cuts = [0, *(run.end() for run in _LONG_SPACE.finditer(text)), len(text)]
        return _join([self.encoding.encode_ordinary(text[start:end]) for start, end in pairwise(cuts)])

    def decode(self, ids: Iterable[Any]) -> str:
        return self.encoding.decode(_check_ids(ids, self.vocab_size), errors="replace")


class BPETokenizer(_TiktokenTokenizer):
    """Byte-level BPE, trained on your own text and split as GPT-2 splits; any Unicode text round-trips.

    Ids 0 … 255 are the bytes, then one id per merge in the order learned, then `<|endoftext|>`. `merges` are pairs of
    earlier ids, each of which makes a new token (else InputError); they define the tokenizer.
    """

    kind: str = "bpe"
    _fields = ("merges",)
    # GPT-2's split: contractions, letters, digits, marks (each with one leading space), white space. The possessive
    # quantifiers keep its meaning and let the engine scan without backtracking.
    _PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def __init__(self, merges: Iterable[Any] = ()) -> None:
        self._merges: list[tuple[int, int]] = []
        tokens = [bytes([byte]) for byte in range(256)]
        self._ranks = {token: rank for rank, token in enumerate(tokens)}
        for i, pair in enumerate(merges):
            are_ids = isinstance(pair, list | tuple) and [type(part) for part in pair] == [int, int]
            if not are_ids or not 0 <= min(pair) <= max(pair) < len(tokens):
                raise InputError(f"merge {i} is {reprlib.repr(pair)}: expected two ids below {len(tokens)}")
            token = tokens[pair[0]] + tokens[pair[1]]
            if token in self._ranks:
                raise InputError(f"merge {i} makes {token!r}, which already has id {self._ranks[token]}")
            self._ranks[token] = len(tokens)
            tokens.append(token)
            self._merges.append((pair[0], pair[1]))

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int = 1024) -> "BPETokenizer":
        """Learn merges from `text` (one string, or one per document) until there are `vocab_size` ids.

        `vocab_size` counts the 256 bytes and `<|endoftext|>`. Text that runs out of pairs to merge gives a smaller
        vocabulary. `<|endoftext|>` in the text separates documents. The same text gives the same merges.
        InputError: a `vocab_size` below 257; text that is not Unicode.
        """
        if vocab_size < 257:
            raise InputError(f"vocab_size is {vocab_size}: expected at least 257 (256 bytes and {END_OF_TEXT})")
        from tokenizers import Tokenizer as Model
        from tokenizers import models, pre_tokenizers, trainers

        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        texts = (_check_text(part) for part in ([text] if isinstance(text, str) else text))
        documents = (document for part in texts for document in part.split(END_OF_TEXT))
        # Pieces keep the trainer's memory small and its cores busy.
        model.train_from_iterator((piece for each in documents for piece in cut_pieces([each], 1 << 16)), trainer)
        # In the trained model a byte is written as one visible character: itself where it has one in Latin-1, else
        # the next free character from U+0100 on.
        visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        hidden = [byte for byte in range(256) if byte not in visible]
        ids = {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
        merges: list[tuple[int, int]] = []
        for left, right in json.loads(model.to_str())["model"]["merges"]:
            merges.append((ids[left], ids[right]))
            ids[left + right] = len(ids)
        return cls(merges)

    @property
    def vocab_size(self) -> int:
        """Number of ids: 256 bytes, the merges and `<|endoftext|>`."""
        return 256 + len(self._merges) + 1

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """The same vocabulary as a `tiktoken.Encoding`."""
        import tiktoken

        ranks: dict[str, Any] = {"mergeable_ranks": self._ranks, "special_tokens": {END_OF_TEXT: self.eot_id}}
        return tiktoken.Encoding("slm_jax_bpe", pat_str=self._PATTERN, **ranks)

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "bpe", "merges": [[left id, right id], …]}`."""
        return {"kind": self.kind, "merges": [list(pair) for pair in self._merges]}


class GPT2Tokenizer(_TiktokenTokenizer):
    """GPT-2's BPE through tiktoken; its two files are loaded at the first `encode` or `decode`."""

    kind: str = "gpt2"
    _URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    _SHA256: ClassVar[dict[str, str]] = {
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }

    @property
    def vocab_size(self) -> int:
        """50,257: 256 bytes, 50,000 merges and `<|endoftext|>`."""
        return 50257

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """Tiktoken's encoding "gpt2", from its cache or downloaded once; MissingInputError: neither is possible."""
        import tiktoken

        lacking = self.lacking()
        try:
            if lacking:  # tiktoken downloads with no timeout, and offline some systems hang in the name lookup
                check_reachable(self._URL, CONNECT_SECONDS)
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
            cause = f"download from {urlsplit(self._URL).hostname} failed: {' '.join(str(error).split())}"
        remedy = "connect once, set TIKTOKEN_CACHE_DIR to a folder that has both, or use tokenizer.kind: bpe"
        raise MissingInputError(f"no files for GPT-2's tokenizer: {'; '.join([*lacking, cause])}; {remedy}")

    def files(self) -> dict[str, bytes]:
        """OpenAI's two files, `vocab.bpe` and `encoder.json`, from tiktoken's cache or downloaded once."""
        from tiktoken.load import read_file_cached

        _ = self.encoding  # downloads them if necessary
        return {name: read_file_cached(self._URL + name, digest) for name, digest in self._SHA256.items()}

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "gpt2"}`: nothing else varies."""
        return {"kind": self.kind}

    def lacking(self) -> list[str]:
        """What is wrong with the two files in tiktoken's cache folder."""
        default = str(Path(tempfile.gettempdir()) / "data-gym-cache")
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
        if not folder:
            return ["TIKTOKEN_CACHE_DIR is set but empty, which turns tiktoken's cache off"]
        files = {name: Path(folder, hashlib.sha1((self._URL + name).encode()).hexdigest()) for name in self._SHA256}
        return [
            f"{file} ({name}) is {'corrupt: its SHA-256 is wrong' if file.is_file() else 'missing'}"
            for name, file in files.items()
            if not file.is_file() or sha256(file) != self._SHA256[name]
        ]


_CLASSES: dict[str, Any] = {cls.kind: cls for cls in (SimpleTokenizer, CharTokenizer, BPETokenizer, GPT2Tokenizer)}


def get_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """Return GPT-2's tokenizer (`"gpt2"`), or one saved in a file, a folder or a run's folder.

    Raises:
        MissingInputError: no tokenizer there (GPT-2's files are loaded at the first `encode` or `decode`).
        InputError: a file that is damaged or not a tokenizer's.
    """
    return GPT2Tokenizer() if name_or_path == "gpt2" else load_tokenizer(name_or_path)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer of any kind: its file, a folder with `tokenizer.json`, a run's folder, or ``FILE.bin.json``."""
    return _load(path, tokenizer_from_dict)


def tokenizer_from_dict(data: Mapping[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer of any kind from the result of its `to_dict`; InputError: anything else."""
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise InputError(f"not a tokenizer of slm_jax: kind is {reprlib.repr(kind)}, expected {', '.join(_CLASSES)}")
    return _CLASSES[kind].from_dict(data)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the tokenizer's `to_dict`: equal exactly if two tokenizers are the same."""
    canonical = json.dumps(tokenizer.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _load(path: str | os.PathLike[str], build: Callable[[Any], _T]) -> _T:
    candidates = [Path(path), Path(path, "tokenizer", FILE_NAME), Path(path, FILE_NAME)]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        expected = f"expected gpt2, a saved tokenizer's file, a folder with {FILE_NAME}, or a run's folder"
        raise MissingInputError(f"no tokenizer at {str(path)!r}: {expected}")
    with located(file):
        content = read_json(file, "save the tokenizer again")
        return build(content.get("tokenizer", content))  # the description of a token file holds its tokenizer


def _join(parts: list[list[int]], *between: int) -> list[int]:
    joined = parts[0]
    for part in parts[1:]:
        joined += [*between, *part]
    return joined


def _check_text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"{text[error.start]!r}, at offset {error.start}"
        raise InputError(f"the text has a lone surrogate, {where}; expected Unicode that UTF-8 can encode") from None
    return text


def _check_ids(ids: Iterable[Any], vocab_size: int) -> list[int]:
    items = ids.tolist() if hasattr(ids, "tolist") else ids  # one transfer for an array on a device
    checked = []
    for position, item in enumerate(items):
        try:
            number = -1 if isinstance(item, bool) else operator.index(item)
        except TypeError:
            number = -1
        if not 0 <= number < vocab_size:
            id_ = reprlib.repr(item)
            raise InputError(f"id {id_} at position {position} is not in the vocabulary of {vocab_size} tokens")
        checked.append(number)
    return checked


def cut_pieces(pieces: Iterable[str], length: int) -> Iterator[str]:
    """Join and cut a document again, so that its pieces can be encoded one by one.

    A piece has about `length` characters, at most twice as many where there is a place to cut: before white space that
    follows something else, where every tokenizer of this module starts a new word.
    """
    held: list[str] = []
    n_held = 0
    for piece in pieces:
        for start in range(0, len(piece), length):
            part = piece[start : start + length]
            before = held[-1][-1] if held else ""
            held.append(part)
            n_held += len(part)
            if n_held > length and (cut := _LAST_CUT.match(before + part)):
                rest = part[cut.end() - len(before) :]
                held[-1] = part[: len(part) - len(rest)]
                yield "".join(held)
                held, n_held = [rest], len(rest)
    if held:
        yield "".join(held)
