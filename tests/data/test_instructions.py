"""What must hold of instructions: what is read, how it is split, and that no mistake in a file goes unnamed."""

import collections
import json

import pytest
from refusals import refused

from slm_jax.data.config import DataConfig, InstructionConfig
from slm_jax.data.instructions import load_instructions, read_examples
from slm_jax.data.templates import Message


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


def load(source, seed=0, split="random", **data):
    return load_instructions(DataConfig(source=source, **data), InstructionConfig(split=split), seed)


def questions(examples):
    return [example.messages[0].content for example in examples]


# Reading


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
        (
            [entry(1), {"instruction": "a", "input": "b"}],
            r"data.json entry 2: no field 'output'.*, only instruction, input",
        ),
        ([{"output": "a"}], r"data.json entry 1: no field 'instruction', only output"),
        ([entry(1), {"instruction": "", "output": "a"}], r"entry 2: instruction is empty"),
        ([{"instruction": "a", "output": "  "}], r"entry 1: output is empty"),
        ([{"instruction": "a", "output": ["b"]}], r"entry 1: output is \['b'\]; expected text"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r"entry 1: the last message has role user"),
        ([entry(1), "text"], r"entry 2: .*not a JSON object"),
        ({"data": [entry(1)]}, r"expected one list of JSON objects"),
        ([], r"empty; expected at least one row"),
    ],
)
def test_what_is_no_instruction_is_refused_with_its_place_in_one_line(write, content, message):
    with refused(message):
        load(write(content))


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


@pytest.mark.parametrize("seed", range(5))
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


def test_the_same_instruction_about_something_else_is_not_equal(write):
    entries = [{"instruction": "Explain.", "input": f"word {i}", "output": "x"} for i in range(20)]
    assert len(load(write(entries)).notes) == 1


def test_given_splits_are_taken_whole(write):
    train, test = write([entry(i) for i in range(10)]), write([entry(i) for i in range(20, 24)], "test.json")
    validation = write([entry(i) for i in range(30, 33)], "validation.jsonl")
    splits = load(train, validation_source=validation, test_source=test)
    assert sorted(questions(splits.train)) == [f"Question {i}?" for i in range(10)]
    assert questions(splits.test) == [f"Question {i}?" for i in range(20, 24)]
    assert questions(splits.validation) == [f"Question {i}?" for i in range(30, 33)]
    only_test = load(train, test_source=test, validation_fraction=0.2)
    assert [len(split) for split in only_test[:3]] == [8, 2, 4]
    only_validation = load(train, validation_source=validation, test_fraction=0.2)
    assert [len(split) for split in only_validation[:3]] == [8, 3, 2]


@pytest.mark.parametrize("order", ["random", "file_order"])
def test_a_prompt_in_two_given_splits_is_refused(write, order):
    train = write([entry(i) for i in range(10)])
    test = write([entry(20), entry(4, output="Another answer."), entry(5)], "test.json")
    with refused(r"test.json entry 2 \(test\) and .*data.json entry 5 .*same prompt, 2 such"):
        load(train, test_source=test, split=order)
    validation = write([entry(5)], "validation.json")
    with refused(r"have the same prompt"):
        load(write([entry(30), entry(31)], "other.json"), test_source=test, validation_source=validation, split=order)


def test_equal_prompts_within_the_training_source_are_no_mistake_beside_a_given_split(write):
    train = write([entry(i % 8, output=f"{i}") for i in range(40)])
    splits = load(train, test_source=write([entry(20)], "test.json"), validation_fraction=0.3)
    assert not {e.prompt for e in splits.train} & {e.prompt for e in splits.validation}


def test_a_split_without_examples_is_refused(write):
    with refused(r"the test split is empty.*data.test_fraction"):
        load(write([entry(i) for i in range(3)]), test_fraction=0.1)
