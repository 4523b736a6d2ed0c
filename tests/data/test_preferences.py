"""What must hold of pairs of responses: every common form is read, only responses count, bad pairs are named."""

import json

import numpy as np
import pytest
from refusals import refused

from slm_jax.data.config import DataConfig, PreferenceConfig
from slm_jax.data.preferences import PairRows, encode_pairs, load_preferences, read_pair
from slm_jax.data.rows import Row
from slm_jax.data.templates import Message, TextTemplate
from slm_jax.tokenizer import CharTokenizer

USER, ASSISTANT = "user", "assistant"
TEMPLATE = TextTemplate(user_start="Q", assistant_start="A", assistant_end=".")
TOKENIZER = CharTokenizer().build_vocab("QA.abcdefgh")


def turn(role, content):
    return {"role": role, "content": content}


FORMS = {
    "the book": {"instruction": "a", "input": "b", "output": "x", "chosen": "c", "rejected": "d"},
    "texts": {"prompt": "a", "chosen": "c", "rejected": "d"},
    "messages": {
        "prompt": [turn(USER, "a")],
        "chosen": [turn(ASSISTANT, "c")],
        "rejected": [turn(ASSISTANT, "d")],
    },
    "conversations": {
        "chosen": [turn(USER, "a"), turn(ASSISTANT, "c")],
        "rejected": [turn(USER, "a"), turn(ASSISTANT, "d")],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form):
    pair = read_pair(Row("row 1", FORMS[form]))
    asked = Message("user", "a", "b" if form == "the book" else "")
    assert pair.messages == (asked, Message("assistant", "c"))
    assert pair.rejected == Message("assistant", "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": "d"}, "row 1: chosen and rejected are equal"),
        ({"rejected": " "}, "row 1: rejected is empty"),
        ({"chosen": None}, "row 1: chosen is empty"),
        ({"rejected": 3}, "row 1: rejected is 3; expected text"),
        ({"prompt": ""}, "row 1: prompt is empty"),
        ({"chosen": [turn(USER, "c")]}, "row 1: chosen is not one response"),
        ({"chosen": [turn(USER, "a"), turn(ASSISTANT, "c")]}, "row 1: chosen is not one response"),
        ({"chosen": [3]}, "row 1, chosen: messages is"),
    ],
)
def test_a_bad_pair_is_named(changes, message):
    with refused(message):
        read_pair(Row("row 1", {**FORMS["texts"], **changes}))


def test_without_a_prompt_there_is_one_line():
    with refused("row 1: no field 'rejected'"):
        read_pair(Row("row 1", {"prompt": "a", "chosen": "c"}))
    with refused("row 1: no prompt; expected instruction, prompt, or whole conversations"):
        read_pair(Row("row 1", {"chosen": "c", "rejected": "d"}))
    other = [turn(USER, "b"), turn(ASSISTANT, "d")]
    with refused("row 1: chosen and rejected differ before their last message"):
        read_pair(Row("row 1", {**FORMS["conversations"], "rejected": other}))


def test_bad_pairs_are_left_out_and_counted_or_refused(tmp_path):
    rows = [{"prompt": f"a{i}", "chosen": "c", "rejected": "c" if i == 3 else "d"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source=f"jsonl:{tmp_path}/pairs.jsonl")
    splits = load_preferences(data, PreferenceConfig(), seed=0)
    assert sum(map(len, splits[:3])) == 19
    (note,) = [note for note in splits.notes if "left out 1 of 20 pairs" in note]
    assert "line 4: chosen and rejected are equal" in note
    with refused("line 4: chosen and rejected are equal"):
        load_preferences(data, PreferenceConfig(empty="refuse"), seed=0)


def pair(prompt, chosen, rejected):
    return read_pair(Row("row", {"prompt": prompt, "chosen": chosen, "rejected": rejected}))


def test_only_the_last_response_and_its_end_count():
    chat = [turn(USER, "a"), turn(ASSISTANT, "b"), turn(USER, "c")]
    asked = read_pair(Row("row", {"prompt": chat, "chosen": "de", "rejected": "f"}))
    (tokens,), _ = encode_pairs([asked], TOKENIZER, TEMPLATE, max_length=32, too_long="drop")
    for side, response in zip(tokens, ("de.", "f."), strict=True):
        assert TOKENIZER.decode(side.ids[:-1].tolist()) == "QaAb.QcA" + response
        assert side.ids[-1] == TOKENIZER.eot_id
        assert side.counts.tolist() == [False] * 8 + [True] * (len(response) + 1)


def test_long_pairs_are_dropped_or_both_prompts_are_cut_on_the_left():
    pairs = [pair("abcdefgh", "a", "bcd"), pair("ab", "a", "b"), pair("a", "c" * 20, "b")]
    kept, notes = encode_pairs(pairs, TOKENIZER, TEMPLATE, max_length=10, too_long="drop")
    assert len(kept) == 1
    assert "left out 2 of 3 pairs" in notes[0]
    kept, notes = encode_pairs(pairs, TOKENIZER, TEMPLATE, max_length=10, too_long="truncate")
    assert len(kept) == 2
    assert [TOKENIZER.decode(side.ids[:-1].tolist()) for side in kept[0]] == ["defghAa.", "defghAbcd."]
    assert "left out 1 of 3 pairs" in notes[0]
    assert "truncated the prompts of 1 of 3 pairs" in notes[1]
    with refused("nothing to learn from: 1 pair, all longer than 10 tokens"):
        encode_pairs(pairs[:1], TOKENIZER, TEMPLATE, max_length=10, too_long="drop")


def test_a_batch_has_both_conversations_side_by_side():
    pairs, _ = encode_pairs(
        [pair("a", "b", "cde"), pair("ab", "h", "g")], TOKENIZER, TEMPLATE, max_length=32, too_long="drop"
    )
    references = np.float32([[-1, -2], [-3, -4]])
    rows = PairRows(pairs, references, 32)
    (batch,) = rows.eval_batches(4)
    assert batch["inputs"].shape == batch["targets"].shape == batch["weights"].shape == (4, 2 * 16)
    assert batch["pairs"].tolist() == [1, 1, 0, 0]
    for r, i in enumerate(rows.order):
        assert (batch["reference_chosen"][r], batch["reference_rejected"][r]) == tuple(references[i])
        for side, half in zip(pairs[i], (np.s_[:16], np.s_[16:]), strict=True):
            assert batch["inputs"][r, half][: side.n_inputs].tolist() == side.ids[:-1].tolist()
            assert batch["targets"][r, half][: side.n_inputs].tolist() == side.ids[1:].tolist()
            assert batch["weights"][r, half].sum() == side.counts.sum()
    assert not any(batch[name][2:].any() for name in batch)
