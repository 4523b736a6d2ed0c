"""Hugging Face's format: ``config.json``, and the other files of a folder that ``transformers`` opens.

Each family of models has a module with its names and its configuration.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from slm_jax.model import GPTConfig
from slm_jax.weights.names import Format
from slm_jax.weights.side_files import About, end_ids, json_file, pad_id, side_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace(Format):
    """A family of models in Hugging Face's format."""

    architectures: tuple[str, str]  # classes of transformers: the language model, and the classifier
    class_head: str = "score.weight"

    def config(self, cfg: GPTConfig) -> dict[str, Any]:
        """Return the keys of ``config.json`` that are the family's own."""
        raise NotImplementedError

    def side_files(self, cfg: GPTConfig, dtype: str, about: About) -> dict[str, bytes]:
        ids = end_ids(cfg, about.tokenizer)
        config = {
            "architectures": [self.architectures[bool(about.classes)]],
            "model_type": self.model_type,
            **self.config(cfg),
            "tie_word_embeddings": cfg.tie_weights,
            **ids,
            **(_class_keys(about.classes, pad_id(cfg, about.tokenizer)) if about.classes else {}),
            "torch_dtype": dtype,
        }
        return {"config.json": json_file(config), **side_files(cfg, self.model_type, about)}


def _class_keys(classes: Sequence[str], pad: int | None) -> dict[str, Any]:
    """Return what a classifier states: it looks for the last token that is not padding."""
    return {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
        "problem_type": "single_label_classification",
        "pad_token_id": pad,
    }
