"""Make ``exports.json``: what transformers reads from folders that we export.

    pip install torch==2.13.0 transformers==5.24.0 && pip install -e .
    python tests/goldens/make_exports.py

For each kind of tokenizer: its ``to_dict``, texts with the ids of ``AutoTokenizer``, and a greedy text of
``transformers.pipeline`` for a random model. For each template: conversations with the text of ``apply_chat_template``.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers
from transformers import AutoTokenizer, pipeline

from slm_jax.data.templates import TEMPLATES
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.tokenizer import BPETokenizer, CharTokenizer, SimpleTokenizer, Tokenizer
from slm_jax.weights.writer import save_pretrained

TEXT = "It's 1984: the café's cat -- «Äpfel», 你好! -- sat on the mat,\n\n  and sat.\tWho's there? 😀\r\n"
TEXTS = ["the cat sat on the mat", TEXT, " It's 84!  ", "the<|endoftext|> cat", "ten cats:\n\n\n1, 4, 8\t\n"]
CONVERSATIONS = [
    [("user", "Rewrite: the cat sat."), ("assistant", "The mat was sat on.")],
    [("system", "Be brief."), ("user", "Who sat?\n"), ("assistant", "The cat."), ("user", " Where? ")],
]
SHAPE = {"context_length": 64, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "tie_weights": False}
NEW_TOKENS = 40


def model(vocab_size: int) -> tuple[GPTConfig, Any]:
    """Make a random model without biases, which would repeat one token; the test makes the same one."""
    cfg, rng = GPTConfig(vocab_size=vocab_size, **SHAPE), np.random.default_rng(1)

    def make(path: Any, leaf: Any) -> np.ndarray:
        return rng.normal(0, 0 if path[-1].key == "bias" else 1, leaf.shape).astype(np.float32)

    return cfg, jax.tree.map_with_path(make, param_shapes(cfg))


def export(tokenizer: Tokenizer, folder: Path, template: str | None = None) -> str:
    """Write a model with a tokenizer, and return its folder."""
    shown = None if template is None else TEMPLATES[template]
    return str(save_pretrained(*model(tokenizer.vocab_size), folder, tokenizer=tokenizer, template=shown))


def main() -> None:
    """Write the file beside this script."""
    tokenizers: list[Tokenizer] = [BPETokenizer.train(TEXT * 2, 290), CharTokenizer().build_vocab(TEXT)]
    tokenizers.append(SimpleTokenizer().build_vocab(TEXT))
    content: dict[str, Any] = {"made_with": transformers.__version__, "tokenizers": [], "templates": {}}
    with tempfile.TemporaryDirectory() as name:
        for tokenizer in tokenizers:
            folder = export(tokenizer, Path(name, tokenizer.kind))
            theirs = AutoTokenizer.from_pretrained(folder)
            texts = TEXTS[:3] if tokenizer.kind == "simple" else TEXTS  # there, <|endoftext|> is a word
            generate = pipeline("text-generation", model=folder)
            out = generate(TEXTS[0], do_sample=False, max_new_tokens=NEW_TOKENS, return_tensors=True)
            content["tokenizers"].append(
                {
                    "tokenizer": tokenizer.to_dict(),
                    "ids": {text: theirs(text)["input_ids"] for text in texts},
                    "greedy": list(out[0]["generated_token_ids"]),
                }
            )
        for template in TEMPLATES:
            theirs = AutoTokenizer.from_pretrained(export(tokenizers[0], Path(name, template), template))
            content["templates"][template] = [
                {
                    "messages": turns,
                    "text": theirs.apply_chat_template(_messages(turns), tokenize=False),
                    "prompt": theirs.apply_chat_template(_messages(turns), tokenize=False, add_generation_prompt=True),
                }
                for turns in CONVERSATIONS
            ]
    Path(__file__).with_name("exports.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


if __name__ == "__main__":
    main()
