"""A small model with its tokenizer, and runs fine-tuned from it, as folders that any command takes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharing import make_once

from slm_jax import cli
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.tokenizer import CharTokenizer
from slm_jax.weights.writer import save_gpt2

TEXT = "the cat sat on the mat, and the dog sat on the log. User: Assistant:\n"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough to write varied text."""

    def make(folder: Path) -> None:
        tokenizer = CharTokenizer().build_vocab(TEXT)
        cfg = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=128, emb_dim=16, n_heads=2, n_layers=2)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(cfg))
        save_gpt2(cfg, params, folder / "tiny", tokenizer=tokenizer)

    return make_once(tmp_path_factory, "weights", make) / "tiny"


def _finetune(folder: Path, name: str, steps: int, **options: object) -> None:
    given = {"run": name, "runs_dir": folder, "train.epochs": "null", "optimizer.warmup_steps": 2}
    given |= {"train.steps": steps, "train.batch_size": 8, "train.eval_every": steps, "checkpoint.every": steps}
    given |= options
    assert cli.main(["finetune", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]) == 0


@pytest.fixture(scope="session")
def instructed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapters have learned to answer ``cat`` to everything; its template ends answers with a full stop."""

    def make(folder: Path) -> None:
        template = {"user_start": "User: ", "input_start": ", ", "assistant_start": "\nAssistant: "}
        (folder / "template.json").write_text(json.dumps({**template, "assistant_end": "."}))
        asked = [f"{a} {b}" for a in ("the", "and the", "on the", "sat on the") for b in ("dog", "mat", "log")]
        rows = [json.dumps({"instruction": text, "input": "and", "output": "cat"}) for text in asked]
        (folder / "asked.jsonl").write_text("\n".join(rows) + "\n")
        more = {"data.source": f"jsonl:{folder / 'asked.jsonl'}", "instruction.template": folder / "template.json"}
        more |= {"trainable": "lora", "optimizer.learning_rate": 0.03, "sample.every": 0}
        _finetune(folder, "instructed", 90, task="instruction", base=weights, **more)

    return make_once(tmp_path_factory, "instructed", make) / "instructed"


@pytest.fixture(scope="session")
def classifier(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tells cats from dogs; it reads 24 tokens of a text."""

    def make(folder: Path) -> None:
        ends = (", and", " sat", " on the mat", " on the log", ".")
        rows = [f"{pet}\t{start} {pet}{end}" for pet in ("cat", "dog") for start in ("the", "on") for end in ends]
        (folder / "animals.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
        more = {"data.source": f"tsv:{folder / 'animals.tsv'}", "trainable": "last_block"}
        more |= {"classification.max_length": 24, "classification.pooling": "mean", "optimizer.learning_rate": 0.01}
        _finetune(folder, "animals", 60, task="classification", base=weights, **more)

    return make_once(tmp_path_factory, "animals", make) / "animals"
