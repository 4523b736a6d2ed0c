"""Make ``lora.safetensors`` for ``tests/test_lora.py``: what PEFT's LoRA computes beside Hugging Face's GPT-2 on a CPU.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors
    python tests/goldens/make_lora.py

The file has a tiny GPT-2 with random weights (``state/…``; its configuration is in the metadata), random adapters
(``lora/…``) on every linear layer of its blocks, its logits, the gradients of the adapters (``gradients/…``) and the
weights with the adapters merged (``merged/…``). PEFT knows query, key and value as one matrix only: three adapters of
rank r are to it one of rank 3 r, the B of which is zero off the three diagonal blocks.
"""

import json
from pathlib import Path

import peft
import torch
import transformers
from make import as_saved, build
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

RANK, ALPHA, SEED = 3, 7.0, 11
SHAPE = {"n_embd": 12, "n_head": 3, "n_layer": 2, "vocab_size": 61, "n_positions": 16}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    base = build(SHAPE)
    state, config = as_saved(base)
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"],
        rank_pattern={"c_attn": 3 * RANK}, alpha_pattern={"c_attn": 3 * ALPHA},
    )  # fmt: skip
    model = peft.get_peft_model(base, lora).float().eval()
    width = SHAPE["n_embd"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
            if "c_attn.lora_B" in name:
                parameter.mul_(torch.block_diag(*[torch.ones(width, RANK)] * 3))
    tokens = torch.randint(SHAPE["vocab_size"], (2, SHAPE["n_positions"] + 1))
    logits = model(tokens[:, :-1]).logits
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    adapters = {
        name.removeprefix("base_model.model.transformer.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    trees = {
        "state": state,
        "lora": {name: parameter.detach().clone() for name, parameter in adapters.items()},
        "gradients": {name: parameter.grad for name, parameter in adapters.items()},
        "merged": {
            name.removeprefix("transformer."): parameter.detach()
            for name, parameter in model.merge_and_unload().named_parameters()
            if "c_" in name and name.endswith("weight")
        },
    }
    tensors = {"tokens": tokens.to(torch.int32), "logits": logits.detach()}
    tensors |= {
        f"{tree}/{name}": value.contiguous() for tree, values in trees.items() for name, value in values.items()
    }
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    figures = {"config": json.loads(config), "rank": RANK, "alpha": ALPHA, "made_with": {**versions, "seed": SEED}}
    save_file(tensors, Path(__file__).parent / "lora.safetensors", {"golden": json.dumps(figures)})
    print({name: list(value.shape) for name, value in tensors.items() if not name.startswith("state")})


if __name__ == "__main__":
    main()
