"""What must hold of responses' scores: rouge_score's figures, and references' probabilities token by token."""

import json
import math

import numpy as np
import pytest
from refusals import refused

from slm_jax.data.templates import TEMPLATES, Message, TextTemplate
from slm_jax.errors import InputError
from slm_jax.evaluation.responses import Response, exact_match, read_responses, reference_loss, rouge_l, score_responses
from slm_jax.tokenizer import BPETokenizer, CharTokenizer

ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "It is 2.", "model_response": "2"}


def response(reference, answer, *asked):
    messages = (*(asked or (Message("user", "?"),)), Message("assistant", reference))
    return Response("here", messages, answer)


# rouge-score 0.1.2, RougeScorer(["rougeL"], use_stemmer=False).score(reference, response)["rougeL"].fmeasure
@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("The cat sat on the mat.", "the cat was on a mat", 0.6666666667),
        ("The chef cooks the meal every day.", "The meal is cooked by the chef every day.", 0.5),
        ("x y x y z", "y x z", 0.75),
        ("a b c d", "d c b a", 0.25),
        ("It's 3.5 km", "its 35 km", 0.25),
        ("same words", "Same,  words!", 1.0),
        ("İstanbul K", "istanbul k", 0.4),
        ("a", "", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_is_that_of_rouge_score(reference, answer, expected):
    assert math.isclose(rouge_l(reference, answer), expected, abs_tol=1e-9)


def test_scores_are_means_over_the_responses():
    for answer, expected in (("\nIt\tis 2. ", True), ("it is 2.", False), ("It is 2", False)):
        assert exact_match("It is  2.", answer) is expected  # it looks through white space only
    scores = score_responses([response("a b", "a b"), response("x y x y z", "y x z"), response("a", "b")])
    assert (scores["n"], scores["exact_match"]) == (3, 1 / 3)
    assert math.isclose(scores["rouge_l"], 1.75 / 3)


def test_both_kinds_of_entry_are_read(tmp_path):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 1 and 1."}]
    chat = {"messages": asked, "output": "2", "model_response": ""}
    answered = {**chat, "messages": [*asked, {"role": "assistant", "content": "3"}]}  # the output is the reference
    (tmp_path / "responses.json").write_text(json.dumps([ALPACA, chat, answered]))
    first, second, third = read_responses(tmp_path / "responses.json")
    assert first.messages == (Message("user", "Add.", "1 + 1"), Message("assistant", "It is 2."))
    assert (first.reference, first.response) == ("It is 2.", "2")
    assert first.where == f"{tmp_path / 'responses.json'} entry 1"
    assert [m.content for m in second.messages] == ["Be brief.", "Add 1 and 1.", "2"]
    assert second.messages == third.messages
    assert second.response == ""


def without(name):
    return {key: value for key, value in ALPACA.items() if key != name}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "empty"),
        ({"a": 1}, "list"),
        ([ALPACA, without("model_response")], "entry 2: no field 'model_response'"),
        ([without("instruction")], "entry 1: no field 'instruction'"),
        ([{**ALPACA, "model_response": None}], "entry 1: model_response is None; expected text"),
        ([{**without("instruction"), "messages": []}], "entry 1: no user message"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, content, expected):
    path = tmp_path / "responses.json"
    path.write_text(json.dumps(content))
    with refused(f"{path}.*{expected}"):
        read_responses(path)


# The references' probability

TEMPLATE = TextTemplate(user_start="<", assistant_start=">", assistant_end="!")
LONG = "abab" * 10  # beyond the context of 20


@pytest.fixture(scope="module")
def model(bigrams_of):
    tokenizer = CharTokenizer().build_vocab("<>!ab?")
    table = np.random.default_rng(2).normal(0, 2, (tokenizer.vocab_size, tokenizer.vocab_size))
    return bigrams_of(table), tokenizer


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_loss_counts_the_reference_and_its_end_and_nothing_else(model, batch_size):
    bigrams, tokenizer = model
    turns = (Message("user", "a?"), Message("assistant", "b"), Message("user", "?"))
    entries = [response("ab", "?"), response("b", "ab", Message("user", LONG)), response("aaa", "", *turns)]
    sums, n_tokens = 0.0, 0
    for reference in ("ab", "b", "aaa"):
        ids = [*tokenizer.encode(f">{reference}!"), tokenizer.eot_id]  # what precedes ">" does not matter to bigrams
        sums += bigrams.score(ids, len(ids) - 1)
        n_tokens += len(ids) - 1
    loss = reference_loss(bigrams.scorer(tokenizer, batch_size), TEMPLATE, entries)
    assert (loss["n_tokens"], loss["n_truncated"]) == (n_tokens, 1)
    assert math.isclose(loss["loss"], -sums / n_tokens, rel_tol=1e-5)
    assert math.isclose(loss["perplexity"], math.exp(loss["loss"]))


def test_the_prompt_is_the_templates(transformer):
    """Of a model that looks at everything: the sum is that of one token at a time, after the whole prompt."""
    tokenizer = CharTokenizer().build_vocab("<>!ab?")
    assert tokenizer.vocab_size <= transformer.model.cfg.vocab_size
    entry = response("ab", "", Message("user", "ab", "b"))
    template = TextTemplate(user_start="<", assistant_start=">", assistant_end="!", input_start="?")
    ids = [*tokenizer.encode("<ab?b>ab!"), tokenizer.eot_id]
    expected = sum(transformer.next_logprobs(ids[:i])[ids[i]] for i in range(len(ids) - 4, len(ids)))
    loss = reference_loss(transformer.scorer(tokenizer), template, [entry])
    assert loss["n_tokens"] == 4
    assert math.isclose(loss["loss"] * 4, -expected, rel_tol=1e-5)


def test_what_cannot_be_encoded_is_named(model):
    bigrams, tokenizer = model
    with pytest.raises(InputError, match=r"here: .*'z'"):
        reference_loss(bigrams.scorer(tokenizer), TEMPLATE, [response("z", "")])
    tokenizer = BPETokenizer.train("ab" * 9, vocab_size=258)
    with pytest.raises(InputError, match=r"here: .*surrogate"):
        reference_loss(bigrams.scorer(tokenizer), TEMPLATES["alpaca"], [response("a\udc80", "")])
