"""A small model with its tokenizer, as a folder that any command takes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import cli
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.tokenizer import CharTokenizer
from slm_jax.weights.writer import save_gpt2

TEXT = "the cat sat on the mat, and the dog sat on the log. User: Assistant:\n"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough to write varied text."""
    tokenizer = CharTokenizer().build_vocab(TEXT)
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=128, emb_dim=16, n_heads=2, n_layers=2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(cfg))
    return save_gpt2(cfg, params, tmp_path_factory.mktemp("weights") / "tiny", tokenizer=tokenizer)


def _finetune(folder: Path, name: str, **options: object) -> Path:
    """Fine-tune for some steps; return the run."""
    given = {"run": name, "runs_dir": folder, "train.epochs": "null", "optimizer.warmup_steps": 2, **options}
    assert cli.main(["finetune", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]) == 0
    return folder / name


@pytest.fixture(scope="session")
def instructed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapters have learned to answer ``cat`` to everything; its template ends answers with a full stop."""
    folder = tmp_path_factory.mktemp("runs")
    template = {"user_start": "User: ", "input_start": ", ", "assistant_start": "\nAssistant: ", "assistant_end": "."}
    (folder / "template.json").write_text(json.dumps(template))
    asked = [f"{a} {b}" for a in ("the", "and the", "on the", "sat on the") for b in ("dog", "mat", "log")]
    rows = [json.dumps({"instruction": text, "input": "and", "output": "cat"}) for text in asked]
    (folder / "asked.jsonl").write_text("\n".join(rows) + "\n")
    more = {"data.source": f"jsonl:{folder / 'asked.jsonl'}", "instruction.template": folder / "template.json"}
    more |= {
        "train.steps": 60,
        "train.batch_size": 8,
        "train.eval_every": 60,
        "checkpoint.every": 60,
        "sample.every": 0,
    }
    more |= {"trainable": "lora", "optimizer.learning_rate": 0.03, "task": "instruction", "base": weights}
    return _finetune(folder, "instructed", **more)


@pytest.fixture(scope="session")
def classifier(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tells cats from dogs; it reads 24 tokens of a text."""
    folder = tmp_path_factory.mktemp("runs")
    ends = (", and", " sat", " on the mat", " on the log", ".")
    rows = [f"{animal}\t{start} {animal}{end}" for animal in ("cat", "dog") for start in ("the", "on") for end in ends]
    (folder / "animals.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
    more = {
        "task": "classification",
        "trainable": "last_block",
        "data.source": f"tsv:{folder / 'animals.tsv'}",
        "base": weights,
    }
    more |= {"train.steps": 30, "train.batch_size": 8, "train.eval_every": 30, "checkpoint.every": 30}
    more |= {"classification.max_length": 24, "classification.pooling": "mean", "optimizer.learning_rate": 0.01}
    return _finetune(folder, "animals", **more)
