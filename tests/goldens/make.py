"""Make the golden files of ``tests/test_transformers_goldens.py``: what Hugging Face's GPT-2 computes on a CPU.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/goldens/make.py

Each file is a tiny GPT-2 with random weights, as ``save_pretrained`` writes it (``state/…``; the configuration is in
the metadata), with its logits, gradients, parameters after three clipped steps of SGD, AdamW's moments after one step
and, for some, greedy continuations. The numbers follow from ``SEED``; other versions or processors
change the last bits.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent
SEED = 4
ROWS = 2  # of a training batch
CLIP_NORM, SGD_RATE = 0.25, 1.0
BETAS = (0.9, 0.95)
PROMPT_LENGTHS, NEW_TOKENS = (1, 7, 16, 33, 56), 200
LEAST_MARGIN = 1e-4  # between the logits of a greedy token and the next best: rounding changes them by about 1e-6

# Names are those of GPT2Config; ``used`` ids of a padded vocabulary are ever fed or chosen.
SHAPES: dict[str, dict[str, Any]] = {
    "three-heads": {"n_embd": 12, "n_head": 3, "n_layer": 2, "vocab_size": 61, "n_positions": 256},
    "five-heads": {"n_embd": 10, "n_head": 5, "n_layer": 1, "vocab_size": 61, "n_positions": 256},
    "padded": {"n_embd": 9, "n_head": 3, "n_layer": 1, "vocab_size": 80, "n_positions": 256, "used": 75},
    "untied": {
        "n_embd": 12, "n_head": 4, "n_layer": 2, "vocab_size": 67, "n_positions": 24, "tie_word_embeddings": False
    },
    "head-dim-7": {"n_embd": 14, "n_head": 2, "n_layer": 2, "vocab_size": 61, "n_positions": 16},
    "one-head": {"n_embd": 10, "n_head": 1, "n_layer": 1, "vocab_size": 71, "n_positions": 33},
}  # fmt: skip
GREEDY = ("three-heads", "five-heads", "padded")

Tensors = dict[str, torch.Tensor]


def build(shape: dict[str, Any]) -> GPT2LMHeadModel:
    """Make a model in which every parameter is random and matters: no zero bias, no norm of scale 1."""
    config = GPT2Config(
        **shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if ".wpe." in name:
                parameter.copy_(noise)
            elif name.endswith(("wte.weight", "lm_head.weight")):
                parameter.copy_(0.4 * noise)
            elif parameter.ndim == 2:
                gain = 1.2 if "c_attn" in name else 2  # attention neither flat nor a choice of one; large branches
                parameter.copy_(gain * noise / parameter.shape[0] ** 0.5)
            else:
                parameter.copy_(0.2 * noise + ("ln_" in name and name.endswith("weight")))
    return model


def as_saved(model: GPT2LMHeadModel) -> tuple[Tensors, str]:
    """Return the tensors and the ``config.json`` that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors"), (Path(folder) / "config.json").read_text()


def backward(model: GPT2LMHeadModel, batch: torch.Tensor) -> float:
    """Set the gradients of the mean cross-entropy of the next token, and return that mean."""
    model.zero_grad()
    loss = cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    return loss.item()


def parameters(model: GPT2LMHeadModel) -> Tensors:
    """Return copies of the parameters, a tied one once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def sgd(model: GPT2LMHeadModel, batches: torch.Tensor) -> tuple[Tensors, list[float], list[float]]:
    """Take a clipped step on each batch; return the parameters, and each step's loss and unclipped norm."""
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD_RATE)
    losses, norms = [], []
    for batch in batches:
        losses.append(backward(model, batch))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
        optimizer.step()
    return parameters(model), losses, norms


def adamw_moments(model: GPT2LMHeadModel, batch: torch.Tensor) -> tuple[Tensors, Tensors]:
    """Take one clipped step of AdamW, and return both of its moments."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS)
    backward(model, batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    first, second = (
        {name: optimizer.state[parameter][moment] for name, parameter in model.named_parameters()}
        for moment in ("exp_avg", "exp_avg_sq")
    )
    return first, second


def continue_greedily(model: GPT2LMHeadModel, prompt: torch.Tensor, used: int) -> tuple[torch.Tensor, float]:
    """Return prompt and continuation, and the smallest lead that a chosen token had over the second."""
    unused = list(range(used, model.config.vocab_size))
    out = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW_TOKENS, do_sample=False,
        suppress_tokens=unused or None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    best = torch.stack(out.scores).topk(2).values
    return out.sequences[0], (best[..., 0] - best[..., 1]).min().item()


def make(name: str, shape: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Compute one file's tensors, and what is needed to read them."""
    torch.manual_seed(SEED)
    shape = dict(shape)
    used = shape.pop("used", shape["vocab_size"])
    model = build(shape)
    state, config = as_saved(model)
    original = parameters(model)
    context = shape["n_positions"]
    batches = torch.randint(used, (3, ROWS, context + 1))
    tensors = {"batches": batches}
    for length, rows in (("full", 1), ("short", 2)):
        tokens = torch.randint(used, (rows, context if length == "full" else min(context // 2, 20)))
        tensors[f"tokens/{length}"] = tokens
        tensors[f"logits/{length}"] = model(tokens).logits.detach()
    backward(model, batches[0])
    trees = {"state": state, "gradients": {n: p.grad.clone() for n, p in model.named_parameters()}}
    trees["exp_avg"], trees["exp_avg_sq"] = adamw_moments(model, batches[0])
    model.load_state_dict(original, strict=False)
    figures: dict[str, Any] = {"used": used, "clip_norm": CLIP_NORM, "sgd_rate": SGD_RATE, "betas": BETAS}
    trees["sgd"], figures["losses"], figures["grad_norms"] = sgd(model, batches)
    assert min(figures["grad_norms"]) > CLIP_NORM, "clipping must be active"
    if used < shape["vocab_size"]:
        assert (tensors["logits/full"].argmax(-1) >= used).any(), "an unused id must win somewhere"
    if name in GREEDY:
        model.load_state_dict(original, strict=False)
        prompts = [torch.randint(used, (length,)) for length in PROMPT_LENGTHS]
        continued = [continue_greedily(model, prompt, used) for prompt in prompts]
        tensors |= {f"greedy/{len(p)}": ids for p, (ids, _) in zip(prompts, continued, strict=True)}
        figures["smallest_margin"] = min(margin for _, margin in continued)
        assert figures["smallest_margin"] > LEAST_MARGIN, f"{name}: {figures['smallest_margin']}; take another SEED"
    tensors |= {f"{tree}/{key}": value for tree, values in trees.items() for key, value in values.items()}
    figures["made_with"] = {"torch": torch.__version__, "transformers": transformers.__version__, "seed": SEED}
    return tensors, {**figures, "config": json.loads(config)}


def main() -> None:
    """Write one file a shape, beside this script."""
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        tensors, figures = make(name, shape)
        tensors = {
            key: (value if value.is_floating_point() else value.to(torch.int32)).contiguous()
            for key, value in tensors.items()
        }
        # One entry: safetensors writes several in any order.
        save_file(tensors, FOLDER / f"{name}.safetensors", {"golden": json.dumps(figures)})
        print(name, {key: value for key, value in figures.items() if key not in ("config", "made_with")})
        for key, ids in tensors.items():
            if key.startswith("greedy/"):
                print("   ", key, len(set(ids[-NEW_TOKENS:].tolist())), "distinct ids; the last:", ids[-12:].tolist())


if __name__ == "__main__":
    main()
