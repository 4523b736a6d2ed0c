"""Make ``chat_templates.json``: what transformers renders of chat templates, and which tokens are the assistant's.

    pip install transformers==5.24.0 tokenizers jinja2
    python tests/goldens/make_chat_templates.py

The templates are our own; each uses what the published ones of Llama 2 and 3, Mistral, Qwen and SmolLM use.
"""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATES = {
    # white space around blocks, the first message as the system's, a start for the response
    "trimmed": """\
{%- if messages[0].role == 'system' %}
    {{- '<|system|>' + messages[0].content | trim + '<|end|>\\n' }}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{% for message in rest %}
    {% if message['role'] == 'user' %}
<|user|>
{{ message['content'] }}<|end|>
    {% elif message['role'] == 'assistant' %}
<|assistant|>
{{ message['content'] }}<|end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}""",
    # special tokens, a check of the order, no start for the response
    "strict": """\
{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant, not ' + message.role) }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    # what is the model's own is marked; loop controls
    "marked": """\
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{{ '<|' ~ message.role ~ '|>' }}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}</s>{% endgeneration %}

{% else %}
{{ message.content }}
{% endif %}
{% if loop.index > 9 %}{% break %}{% endif %}
{% endfor %}
{{ '<|assistant|>\\n' if add_generation_prompt }}""",
    # the reasoning of earlier responses is left out; namespaces, macros, filters, JSON
    "reasoning": """\
{%- macro turn(role, text) %}{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{% endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last == -1 and message.role == "user" %}
        {%- set ns.last = (messages | length) - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools is defined and tools is not none %}{{ turn('system', tools | tojson) }}{% endif %}
{{- messages[:1] | map(attribute='content') | list | tojson(indent=2) }}
{% for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and '</think>' not in content %}
        {{- turn(message.role, '<think>\\n\\n</think>\\n\\n' + content.lstrip('\\n')) }}
    {%- else %}
        {{- turn(message.role, content.split('</think>')[-1].lstrip('\\n')) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""",
}
ASK = [{"role": "user", "content": " What is 2 + 2?\n"}]
CONVERSATIONS = [
    ASK,
    [*ASK, {"role": "assistant", "content": 'It is 4 — "four" & <more>.\n'}],
    [
        *ASK,
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "é\n\n🙂"},
        {"role": "assistant", "content": "5"},
    ],
    [{"role": "system", "content": " Be brief. "}, *ASK, {"role": "assistant", "content": "Four."}],
]


def characters() -> Tokenizer:
    """One token per byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*TOKENS.values(), "<|im_start|>", "<|im_end|>", "<|end|>"])
    return tokenizer


def main() -> None:
    golden = {}
    with tempfile.TemporaryDirectory() as folder:
        characters().save(f"{folder}/tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, template in TEMPLATES.items():
        rendered = []
        for messages in CONVERSATIONS:
            options = {"chat_template": template, "add_generation_prompt": messages[-1]["role"] == "user"}
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                encoded = tokenizer.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask="{% generation" in template, **options
                )
                more = {"assistant": sum(mask)} if (mask := encoded.get("assistant_masks")) else {}
                rendered.append({"messages": messages, "text": text, "ids": encoded["input_ids"], **more})
            except Exception as error:
                rendered.append({"messages": messages, "error": str(error)})
        golden[name] = {"template": template, "rendered": rendered}
    content = {"tokens": TOKENS, "tokenizer": json.loads(characters().to_str()), "templates": golden}
    file = Path(__file__).with_name("chat_templates.json")
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
