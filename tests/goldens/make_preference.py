"""Make ``preference.safetensors`` for ``tests/tasks/test_preference.py``: what TRL's losses make of pairs of responses.

    pip install torch==2.13.0 transformers==5.24.0 trl==1.16.0 datasets safetensors
    python tests/goldens/make_preference.py

TRL's ``DPOTrainer._compute_loss`` (sigmoid and ipo) and ``CPOTrainer.cpo_loss`` (simpo) run on tiny random models; the
trainers around them are left out. The reference is the model before noise was added to it. Of each model the file has
the tensors (``state/…``), the pairs, the reference's log-probabilities, and for each loss its value, the rewards and
the gradients. The numbers follow from ``SEED``; other versions or processors change the last bits.
"""

import collections
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from make import as_saved
from make_families import CONTEXT, SHAPES, VOCAB, build
from safetensors.torch import save_file
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

FILE = Path(__file__).parent / "preference.safetensors"
SEED, BETA, GAMMA = 29, 0.3, 0.4
PAIRS, PROMPT = 5, 4
LENGTHS = ((3, 9), (8, 1), (5, 5), (1, 2), (7, 4))  # tokens of the chosen and the rejected responses


def make_gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (chosen rows, then rejected ones), padded on the right, and the mask of the responses."""
    ids = torch.zeros(2 * PAIRS, PROMPT + max(map(max, LENGTHS)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, lengths in enumerate(LENGTHS):
        prompt = torch.randint(VOCAB, (PROMPT,))
        for side, length in enumerate(lengths):
            row = side * PAIRS + i
            ids[row, : PROMPT + length] = torch.cat([prompt, torch.randint(VOCAB, (length,))])
            mask[row, PROMPT : PROMPT + length] = 1
    return ids, mask


class WithLogprobs:
    """A model whose output has what TRL's patch of transformers adds to it."""

    def __init__(self, model: Any):
        self.model, self.training = model, True

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        logprobs = self.model(input_ids).logits[:, :-1].log_softmax(-1)
        counted = labels[:, 1:] != -100
        chosen = logprobs.gather(-1, input_ids[:, 1:, None])[..., 0] * counted
        zeros = torch.zeros_like(chosen)
        return SimpleNamespace(log_probs=chosen, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer(kind: str, model: Any) -> Any:
    """Return what TRL's methods need of their trainer."""
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    return SimpleNamespace(
        accelerator=same, model=model, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=BETA,
        f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        loss_type=kind, simpo_gamma=GAMMA, alpha=0.0,
    )  # fmt: skip


def loss_of(kind: str, model: Any, ids: torch.Tensor, mask: torch.Tensor, references: torch.Tensor) -> tuple[Any, Any]:
    """Return TRL's mean loss and the rewards of its log."""
    policy = WithLogprobs(model)
    stand_in = trainer(kind, policy)
    if kind == "simpo":
        output = policy(ids, ids.masked_fill(mask == 0, -100))
        chosen, rejected = (output.log_probs.sum(1) / mask[:, 1:].sum(1)).chunk(2)
        losses, *rewards = CPOTrainer.cpo_loss(stand_in, chosen, rejected)
        return losses.mean(), [each.mean().item() for each in rewards]
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
        "ref_chosen_logps": references[:PAIRS], "ref_rejected_logps": references[PAIRS:],
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(stand_in, policy, inputs, False)
    logged = stand_in._metrics["train"]
    return loss, [logged["rewards/chosen"][0], logged["rewards/rejected"][0]]


def make(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Compute one model's tensors and figures."""
    ids, mask = pairs()
    with torch.no_grad():
        references = WithLogprobs(model)(ids, ids.masked_fill(mask == 0, -100)).log_probs.sum(1)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    state, config = as_saved(model)
    tensors = {"ids": ids.to(torch.int32), "mask": mask.to(torch.int32), "references": references}
    tensors |= {f"state/{name}": value for name, value in state.items()}
    figures: dict[str, Any] = {"config": json.loads(config)}
    for kind in ("sigmoid", "ipo", "simpo"):
        model.zero_grad()
        loss, rewards = loss_of(kind, model, ids, mask, references)
        loss.backward()
        figures[kind] = {"loss": loss.item(), "rewards": rewards}
        tensors |= {f"{kind}/{name}": p.grad.clone() for name, p in model.named_parameters()}
    return {name: value.contiguous() for name, value in tensors.items()}, figures


def main() -> None:
    """Write the file beside this script."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tensors, models = {}, {}
    for name, model in (("gpt2", make_gpt2()), ("llama", build(*SHAPES["llama-grouped"]))):
        own, models[name] = make(model)
        tensors |= {f"{name}/{key}": value for key, value in own.items()}
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    golden = {"models": models, "beta": BETA, "gamma": GAMMA, "made_with": made_with, "seed": SEED}
    save_file(tensors, FILE, {"golden": json.dumps(golden)})
    print(f"{FILE.name}: {len(models)} models, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
