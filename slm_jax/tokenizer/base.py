"""What all tokenizers share: their interface, the checks of texts and ids, and the cutting of long texts."""

import json
import operator
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from slm_jax.errors import InputError, MissingInputError, located
from slm_jax.files import read_json, write_file

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
# Where every tokenizer starts a new word. Some join punctuation with the line breaks after it.
_LAST_CUT = re.compile(r".*(?:\S(?=[ \t])|[^\W_](?=[\n\r]))", re.DOTALL)

_LONGEST_PIECE = 1 << 23  # characters, where there is no place to cut

_T = TypeVar("_T")


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of every tokenizer; `from_dict`, `save` and `load` are the same for all."""

    kind: str
    chat_template: str | None = None  # the model's own, in Jinja's language
    _fields: tuple[str, ...] = ()  # of the saved dict, beside the kind; the arguments of the class

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: ids are 0 … vocab_size - 1."""

    @property
    def eot_id(self) -> int:
        """The id that ends a document: that of `<|endoftext|>`, or of a pretrained model's end-of-text token."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end what a model writes; the first is `eot_id`."""
        return (self.eot_id,)

    @property
    def start_ids(self) -> list[int]:
        """What the model expects before a text: the id of its beginning-of-text token, or nothing."""
        return []

    @property
    def document_ids(self) -> list[int]:
        """What stands between two documents: `eot_id` and `start_ids`."""
        return [self.eot_id, *self.start_ids]

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens that `encode` takes only with `allow_special`, and their ids."""
        return {END_OF_TEXT: self.eot_id}

    @property
    def roles(self) -> Mapping[str, str]:
        """Special tokens by the names that chat templates have for them, such as `eos_token`."""
        return {"eos_token": END_OF_TEXT}

    def continued(self) -> "Tokenizer":
        """Return this tokenizer for a text that continues another one, such as that of a single token.

        It puts nothing before the text, no space and no `start_ids`, and `decode` leaves nothing out.
        """
        return self

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Turn text into ids; `allow_special` lets special tokens in the text become their ids."""

    def encode_prompt(self, text: str) -> list[int]:
        """Turn a text into the ids that a model continues: with `start_ids`; `eot_id` if there are none."""
        return [*self.start_ids, *self.encode(text)] or [self.eot_id]

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Turn the parts of one text, which may have special tokens, into the ids of each."""
        return [self.encode(part, allow_special=True) for part in parts]

    def decode(self, ids: Iterable[Any]) -> str:
        """Turn ids (a list, a NumPy or JAX array) back into text; `start_ids` at the start are left out."""

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
        return read_saved(find_file(path), kind.from_dict)


def find_file(path: str | os.PathLike[str]) -> Path:
    """Return the file of a tokenizer: the path itself, or one in the folder, a run's or of a pretrained model."""
    names = (Path("tokenizer", FILE_NAME), FILE_NAME, "tokenizer.model", "model.gguf")
    file = next((each for each in (Path(path), *(Path(path, name) for name in names)) if each.is_file()), None)
    if file is None:
        expected = f"expected gpt2, a tokenizer's file, a folder with {FILE_NAME}, or a run's folder"
        raise MissingInputError(f"no tokenizer at {str(path)!r}: {expected}")
    return file


def read_saved(file: Path, build: Callable[[Any], _T]) -> _T:
    """Build a tokenizer from the content of its file, or of the description of a token file, which holds it."""
    content = read_json(file, "save the tokenizer again")
    with located(file):
        return build(content.get("tokenizer", content))


def join(parts: list[list[int]], *between: int) -> list[int]:
    """Join lists of ids into one, the first of them, with the ids ``between`` between each two."""
    joined = parts[0]
    for part in parts[1:]:
        joined += [*between, *part]
    return joined


def check_text(text: str) -> str:
    """Return a text that UTF-8 can encode, or raise: TypeError, InputError."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"{text[error.start]!r}, at offset {error.start}"
        raise InputError(f"the text has a lone surrogate, {where}; expected Unicode that UTF-8 can encode") from None
    return text


def check_ids(ids: Iterable[Any], vocab_size: int) -> list[int]:
    """Return ids as a list, or raise an InputError that names the one outside the vocabulary."""
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
    follows something else, where every tokenizer of this module starts a new word. Without such a place it ends
    somewhere after eight million characters, so that memory does not grow with the text.
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
            elif n_held > _LONGEST_PIECE:
                yield "".join(held)
                held, n_held = [], 0
    if held:
        yield "".join(held)
