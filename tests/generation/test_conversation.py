"""What must hold of a conversation: it is remembered, written in its template, and leaves room for each answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.data.templates import Message, TextTemplate
from slm_jax.errors import InputError
from slm_jax.generation.config import Sampling
from slm_jax.generation.conversation import Conversation
from slm_jax.model import GPTConfig, GPTModel, param_shapes
from slm_jax.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer().build_vocab("the cat sat on the mat, and the dog sat on the log. User: Assistant:\n")
PLAIN = TextTemplate(user_start="\nUser: ", assistant_start="\nAssistant:")
TAUGHT = TextTemplate("\nUser:", " the", assistant_end=" and.", system_start="sat", system_end=",", input_start="")


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough to write varied text."""
    cfg = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=128, emb_dim=16, n_heads=2, n_layers=2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(cfg))
    return GPTModel(cfg), params, TOKENIZER


def talk(model, template=PLAIN, **options):
    sampling = Sampling(options.pop("temperature", 0.8), top_k=50)
    return Conversation(*model, template, sampling, **{"max_new_tokens": 8, **options})


def say(conversation, message):
    return "".join(conversation.answer(message))


@pytest.mark.parametrize("template", [PLAIN, TAUGHT], ids=["plain", "taught"])
def test_an_answer_is_remembered_as_the_model_wrote_it_and_the_next_depends_on_it(model, template):
    conversation = talk(model, template, introduction="on the log")
    first = say(conversation, "the cat")
    assert first == first.lstrip()
    ((message, answer),) = conversation.turns
    assert (message, answer.strip()) == ("the cat", first.strip())
    turns = [Message("user", "the cat"), Message("assistant", answer), Message("user", "the dog")]
    assert conversation.prompt("the dog") == template.prompt([Message("system", "on the log"), *turns])
    second = say(conversation, "the dog")
    assert [message for message, _ in conversation.turns] == ["the cat", "the dog"]
    assert len(TOKENIZER.encode(second)) <= 8
    conversation.turns.clear()
    assert conversation.prompt("the dog") == template.prompt([Message("system", "on the log"), turns[-1]])


def test_an_answer_ends_where_the_template_ends_it(model):
    conversation = talk(model, max_new_tokens=60)
    assert not any("\nUser:" in say(conversation, "sat") for _ in range(4))
    plain = say(talk(model, TAUGHT, max_new_tokens=60), " cat")
    end = plain[3]  # a likely character of this model
    soon = TextTemplate(**{**TAUGHT.to_dict(), "assistant_end": end})
    assert say(talk(model, soon, max_new_tokens=60), " cat").rstrip() == plain.partition(end)[0].rstrip()


def test_the_same_seed_gives_the_same_conversation(model):
    first = say(talk(model), "the cat")
    assert first == say(talk(model), "the cat") != say(talk(model, seed=1), "the cat")
    conversation = talk(model)
    assert say(conversation, "the cat") != say(conversation, "the cat")


@pytest.mark.parametrize("template", [PLAIN, TAUGHT], ids=["plain", "taught"])
def test_the_oldest_turns_are_dropped_and_the_introduction_stays(model, template):
    conversation = talk(model, template, introduction=" on the log")
    for _ in range(8):
        say(conversation, " sat on the mat")
    assert 1 <= len(conversation.turns) < 8
    prompt = conversation.prompt("the cat")
    assert prompt.startswith(template.prompt([Message("system", " on the log")]).removesuffix(template.assistant_start))
    assert len(TOKENIZER.encode(prompt)) + 8 <= 128
    kept = list(conversation.turns)
    with pytest.raises(InputError, match=r"makes \d+ tokens; expected at most 120"):
        conversation.answer("the cat " * 20)
    assert conversation.turns == kept
