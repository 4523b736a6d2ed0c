"""What makes two starts of a run the same run: the keys that say what is trained on what."""

import dataclasses
from pathlib import Path
from typing import Any

from slm_jax.config import execution_keys, flatten, to_dict
from slm_jax.model import GPTConfig
from slm_jax.training.config import BaseRunConfig

# Keys that runs of earlier versions do not have, with the value that those had in effect.
_LATER_KEYS = {
    **{"model.exact_gelu": False, "base": None, "base_optimizer": False, "trainable": "all"},
    **{"data.packing": False, "data.text_column": None, "optimizer.kind": "adamw"},
}


def identity(config: BaseRunConfig, model: GPTConfig) -> dict[str, Any]:
    """Return the keys that say what is trained on what, with the model's resolved shape."""
    base = None if config.base is None else str(Path(config.base))  # "./runs/x" is "runs/x"
    values = flatten({**to_dict(config), "model": dataclasses.asdict(model), "base": base})
    return {
        key: list(value) if isinstance(value, tuple) else value  # as JSON has it
        for key, value in values.items()
        if key not in {*execution_keys(config), "model.unpadded_vocab_size"}  # follows from model.vocab_size
        and not key.startswith(tuple(_unused_keys(config)))
        and (key, value) not in _LATER_KEYS.items()
    }


def _unused_keys(config: BaseRunConfig) -> list[str]:
    """Return what the keys start with that mean nothing to this kind of run."""
    used = {
        "classification.": config.task == "classification",
        "instruction.": config.task == "instruction",
        "data.test_": config.task != "pretraining",
        "data.packing": config.task == "pretraining",
        "data.text_column": config.task == "pretraining",
        "optimizer.muon_": config.optimizer.kind == "muon",
        "lora.": config.trainable == "lora",
        "trainable_blocks": config.trainable == "last_n_blocks",
    }
    return [prefix for prefix, is_used in used.items() if not is_used]


def first_difference(saved: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Describe the first key in which two identities differ; None where they agree."""
    for key in [*wanted, *(key for key in saved if key not in wanted)]:
        if saved.get(key) != wanted.get(key):
            if key == "data.sha256":
                return (
                    "the text behind data.source is not the same (a file changed, or for builtin: the Python version)"
                )
            was, now = (values.get(key, _LATER_KEYS.get(key)) for values in (saved, wanted))
            return f"{key} is {now!r} now and was {was!r}"
    return None
