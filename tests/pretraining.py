"""A pretraining run of seconds, shared by the tests that train one."""

import json
from pathlib import Path


def options(text: Path, runs: Path, **more: object) -> list[str]:
    """A run of seconds: 30 steps of a model of one narrow block, with dropout and micro-batches."""
    values = {
        "data.source": f"text:{text}",
        "runs_dir": runs,
        "run": "small",
        "tokenizer.kind": "char",
        "model.n_layers": 1,
        "model.emb_dim": 32,
        "model.n_heads": 2,
        "model.context_length": 16,
        "model.drop_rate": 0.1,
        "train.steps": 30,
        "train.batch_size": 8,
        "train.accumulate": 2,
        "train.eval_every": 10,
        "train.eval_batch_size": 64,
        "train.log_every": 1,
        "checkpoint.every": 10,
        "sample.every": 15,
        "sample.max_new_tokens": 10,
        "optimizer.warmup_steps": 5,
        "optimizer.learning_rate": 0.01,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def metrics(run: Path) -> list[dict[str, object]]:
    """The log without what a clock decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "mfu")} for row in rows]
