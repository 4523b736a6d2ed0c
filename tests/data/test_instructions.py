"""What must hold of instructions: what is read, how it is split, what is learned, and what is in the batches."""

import collections
import json

import numpy as np
import pytest
from refusals import refused

from slm_jax.data.config import DataConfig, InstructionConfig
from slm_jax.data.instructions import (
    Example,
    Tokens,
    encode_examples,
    instruction_batches,
    instruction_eval_batches,
    load_instructions,
    pack,
    read_examples,
)
from slm_jax.data.templates import TEMPLATES, Message, TextTemplate
from slm_jax.tokenizer import BPETokenizer, CharTokenizer


def entry(i, output=None):
    return {"instruction": f"Question {i}?", "input": "", "output": output or f"Answer {i}."}


@pytest.fixture
def write(tmp_path):
    """Write entries into a file; give its source."""

    def write(entries, name="data.json"):
        file = tmp_path / name
        lines = name.endswith(".jsonl")
        file.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries), encoding="utf-8")
        return f"{'jsonl' if lines else 'json'}:{file}"

    return write


def load(source, seed=0, split="random", empty="drop", **data):
    return load_instructions(DataConfig(source=source, **data), InstructionConfig(split=split, empty=empty), seed)


def questions(examples):
    return [example.messages[0].content for example in examples]


# Reading


@pytest.mark.real_world
def test_alpaca_dolly_and_chat_entries_are_read_from_json_and_jsonl(write, tmp_path):
    entries = [
        {"instruction": "Add.", "input": "1, 2", "output": "3", "id": 7},
        {"instruction": "Add.", "output": "Add what?"},
        {"instruction": "Add.", "context": "1, 3", "response": "4", "category": "closed_qa"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ]
    expected = [
        (Message("user", "Add.", "1, 2"), Message("assistant", "3")),
        (Message("user", "Add."), Message("assistant", "Add what?")),
        (Message("user", "Add.", "1, 3"), Message("assistant", "4")),
        (Message("user", "Hi"), Message("assistant", "Hello")),
    ]
    as_json, as_lines = read_examples(write(entries)), read_examples(write(entries, "data.jsonl"))
    assert [example.messages for example in as_json] == [example.messages for example in as_lines] == expected
    assert as_json[2].where == f"{tmp_path / 'data.json'} entry 3"
    assert as_lines[2].where == f"{tmp_path / 'data.jsonl'} line 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([entry(1), {"instruction": "a"}], r"data.json entry 2: no field 'output'.*, only instruction"),
        ([{"instruction": "a", "output": "  "}, {"instruction": "", "output": "a"}], r"entry 2: instruction is empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r"entry 1: the last message has role user"),
    ],
)
def test_what_is_no_instruction_is_refused_with_its_place_in_one_line(write, content, message):
    with refused(message):
        load(write(content))


@pytest.mark.real_world
def test_entries_with_an_empty_text_are_left_out_and_counted_unless_they_are_refused(write):
    entries = [entry(i) for i in range(18)]
    gaps = [{**entries[0], "output": ""}, {**entries[0], "instruction": None}]
    source = write(
        [*entries, *gaps, {"instruction": "a", "context": None, "response": "b"}, {**entries[1], "input": None}]
    )
    splits = load(source)
    assert sum(map(len, splits[:3])) == 20
    assert "left out 2 of 22 entries" in splits.notes[1]
    with refused("entry 19: output is empty"):
        load(source, empty="refuse")


# Splits


def test_file_order_is_training_then_test_then_validation(write):
    splits = load(write([entry(i) for i in range(20)]), split="file_order", validation_fraction=0.1, test_fraction=0.25)
    assert [questions(split) for split in (splits.train, splits.test, splits.validation)] == [
        [f"Question {i}?" for i in part] for part in (range(13), range(13, 18), range(18, 20))
    ]
    assert splits.notes == ("examples: 13 train, 2 validation, 5 test",)


