"""What must hold of mistakes in fine-tuning: one line that says what is wrong and where, and nothing is written."""

import json

import pytest
from finetuning import instructions, jsonl, labelled, options, words
from refusals import fails


def label(i, **fields):
    """The rows of classification, one of them changed."""
    rows = labelled()
    rows[i] = {**rows[i], **fields}
    return rows


def long(prompt="a", response="b"):
    return [{"instruction": f"{i}" + prompt, "output": response} for i in range(20)]


BAD_TEXTS = {
    "missing column": ([{"message": "a", "label": "x"}], {}, ["line 1", "no field 'text'", "message, label"]),
    "empty text": (label(3, text=" "), {}, ["line 4", "text is empty"]),
    "unlabelled row": (label(2, label=None), {}, ["line 3", "label is None"]),
    "one class": ([{**row, "label": "one"} for row in labelled()], {}, ["one class only", "'one'"]),
    "no such LoRA target": (labelled(), {"trainable": "lora", "lora.targets": "mlp/*"}, ["'mlp/*'", "attn/q"]),
    "a longer text than the context": (labelled(), {"classification.max_length": 33}, ["is 33", "context of 32"]),
    "a letter that the base lacks": (label(1, text="\u03a9mega"), {}, ["\u03a9"]),
    "too few texts": (labelled(3), {}, ["split is empty"]),
    "another preset": (labelled(), {"model.preset": "mini"}, ["model.preset is mini", "the base has another shape"]),
    "no base": (labelled(), {"base": "nowhere/at-all"}, ["nowhere/at-all"]),
    "no model": (labelled(), {"trainable": "all", "base": __file__}, ["mistakes.py"]),
}
BAD_INSTRUCTIONS = {
    "no list": ({"instruction": "a", "output": "b"}, {}, ["not a list"]),
    "no object": ([{"instruction": "a", "output": "b"}, 3], {}, ["entry 2", "not a JSON object"]),
    "no output": ([{"instruction": "a"}], {}, ["entry 1", "no field 'output'", "only instruction"]),
    "empty output": ([{"instruction": "a", "output": " "}], {}, ["entry 1", "output is empty"]),
    "a longer example than the context": (instructions(), {"instruction.max_length": 33}, ["is 33", "context of 32"]),
    "all too long": (long(prompt="a" * 40), {}, ["longer than 32 tokens"]),
    "responses alone too long": (
        long(response="b" * 50),
        {"instruction.too_long": "truncate"},
        ["nothing to learn from", "the response alone is longer than 32 tokens"],
    ),
    "too few": (instructions(3), {}, ["split is empty"]),
    "no such template": (instructions(), {"instruction.template": "alpaka"}, ["'alpaka'", "alpaca"]),
    "no such LoRA target": (instructions(), {"trainable": "lora", "lora.targets": "class_head"}, ["'class_head'"]),
}
BAD = [("classification", name, *row) for name, row in BAD_TEXTS.items()]
BAD += [("instruction", name, *row) for name, row in BAD_INSTRUCTIONS.items()]


@pytest.mark.parametrize(("task", "name", "rows", "more", "message"), BAD)
def test_bad_data_bases_and_values_are_one_line(place, tmp_path, capsys, task, name, rows, more, message):
    data = tmp_path / "data"
    source = f"jsonl:{jsonl(data, rows)}" if task == "classification" else f"json:{data}"
    if task == "instruction":
        data.write_text(json.dumps(rows))
    fails(["finetune", *options(place, task, tmp_path / "runs", data__source=source), *words(more)], capsys, *message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("split", "row", "message"),
    [
        ("test", {"text": "new 1", "label": "signs"}, ["test.jsonl line 1", "'signs'", "never occurs in training"]),
        ("validation", labelled()[4], ["(validation) and", "(train) have the same text", "group_duplicates=false"]),
        ("test", {"text": "new 2"}, ["test.jsonl line 1", "no field 'label'"]),
    ],
    ids=["unseen label", "duplicate", "no labels"],
)
def test_bad_texts_of_given_splits_are_one_line(place, tmp_path, capsys, split, row, message):
    more = {f"data__{split}_source": f"jsonl:{jsonl(tmp_path / f'{split}.jsonl', [row])}"}
    fails(["finetune", *options(place, "classification", tmp_path / "runs", **more)], capsys, *message)


def test_commands_send_each_other_their_tasks_and_a_classifier_is_no_base(place, tuned, tmp_path, capsys):
    arguments = options(place, "classification", tmp_path / "runs")
    fails(["train", *arguments], capsys, "task is classification", "slm-jax finetune")
    fails(["finetune", *arguments, "--task", "pretraining"], capsys, "task is pretraining", "slm-jax train")
    run, _ = tuned("classification", "last_block")
    fails(["finetune", *arguments, "--base", str(run)], capsys, "is a classifier; expected a language model")
