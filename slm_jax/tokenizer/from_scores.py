"""Vocabularies whose pieces have scores, SentencePiece's and llama2.c's, rewritten as a `tokenizer.json`.

Such a BPE joins the two neighbours that make the piece with the highest score; a space is written "▁", one is put
before the text, and a character without a piece becomes its bytes in UTF-8.
"""

import base64
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm_jax.errors import InputError, located
from slm_jax.tokenizer.pretrained import PretrainedTokenizer

SPACE = "▁"
_LONGEST = 512  # characters of a piece: all its cuts in two are looked up
_MOST_BYTES = 1 << 26  # of a file
# Kinds of pieces, numbered as in SentencePiece and GGUF; special ones stand for no text.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe_model(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, add_space: bool = True
) -> dict[str, Any]:
    """Return the `tokenizer.json` of a BPE with scores.

    ``add_space``: whether a text begins with a space. InputError: a piece that is too long or occurs twice.
    """
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": set(_BYTES) <= set(pieces),
        "vocab": _vocabulary(pieces),
        "merges": _merges(pieces, scores, kinds),
    }
    return _content(model, pieces, kinds, add_space)


def _content(model: dict[str, Any], pieces: Sequence[str], kinds: Sequence[int], add_space: bool) -> dict[str, Any]:
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space else []),
    ]
    return {
        "version": "1.0",
        "added_tokens": added_tokens(pieces, kinds),
        "normalizer": {"type": "Sequence", "normalizers": [*([prepend] if add_space else []), replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def added_tokens(pieces: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the tokens that are found in a text before all others, as a `tokenizer.json` lists them."""
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": id_, "content": piece, **settings, "special": kind != USER_DEFINED}
        for id_, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def with_bos(content: dict[str, Any], token: str, id_: int) -> dict[str, Any]:
    """Return a `tokenizer.json` by which other programs let a text begin with a token; ours take it from its role."""
    special = {token: {"id": token, "ids": [id_], "tokens": [token]}}
    text = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*text, {"Sequence": {"id": "B", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": text, "pair": pair, "special_tokens": special}
    return {**content, "post_processor": processor}


def _vocabulary(pieces: Sequence[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for id_, piece in enumerate(pieces):
        if len(piece) > _LONGEST:
            raise InputError(f"piece {id_} has {len(piece):,} characters; expected at most {_LONGEST}")
        if ids.setdefault(piece, id_) != id_:
            raise InputError(f"pieces {ids[piece]} and {id_} are both {piece!r:.60}; expected one id each")
    return ids


def _merges(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[list[str]]:
    """Return all pairs of pieces that make a piece, the ones with the highest score first."""
    ids = {piece: id_ for id_, piece in enumerate(pieces) if kinds[id_] == NORMAL}
    merges = []
    for piece, id_ in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-scores[id_], id_, ids[left], ids[right]))
    return [[pieces[left], pieces[right]] for _, _, left, right in sorted(merges)]


# llama2.c


def read_llama2c(file: Path) -> PretrainedTokenizer:
    """Read a tokenizer of llama2.c: the length of the longest piece, then for each id a score and a piece."""
    with located(file):
        pieces, scores = _llama2c_pieces(_read(file))
        special = ("<unk>", "<s>", "</s>")
        if [piece.strip() for piece in pieces[:3]] != [*special] or pieces[3:259] != _BYTES:
            raise InputError("not a tokenizer of llama2.c; expected <unk>, <s>, </s> and 256 bytes to begin with")
        kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - 259)]
        pieces = [*special, *(piece.replace(" ", SPACE) for piece in pieces[3:])]
        roles = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
        # Its models were trained without </s>: the <s> of the next text ends a text, too.
        return PretrainedTokenizer(with_bos(bpe_model(pieces, scores, kinds), "<s>", 1), roles, (2, 1), add_bos=True)


def _llama2c_pieces(data: bytes) -> tuple[list[str], list[float]]:
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        (longest,) = struct.unpack_from("<i", data)
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            if not 0 <= length <= longest or at + 8 + length > len(data):
                raise InputError(f"piece {len(pieces)} has {length:,} bytes; expected at most {longest:,} in the file")
            pieces.append(data[at + 8 : at + 8 + length].decode())
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise InputError(f"not a tokenizer of llama2.c, or damaged: piece {len(pieces)}: {error}") from None
    return pieces, scores


def _read(file: Path) -> bytes:
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise InputError(f"{size:,} bytes; expected a tokenizer of at most {_MOST_BYTES:,}")
    return file.read_bytes()


# SentencePiece


def read_sentencepiece(file: Path) -> PretrainedTokenizer:
    """Read a model of SentencePiece, of its kinds BPE and unigram; InputError: its package is not installed."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(f"{file}: needs SentencePiece; pip install 'slm-jax[sentencepiece]'") from None
    with located(file):
        protocol: Any = sentencepiece_model_pb2  # its classes are made when it is imported
        proto = protocol.ModelProto()
        try:
            proto.ParseFromString(_read(file))
        except Exception as error:  # the package's own type, which moves between versions
            raise InputError(f"not a model of SentencePiece, or damaged ({error})") from None
        if not proto.pieces:
            raise InputError("not a model of SentencePiece, or damaged: no pieces")
        return _from_protocol(proto)


def _from_protocol(proto: Any) -> PretrainedTokenizer:
    pieces, scores, kinds = ([getattr(p, name) for p in proto.pieces] for name in ("piece", "score", "type"))
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == trainer.BPE:
        content = bpe_model(pieces, scores, kinds, add_space=rules.add_dummy_prefix)
    elif trainer.model_type == trainer.UNIGRAM:
        content = _unigram_model(pieces, scores, kinds, rules.add_dummy_prefix)
    else:
        raise InputError("a SentencePiece model of words or characters; expected BPE or unigram")
    normalizers = [
        *_charsmap(rules.precompiled_charsmap),
        *([_STRIP, _SQUEEZE] if rules.remove_extra_whitespaces else []),
        *content["normalizer"]["normalizers"],
    ]
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id}
    ids["pad_token"] = trainer.pad_id
    roles = {role: pieces[id_] for role, id_ in ids.items() if 0 <= id_ < len(pieces)}
    if "eos_token" not in roles:
        raise InputError("no piece ends a text (eos_id); expected one")
    # Llama's and Mistral's models expect it; the file does not say so.
    add_bos = "bos_token" in roles
    content = with_bos(content, roles["bos_token"], trainer.bos_id) if add_bos else content
    return PretrainedTokenizer(content, roles, (trainer.eos_id,), add_bos)


def _unigram_model(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], add_space: bool
) -> dict[str, Any]:
    """Return the `tokenizer.json` of a vocabulary of which the most likely pieces make a text."""
    model = {
        "type": "Unigram",
        "unk_id": next((id_ for id_, kind in enumerate(kinds) if kind == UNKNOWN), None),
        "vocab": [[piece, score] for piece, score in zip(pieces, scores, strict=True)],
        "byte_fallback": set(_BYTES) <= set(pieces),
    }
    return _content(model, pieces, kinds, add_space)


_STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
_SQUEEZE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def _charsmap(compiled: bytes) -> list[dict[str, Any]]:
    """Return the normalizer of SentencePiece's table of characters, if it has one."""
    if not compiled:
        return []
    return [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(compiled).decode()}]
