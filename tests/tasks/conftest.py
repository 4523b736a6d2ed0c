"""Data, a base and runs of fine-tuning of seconds, for the tests that end in a run or in a refusal of one."""

import json
import shutil

import pytest
from finetuning import ALPHABET, TEMPLATE, instructions, jsonl, labelled, options, preferences, words
from sharing import make_once

from slm_jax import cli


def make_place(folder):
    jsonl(folder / "classification.jsonl", labelled())
    jsonl(folder / "instruction.jsonl", instructions())
    jsonl(folder / "preference.jsonl", preferences())
    (folder / "template.json").write_text(json.dumps(TEMPLATE))
    (folder / "text.txt").write_text((ALPHABET + "\n") * 40)
    options = {
        "data.source": f"text:{folder / 'text.txt'}", "runs_dir": folder, "run": "base", "tokenizer.kind": "char",
        "model.n_layers": 2, "model.emb_dim": 16, "model.n_heads": 2, "model.context_length": 32, "train.steps": 2,
        "model.unroll": "false", "sample.every": 0, "optimizer.warmup_steps": 0,
    }  # fmt: skip
    assert cli.main(["train", *words(options)]) == 0


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Data of all tasks, a template, and a model that was pretrained for two steps."""
    return make_once(tmp_path_factory, "finetuning", make_place)


@pytest.fixture(scope="session")
def tuned(place, tmp_path_factory):
    """Run and arguments by task and by what is trained; what they started from is gone when they are done."""

    def run(task, trainable):
        def make(runs):
            shutil.copytree(place / "base", runs / "base")
            assert cli.main(["finetune", *arguments(runs)]) == 0
            shutil.rmtree(runs / "base")

        def arguments(runs):
            return options(place, task, runs, trainable, base=runs / "base")

        runs = make_once(tmp_path_factory, f"tuned-{task}-{trainable}", make)
        return runs / "tuned", arguments(runs)

    return run
