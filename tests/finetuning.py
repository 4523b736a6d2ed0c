"""Data, a base and runs of fine-tuning of seconds, for the tests that end in a run or in a refusal of one."""

import json
import shutil

import jax
import numpy as np
import pytest
from sharing import make_once

from slm_jax import cli
from slm_jax.model import GPTConfig, init_params
from slm_jax.runs import Run, save_run

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .:QA\n"
TEMPLATE = {"user_start": "Q: ", "assistant_start": "\nA: ", "assistant_end": "\n"}
TASKS, MODES = ("classification", "instruction"), ("all", "last_block", "lora")
STEPS = 24


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(n=60):
    """Letters or digits."""
    rng = np.random.default_rng(0)
    signs = ("abcdefghij", "0123456789")
    return [
        {"text": "".join(rng.choice(list(signs[i % 2]), 6 + i % 7)), "label": ("letters", "digits")[i % 2]}
        for i in range(n)
    ]


def instructions(n=20):
    return [{"instruction": f"double {i}", "output": f"{2 * i}."} for i in range(n)]


def make_place(folder):
    jsonl(folder / "classification.jsonl", labelled())
    jsonl(folder / "instruction.jsonl", instructions())
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
    """Data of both tasks, a template, and a model that was pretrained for two steps."""
    return make_once(tmp_path_factory, "finetuning", make_place)


def words(options):
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def options(place, task, runs, trainable="last_block", **more):
    """A run of seconds, with dropout, so that its keys matter."""
    values = {
        "task": task, "trainable": trainable, "base": place / "base", "runs_dir": runs, "run": "tuned",
        "data.source": f"jsonl:{place / task}.jsonl", "instruction.template": place / "template.json",
        "model.drop_rate": 0.1, "model.unroll": "false", "lora.rank": 2, "lora.drop_rate": 0.1,
        "classification.pad_to": "longest", "classification.pooling": "mean",
        "train.steps": STEPS, "train.batch_size": 4, "train.eval_every": 8,
        "train.eval_batch_size": 8, "train.log_every": 1, "checkpoint.every": 6, "sample.every": 8,
        "sample.max_new_tokens": 4, "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 1,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return words(values)


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


def save_new(folder, tokenizer, **fields):
    """A run of no training."""
    shape = {"context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, **fields}
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, **shape)
    save_run(folder, Run(folder, None, cfg, init_params(cfg, jax.random.key(1)), tokenizer))


def fails(arguments, capsys, *said):
    """The command ends with 2 and one line on stderr that says all of ``said``."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for text in said:
        assert text in lines[0]
    assert "Traceback" not in lines[0]
