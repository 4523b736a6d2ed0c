"""What lies beside weights and ``config.json`` in a Hugging Face folder: tokenizer, generation settings, model card.

Every family's export writes these files; only ``config.json`` is its own.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slm_jax.data.chat_template import ChatTemplate
from slm_jax.data.templates import Message, Template
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, count_params
from slm_jax.tokenizer import END_OF_TEXT, UNKNOWN, PretrainedTokenizer, SimpleTokenizer, Tokenizer
from slm_jax.weights.registry import GGUFDtype
from slm_jax.weights.tokenizer_json import tokenizer_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What an export says about a model beside its weights.

    Attributes:
        name: by which the model is opened: a path, or OWNER/NAME on Hugging Face's hub.
        tokenizer: tokenizer of the model.
        template: template of the conversations that the model was trained on.
        classes: names of a classifier's classes, in the order of its logits; empty: a language model.
        base_model: name on the hub of the model that it was fine-tuned from.
        dtype: dtype of the matrices in GGUF.
        generation: keys of generation_config.json, such as temperature.
        card: further rows of the model card's table.
    """

    name: str
    tokenizer: Tokenizer | None = None
    template: Template | None = None
    classes: Sequence[str] = ()
    base_model: str | None = None
    dtype: GGUFDtype = "float32"
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def json_file(content: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def side_files(cfg: GPTConfig, model_type: str, about: About) -> dict[str, bytes]:
    """Return the files by name; those of the tokenizer only if other programs can have it."""
    tokenizer = _tokenizer_files(cfg, about)
    code = _snippet(cfg, about) if tokenizer else _WEIGHTS.format(name=json.dumps(about.name))
    return {
        "README.md": _card(cfg, model_type, about, code).encode(),
        **({} if about.classes else {"generation_config.json": json_file(_generation(cfg, about))}),
        **tokenizer,
    }


def end_ids(cfg: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the ids that begin and end a text, as ``config.json`` and ``generation_config.json`` state them."""
    if tokenizer is not None:
        ends = [*tokenizer.eos_ids]
        return {"bos_token_id": _role_id(tokenizer, "bos_token"), "eos_token_id": ends if len(ends) > 1 else ends[0]}
    end = 50_256 if _n_ids(cfg, None) == 50_257 else None  # GPT-2's
    return {"bos_token_id": end, "eos_token_id": end}


def pad_id(cfg: GPTConfig, tokenizer: Tokenizer | None) -> int | None:
    """Return the id that texts of a batch are padded with."""
    return end_ids(cfg, None)["eos_token_id"] if tokenizer is None else _role_id(tokenizer, "pad_token")


def _role_id(tokenizer: Tokenizer, role: str) -> int:
    """Return the id of the special token with a role; of the end-of-text token if there is none."""
    return tokenizer.special_tokens.get(tokenizer.roles.get(role, ""), tokenizer.eot_id)


def _n_ids(cfg: GPTConfig, tokenizer: Tokenizer | None) -> int:
    return tokenizer.vocab_size if tokenizer else cfg.unpadded_vocab_size or cfg.vocab_size


def _generation(cfg: GPTConfig, about: About) -> dict[str, Any]:
    n_ids, ends = _n_ids(cfg, about.tokenizer), end_ids(cfg, about.tokenizer)
    padding = {"suppress_tokens": list(range(n_ids, cfg.vocab_size))} if n_ids < cfg.vocab_size else {}
    return {**ends, "pad_token_id": pad_id(cfg, about.tokenizer), **padding, **about.generation}


def _tokenizer_files(cfg: GPTConfig, about: About) -> dict[str, bytes]:
    if about.tokenizer is None:
        return {}
    try:
        content = tokenizer_json(about.tokenizer)
    except InputError:
        return {}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.context_length,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(about.tokenizer, PretrainedTokenizer):
        settings |= {"bos_token": None, **about.tokenizer.roles, "add_bos_token": bool(about.tokenizer.start_ids)}
    if isinstance(about.tokenizer, SimpleTokenizer):
        settings["unk_token"] = UNKNOWN
    if about.classes:  # texts of a batch are padded with it
        settings.setdefault("pad_token", settings["eos_token"])
    if about.template is not None:
        settings["chat_template"] = chat_template(about.template, about.tokenizer)
    return {"tokenizer.json": content.encode(), "tokenizer_config.json": json_file(settings)}


# Names in capitals stand for the fields of Template.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ DEFAULT_SYSTEM }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ SYSTEM_START + message['content'] + SYSTEM_END }}"
    "{% elif message['role'] == 'assistant' %}{{ ASSISTANT_START + message['content'] + ASSISTANT_END }}"
    "{% elif message['role'] == 'user' %}{{ USER_START + message['content'] }}"
    "{% if message['input'] %}{{ INPUT_START + message['input'] }}{% endif %}{{ USER_END }}"
    "{% else %}{{ raise_exception('role is ' + message['role'] + '; expected system, user or assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ASSISTANT_START }}{% endif %}"
)


def chat_template(template: Template, tokenizer: Tokenizer | None = None) -> str:
    """Return a template in Jinja, which ``transformers`` and others render to the same text.

    A model's own is in Jinja already. In others, a message of the user may have an ``input`` beside its ``content``, as
    an entry of Alpaca has. Programs leave it to the template to begin with the token that the model expects there.
    """
    if isinstance(template, ChatTemplate):
        return template.source
    fields = {name.upper(): json.dumps(text, ensure_ascii=False) for name, text in template.to_dict().items()}
    start = "{{ bos_token }}" if tokenizer is not None and tokenizer.start_ids else ""
    return start + re.sub("|".join(fields), lambda found: fields[found[0]], _CHAT_TEMPLATE)


_PLAIN = """\
from transformers import pipeline

generate = pipeline("text-generation", model={name})
print(generate({prompt}, max_new_tokens={room})[0]["generated_text"])
"""
_CHAT = """\
from transformers import pipeline

chat = pipeline("text-generation", model={name})
messages = [{{"role": "user", "content": {prompt}}}]
print(chat(messages, max_new_tokens={room})[0]["generated_text"][-1]["content"])
"""
_CLASSIFY = """\
from transformers import pipeline

classify = pipeline("text-classification", model={name})
print(classify({prompt}))
"""
_WEIGHTS = """\
from transformers import AutoModel

model = AutoModel.from_pretrained({name})
"""


def _snippet(cfg: GPTConfig, about: About) -> str:
    """Return Python code that opens the model and uses it."""
    assert about.tokenizer is not None
    form, prompt = _PLAIN, "Every effort"
    if about.classes:
        form = _CLASSIFY
    elif about.template is not None:
        form, prompt = _CHAT, "What is the capital of France?"
    try:
        about.tokenizer.encode(prompt)
    except InputError:  # it has ids for few characters
        prompt = about.tokenizer.decode([about.tokenizer.vocab_size // 2])
    room = min(30, max(1, cfg.context_length // 4))  # the prompt needs some of the context, too
    return form.format(name=json.dumps(about.name, ensure_ascii=False), prompt=json.dumps(prompt), room=room)


def _card(cfg: GPTConfig, model_type: str, about: About, code: str) -> str:
    rows: dict[str, Any] = {
        "parameters": f"{count_params(cfg):,}",
        "context length (tokens)": f"{cfg.context_length:,}",
    }
    if about.tokenizer is not None:
        rows["tokenizer"] = f"{about.tokenizer.kind}, {about.tokenizer.vocab_size:,} ids"
    cells = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in {**rows, **about.card}.items()
    ]
    task = "text-classification" if about.classes else "text-generation"
    head = {"library_name": "transformers", "pipeline_tag": task, "tags": [model_type, "slm_jax"]}
    if about.base_model:
        head["base_model"] = about.base_model
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---\n",
        f"# {about.name.rstrip('/').rpartition('/')[2]}\n",
        f"```python\n{code}```\n",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in cells),
    ]
    if about.template is not None:
        question, answer = Message("user", "(question)", "(its input, if it has one)"), Message("assistant", "(answer)")
        example = about.template.text([question, answer])
        parts.append(f"It was trained on conversations of this form:\n\n````text\n{example}\n````\n")
    return "\n".join(parts)
