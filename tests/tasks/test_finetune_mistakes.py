"""What must hold of mistakes in fine-tuning: one line that says what is wrong and where, and nothing is written."""
# ruff: noqa: F811 (a fixture that is imported is also an argument)

import json

import pytest
from finetuning import (
    ALPHABET,
    TASKS,
    fails,
    instructions,
    jsonl,
    labelled,
    options,
    place,  # noqa: F401
    save_new,
    tuned,  # noqa: F401
    words,
)

from slm_jax.tokenizer import BPETokenizer, CharTokenizer


def label(i, **fields):
    """The rows of classification, one of them changed."""
    rows = labelled()
    rows[i] = {**rows[i], **fields}
    return rows


BAD_TEXTS = {
    "missing column": ([{"message": "a", "label": "x"}], {}, ["line 1", "no field 'text'", "message, label"]),
    "empty text": (label(3, text=" "), {}, ["line 4", "text is empty"]),
    "unlabelled row": (label(2, label=None), {}, ["line 3", "label is None"]),
    "one class": ([{**row, "label": "one"} for row in labelled()], {}, ["one class only", "'one'"]),
    "no such LoRA target": (labelled(), {"trainable": "lora", "lora.targets": "mlp/*"}, ["'mlp/*'", "attn/q"]),
    "too many blocks": (labelled(), {"trainable": "last_n_blocks", "trainable_blocks": 3}, ["3", "has 2 blocks"]),
    "a longer text than the context": (labelled(), {"classification.max_length": 33}, ["is 33", "context of 32"]),
    "a letter that the base lacks": (label(1, text="\u03a9mega"), {}, ["\u03a9"]),
    "too few texts": (labelled(3), {}, ["split is empty"]),
    "another tokenizer": (labelled(), {"tokenizer.path": "OTHER"}, ["base", "another tokenizer"]),
    "another shape": (labelled(), {"model.emb_dim": 32}, ["model.emb_dim is 32, and the base's is 16", "leave it out"]),
    "another preset": (labelled(), {"model.preset": "mini"}, ["model.preset is mini", "the base has another shape"]),
    "no base": (labelled(), {"base": "nowhere/at-all"}, ["nowhere/at-all"]),
    "no model": (labelled(), {"trainable": "all", "base": "DATA"}, ["data"]),
}


@pytest.mark.parametrize("bad", BAD_TEXTS)
def test_bad_labelled_texts_and_bases_are_one_line(place, tmp_path, capsys, bad):
    rows, more, said = BAD_TEXTS[bad]
    data = jsonl(tmp_path / "data.jsonl", rows)
    CharTokenizer(ALPHABET[:-1]).save(tmp_path / "other")
    more = {key: {"OTHER": tmp_path / "other", "DATA": data}.get(value, value) for key, value in more.items()}
    arguments = [*options(place, "classification", tmp_path / "runs", data__source=f"jsonl:{data}"), *words(more)]
    fails(["finetune", *arguments], capsys, *said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("split", "row", "said"),
    [
        ("test", {"text": "new 1", "label": "signs"}, ["test.jsonl line 1", "'signs'", "never occurs in training"]),
        ("validation", labelled()[4], ["(validation) and", "(train) have the same text", "group_duplicates=false"]),
        ("test", {"text": "new 2"}, ["test.jsonl line 1", "no field 'label'"]),
    ],
    ids=["unseen label", "duplicate", "no labels"],
)
def test_bad_texts_of_given_splits_are_one_line(place, tmp_path, capsys, split, row, said):
    more = {f"data__{split}_source": f"jsonl:{jsonl(tmp_path / f'{split}.jsonl', [row])}"}
    fails(["finetune", *options(place, "classification", tmp_path / "runs", **more)], capsys, *said)
    assert not (tmp_path / "runs").exists()


BAD_INSTRUCTIONS = {
    "no list": ({"instruction": "a", "output": "b"}, {}, ["not a list"]),
    "no object": ([{"instruction": "a", "output": "b"}, 3], {}, ["entry 2", "not a JSON object"]),
    "no output": ([{"instruction": "a"}], {}, ["entry 1", "no field 'output'", "only instruction"]),
    "empty output": ([{"instruction": "a", "output": " "}], {}, ["entry 1", "output is empty"]),
    "all too long": (
        [{"instruction": "a" * (40 + i), "output": "b"} for i in range(20)],
        {},
        ["longer than 32 tokens"],
    ),
    "responses alone too long": (
        [{"instruction": f"{i}", "output": "b" * 50} for i in range(20)],
        {"instruction.too_long": "truncate"},
        ["nothing to learn from", "the response alone is longer than 32 tokens"],
    ),
    "too few": (instructions(3), {}, ["split is empty"]),
    "no such template": (instructions(), {"instruction.template": "alpaka"}, ["'alpaka'", "alpaca"]),
    "no base": (instructions(), {"base": "nowhere/at-all"}, ["nowhere/at-all"]),
    "no such LoRA target": (instructions(), {"trainable": "lora", "lora.targets": "class_head"}, ["'class_head'"]),
    "a tied head alone": (instructions(), {"trainable": "head"}, ["trainable is head", "tie_weights"]),
}


@pytest.mark.parametrize("bad", BAD_INSTRUCTIONS)
def test_bad_instructions_are_one_line(place, tmp_path, capsys, bad):
    content, more, said = BAD_INSTRUCTIONS[bad]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(content))
    arguments = [*options(place, "instruction", tmp_path / "runs", data__source=f"json:{data}"), *words(more)]
    fails(["finetune", *arguments], capsys, *said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_is_no_base(place, tuned, tmp_path, capsys, task):
    run, _ = tuned("classification", "all")
    fails(
        ["finetune", *options(place, task, tmp_path / "runs", base=run)],
        capsys,
        "is a classifier; expected the run that it was made from",
    )
    assert not (tmp_path / "runs").exists()


def test_commands_send_each_other_their_tasks(place, tmp_path, capsys):
    arguments = options(place, "classification", tmp_path / "runs")
    fails(["train", *arguments], capsys, "task is classification", "slm-jax finetune")
    fails(["finetune", *arguments, "--task", "pretraining"], capsys, "task is pretraining", "slm-jax train")


def test_another_kind_of_tokenizer_than_the_base_has_is_refused(place, tmp_path, capsys):
    tokenizer = BPETokenizer.train(ALPHABET * 3, vocab_size=260)
    save_new(tmp_path / "base", tokenizer)
    arguments = options(place, "classification", tmp_path / "runs", base=tmp_path / "base", tokenizer__kind="char")
    fails(["finetune", *arguments], capsys, f"base {tmp_path / 'base'} was trained with another tokenizer", "leave")
    assert not (tmp_path / "runs").exists()
