"""From a source to two token arrays, one to train on and one to validate on, that share no token."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable

import numpy as np

from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.data.documents import read_documents
from slm_jax.data.sources import KINDS, check_text_column, is_token_source, parse_source
from slm_jax.data.token_file import TokenFile, check_ids, open_token_file, token_dtype
from slm_jax.errors import InputError
from slm_jax.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    SimpleTokenizer,
    Tokenizer,
    fingerprint,
    get_tokenizer,
)

_LONG = 200_000_000  # characters from which reading the text at each start is no longer reasonable
# What to do about ids of another tokenizer than the model's, or than the one asked for.
_MODELS = "prepare the text with the model's: slm-jax prepare --tokenizer RUN"
_ASKED = "leave tokenizer.kind and tokenizer.path out, or prepare the text with the one asked for"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, and the tokenizer that made them.

    Attributes:
        train: 1-D integers; documents follow each other with the end-of-text id between them.
        validation: likewise, from text that ``train`` does not have.
        tokenizer: what the ids mean.
        bytes_per_token: UTF-8 bytes a validation token stands for; None where the source is tokens.
        sha256: of each token file that both splits are made of; empty if one of them has none, or the source is text.
        notes: what a person should know of the source, a line each.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float | None
    sha256: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a SHA-256 of both splits: the same only where every token is the same."""
        if self.sha256:  # compared with the files as they were opened; tens of GB are not read a second time
            cut = [*self.sha256, self.train.size, self.validation.size]
            return hashlib.sha256(json.dumps(cut).encode()).hexdigest()
        digest = hashlib.sha256()
        for tokens in (self.train, self.validation):
            digest.update(str(tokens.size).encode())
            for chunk in _chunks(tokens):
                digest.update(np.ascontiguousarray(chunk, dtype="<u4").tobytes())
        return digest.hexdigest()


def load_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    saved: Tokenizer | None = None,
    stop: Callable[[], None] | None = None,
) -> Corpus:
    """Read the sources, split them, get or train the tokenizer (on the training split), and encode.

    Args:
        data: sources and split.
        tokenizer: what to use or train.
        saved: the tokenizer of a run that goes on; used instead of ``tokenizer``.
        stop: called now and then; may raise to stop early.

    Raises:
        InputError: a source or tokenizer that cannot be used; token ids outside the vocabulary.
    """
    check = stop or (lambda: None)
    sources = [source for source in (data.source, data.validation_source) if source is not None]
    check_text_column(data.text_column, sources, "data.text_column")
    if any(map(is_token_source, sources)):
        return _load_token_files(data, sources, tokenizer, saved)
    train_documents = split_at_end_of_text(read_documents(data.source, data.text_column))
    if data.validation_source is None:
        train_documents, validation_documents = split_documents(train_documents, data.validation_fraction)
    else:
        validation_documents = split_at_end_of_text(read_documents(data.validation_source, data.text_column))
    used = saved or make_tokenizer(tokenizer, train_documents, validation_documents)
    train = encode_documents(train_documents, used, check)
    validation = encode_documents(validation_documents, used, check)
    size = sum(len(document.encode()) for document in validation_documents)
    n_characters = sum(map(len, train_documents)) + sum(map(len, validation_documents))
    return Corpus(train, validation, used, size / max(1, validation.size), notes=_notes(data.source, n_characters))


def open_tokens(source: str, tokenizer: Tokenizer) -> TokenFile:
    """Open ``tokens:FILE.bin`` and make sure that its ids are those of a model's tokenizer.

    Raises:
        InputError: not such a source; a file that cannot be used, or was made with another tokenizer; bare ids outside
            the vocabulary.
    """
    file = open_token_file(_token_path(source))
    _check_tokenizer(source, file, tokenizer, "the model's", _MODELS)
    return file


def _load_token_files(data: DataConfig, sources: list[str], config: TokenizerConfig, saved: Tokenizer | None) -> Corpus:
    if not all(map(is_token_source, sources)):
        raise InputError(
            f"data.source {data.source} and data.validation_source {data.validation_source}: one is tokens, the other "
            "text; expected both of the same kind"
        )
    files = [open_token_file(_token_path(source)) for source in sources]
    tokenizer, whose, remedy = _choose_tokenizer(data.source, files[0].tokenizer, config, saved)
    for source, file in zip(sources, files, strict=True):
        _check_tokenizer(source, file, tokenizer, whose, remedy)
    known = tuple(file.sha256 for file in files if file.sha256 is not None)
    sha256 = known if len(known) == len(files) else ()
    tokens = files[0].tokens
    if len(files) > 1:
        return Corpus(tokens, files[1].tokens, tokenizer, None, sha256)
    cut = int(len(tokens) * (1 - data.validation_fraction))
    return Corpus(tokens[:cut], tokens[cut:], tokenizer, None, sha256)