def test_the_books_split(named_data):
    entries = json.loads((named_data / "instruction-data.json").read_text(encoding="utf-8"))
    splits = load("named:instruction-data", split="file_order", validation_fraction=0.05, test_fraction=0.1)
    assert [len(split) for split in splits[:3]] == [935, 55, 110]
    expected = [one["instruction"] for one in entries]
    assert questions([*splits.train, *splits.test, *splits.validation]) == expected
    assert "935 train, 55 validation, 110 test" in splits.notes[0]
    assert "6 of them repeat the prompt of one in another split" in splits.notes[1]

    at_random = load("named:instruction-data", validation_fraction=0.05, test_fraction=0.1)
    assert sum(len(split) for split in at_random[:3]) == 1100
    prompts = [{example.prompt for example in split} for split in at_random[:3]]
    assert [len(split) for split in at_random[:3]] == pytest.approx([935, 55, 110], abs=2)
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 1075


def test_a_random_split_is_a_function_of_the_seed_and_has_every_example_once(write):
    source = write([entry(i) for i in range(40)])
    splits = load(source, seed=1)
    assert splits == load(source, seed=1)
    assert splits.train != load(source, seed=2).train
    drawn = questions([*splits.train, *splits.validation, *splits.test])
    assert sorted(drawn) == sorted(f"Question {i}?" for i in range(40))
    assert drawn[:30] != [f"Question {i}?" for i in range(30)]


@pytest.mark.parametrize("seed", range(3))
def test_equal_prompts_stay_together_at_random(write, seed):
    source = write([entry(i % 15, output=f"Answer {i}.") for i in range(60)])
    splits = load(source, seed=seed, validation_fraction=0.2, test_fraction=0.2)
    where = collections.defaultdict(set)
    for name, split in zip(("train", "validation", "test"), splits[:3], strict=True):
        for example in split:
            where[example.prompt].add(name)
    assert len(where) == 15
    assert all(len(names) == 1 for names in where.values())
    assert sum(len(split) for split in splits[:3]) == 60
    assert splits.notes[1] == "45 of them repeat the prompt of another one, and are in the same split"


def test_given_splits_are_taken_whole(write):
    train, test = write([entry(i) for i in range(10)]), write([entry(i) for i in range(20, 24)], "test.json")
    validation = write([entry(i) for i in range(30, 33)], "validation.jsonl")
    splits = load(train, validation_source=validation, test_source=test)
    assert sorted(questions(splits.train)) == [f"Question {i}?" for i in range(10)]
    assert questions(splits.test) == [f"Question {i}?" for i in range(20, 24)]
    assert questions(splits.validation) == [f"Question {i}?" for i in range(30, 33)]
    only_test = load(train, test_source=test, validation_fraction=0.2)
    assert [len(split) for split in only_test[:3]] == [8, 2, 4]


@pytest.mark.parametrize("order", ["random", "file_order"])
def test_a_prompt_in_two_given_splits_is_refused(write, order):
    train = write([entry(i) for i in range(10)])
    test = write([entry(20), entry(4, output="Another answer."), entry(5)], "test.json")
    with refused(r"test.json entry 2 \(test\) and .*data.json entry 5 .*same prompt \(2 such"):
        load(train, test_source=test, split=order)


# Tokens

PLAIN = TextTemplate(user_start="Q:", user_end="\n", assistant_start="A:", assistant_end=".")  # a token a character
CHARS = CharTokenizer().build_vocab("QA:.\nabcdefghijklmnopqrstuvwxyz")
TRAINED_ON = "Below is an instruction that describes a task. ### Instruction: ### Response: <|im_end|> <|end|> " * 20


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TRAINED_ON, vocab_size=320)


