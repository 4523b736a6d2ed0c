"""Byte-level BPE through tiktoken: trained on your own text, and GPT-2's."""

import hashlib
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import check_reachable, sha256
from slm_jax.tokenizer.base import END_OF_TEXT, Tokenizer, check_ids, check_text, cut_pieces, join

if TYPE_CHECKING:
    import tiktoken

CONNECT_SECONDS = 1.5
_LONGEST_TOKEN = 1_024  # bytes: merges that double would fill the memory
# A part of a word, as GPT-2 splits them, that is so long that training cuts it off.
_LONG_WORD = re.compile(r"[^\W\d_]{512}|\s{512}|\d{512}|(?:[^\w\s]|_){512}")

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
        offset = check_text(text).find(END_OF_TEXT)
        if offset >= 0 and not allow_special:
            raise InputError(f"the text has {END_OF_TEXT} at offset {offset}; expected text without it")
        return join([self._encode_ordinary(document) for document in text.split(END_OF_TEXT)], self.eot_id)

    def _encode_ordinary(self, text: str) -> list[int]:
        # tiktoken's regex overflows its stack on a very long run of white space before a word. The run's last
        # character belongs to what follows, so a cut before it leaves every token as it was.
        cuts = [0, *(run.end() for run in _LONG_SPACE.finditer(text)), len(text)]
        return join([self.encoding.encode_ordinary(text[start:end]) for start, end in pairwise(cuts)])

    def decode(self, ids: Iterable[Any]) -> str:
        return self.encoding.decode(check_ids(ids, self.vocab_size), errors="replace")


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
            if len(token) > _LONGEST_TOKEN:
                raise InputError(
                    f"merge {i} makes a token of {len(token):,} bytes: expected at most {_LONGEST_TOKEN:,}"
                )
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
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=alphabet,
            max_token_length=_LONGEST_TOKEN,
            show_progress=False,
        )
        texts = (check_text(part) for part in ([text] if isinstance(text, str) else text))
        documents = (document for part in texts for document in part.split(END_OF_TEXT))
        # Pieces keep the trainer's memory small and its cores busy.
        pieces = (piece for each in documents for piece in cut_pieces([each], 1 << 16))
        model.train_from_iterator((part for piece in pieces for part in _cut_long_words(piece)), trainer)
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


def _cut_long_words(text: str) -> Iterator[str]:
    """Yield a text in parts, so that no word is much longer than 512 characters: training takes the square of that."""
    begin = 0
    for at in range(0, len(text), 512):
        if _LONG_WORD.match(text, at):
            yield text[begin:at]
            begin = at
    yield text[begin:]


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