def _choose_tokenizer(
    source: str, own: Tokenizer | None, config: TokenizerConfig, saved: Tokenizer | None
) -> tuple[Tokenizer, str, str]:
    """Return the tokenizer of token ids, whose it is, and what to do about a file of another one."""
    if saved is not None:
        return saved, "the model's", _MODELS
    if config.kind == "gpt2" or config.path is not None:
        return make_tokenizer(config, [], []), "the one asked for", _ASKED
    if own is None:
        raise InputError(
            f"data.source {source} holds bare token ids, so no {config.kind} tokenizer can be trained on it; "
            "say which one made them: --tokenizer.kind gpt2, or --tokenizer.path FILE"
        )
    if config.kind not in ("bpe", own.kind):  # bpe is also what nobody asked for
        raise InputError(f"{source}: made with {_name(own)}, but tokenizer.kind is {config.kind}; {_ASKED}")
    return own, "data.source's", "prepare both with the same one"


def _check_tokenizer(source: str, file: TokenFile, tokenizer: Tokenizer, whose: str, remedy: str) -> None:
    """Refuse ids of another tokenizer; of bare ids only the range can be checked."""
    if file.tokenizer is None:
        check_ids(file.tokens, tokenizer.vocab_size, _token_path(source))
    elif fingerprint(file.tokenizer) != fingerprint(tokenizer):
        raise InputError(f"{source}: made with {_name(file.tokenizer)}, but {whose} is {_name(tokenizer)}; {remedy}")


def _name(tokenizer: Tokenizer) -> str:
    return f"the {tokenizer.kind} tokenizer {fingerprint(tokenizer)[:8]}"


def _token_path(source: str) -> str:
    kind, path = parse_source(source)
    if kind != "tokens":
        raise InputError(f"source {source!r} holds text, expected token ids: {KINDS['tokens']}")
    return path


def _notes(source: str, n_characters: int) -> tuple[str, ...]:
    if n_characters < _LONG:
        return ()
    text = f"{n_characters / 1e6:,.0f} million characters are read and encoded at each start"
    return (f"{text}; once is enough: slm-jax prepare --source {shlex.quote(source)} --out FILE.bin",)


def split_at_end_of_text(texts: Iterable[str]) -> list[str]:
    """Split texts at a literal ``<|endoftext|>``, the usual mark between documents in one file; drop empty ones."""
    return [document for text in texts for document in text.split(END_OF_TEXT) if document.strip()]


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Split documents by characters: the first part trains, the rest validates.

    Several documents are first put in a random order, always the same one, so that both parts are alike; one document
    keeps its own, so that its last part validates (as in nanoGPT and the book). A document at the cut is cut in two.

    Args:
        documents: texts, in a fixed order.
        validation_fraction: the share of characters that validates, 0 to 1.
    """
    order = np.random.default_rng(0).permutation(len(documents))
    documents = [documents[i] for i in order]
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

    Characters are the exception: nanoGPT's way, the alphabet is that of the whole text, or else a rare letter of the
    validation split could not be encoded.

    Raises:
        InputError: a tokenizer's file that cannot be read; no text to make one from.
    """
    if config.path is not None:
        return get_tokenizer(config.path)
    if config.kind == "gpt2":
        return get_tokenizer("gpt2")
    if not any(map(str.strip, train)):
        raise InputError("empty text: there is nothing to train on; expected at least one window of text")
    if config.kind == "char":
        return CharTokenizer().build_vocab("".join([*train, *validation]))
    if config.kind == "simple":
        return SimpleTokenizer().build_vocab(f" {END_OF_TEXT} ".join(train))
    return BPETokenizer.train(train, vocab_size=config.vocab_size)


def encode_documents(documents: list[str], tokenizer: Tokenizer, stop: Callable[[], None] = lambda: None) -> np.ndarray:
    """Encode documents into one array of ids, uint16 where they fit, with the end-of-text id between documents.

    ``stop`` is called for each document and may raise.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    pieces: list[np.ndarray] = []
    for document in documents:
        stop()
        ids = tokenizer.encode(document)
        if not ids:  # white space at the cut between the splits, which is no word
            continue
        if pieces:
            pieces.append(np.array([tokenizer.eot_id], dtype))
        pieces.append(np.array(ids, dtype))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)


def _chunks(tokens: np.ndarray, size: int = 1 << 20) -> Iterable[np.ndarray]:
    return (tokens[i : i + size] for i in range(0, tokens.size, size))
