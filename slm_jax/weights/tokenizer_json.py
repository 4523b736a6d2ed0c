"""Our tokenizers as a ``tokenizer.json`` of Hugging Face's library ``tokenizers``, with the same ids for any text."""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from slm_jax.errors import InputError
from slm_jax.tokenizer import (
    END_OF_TEXT,
    UNKNOWN,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    PretrainedTokenizer,
    SimpleTokenizer,
    Tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Model

_ANY_CHARACTER = r"[\s\S]"
_SPACES = r"[\t-\r\x1c-\x20\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"  # as Python's \s
_MARKS = r"""[,.:;?_!"()']|--"""
_NO_SPACE_BEFORE = r"""[,.:;?!"()']"""


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the content of ``tokenizer.json``.

    ``<|endoftext|>`` is a special token there: in text, it always becomes its id, as with our ``allow_special``.

    Raises:
        InputError: a tokenizer that only slm_jax has; GPT-2's, if its files are not on this machine.
    """
    if isinstance(tokenizer, PretrainedTokenizer):
        return json.dumps(tokenizer.to_dict()["model"], ensure_ascii=False)
    if isinstance(tokenizer, GPT2Tokenizer):
        return _gpt2(tokenizer).to_str()
    if isinstance(tokenizer, BPETokenizer):
        return _bpe(tokenizer).to_str()
    if isinstance(tokenizer, CharTokenizer):
        return _characters(tokenizer).to_str()
    if isinstance(tokenizer, SimpleTokenizer):
        return _words(tokenizer).to_str()
    raise InputError(f"a tokenizer of kind {tokenizer.kind} cannot be written as tokenizer.json")


def _gpt2(tokenizer: GPT2Tokenizer) -> "Model":
    files = tokenizer.files()
    lines = files["vocab.bpe"].decode().splitlines()[1:]  # below the version
    merges = [(left, right) for left, right in map(str.split, takewhile(bool, lines))]
    return _byte_level(json.loads(files["encoder.json"]), merges)


def _bpe(tokenizer: BPETokenizer) -> "Model":
    tokens, merges = byte_characters(), []
    for left, right in tokenizer.to_dict()["merges"]:
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    model = _byte_level({token: id_ for id_, token in enumerate(tokens)}, merges)
    # tiktoken merges any two tokens that together make a third, the library only the listed pairs. They agree if each
    # token, encoded alone, ends as one: true of all merges that were learned, not of all that can be written by hand.
    broken = next((id_ for id_, token in enumerate(tokens) if len(model.model.tokenize(token)) != 1), None)
    if broken is not None:
        raise InputError(f"merge {broken - 256} of the BPE is never reached in order, which other programs merge by")
    return model


def byte_characters() -> list[str]:
    """Return the visible character by which byte-level BPE writes each byte: itself, or one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 0x100 + hidden.index(byte)) for byte in range(256)]


def _byte_level(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> "Model":
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers

    model = Model(models.BPE(dict(vocab), list(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT])
    return model


def _characters(tokenizer: CharTokenizer) -> "Model":
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    model = Model(models.WordLevel({char: id_ for id_, char in enumerate(tokenizer.to_dict()["chars"])}))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(_ANY_CHARACTER), "isolated")
    model.decoder = decoders.Fuse()
    model.add_special_tokens([END_OF_TEXT])
    return model


def _words(tokenizer: SimpleTokenizer) -> "Model":
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    words = [*tokenizer.to_dict()["words"], END_OF_TEXT, UNKNOWN]
    model = Model(models.WordLevel({word: id_ for id_, word in enumerate(words)}, UNKNOWN))
    pieces = [pre_tokenizers.Split(Regex(_SPACES), "removed"), pre_tokenizers.Split(Regex(_MARKS), "isolated")]
    model.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    spaced = decoders.Replace(Regex(f"^(?!{_NO_SPACE_BEFORE})"), " ")
    model.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model.add_special_tokens([AddedToken(word, single_word=True) for word in (END_OF_TEXT, UNKNOWN)])
    return model
