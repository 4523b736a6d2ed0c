"""Make the golden file of ``tests/test_finetuning_goldens.py``: fine-tuning as Hugging Face and PyTorch compute it.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/goldens/make_finetuning.py

A tiny ``GPT2ForSequenceClassification`` with random weights: its logits and loss on padded texts, and its parameters
after three clipped steps of SGD on the last block, the final norm and the head, all else frozen. And the loss and
gradients of the same GPT-2 as a language model on responses only (labels of -100 elsewhere).
"""

import json

import torch
import transformers
from make import CLIP_NORM, FOLDER, SEED, SGD_RATE
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2ForSequenceClassification

N_CLASSES, LENGTHS, PAD = 3, ((9, 4, 1, 6), (12, 3, 7, 2), (5, 12, 8, 1)), 0
SHAPE = {"n_embd": 12, "n_head": 3, "n_layer": 3, "vocab_size": 41, "n_positions": 16}


def main() -> None:
    """Compute and write the file."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = GPT2Config(
        **SHAPE, num_labels=N_CLASSES, pad_token_id=PAD, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            scale = 2 / parameter.shape[0] ** 0.5 if parameter.ndim == 2 and "wte" not in name else 0.4
            parameter.copy_(scale * noise + ("ln_" in name and name.endswith("weight")))
    tensors = {f"state/{name}": value.clone() for name, value in model.state_dict().items()}
    lengths = torch.tensor(LENGTHS)
    texts = torch.randint(1, SHAPE["vocab_size"], (*lengths.shape, 12))
    texts[torch.arange(12) >= lengths[..., None]] = PAD
    labels = torch.randint(N_CLASSES, lengths.shape)
    tensors |= {"texts": texts, "lengths": lengths, "labels": labels}
    tensors["logits"] = torch.stack([model(batch).logits.detach() for batch in texts])

    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(
            (f"transformer.h.{SHAPE['n_layer'] - 1}.", "transformer.ln_f", "score")
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=SGD_RATE)
    losses, norms = [], []
    for batch, label in zip(texts, labels, strict=True):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch).logits, label)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM).item())
        optimizer.step()
    assert min(norms) > CLIP_NORM, "clipping must be active"
    tensors |= {f"sgd/{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    model.load_state_dict({name.removeprefix("state/"): v for name, v in tensors.items() if name.startswith("state/")})
    model.requires_grad_(True)
    model.zero_grad()
    tokens = torch.randint(1, SHAPE["vocab_size"], (3, 12))
    supervised = torch.zeros(3, 12, dtype=torch.bool)
    for row, (start, end) in enumerate(((6, 12), (2, 5), (9, 10))):
        supervised[row, start:end] = True
    hidden = model.transformer(tokens[:, :-1]).last_hidden_state
    targets = torch.where(supervised[:, 1:], tokens[:, 1:], -100)
    loss = cross_entropy((hidden @ model.transformer.wte.weight.T).flatten(0, 1), targets.flatten())
    loss.backward()
    tensors |= {"tokens": tokens, "supervised": supervised}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tensors |= {f"gradients/{name}": gradient.clone() for name, gradient in gradients.items()}
    figures = {
        "config": json.loads(model.config.to_json_string()),
        "clip_norm": CLIP_NORM,
        "sgd_rate": SGD_RATE,
        "losses": losses,
        "grad_norms": norms,
        "response_loss": loss.item(),
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "seed": SEED},
    }
    whole = {k: (v if v.is_floating_point() else v.to(torch.int32)).contiguous() for k, v in tensors.items()}
    save_file(whole, FOLDER / "finetuning.safetensors", {"golden": json.dumps(figures)})
    print({key: value for key, value in figures.items() if key != "config"})


if __name__ == "__main__":
    main()
