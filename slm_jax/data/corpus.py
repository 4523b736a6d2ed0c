"""From a source to two separate token arrays, for training and for validation."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable

import numpy as np

from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.data.ids import Ids, split_ids
from slm_jax.data.rows import Source
from slm_jax.data.sources import check_text_column, parse_source
from slm_jax.data.token_file import TokenFile, TokenSource, check_ids, open_token_file, token_dtype
from slm_jax.errors import InputError
from slm_jax.tokenizer import BPETokenizer, CharTokenizer, SimpleTokenizer, Tokenizer, fingerprint, get_tokenizer

_LONG = 200_000_000  # characters above which reading and encoding the text at each start takes too long
_CHUNK = 1 << 20  # tokens hashed at a time


@dataclasses.dataclass(frozen=True)
class Corpus:
    """1-D token ids of both splits, with the end-of-text id between documents, and the tokenizer that made them."""

    train: Ids
    validation: Ids
    tokenizer: Tokenizer
    bytes_per_token: float | None  # UTF-8 bytes per validation token; None if the source is token ids
    sha256: tuple[str, ...] = ()  # SHA-256 of each token file; empty for text, or if a file has none
    notes: tuple[str, ...] = ()  # warnings about the source, one per line

    def fingerprint(self) -> str:
        """Return a SHA-256 of both splits, which is equal only if all tokens are."""
        if self.sha256:  # verified when the files were opened: don't read tens of GB again
            cut = [*self.sha256, self.train.size, self.validation.size]
            return hashlib.sha256(json.dumps(cut).encode()).hexdigest()
        digest = hashlib.sha256()
        for tokens in (self.train, self.validation):
            digest.update(str(tokens.size).encode())
            for start in range(0, tokens.size, _CHUNK):
                digest.update(np.ascontiguousarray(tokens[start : start + _CHUNK], dtype="<u4").tobytes())
        return digest.hexdigest()


def load_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    saved: Tokenizer | None = None,
    stop: Callable[[], None] | None = None,
    verify: bool = True,
) -> Corpus:
    """Read the sources, split them, get or train the tokenizer (on the training split), and encode.

    ``saved``, the tokenizer of a resumed run or a base, replaces the configured one; ``stop`` is called regularly and
    may raise. ``verify``: whether to check the SHA-256 of token files and the range of bare ids, which reads all of
    them; doing so on one host is enough.

    Raises:
        InputError: a source or tokenizer that cannot be used; token ids outside the vocabulary.
    """
    sources = [parse_source(text) for text in (data.source, data.validation_source) if text is not None]
    check_text_column(data.text_column, sources, "data.text_column")
    if any(isinstance(source, TokenSource) for source in sources):
        return _load_token_files(data, sources, tokenizer, saved, verify)
    if len(sources) == 1:
        train, validation = split_documents(sources[0].read_documents(data.text_column), data.validation_fraction)
    else:
        train, validation = (source.read_documents(data.text_column) for source in sources)
    used = saved or make_tokenizer(tokenizer, train, validation)
    train_ids, validation_ids = (encode_documents(part, used, stop) for part in (train, validation))
    n_bytes = sum(len(document.encode()) for document in validation)
    notes: tuple[str, ...] = ()
    if (n_characters := sum(map(len, train)) + sum(map(len, validation))) >= _LONG:
        do_once = f"slm-jax prepare --source {shlex.quote(data.source)} --out FILE.bin"
        notes = (f"{n_characters / 1e6:,.0f} million characters are read at each start; to do it once: {do_once}",)
    return Corpus(train_ids, validation_ids, used, n_bytes / max(1, validation_ids.size), notes=notes)


def _load_token_files(
    data: DataConfig, sources: list[Source], config: TokenizerConfig, saved: Tokenizer | None, verify: bool
) -> Corpus:
    if not all(isinstance(source, TokenSource) for source in sources):
        both = f"data.source {data.source} and data.validation_source {data.validation_source}"
        raise InputError(f"{both}: one is tokens, the other text; expected both of the same kind")
    files = [open_token_file(source.name, verify) for source in sources]
    used = saved or _choose_tokenizer(data.source, files[0].tokenizer, config)
    for source, file in zip(sources, files, strict=True):
        check_tokenizer(source, file, used, verify)
    known = tuple(file.sha256 for file in files if file.sha256 is not None)
    arrays = [file.tokens for file in files]
    if len(arrays) == 1:
        arrays = list(split_ids(arrays[0], int(len(arrays[0]) * (1 - data.validation_fraction))))
    return Corpus(arrays[0], arrays[1], used, None, known if len(known) == len(files) else ())


def _choose_tokenizer(source: str, own: Tokenizer | None, config: TokenizerConfig) -> Tokenizer:
    if config.kind == "gpt2" or config.path is not None:
        return make_tokenizer(config, [], [])
    if own is None:
        expected = "expected --tokenizer.kind gpt2, or --tokenizer.path FILE"
        raise InputError(f"data.source {source} holds bare token ids, so its tokenizer is unknown; {expected}")
    if config.kind not in ("bpe", own.kind):  # bpe is also the default
        raise InputError(f"{source}: made with {_name(own)}, but tokenizer.kind is {config.kind}; leave it out")
    return own


def check_tokenizer(source: Source, file: TokenFile, tokenizer: Tokenizer, verify: bool = True) -> None:
    """Refuse ids of another tokenizer; of bare ids, only the range can be checked (if ``verify``: reads all ids)."""
    if file.tokenizer is None:
        if verify:
            check_ids(file.tokens, tokenizer.vocab_size, source.name)
    elif fingerprint(file.tokenizer) != fingerprint(tokenizer):
        what = f"made with {_name(file.tokenizer)}, expected {_name(tokenizer)}"
        raise InputError(f"{source}: {what}; prepare the text with that one: slm-jax prepare --tokenizer PATH")


def _name(tokenizer: Tokenizer) -> str:
    return f"the {tokenizer.kind} tokenizer {fingerprint(tokenizer)[:8]}"


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Split documents by characters: the first part is for training, the rest for validation.

    Several documents are first shuffled, always in the same order, so that both parts are similar; a single document's
    end is for validation (as in nanoGPT and the book). A document at the boundary is cut in two.
    """
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    remaining = int(sum(map(len, documents)) * (1 - validation_fraction))
    train: list[str] = []
    for i, document in enumerate(documents):
        if len(document) > remaining:
            parts = (document[:remaining], document[remaining:])
            return [*train, parts[0]] if parts[0] else train, [parts[1], *documents[i + 1 :]]
        train.append(document)
        remaining -= len(document)
    return train, []