def example(*turns, where="data.json entry 1"):
    roles = ("user", "assistant") * (len(turns) // 2)
    return Example(where, tuple(Message(role, turn) for role, turn in zip(roles, turns, strict=True)))


def encode(*examples, mask_prompt=True, max_length=100, too_long="drop", tokenizer=CHARS, template=PLAIN):
    options = {"mask_prompt": mask_prompt, "max_length": max_length, "too_long": too_long}
    return encode_examples(examples, tokenizer, template, **options)


def learned(tokens, tokenizer=CHARS):
    return tokenizer.decode(tokens.ids[tokens.counts])


def rows_of(examples):
    return [[example] for example in examples]


# What is learned


def test_only_the_responses_and_the_end_of_the_text_are_learned():
    (tokens,), notes = encode(example("abc", "xy"))
    assert CHARS.decode(tokens.ids) == "Q:abc\nA:xy.<|endoftext|>"
    assert tokens.counts.tolist() == [False] * 8 + [True] * 4
    assert (tokens.ids == CHARS.eot_id).sum() == 1
    assert notes == ()
    (unmasked,), _ = encode(example("abc", "xy"), mask_prompt=False)
    assert unmasked.counts.tolist() == [False] + [True] * 11
    (talk,), _ = encode(example("ab", "x", "c", "yz"))
    assert CHARS.decode(talk.ids) == "Q:ab\nA:x.Q:c\nA:yz.<|endoftext|>"
    assert np.flatnonzero(talk.counts).tolist() == [7, 8, 15, 16, 17, 18]
    with refused(r"^data.json entry 7: character 'Z' .*vocabulary"):
        encode(example("Z", "x", where="data.json entry 7"))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["Plain.", " leads with a space", "ends in a line\n", "Zoë \U0001f40d\n\n1. two"])
def test_what_counts_decodes_to_the_response_and_what_goes_in_first_is_the_prompt(bpe, name, answer):
    template = TEMPLATES[name]
    asked = Example("", (Message("user", "Count!", "x\n\n"), Message("assistant", answer)))
    (tokens,), _ = encode(asked, tokenizer=bpe, template=template, max_length=500)
    assert learned(tokens, bpe) == answer + template.assistant_end + "<|endoftext|>"
    n_prompt = int(np.argmax(tokens.counts))
    assert tokens.counts[n_prompt:].all()
    assert tokens.ids[:n_prompt].tolist() == bpe.encode(template.prompt(asked.messages))
    # Chat encodes the conversation so far as one text, training piece by piece.
    talk = example("Hello there", "Good day.", "And now?", "We go on.")
    (tokens,), _ = encode(talk, tokenizer=bpe, template=template, max_length=500)
    prompt = bpe.encode(template.prompt(talk.messages))
    assert tokens.ids[: len(prompt)].tolist() == prompt


# Too long


def test_max_length_counts_what_goes_in_and_dropping_is_counted():
    encoded, notes = encode(example("abc", "xy"), example("abcd", "xy"), example("a", "x"), max_length=11)
    assert [learned(tokens) for tokens in encoded] == ["xy.<|endoftext|>", "x.<|endoftext|>"]
    assert (encoded[0].n_inputs, len(encoded[0].ids)) == (11, 12)
    assert notes == ("left out 1 of 3 examples: they are longer than 11 tokens",)
    with refused(r"they are longer than 10 tokens.*larger instruction.max_length"):
        encode(example("abc", "xy"), max_length=10)


def test_truncating_cuts_the_prompt_only_and_is_counted():
    talks = [example("abc", "xy"), example("abcdef", "xy"), example("a", "x")]
    encoded, notes = encode(*talks, max_length=9, too_long="truncate")
    assert [CHARS.decode(tokens.ids) for tokens in encoded] == [
        "abc\nA:xy.<|endoftext|>",
        "def\nA:xy.<|endoftext|>",
        "Q:a\nA:x.<|endoftext|>",
    ]
    assert [learned(tokens) for tokens in encoded] == ["xy.<|endoftext|>"] * 2 + ["x.<|endoftext|>"]
    assert max(len(tokens.ids) for tokens in encoded) == 10
    assert notes == ("truncated 2 of 3 examples to 9 tokens: cut 7 off the front",)
    (tokens,), _ = encode(example("ab", "x", "c", "yz"), max_length=10, too_long="truncate")
    assert CHARS.decode(tokens.ids) == ".Q:c\nA:yz.<|endoftext|>"  # a conversation loses its oldest turns
    assert learned(tokens) == "yz.<|endoftext|>"


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_no_token_of_a_response_is_ever_cut_off(mask_prompt):
    response = "uvwxyz"  # 8 tokens with what ends it
    options = {"too_long": "truncate", "mask_prompt": mask_prompt}
    (tokens,), _ = encode(example("abc", response), max_length=8, **options)
    assert CHARS.decode(tokens.ids) == ":uvwxyz.<|endoftext|>"  # one token to tell the first from
    assert tokens.counts.tolist() == [False] + [True] * 8
    encoded, notes = encode(example("abc", response), example("a", "b"), max_length=7, **options)
    assert [CHARS.decode(tokens.ids[-3:]) for tokens in encoded] == ["b.<|endoftext|>"]
    assert notes[0] == "left out 1 of 2 examples: the response alone is longer than 7 tokens"
    with refused(r"nothing to learn from: 1 example, and the response alone is longer than 7"):
        encode(example("abc", response), max_length=7, **options)


