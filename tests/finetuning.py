"""Rows and options of a run of fine-tuning of seconds; tests/tasks/conftest.py makes the runs."""

import json

import jax
import numpy as np

from slm_jax.model import GPTConfig, init_params
from slm_jax.runs import Run, save_run

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .:QA\n"
TEMPLATE = {"user_start": "Q: ", "assistant_start": "\nA: ", "assistant_end": "\n"}
TASKS = ("classification", "instruction")
STEPS = 12


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


def preferences(n=30):
    return [{"prompt": f"double {i}", "chosen": f"{2 * i}.", "rejected": f"{2 * i + 1}. {i}"} for i in range(n)]


def words(options):
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def options(place, task, runs, trainable="last_block", **more):
    """A run of seconds, with dropout, so that its keys matter."""
    values = {
        "task": task, "trainable": trainable, "base": place / "base", "runs_dir": runs, "run": "tuned",
        "data.source": f"jsonl:{place / task}.jsonl", "instruction.template": place / "template.json",
        "preference.template": place / "template.json",
        "model.drop_rate": 0.1, "model.unroll": "false", "lora.rank": 2, "lora.drop_rate": 0.1,
        "classification.pad_to": "longest", "classification.pooling": "mean",
        "train.steps": STEPS, "train.batch_size": 4, "train.eval_every": 4,
        "train.eval_batch_size": 8, "train.log_every": 1, "checkpoint.every": 3, "sample.every": 4,
        "sample.max_new_tokens": 4, "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 1,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return words(values)


def save_new(folder, tokenizer, **fields):
    """A run of no training, with all that Qwen3 has: GPT-2 is fine-tuned in the goldens."""
    shape = {
        "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "norm": "rmsnorm", "positions": "rope",
        "mlp": "swiglu", "hidden_dim": 40, "n_kv_heads": 1, "head_dim": 10, "qk_norm": True, "bias": False, **fields,
    }  # fmt: skip
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, **shape)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(1))
    save_run(folder, Run(folder, None, cfg, params, tokenizer))
