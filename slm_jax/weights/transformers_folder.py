"""The files beside the weights in a folder that ``transformers`` opens: configuration, tokenizer, model card."""

import json
from collections.abc import Mapping
from typing import Any

from slm_jax.errors import MissingInputError
from slm_jax.model import GPTConfig, count_params
from slm_jax.tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer

_GPT2_VOCABULARY = 50_257


def folder_files(
    cfg: GPTConfig, dtype: str, tokenizer: Tokenizer | None, card: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """Return every file but the weights, by name."""
    gpt2_files = _tokenizer_files(cfg) if isinstance(tokenizer, GPT2Tokenizer) else {}
    texts = {
        "config.json": _json(_config(cfg, dtype, tokenizer)),
        "generation_config.json": _json(_generation_config(cfg, tokenizer)),
        "README.md": _card(cfg, tokenizer, bool(gpt2_files), card or {}),
    }
    return {**{name: text.encode() for name, text in texts.items()}, **gpt2_files}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _end_of_text(cfg: GPTConfig, tokenizer: Tokenizer | None) -> int | None:
    if tokenizer is not None:
        return tokenizer.eot_id
    vocabulary = cfg.unpadded_vocab_size or cfg.vocab_size
    return _GPT2_VOCABULARY - 1 if vocabulary == _GPT2_VOCABULARY else None


def _config(cfg: GPTConfig, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context_length,
        "n_ctx": cfg.context_length,
        "n_embd": cfg.emb_dim,
        "n_head": cfg.n_heads,
        "n_layer": cfg.n_layers,
        "activation_function": "gelu" if cfg.exact_gelu else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": cfg.tie_weights,
        "attn_pdrop": cfg.drop_rate,
        "embd_pdrop": cfg.drop_rate,
        "resid_pdrop": cfg.drop_rate,
        "bos_token_id": _end_of_text(cfg, tokenizer),
        "eos_token_id": _end_of_text(cfg, tokenizer),
        "torch_dtype": dtype,
    }


def _generation_config(cfg: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    end = _end_of_text(cfg, tokenizer)
    content: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end}
    vocabulary = tokenizer.vocab_size if tokenizer else cfg.unpadded_vocab_size or cfg.vocab_size
    if vocabulary < cfg.vocab_size:  # ids that only round the vocabulary up
        content["suppress_tokens"] = list(range(vocabulary, cfg.vocab_size))
    return content


def _tokenizer_files(cfg: GPTConfig) -> dict[str, bytes]:
    """Return GPT-2's tokenizer as ``transformers`` reads it: the files that tiktoken keeps; nothing without them."""
    try:
        files = GPT2Tokenizer().files()
    except MissingInputError:
        return {}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": cfg.context_length,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
    }
    return {
        "vocab.json": files["encoder.json"],
        "merges.txt": files["vocab.bpe"],
        "tokenizer_config.json": _json(settings).encode(),
    }


def _card(cfg: GPTConfig, tokenizer: Tokenizer | None, has_files: bool, figures: Mapping[str, Any]) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2, slm_jax]",
        "---",
        "",
        "# A GPT-2 from slm_jax",
        "",
        f"{count_params(cfg):,} parameters: {cfg.n_layers} layers, {cfg.n_heads} heads, width {cfg.emb_dim}, "
        f"context {cfg.context_length:,}, vocabulary {cfg.vocab_size:,}, "
        f"output head {'tied to the token embedding' if cfg.tie_weights else 'of its own'}.",
        "",
        "```python",
        "from transformers import GPT2LMHeadModel",
        'model = GPT2LMHeadModel.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    if isinstance(tokenizer, GPT2Tokenizer):
        lines += ["Tokenizer: GPT-2's." if has_files else "Tokenizer: GPT-2's; its files are not in this folder.", ""]
    elif tokenizer is not None:
        lines += [f"Tokenizer: `tokenizer/tokenizer.json` (slm_jax, kind {tokenizer.kind}).", ""]
    if figures:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in figures.items()] + [""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
