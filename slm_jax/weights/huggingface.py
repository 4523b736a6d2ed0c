"""Hugging Face's GPT-2: names, configuration, and the files of a folder that ``transformers`` opens.

Its ``Conv1D`` stores weights as (in, out), like ours. Source: ``transformers``, ``GPT2LMHeadModel`` and ``GPT2Config``.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import read_json
from slm_jax.model import GPTConfig, count_params
from slm_jax.nn.axes import HEAD
from slm_jax.tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer
from slm_jax.weights.names import POSITIONS, TOKENS, Format
from slm_jax.weights.tensor_files import TensorFiles

FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
}
# Keys that change the function that the model computes, and the values that GPTModel supports.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True, False),
}


class HuggingFace(Format):
    """Names and configuration of ``GPT2LMHeadModel``."""

    def recognise(self, files: TensorFiles) -> bool:
        """Whether most matrices with more outputs than inputs lie as in this format; one of them may be wrong."""
        pattern = re.compile(r"h\.\d+\.(attn\.c_attn|mlp\.c_fc)\.weight")
        shapes = [tensor.shape for name, tensor in files.tensors.items() if pattern.fullmatch(name)]
        n_in_out = sum(len(shape) != 2 or shape[0] < shape[1] for shape in shapes)
        return bool(shapes) and (2 * n_in_out < len(shapes)) == self.out_in

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        file = files.file.parent / "config.json"
        if not file.is_file():
            return {}
        content = read_json(file)
        for key, allowed in _SUPPORTED.items():
            if key in content and content[key] not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise InputError(f"{file}: {key} is {content[key]!r}; expected {expected}")
        fields: dict[str, Any] = {}
        for key, field in {**FIELDS, "num_attention_heads": "n_heads"}.items():
            value = content.get(key)
            if value is not None and fields.setdefault(field, value) != value:
                raise InputError(f"{file}: n_head is {fields[field]!r} and {key} {value!r}; expected one or the other")
        fields["exact_gelu"] = content.get("activation_function") == "gelu"
        if not content.get("tie_word_embeddings", True):
            fields["tie_weights"] = False
        return fields

    def side_files(
        self, cfg: GPTConfig, dtype: str, tokenizer: Tokenizer | None, card: Mapping[str, Any]
    ) -> dict[str, bytes]:
        n_ids = tokenizer.vocab_size if tokenizer else cfg.unpadded_vocab_size or cfg.vocab_size
        end = tokenizer.eot_id if tokenizer else n_ids - 1 if n_ids == 50_257 else None
        ends = {"bos_token_id": end, "eos_token_id": end}
        padding = {"suppress_tokens": list(range(n_ids, cfg.vocab_size))} if n_ids < cfg.vocab_size else {}
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **{key: getattr(cfg, field) for key, field in FIELDS.items()},
            "n_ctx": cfg.context_length,
            "activation_function": "gelu" if cfg.exact_gelu else "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": cfg.tie_weights,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), cfg.drop_rate),
            **ends,
            "torch_dtype": dtype,
        }
        return {
            "config.json": _json(config),
            "generation_config.json": _json({**ends, **padding}),
            "README.md": _card(cfg, tokenizer, card).encode(),
            **(_tokenizer_files(cfg) if isinstance(tokenizer, GPT2Tokenizer) else {}),
        }


FORMAT = HuggingFace(
    title="Hugging Face",
    top={
        "wte.weight": TOKENS,
        "wpe.weight": POSITIONS,
        "ln_f.weight": "final_norm/scale",
        "ln_f.bias": "final_norm/bias",
        "lm_head.weight": HEAD,
    },
    prefix="h.{}.",
    block={
        "ln_1.weight": "norm1/scale",
        "ln_1.bias": "norm1/bias",
        "attn.c_attn.weight": "attn/q/kernel attn/k/kernel attn/v/kernel",
        "attn.c_attn.bias": "attn/q/bias attn/k/bias attn/v/bias",
        "attn.c_proj.weight": "attn/out_proj/kernel",
        "attn.c_proj.bias": "attn/out_proj/bias",
        "ln_2.weight": "norm2/scale",
        "ln_2.bias": "norm2/bias",
        "mlp.c_fc.weight": "ff/fc/kernel",
        "mlp.c_fc.bias": "ff/fc/bias",
        "mlp.c_proj.weight": "ff/proj/kernel",
        "mlp.c_proj.bias": "ff/proj/bias",
    },
    front="transformer.",
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",  # the mask; not attn.c_attn.bias
    out_in=False,
    fixed={"bias": True, "qkv_bias": True},
)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _tokenizer_files(cfg: GPTConfig) -> dict[str, bytes]:
    """Return GPT-2's tokenizer as ``transformers`` reads it, if tiktoken's files are on this machine."""
    try:
        files = GPT2Tokenizer().files()
    except MissingInputError:
        return {}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": cfg.context_length,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "add_prefix_space": False,
    }
    return {
        "vocab.json": files["encoder.json"],
        "merges.txt": files["vocab.bpe"],
        "tokenizer_config.json": _json(settings),
    }


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, slm_jax]
---

# A GPT-2 from slm_jax

```python
from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained("path/to/this/folder")
```

| | |
|---|---|
"""


def _card(cfg: GPTConfig, tokenizer: Tokenizer | None, figures: Mapping[str, Any]) -> str:
    shown: dict[str, Any] = {"parameters": f"{count_params(cfg):,}"}
    if isinstance(tokenizer, GPT2Tokenizer):
        shown["tokenizer"] = "GPT-2's"
    elif tokenizer is not None:
        shown["tokenizer"] = f"`tokenizer/tokenizer.json` (slm_jax, kind {tokenizer.kind})"
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in {**shown, **figures}.items()]
    return _CARD + "".join(f"| {name} | {value} |\n" for name, value in cells)