# Batches

ALONE = {"bucketed": True, "packed": False}
PACKED = {"bucketed": False, "packed": True}


def numbered(lengths):
    """Examples of so many inputs; each token tells the example and the place, and the first half is masked."""
    ids = [100 * i + np.arange(length + 1, dtype=np.int32) for i, length in enumerate(lengths, start=1)]
    return [Tokens(one, np.arange(len(one)) > len(one) // 2) for one in ids]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_has_the_documented_names_and_types(packed):
    shape = {"limit": 40, "bucketed": False, "packed": packed}
    batch = instruction_batches(rows_of(numbered([5, 20])), batch_size=2, seed=0, **shape)[0]
    names = {"inputs", "targets", "weights"} | ({"segment_ids", "positions"} if packed else set())
    expected = {name: ((2, 40), np.float32 if name == "weights" else np.int32) for name in names}
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == expected


def test_a_hosts_rows_are_as_wide_as_the_longest_of_all_hosts():
    batches = instruction_batches(rows_of(numbered([5, 20])), batch_size=2, limit=64, seed=0, **ALONE)
    hosts = [batches.of_rows(np.array([row]))[0] for row in range(2)]
    for name, value in batches[0].items():
        assert value.shape == (2, 32)
        np.testing.assert_array_equal(value, np.concatenate([host[name] for host in hosts]))


def test_padding_is_never_a_target():
    (batch,) = instruction_eval_batches(rows_of(numbered([4])), batch_size=2, limit=8, **ALONE)
    np.testing.assert_array_equal(batch["inputs"], [[100, 101, 102, 103, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(batch["targets"], [[101, 102, 103, 104, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(batch["weights"], [[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8])


def test_a_packed_row_is_its_examples_side_by_side():
    (batch,) = instruction_eval_batches([numbered([3, 2])], batch_size=1, limit=8, **PACKED)
    np.testing.assert_array_equal(batch["inputs"], [[100, 101, 102, 200, 201, 0, 0, 0]])
    np.testing.assert_array_equal(batch["targets"], [[101, 102, 103, 201, 202, 0, 0, 0]])
    np.testing.assert_array_equal(batch["weights"], [[0, 0, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1, 0, 0, 0]])


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_has_every_target_once(packed):
    examples = numbered([5, 1, 9, 3, 3, 12, 7])
    rows = pack(examples, 14, seed=0) if packed else rows_of(examples)
    batches = list(instruction_eval_batches(rows, batch_size=3, limit=16, **(PACKED if packed else ALONE)))
    assert {batch["inputs"].shape for batch in batches} == {(3, 16)}
    seen = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    expected = np.concatenate([example.ids[1:][example.counts[1:]] for example in examples])
    assert sorted(seen.tolist()) == sorted(expected.tolist())
    assert len(set(seen.tolist())) == len(seen)


# Packing


def test_packing_keeps_every_example_once_within_the_width_and_is_fixed_by_the_seed():
    lengths = np.random.default_rng(0).integers(1, 33, size=200)
    examples = numbered(lengths)
    rows = pack(examples, 32, seed=3)
    assert all(sum(example.n_inputs for example in row) <= 32 for row in rows)
    drawn = [id(example) for row in rows for example in row]
    assert sorted(drawn) == sorted(map(id, examples))
    assert drawn == [id(example) for row in pack(examples, 32, seed=3) for example in row]
    assert drawn != [id(example) for row in pack(examples, 32, seed=4) for example in row]
    assert len(rows) <= 1.7 * np.ceil(lengths.sum() / 32)  # the bound of first fit
    assert [len(row) for row in pack(numbered([10] * 9), 30, seed=0)] == [3, 3, 3]
