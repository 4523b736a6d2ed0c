"""What must hold beside transformers: from what we export it reads the same ids, conversations and greedy text.

The golden was made by transformers on a CPU (``goldens/make_exports.py``); neither it nor PyTorch is needed here.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.data.templates import TEMPLATES, Message
from slm_jax.generation.decode import generate
from slm_jax.model import GPTConfig, GPTModel, param_shapes
from slm_jax.tokenizer import tokenizer_from_dict

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "exports.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("golden", GOLDEN["tokenizers"], ids=lambda golden: golden["tokenizer"]["kind"])
def test_ids_and_greedy_text(golden):
    tokenizer = tokenizer_from_dict(golden["tokenizer"])
    for text, ids in golden["ids"].items():
        assert tokenizer.encode(text, allow_special=True) == ids
    shape = {"context_length": 64, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "tie_weights": False}
    cfg, rng = GPTConfig(vocab_size=tokenizer.vocab_size, **shape), np.random.default_rng(1)

    def make(path, leaf):
        return rng.normal(0, 0 if path[-1].key == "bias" else 1, leaf.shape).astype(np.float32)

    params = jax.tree.map_with_path(make, param_shapes(cfg))
    (prompt, *_) = golden["ids"].values()
    stop = {"eos_id": tokenizer.eot_id, "past_context": "stop"}
    (row,) = generate(GPTModel(cfg), params, [prompt], max_new_tokens=40, temperature=0.0, **stop)
    assert row[: len(golden["greedy"])].tolist() == golden["greedy"]
    assert len(set(golden["greedy"][len(prompt) :])) > 5  # it is no repetition


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations(name):
    for golden in GOLDEN["templates"][name]:
        messages = [Message(role, content) for role, content in golden["messages"]]
        assert "".join(text for text, _ in TEMPLATES[name].pieces(messages)) == golden["text"]
        if messages[-1].role == "user":
            assert TEMPLATES[name].prompt(messages) == golden["prompt"]
