"""What must hold beside exported weights: other programs write conversations, stop and sample as we do."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slm_jax.data.chat_template import ChatTemplate, own_template
from slm_jax.data.templates import TEMPLATES, Message, TextTemplate, encode_prompt
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, PretrainedTokenizer, get_tokenizer
from slm_jax.tokenizer.from_scores import with_bos
from slm_jax.weights.ollama import modelfile
from slm_jax.weights.registry import find_format
from slm_jax.weights.side_files import About, chat_template
from slm_jax.weights.tokenizer_json import tokenizer_json
from slm_jax.weights.writer import write_model

ODD = TextTemplate(
    user_start="'\"\\ {{ user }} {% raw %} {# é 😀\n",
    user_end="\t\\n",
    input_start=" USER_START ",
    assistant_start="}}%}",
)
TURNS = st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1, max_size=3)


def render(template, messages, **more):
    """Do what transformers does."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message):
        raise TemplateError(message)

    env.globals["raise_exception"] = raise_exception
    return env.from_string(chat_template(template)).render(messages=messages, **more)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), ODD], ids=[*TEMPLATES, "odd"])
def test_others_render_conversations_to_the_same_text(template):
    @settings(max_examples=50, deadline=None)
    @given(st.none() | st.text(), TURNS)
    def check(system, turns):
        messages = [] if system is None else [Message("system", system)]
        for content, about, answer in turns:
            messages += [Message("user", content, about), Message("assistant", answer)]
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        with_input = [{**d, "input": m.input} if m.input else d for d, m in zip(dicts, messages, strict=True)]
        assert render(template, with_input) == "".join(text for text, _ in template.pieces(messages))
        assert render(template, with_input[:-1], add_generation_prompt=True) == template.prompt(messages)

    check()
    with pytest.raises(TemplateError, match="role is tool"):
        render(template, [{"role": "tool", "content": "1"}])


def written(folder, **about):
    cfg = GPTConfig(vocab_size=270, context_length=8, emb_dim=8, n_heads=2, n_layers=1)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), param_shapes(cfg))
    return write_model(cfg, params, folder / "out", "huggingface", About(name="ada/tiny", **about))


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_what_a_fine_tuned_model_states(tmp_path):
    tokenizer = BPETokenizer.train("to be or not to be", 262)
    folder = written(
        tmp_path, tokenizer=tokenizer, template=TEMPLATES["chatml"], base_model="openai-community/gpt2",
        generation={"do_sample": False}, card={"validation loss": "1.2500", "a|b": "c\nd"},
    )  # fmt: skip
    eot = tokenizer.eot_id
    generation = read(folder / "generation_config.json")
    assert generation == {
        "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "do_sample": False,
        "suppress_tokens": list(range(tokenizer.vocab_size, 270)),
    }  # fmt: skip
    assert read(folder / "config.json")["eos_token_id"] == eot
    config = read(folder / "tokenizer_config.json")
    assert (config["eos_token"], config["model_max_length"]) == ("<|endoftext|>", 8)
    assert config["chat_template"] == chat_template(TEMPLATES["chatml"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert 'base_model: "openai-community/gpt2"\n' in card
    assert "| validation loss | 1.2500 |\n| a\\|b | c d |\n" in card
    (code,) = (part.partition("```")[0] for part in card.split("```python\n")[1:])
    compile(code, "card", "exec")
    assert 'model="ada/tiny"' in code
    assert "<|im_start|>user\n(question)" in card


def test_a_tokenizer_that_only_we_have_is_written_for_us_alone(tmp_path):
    a, b, c = b"abc"
    folder = written(tmp_path, tokenizer=BPETokenizer([(a, b), (b, c), (a, 257)]))
    assert not (folder / "tokenizer.json").exists()
    assert "pipeline" not in (folder / "README.md").read_text().partition("```python")[2]
    assert BPETokenizer.load(folder).vocab_size == 260


def test_code_in_the_card_asks_with_characters_that_the_model_has(tmp_path):
    folder = written(tmp_path, tokenizer=CharTokenizer("xyz"))
    assert 'generate("z"' in (folder / "README.md").read_text()


def test_conversations_begin_with_the_token_that_the_model_expects(tmp_path):
    bpe = BPETokenizer.train("to be or not to be", 262)
    model = with_bos(json.loads(tokenizer_json(bpe)), END_OF_TEXT, bpe.eot_id)
    tokenizer = PretrainedTokenizer(model, dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT), [bpe.eot_id], True)
    read = get_tokenizer(written(tmp_path, tokenizer=tokenizer, template=TEMPLATES["alpaca"]))
    template, talk = own_template(read), [Message("user", "To be?")]
    expected = encode_prompt(tokenizer, TEMPLATES["alpaca"], talk)
    assert expected[0] == bpe.eot_id
    assert encode_prompt(read, template, talk) == expected
    about = About(name="x", tokenizer=tokenizer, template=TEMPLATES["alpaca"])
    again = dataclasses.replace(about, tokenizer=read, template=template)
    assert modelfile("model.gguf", 64, again) == modelfile("model.gguf", 64, about)


def test_a_classifier_with_several_end_ids_is_padded_with_one():
    bpe = BPETokenizer.train("to be or not to be", 262)
    model = json.loads(tokenizer_json(bpe))
    tokenizer = PretrainedTokenizer(model, {"eos_token": END_OF_TEXT}, [bpe.eot_id, 3])
    about = About(name="tiny", tokenizer=tokenizer, classes=("a", "b"))
    cfg = GPTConfig(vocab_size=263, context_length=8, emb_dim=8, n_heads=2, n_layers=1)
    files = find_format("huggingface", cfg).side_files(cfg, "float32", about)
    config = json.loads(files["config.json"])
    assert config["eos_token_id"] == [bpe.eot_id, 3]
    assert config["pad_token_id"] == bpe.eot_id
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == END_OF_TEXT


def test_a_card_shows_templates_whose_prompt_adds_what_a_conversation_has_not(tmp_path):
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer = BPETokenizer.train("to be or not to be", 262)
    folder = written(tmp_path, tokenizer=tokenizer, template=ChatTemplate(source, {}))
    assert "><(answer)>\n````" in (folder / "README.md").read_text()
