"""From a source to two token arrays, one to train on and one to validate on, that share no token."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from slm_jax.config import DataConfig, TokenizerConfig
from slm_jax.data.sources import is_token_source, read_documents, read_tokens
from slm_jax.errors import InputError
from slm_jax.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, SimpleTokenizer, Tokenizer, get_tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, and the tokenizer that made them.

    Attributes:
        train: 1-D integers; documents follow each other with the end-of-text id between them.
        validation: likewise, from text that ``train`` does not have.
        tokenizer: what the ids mean.
        bytes_per_token: UTF-8 bytes a validation token stands for; None where the source is tokens.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    bytes_per_token: float | None

    def fingerprint(self) -> str:
        """Return a SHA-256 over both splits: the same only where every token is the same."""
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
    if any(map(is_token_source, filter(None, (data.source, data.validation_source)))):
        return _load_token_files(data, tokenizer, saved)
    train_documents = split_at_end_of_text(read_documents(data.source))
    if data.validation_source is None:
        train_documents, validation_documents = split_documents(train_documents, data.validation_fraction)
    else:
        validation_documents = split_at_end_of_text(read_documents(data.validation_source))
    used = saved or make_tokenizer(tokenizer, train_documents, validation_documents)
    train = encode_documents(train_documents, used, check)
    validation = encode_documents(validation_documents, used, check)
    size = sum(len(document.encode()) for document in validation_documents)
    return Corpus(train, validation, used, size / max(1, validation.size))


def _load_token_files(data: DataConfig, tokenizer: TokenizerConfig, saved: Tokenizer | None) -> Corpus:
    if not all(map(is_token_source, filter(None, (data.source, data.validation_source)))):
        raise InputError(
            f"data.source {data.source} and data.validation_source {data.validation_source}: one is tokens, the other "
            "text; expected both of the same kind"
        )
    if saved is None and tokenizer.kind != "gpt2" and tokenizer.path is None:
        raise InputError(
            f"data.source {data.source} holds token ids, so no {tokenizer.kind} tokenizer can be trained on it; "
            "say which one made them: --tokenizer.kind gpt2, or --tokenizer.path FILE"
        )
    used = saved or make_tokenizer(tokenizer, [], [])
    tokens = read_tokens(data.source, used.vocab_size)
    if data.validation_source is not None:
        return Corpus(tokens, read_tokens(data.validation_source, used.vocab_size), used, None)
    cut = int(len(tokens) * (1 - data.validation_fraction))
    return Corpus(tokens[:cut], tokens[cut:], used, None)


def split_at_end_of_text(texts: Iterable[str]) -> list[str]:
    """Split texts at a literal ``<|endoftext|>``, the usual mark between documents in one file; drop empty ones."""
    return [document for text in texts for document in text.split(END_OF_TEXT) if document.strip()]


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Split documents by characters: the first part trains, the rest validates.

    Several documents are first put in a random order, always the same one, so that both parts are alike; one document
    keeps its own, so that its last part validates (as in nanoGPT and the book). A document at the cut is cut in two.
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
    """Load the configured tokenizer, or make it from the training text.

    Characters are the exception: nanoGPT's way, the alphabet is that of the whole text, or else a rare letter of the
    validation split could not be encoded.
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
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
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
