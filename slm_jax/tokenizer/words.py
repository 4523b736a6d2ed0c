"""The book's tokenizers of words and of characters."""

import re
import reprlib
from collections.abc import Iterable
from typing import Any

from slm_jax.errors import InputError
from slm_jax.tokenizer.base import END_OF_TEXT, Tokenizer, check_ids, check_text, join

UNKNOWN = "<|unk|>"


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
        return list(check_text(text))

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
        text = " ".join(self._tokens[i] for i in check_ids(ids, self.vocab_size))
        return re.sub(r"""\s+([,.:;?!"()'])""", r"\1", text)

    def _split(self, text: str) -> list[str]:
        parts = re.split(r"""([,.:;?_!"()']|--|\s)""", check_text(text))
        return [word for part in parts if (word := part.strip())]


class CharTokenizer(_TableTokenizer):
    """One id per character, sorted (nanoGPT's ids), then `<|endoftext|>`; the round trip is exact."""

    kind: str = "char"
    _fields = ("chars",)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Turn text into ids (`allow_special`: `<|endoftext|>` is one); InputError: a character without an id."""
        eot_id = self.eot_id
        documents = check_text(text).split(END_OF_TEXT) if allow_special else [check_text(text)]
        try:
            return join([[self._ids[char] for char in document] for document in documents], eot_id)
        except KeyError as error:
            char = error.args[0]
            # A special token may hold the unknown character, too.
            plain = text.replace(END_OF_TEXT, self._tokens[0] * len(END_OF_TEXT)) if allow_special else text
            what = f"character {char!r} at offset {plain.index(char)} is not in the vocabulary of {eot_id} characters"
            raise InputError(f"{what}; use text of these, or tokenizer.kind: bpe") from None

    def decode(self, ids: Iterable[Any]) -> str:
        """Join the characters."""
        return "".join(self._tokens[i] for i in check_ids(ids, self.vocab_size))