def make_tokenizer(config: TokenizerConfig, train: list[str], validation: list[str]) -> Tokenizer:
    """Load the configured tokenizer, or make it from the training text ``train``.

    ``char`` takes its alphabet from the whole text (as in nanoGPT), so that rare characters of the validation split can
    be encoded. InputError: a file cannot be read, or there is no text to make a tokenizer from.
    """
    if config.path is not None or config.kind == "gpt2":
        return get_tokenizer(config.path or "gpt2")
    if not any(map(str.strip, train)):
        raise InputError("empty text: there is nothing to train on; expected at least one window of text")
    if config.kind == "char":
        return CharTokenizer().build_vocab("".join([*train, *validation]))
    if config.kind == "simple":
        return SimpleTokenizer().build_vocab("\n".join(train))
    return BPETokenizer.train(train, vocab_size=config.vocab_size)


def encode_documents(documents: list[str], tokenizer: Tokenizer, stop: Callable[[], None] | None = None) -> np.ndarray:
    """Encode documents into one array of ids, uint16 if they fit, with `document_ids` between documents.

    ``stop`` is called for each document and may raise.
    """
    pieces = [np.zeros(0, token_dtype(tokenizer.vocab_size))]
    for document in documents:
        if stop:
            stop()
        if ids := tokenizer.encode(document):  # white space at the cut between the splits may have no token
            pieces.append(np.array([*tokenizer.document_ids, *ids], pieces[0].dtype))
    return np.concatenate(pieces)[1:]
