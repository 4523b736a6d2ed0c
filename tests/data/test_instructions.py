"""What must hold of instructions: what is read, how it is split, and that no mistake in a file goes unnamed."""

import ast
import collections
import json

import pytest

from slm_jax.data.builtin_instructions import INSTRUCTION, docstring_entries
from slm_jax.data.config import DataConfig, InstructionConfig
from slm_jax.data.instructions import load_instructions, read_examples
from slm_jax.data.templates import Message
from slm_jax.errors import InputError, MissingInputError


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


def test_tensorflow_datasets_dolly(tmp_path, monkeypatch):
    """A data set under the real name, written as TensorFlow Datasets writes it, with the real one's fields."""
    import tensorflow_datasets as tfds

    rows = [
        {"instruction": "Sum up.", "context": "Long \u2014 text.", "response": "Text.", "category": "summarization"},
        {"instruction": "Say yes.", "context": "", "response": "Yes.", "category": "open_qa"},
    ]
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name, VERSION = "databricks_dolly", tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict(dict.fromkeys(rows[0], tfds.features.Text()))
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(rows)

    Builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    expected = {
        (Message("user", "Sum up.", "Long \u2014 text."), Message("assistant", "Text.")),
        (Message("user", "Say yes."), Message("assistant", "Yes.")),
    }
    examples = read_examples("tfds:databricks_dolly")
    assert {example.messages for example in examples} == expected
    assert examples[1].where == "tfds:databricks_dolly:train example 1"
    assert read_examples("tfds:databricks_dolly:train[:1]")[0].messages == examples[0].messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [entry(1), {"instruction": "a", "input": "b"}],
            r"data.json entry 2: no field 'output' but instruction, input",
        ),
        ([{"output": "a"}], r"data.json entry 1: no field 'instruction' but output"),
        ([entry(1), {"instruction": "", "output": "a"}], r"entry 2: instruction is empty"),
        ([{"instruction": "a", "output": "  "}], r"entry 1: output is empty"),
        ([{"instruction": "a", "output": ["b"]}], r"entry 1: output is \['b'\]; expected text"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r"entry 1: the last message is of role user"),
        ([entry(1), "text"], r"entry 2: .*no JSON object"),
        ({"data": [entry(1)]}, r"expected one list of JSON objects"),
        ([], r"empty; expected at least one example"),
    ],
)
def test_what_is_no_instruction_is_refused_with_its_place_in_one_line(write, content, message):
    with pytest.raises(InputError, match=message) as error:
        load(write(content))
    assert "\n" not in str(error.value)


def test_a_bad_line_of_json_lines_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(entry(1)) + '\n\n{"instruction": \n', encoding="utf-8")
    with pytest.raises(InputError, match=r"data.jsonl line 3: not JSON"):
        load(f"jsonl:{file}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data.json", r"no kind \(did you mean json:data.json\?\); expected json:FILE, jsonl:FILE, tfds:NAME"),
        ("jsno:data.json", r"did you mean json:data.json\?"),
        ("instruction-data", r"did you mean named:instruction-data\?"),
        ("text:data.txt", r"no kind 'text' here; expected json:FILE"),
        ("json:", r"says only the kind; expected json:FILE"),
        ("named:sms-spam", r"holds no instructions; expected named:instruction-data"),
        ("named:alpaca", r"no such name; expected named:instruction-data"),
        ("builtin:python-docs", r"expected builtin:docstrings"),
    ],
)
def test_what_is_no_source_of_instructions_is_refused_in_one_line(source, message):
    with pytest.raises(InputError, match=message) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"nothing.json: no such file"):
        load(f"json:{tmp_path / 'nothing.json'}")


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


@pytest.mark.parametrize("n", [10, 100, 1000, 1100])
def test_shares_that_are_whole_numbers_come_out_whole(write, n):
    """0.7 is 1 - 0.1 - 0.2 only nearly."""
    splits = load(write([entry(i) for i in range(n)]), validation_fraction=0.1, test_fraction=0.2)
    assert [len(split) for split in splits[:3]] == [n * 7 // 10, n // 10, n // 5]


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
    assert splits.notes[1] == "45 of them repeat the prompt of another, and are in the same split as that"


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
    with pytest.raises(InputError, match=r"test.json entry 2 \(test\) has the same prompt as .*data.json entry 5") as e:
        load(train, test_source=test, split=order)
    assert "(2 such in all)" in str(e.value)
    assert "\n" not in str(e.value)
    validation = write([entry(5)], "validation.json")
    with pytest.raises(InputError, match=r"has the same prompt as"):
        load(write([entry(30), entry(31)], "other.json"), test_source=test, validation_source=validation, split=order)


def test_equal_prompts_within_the_training_source_are_no_mistake_beside_a_given_split(write):
    train = write([entry(i % 8, output=f"{i}") for i in range(40)])
    splits = load(train, test_source=write([entry(20)], "test.json"), validation_fraction=0.3)
    assert not {e.prompt for e in splits.train} & {e.prompt for e in splits.validation}


def test_a_split_without_examples_is_refused(write):
    with pytest.raises(InputError, match=r"the test split gets none of the 3 examples of json:.*data.test_fraction"):
        load(write([entry(i) for i in range(3)]), test_fraction=0.1)
    with pytest.raises(InputError, match=r"0.5 and data.test_fraction 0.6 leave nothing to train on"):
        load(write([entry(1)]), validation_fraction=0.5, test_fraction=0.6)


# The standard library's docstrings


def test_builtin_pairs_are_signatures_and_sentences():
    entries = docstring_entries()
    assert len(entries) > 1000
    assert len({one["input"] for one in entries}) == len(entries)
    for one in entries:
        assert one["instruction"] == INSTRUCTION
        (function,) = ast.parse(f"{one['input']} pass").body
        assert not function.name.startswith("_")
        assert "\n" not in one["input"] + one["output"]
        assert one["output"][0].isupper()
        assert one["output"][-1] in ".!?:"
    assert any("async def" in one["input"] for one in entries)


def test_builtin_pairs_split_without_overlap():
    splits = load("builtin:docstrings", test_fraction=0.1)
    assert sum(len(split) for split in splits[:3]) == len(docstring_entries())
    assert len(splits.notes) == 1
    assert splits.train[0].where.startswith("builtin:docstrings entry ")
