"""What must hold of preference tuning: TRL's losses and gradients, ln 2 at the start, a reference that never moves."""

import json
import math
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetuning import options
from pretraining import metrics
from refusals import fails
from safetensors import safe_open
from safetensors.numpy import save_file

from slm_jax.data.config import PreferenceConfig
from slm_jax.model import GPTModel
from slm_jax.runs import load_pretrained
from slm_jax.tasks.preference import make_loss_fn, preference_loss

GOLDEN = Path(__file__).parent.parent / "goldens" / "preference.safetensors"
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo"}


@cache
def golden():
    with safe_open(GOLDEN, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["golden"])  # noqa: SIM118


def read(folder, model, kind, config):
    """Read a tree of a golden's tensors, which have the names of Hugging Face, as our parameters."""
    tensors, start = golden()[0], f"{model}/{kind}/"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tree = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    save_file(tree, folder / "model.safetensors", {"format": "pt"})
    return load_pretrained(folder)


def batch_of(model):
    """The golden's pairs, side by side."""
    tensors = golden()[0]
    ids, mask = tensors[f"{model}/ids"], tensors[f"{model}/mask"]
    n = len(ids) // 2

    def side_by_side(rows):
        return jnp.asarray(np.concatenate([rows[:n], rows[n:]], axis=1))

    references = tensors[f"{model}/references"]
    return {
        "inputs": side_by_side(ids[:, :-1]),
        "targets": side_by_side(ids[:, 1:]),
        "weights": side_by_side(mask[:, 1:].astype(np.float32)),
        "pairs": jnp.ones(n),
        "reference_chosen": jnp.asarray(references[:n]),
        "reference_rejected": jnp.asarray(references[n:]),
    }


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_rewards_and_gradients_are_trls(tmp_path, model, kind):
    figures = golden()[1]
    about = figures["models"][model]
    cfg, params = read(tmp_path / "state", model, "state", about["config"])
    _, expected = read(tmp_path / "gradients", model, kind, about["config"])
    config = PreferenceConfig(loss=LOSSES[kind], beta=figures["beta"], gamma=figures["gamma"])
    loss_fn, batch = make_loss_fn(GPTModel(cfg), config), batch_of(model)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        loss, n, means = loss_fn(params, {}, batch, None)
        return loss / n, {name: value / n for name, value in means.items()}

    (loss, means), found = run(params)
    assert abs(loss - about[kind]["loss"]) <= 1e-5
    if kind != "ipo":  # TRL logs rewards of whole responses there, and ours are per token, as its loss
        rewards = [means["chosen_reward"], means["rejected_reward"]]
        np.testing.assert_allclose(rewards, about[kind]["rewards"], atol=1e-5)
    norm = math.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(expected)))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= 1e-5 * norm


def losses(policy, reference, **config):
    arrays = (jnp.float32(x) for x in (policy, reference, [[2, 4]]))
    loss, rewards = preference_loss(*arrays, PreferenceConfig(**config))
    return float(loss[0]), rewards[0].tolist()


def test_the_losses_by_hand():
    policy, reference = [[-3.0, -9.0]], [[-4.0, -8.0]]  # Δ = β (1 + 1)
    assert losses(policy, reference, beta=0.5)[0] == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses(policy, reference, beta=0.5)[1] == [0.5, -0.5]
    smoothed = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    assert losses(policy, reference, beta=0.5, label_smoothing=0.1)[0] == pytest.approx(smoothed)
    assert losses(policy, reference, beta=0.5, loss="ipo")[0] == pytest.approx((1 / 2 + 1 / 4 - 1) ** 2)
    simpo = math.log(1 + math.exp(-(2 * (-3 / 2 + 9 / 4) - 0.3)))
    assert losses(policy, reference, beta=2.0, gamma=0.3, loss="simpo")[0] == pytest.approx(simpo)
    assert losses(policy, reference, beta=0.5, sft_weight=0.1)[0] == pytest.approx(
        math.log(1 + math.exp(-1)) + 0.1 * 3 / 2
    )


@pytest.fixture(scope="module")
def run(tuned):
    return tuned("preference", "lora")[0]


def test_it_starts_at_ln_2_and_learns(run):
    first, *_, last = [row for row in metrics(run) if row["split"] == "val"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["margin"]) <= 1e-5
    assert last["loss"] < first["loss"]
    assert last["margin"] > 0
    assert last["accuracy"] > 0.8
    assert last["chosen_logprob"] > last["rejected_logprob"] or last["margin"] > 0
    train = [row for row in metrics(run) if row["split"] == "train"]
    assert {"accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob"} <= set(train[0])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["test"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(json.loads((run / "responses.json").read_text())) == summary["after"]["test"]["responses"] > 0


def test_the_reference_of_a_run_cannot_change(place, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "tuned")
    file = tmp_path / "tuned" / "reference.json"
    file.write_text(file.read_text().replace("-", "", 1))
    given = ["finetune", *options(place, "preference", tmp_path, "lora", base=run.parent / "base")]
    fails(given, capsys, "reference.json: is not what this run was trained with")


def test_mistakes_are_one_line(place, tmp_path, capsys):
    given = options(place, "preference", tmp_path, "all")
    for more, message in (
        (["--base", "null"], "base is null; expected a model that answers"),
        (["--preference.beta", "0"], "preference.beta"),
        (["--preference.label_smoothing", "0.5"], "preference.label_smoothing"),
        (["--preference.max_length", "5"], "nothing to learn from"),
        (["--data.source", f"jsonl:{place}/instruction.jsonl"], "no field 'chosen'"),
    ):
        fails(["finetune", *given, *more], capsys, message)
