"""Make ``families.safetensors`` for ``tests/weights/test_llama_and_qwen3.py``: what transformers' models compute.

    pip install torch==2.13.0 transformers==5.24.0 safetensors
    python tests/goldens/make_families.py

The file holds several tiny models with random weights. Of each it has, under its name, the tensors as
``save_pretrained`` writes them (``state/…``), tokens with their logits, the gradients of the mean cross-entropy and
both of AdamW's moments after one step; the configurations are in the metadata. The numbers follow from ``SEED``;
other versions or processors change the last bits.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from make import as_saved, backward
from safetensors.torch import save_file

FILE = Path(__file__).parent / "families.safetensors"
SEED = 17
VOCAB, CONTEXT, ROWS = 19, 24, 2
BETAS = (0.9, 0.95)

LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
# Of the frequencies of a head of 6 or 8, the first stays, the second changes in part and the others in whole.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 0.2, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 100.0}

# Keys of LlamaConfig or Qwen3Config: width, layers, heads, heads of keys and values, size of a head, and what differs.
SHAPES: dict[str, tuple[str, tuple[int, int, int, int, int], dict[str, Any]]] = {
    "llama": ("llama", (8, 1, 4, 4, 2), {"tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "llama-grouped": ("llama", (8, 1, 4, 2, 2), {"tie_word_embeddings": False, "rope_parameters": LINEAR}),
    "llama-one-kv-head": ("llama", (12, 1, 3, 1, 4), {"tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "llama3": ("llama", (12, 2, 2, 1, 6), {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-wide-heads": ("llama", (6, 1, 2, 2, 8), {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama-biases": (
        "llama", (8, 1, 2, 1, 4), {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "llama-attention-bias": ("llama", (8, 1, 2, 2, 4), {"attention_bias": True, "tie_word_embeddings": False}),
    "llama-mlp-bias": ("llama", (8, 1, 2, 1, 4), {"mlp_bias": True, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", (8, 2, 4, 2, 6), {"tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "qwen3-untied": ("qwen3", (10, 1, 3, 3, 4), {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "qwen3-bias": (
        "qwen3", (8, 1, 4, 1, 2), {"attention_bias": True, "tie_word_embeddings": False, "rope_parameters": LINEAR}
    ),
}  # fmt: skip
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def build(family: str, sizes: tuple[int, int, int, int, int], more: dict[str, Any]) -> Any:
    """Make a model in which every parameter is random and matters: no zero bias, no norm of scale 1."""
    width, layers, heads, kv_heads, head_dim = sizes
    config_class, model_class = CLASSES[family]
    config = config_class(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, hidden_size=width, intermediate_size=width + 5,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=3e-5, bos_token_id=None, eos_token_id=None, attn_implementation="eager", **more,
    )  # fmt: skip
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(1.2 * noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + name.endswith("norm.weight"))
    return model


def make(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Compute one model's tensors and its configuration."""
    model = build(*SHAPES[name])
    state, config = as_saved(model)
    batch = torch.randint(VOCAB, (ROWS, 13))
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS)
    logits = model(batch[:, :-1]).logits.detach()
    backward(model, batch)
    parameters = dict(model.named_parameters())
    trees = {"state": state, "gradients": {n: p.grad.clone() for n, p in parameters.items()}}
    optimizer.step()
    for moment in ("exp_avg", "exp_avg_sq"):
        trees[moment] = {n: optimizer.state[p][moment] for n, p in parameters.items()}
    tensors = {"batch": batch.to(torch.int32), "logits": logits}
    tensors |= {f"{tree}/{key}": value.contiguous() for tree, values in trees.items() for key, value in values.items()}
    return {f"{name}/{key}": value for key, value in tensors.items()}, json.loads(config)


def main() -> None:
    """Write the file beside this script."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, Any] = {}
    for name in SHAPES:
        more, configs[name] = make(name)
        tensors |= more
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "seed": SEED}
    figures = {"configs": configs, "betas": BETAS, "made_with": made_with}
    # One entry: safetensors writes several in any order.
    save_file(tensors, FILE, {"golden": json.dumps(figures)})
    print(f"{FILE.name}: {len(configs)} models, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
