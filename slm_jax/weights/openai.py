"""OpenAI's GPT-2 as TensorFlow's code saves it: a folder with ``model.ckpt.*`` and ``hparams.json``.

Matrices are (1, in, out). Source: openai/gpt-2, ``src/model.py``.
"""

from typing import Any

from slm_jax.files import read_json
from slm_jax.weights.names import POSITIONS, TOKENS, Format
from slm_jax.weights.tensor_files import TensorFiles

_FIELDS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}


class OpenAI(Format):
    """OpenAI's names and ``hparams.json``."""

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        file = files.file.parent / "hparams.json"
        content = read_json(file) if file.is_file() else {}
        return {field: content[key] for key, field in _FIELDS.items() if key in content}


FORMAT = OpenAI(
    title="OpenAI's TensorFlow",
    top={
        "model/wte": TOKENS,
        "model/wpe": POSITIONS,
        "model/ln_f/g": "final_norm/scale",
        "model/ln_f/b": "final_norm/bias",
    },
    prefix="model/h{}/",
    block={
        "ln_1/g": "norm1/scale",
        "ln_1/b": "norm1/bias",
        "attn/c_attn/w": "attn/q/kernel attn/k/kernel attn/v/kernel",
        "attn/c_attn/b": "attn/q/bias attn/k/bias attn/v/bias",
        "attn/c_proj/w": "attn/out_proj/kernel",
        "attn/c_proj/b": "attn/out_proj/bias",
        "ln_2/g": "norm2/scale",
        "ln_2/b": "norm2/bias",
        "mlp/c_fc/w": "ff/fc/kernel",
        "mlp/c_fc/b": "ff/fc/bias",
        "mlp/c_proj/w": "ff/proj/kernel",
        "mlp/c_proj/b": "ff/proj/bias",
    },
    buffers=r".*/Adam(_1)?|beta[12]_power|global_step",  # of a training that was saved with its optimizer
    out_in=False,
    fixed={"bias": True, "qkv_bias": True, "tie_weights": True},
)
