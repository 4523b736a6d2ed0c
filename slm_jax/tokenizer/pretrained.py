"""Tokenizers of pretrained models, through Hugging Face's package `tokenizers`.

A `tokenizer.json` says how text becomes ids. Which tokens begin and end a text, and how conversations are written, is
in the files beside it: `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
`chat_template.jinja`. Vocabularies of other formats are first rewritten as a `tokenizer.json`
(`slm_jax/tokenizer/from_scores.py`, `from_gguf.py`).
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

from slm_jax.errors import InputError, located
from slm_jax.files import check_kind, read_json
from slm_jax.tokenizer.base import END_OF_TEXT, Tokenizer, check_ids, check_text

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Where no file says which token ends a text.
_USUAL_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


class _Saved(TypedDict):
    model: dict[str, Any]
    roles: dict[str, str]
    eos_ids: list[int]
    add_bos: bool
    chat_template: str | None


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers`, and the roles of its special tokens.

    Args:
        model: content of a `tokenizer.json`; its truncation and padding are switched off.
        roles: special tokens by the names that chat templates have for them, such as `eos_token`.
        eos_ids: ids that end what the model writes; the first also ends a document.
        add_bos: whether the model expects the token `bos_token` before a text.
        chat_template: the model's own template of conversations, in Jinja's language.

    Raises:
        InputError: a `model` that `tokenizers` cannot read; roles without a token in the vocabulary.
    """

    kind: str = "huggingface"

    def __init__(
        self,
        model: Mapping[str, Any],
        roles: Mapping[str, str],
        eos_ids: Sequence[int],
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self._content = {**model, "truncation": None, "padding": None}
        self._model = _build(model)
        self._roles, self._eos_ids, self._add_bos = dict(roles), tuple(eos_ids), add_bos
        self.chat_template = chat_template
        if not eos_ids or not all(0 <= id_ < self.vocab_size for id_ in eos_ids):
            raise InputError(f"eos_ids is {list(eos_ids)}; expected ids below {self.vocab_size}, at least one")
        if add_bos and self.token_id(roles.get("bos_token", "")) is None:
            raise InputError(f"bos_token is {roles.get('bos_token')!r}; expected a token of the vocabulary")

    @cached_property
    def _n_ids(self) -> int:
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest id and one; some in between may have no token."""
        return self._n_ids

    @property
    def eot_id(self) -> int:
        return self._eos_ids[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def start_ids(self) -> list[int]:
        id_ = self.token_id(self._roles["bos_token"]) if self._add_bos else None
        return [] if id_ is None else [id_]

    @property
    def roles(self) -> Mapping[str, str]:
        return self._roles

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self._model.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        tokens = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it; None: it has none."""
        return self._model.token_to_id(token)

    def continued(self) -> "PretrainedTokenizer":
        return self._continued

    @cached_property
    def _continued(self) -> "PretrainedTokenizer":
        parts = {name: _without_space(self._content.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
        if not self._add_bos and all(self._content.get(name) == part for name, part in parts.items()):
            return self
        content = {**self._content, **parts}
        return PretrainedTokenizer(content, self._roles, self._eos_ids, chat_template=self.chat_template)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        is_plain = allow_special or not self._special_pattern or not self._special_pattern.search(check_text(text))
        return self._encode(text, self._model if is_plain else self._spelling).ids

    @cached_property
    def _spelling(self) -> Any:
        """The tokenizer for texts in which special tokens are words like any others."""
        model = type(self._model).from_str(self._model.to_str())
        model.encode_special_tokens = True
        return model

    def encode_prompt(self, text: str) -> list[int]:
        if self._special_pattern and (found := self._special_pattern.search(check_text(text))):
            where = f"{found[0]} at offset {found.start()}"
            raise InputError(f"the prompt has the special token {where}; a chat template (--instruction) writes them")
        return super().encode_prompt(text)

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Encode the whole text; an id belongs to the part in which its text begins."""
        encoded, ends = self._encode("".join(parts), self._model), list(accumulate(map(len, parts)))
        split: list[list[int]] = [[] for _ in parts]
        for id_, (start, _) in zip(encoded.ids, encoded.offsets, strict=True):
            split[min(bisect_right(ends, start), len(parts) - 1)].append(id_)
        return split

    def _encode(self, text: str, model: Any) -> Any:
        try:
            return model.encode(check_text(text), add_special_tokens=False)
        except Exception as error:  # the package raises nothing more special
            culprit = next((char for char in dict.fromkeys(text) if char != text and not self._has(char, model)), text)
            raise InputError(f"the tokenizer cannot encode {culprit!r:.60} ({_one_line(error)})") from None

    def _has(self, char: str, model: Any) -> bool:
        try:
            self._encode(char, model)
        except InputError:
            return False
        return True

    def decode(self, ids: Iterable[Any]) -> str:
        checked, start = check_ids(ids, self.vocab_size), self.start_ids
        if start and checked[: len(start)] == start:
            checked = checked[len(start) :]
        return self._model.decode(checked, skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        """The content of the `tokenizer.json`, and the roles of special tokens."""
        return {
            "kind": self.kind,
            "model": self._content,
            "roles": self._roles,
            "eos_ids": list(self._eos_ids),
            "add_bos": self._add_bos,
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PretrainedTokenizer":
        if data.get("kind") != cls.kind:
            raise InputError(f"kind is {data.get('kind')!r:.60}; expected {cls.kind!r} (or use load_tokenizer)")
        check_kind(data, _Saved, "tokenizer")
        return cls(*(data[name] for name in list(_Saved.__annotations__)))


@lru_cache(maxsize=1)  # the roles are looked up in it before a `PretrainedTokenizer` is made
def _read_model(text: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(text)


def _build(content: Mapping[str, Any]) -> Any:
    """Return a tokenizer that adds nothing to a text, cuts nothing off and pads nothing."""
    import tokenizers

    try:
        return _read_model(json.dumps({**content, **dict.fromkeys(("post_processor", "truncation", "padding"))}))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the package is no Exception
        what = _one_line(error)
        parts = ("normalizer", "pre_tokenizer", "model", "decoder")
        kinds = {name: content[name].get("type") for name in parts if isinstance(content.get(name), dict)}
        shown = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        problem = f"the package tokenizers {tokenizers.__version__} cannot read it ({what:.200}; {shown})"
        raise InputError(f"{problem}; expected a tokenizer.json that this version knows") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _without_space(part: Any) -> Any:
    """Return a part of a `tokenizer.json` that neither puts a space before a text nor removes one there."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Sequence":
        name = next((name for name in ("normalizers", "pretokenizers", "decoders") if name in part), "")
        return {**part, name: [kept for each in part[name] if (kept := _without_space(each)) is not None]}
    if kind == "Metaspace":
        return {
            **{name: value for name, value in part.items() if name != "add_prefix_space"},
            "prepend_scheme": "never",
        }
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    if kind == "Strip":
        return {**part, **({"start": 0} if "start" in part else {"strip_left": False})}
    return None if kind == "Prepend" else part


# Hugging Face's files


def from_tokenizer_json(content: dict[str, Any], folder: Path) -> PretrainedTokenizer:
    """Make a tokenizer from the content of a `tokenizer.json`, and the files in its folder that say more about it."""
    model = _build(content)
    config = _read(folder / "tokenizer_config.json")
    roles = {**_roles(_read(folder / "special_tokens_map.json")), **_roles(config)}
    eos_ids = _end_ids(model, roles, _read(folder / "generation_config.json"), _read(folder / "config.json"))
    roles.setdefault("eos_token", model.id_to_token(eos_ids[0]) or "")
    template = read_chat_template(folder)
    return PretrainedTokenizer(content, roles, eos_ids, _adds_bos(content, roles, config), template)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _roles(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by their roles; one is a text, or an object with the text as its content."""
    found = {}
    for role in ROLES:
        token = content.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _end_ids(model: Any, roles: Mapping[str, str], *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a text: of the role `eos_token`, and those of a model's configurations."""
    ids: list[Any] = []
    if "eos_token" in roles:
        ids.append(model.token_to_id(roles["eos_token"]))
        if ids == [None]:
            raise InputError(f"eos_token is {roles['eos_token']!r}; expected a token of the vocabulary")
    for config in configs:
        value = config.get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    if not any(type(id_) is int for id_ in ids):
        ids = [model.token_to_id(token) for token in _USUAL_ENDS]
    if not (found := tuple(dict.fromkeys(id_ for id_ in ids if type(id_) is int))):
        raise InputError("no file says which token ends a text; expected eos_token in tokenizer_config.json")
    return found


def _adds_bos(content: Mapping[str, Any], roles: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Return whether a text begins with `bos_token`, as `transformers` decides it: by the `tokenizer.json`.

    A file without any post-processor leaves it to `add_bos_token`.
    """
    processor = content.get("post_processor")
    if processor is None:
        return "bos_token" in roles and config.get("add_bos_token") is True
    parts = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    starts = [part["single"][:1] for part in parts if isinstance(part, dict) and isinstance(part.get("single"), list)]
    return [{"SpecialToken": {"id": roles.get("bos_token"), "type_id": 0}}] in starts


def read_chat_template(folder: Path) -> str | None:
    """Return the template of conversations in the files of a pretrained model's folder; None: it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as UTF-8: {error}") from None
    found = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, each with a name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if not isinstance(found, str | None):
        with located(folder / "tokenizer_config.json"):
            raise InputError(f"chat_template is {found!r:.60}; expected text")
    return found
