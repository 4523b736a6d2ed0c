"""Text to token ids and back: words, characters, a trainable byte-level BPE, GPT-2's BPE, and pretrained models' own.

All tokenizers share one interface, `Tokenizer`; a vocabulary is built, trained or loaded, and saved as one JSON file.
The book's are in `slm_jax/tokenizer/words.py` and `bpe.py`, those of pretrained models in `pretrained.py`.

Special tokens in text. `<|endoftext|>` marks the end of a document, and untrusted text must not be able to forge it.
`BPETokenizer` and `GPT2Tokenizer` refuse it in text, `CharTokenizer` spells it out, and so does `PretrainedTokenizer`
with all of its special tokens (one may be called `<filename>`), unless the caller passes `allow_special=True`; then it
becomes `eot_id`. `SimpleTokenizer` follows the book, where it is a word like any other and always becomes its id.
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from typing import Any

from slm_jax.errors import InputError
from slm_jax.tokenizer.base import END_OF_TEXT, FILE_NAME, Tokenizer, cut_pieces, find_file, read_saved
from slm_jax.tokenizer.bpe import BPETokenizer, GPT2Tokenizer
from slm_jax.tokenizer.from_gguf import read_gguf
from slm_jax.tokenizer.from_scores import read_llama2c, read_sentencepiece
from slm_jax.tokenizer.pretrained import PretrainedTokenizer, from_tokenizer_json
from slm_jax.tokenizer.words import UNKNOWN, CharTokenizer, SimpleTokenizer

__all__ = [
    "END_OF_TEXT",
    "FILE_NAME",
    "UNKNOWN",
    "BPETokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "PretrainedTokenizer",
    "SimpleTokenizer",
    "Tokenizer",
    "cut_pieces",
    "fingerprint",
    "get_tokenizer",
    "load_tokenizer",
    "same_tokens",
    "tokenizer_from_dict",
]

_CLASSES: dict[str, Any] = {
    cls.kind: cls for cls in (SimpleTokenizer, CharTokenizer, BPETokenizer, GPT2Tokenizer, PretrainedTokenizer)
}


def get_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """Return GPT-2's tokenizer (`"gpt2"`), or one from a file or folder.

    Args:
        name_or_path: `gpt2`; a tokenizer that was saved: its file, its folder, a run's folder or ``FILE.bin.json``; or
            a pretrained model's: its folder or file `tokenizer.json` of Hugging Face, with the files beside it, a GGUF
            file, SentencePiece's `tokenizer.model`, llama2.c's ``FILE.bin``.

    Raises:
        MissingInputError: no tokenizer there (GPT-2's files are loaded at the first `encode` or `decode`).
        InputError: a file that is damaged, not a tokenizer's, or needs what the package `tokenizers` doesn't have.
    """
    return GPT2Tokenizer() if name_or_path == "gpt2" else load_tokenizer(name_or_path)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer of any kind from a file or folder; arguments and errors as for :func:`get_tokenizer`."""
    file = find_file(path)
    if file.suffix == ".model":
        return read_sentencepiece(file)
    if file.suffix == ".gguf":
        return read_gguf(file)
    if file.suffix == ".bin":
        return read_llama2c(file)

    def build(content: dict[str, Any]) -> Tokenizer:
        foreign = "model" in content and "kind" not in content
        return from_tokenizer_json(content, file.parent) if foreign else tokenizer_from_dict(content)

    return read_saved(file, build)


def tokenizer_from_dict(data: Mapping[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer of any kind from the result of its `to_dict`; InputError: anything else."""
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise InputError(f"not a tokenizer of slm_jax: kind is {reprlib.repr(kind)}, expected {', '.join(_CLASSES)}")
    return _CLASSES[kind].from_dict(data)


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether each id is the same text, as in a tokenizer and its export for other programs."""
    return a.vocab_size == b.vocab_size and all(a.decode([id_]) == b.decode([id_]) for id_ in range(a.vocab_size))


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of what determines the ids (`to_dict` without the chat template)."""
    content = {name: value for name, value in tokenizer.to_dict().items() if name != "chat_template"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
