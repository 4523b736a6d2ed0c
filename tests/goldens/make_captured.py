"""Make ``captured.safetensors`` for ``tests/test_capture.py``: what Hugging Face's GPT-2 has inside, on a CPU.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/goldens/make_captured.py

The file has a tiny GPT-2 with random weights (``state/…``; its configuration is in the metadata), its hidden states
(``hidden/0`` are the embeddings, the last are after the final norm), attention weights, the inputs of each block's
linear layers, and logits with a head, an attention or a feed-forward taken out by hooks.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from make import as_saved, build
from safetensors.torch import save_file

SEED = 12
SHAPE = {"n_embd": 12, "n_head": 3, "n_layer": 3, "vocab_size": 61, "n_positions": 11}
HEAD = slice(4, 8)  # the columns of head 1


def watch(found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    """Return a hook that keeps a module's input."""
    return lambda module, args: found.update({name: args[0].detach().clone()})


def without_head(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Set the columns of one head to zero before the output projection."""
    x = args[0].clone()
    x[..., HEAD] = 0
    return (x, *args[1:])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = build(SHAPE)
    state, config = as_saved(model)
    tokens = torch.randint(SHAPE["vocab_size"], (2, SHAPE["n_positions"]))
    blocks = model.transformer.h
    tensors = {f"state/{name}": value for name, value in state.items()} | {"tokens": tokens.to(torch.int32)}

    inputs: dict[str, torch.Tensor] = {}
    modules = {"norm1": "attn.c_attn", "attn/heads": "attn.c_proj", "norm2": "mlp.c_fc", "ff/hidden": "mlp.c_proj"}
    hooks = [
        block.get_submodule(path).register_forward_pre_hook(watch(inputs, f"blocks/{i}/{name}"))
        for i, block in enumerate(blocks)
        for name, path in modules.items()
    ]
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    tensors |= inputs | {"logits": out.logits}
    tensors |= {f"hidden/{i}": hidden for i, hidden in enumerate(out.hidden_states)}
    tensors |= {f"blocks/{i}/attn/weights": weights for i, weights in enumerate(out.attentions)}

    for name, module, hook in (
        ("blocks/1/attn/heads/1", blocks[1].attn.c_proj.register_forward_pre_hook, without_head),
        ("blocks/0/attn", blocks[0].attn.c_proj.register_forward_hook, lambda *call: torch.zeros_like(call[2])),
        ("blocks/2/ff", blocks[2].mlp.register_forward_hook, lambda *call: torch.zeros_like(call[2])),
    ):
        handle = module(hook)
        tensors[f"without/{name}"] = model(tokens).logits
        handle.remove()

    made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "seed": SEED}
    metadata = {"golden": json.dumps({"config": json.loads(config), "made_with": made_with})}
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(tensors, Path(__file__).parent / "captured.safetensors", metadata)
    print({name: tuple(value.shape) for name, value in tensors.items() if not name.startswith("state/")})


if __name__ == "__main__":
    main()
