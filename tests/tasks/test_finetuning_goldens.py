"""What must hold of fine-tuning beside Hugging Face and PyTorch: the same numbers from the same weights.

The golden file was computed by transformers and torch on a CPU (``goldens/make_finetuning.py``), so that neither is
needed here. If a limit breaks, ours moved: theirs is a file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden_files import read_golden

from slm_jax.model import GPTClassifier, GPTModel
from slm_jax.tasks import classification, pretraining
from slm_jax.tasks.config import FinetuneConfig
from slm_jax.training.step import TrainState, make_train_step
from slm_jax.training.trainable import split_params, whole_params
from slm_jax.weights.gpt2 import FORMAT


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Our configuration, our params with a class head, their tensors by kind, and their figures."""
    cfg, params, trees, figures = read_golden("finetuning", tmp_path_factory.mktemp("theirs"), head="score.weight")
    head = trees["state"]["score.weight"]
    params["class_head"] = {"kernel": jnp.asarray(head.T), "bias": jnp.zeros(len(head))}
    return cfg, params, trees, figures


def in_their_names(cfg, params):
    """Cut one of our trees into their tensors."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    theirs = {name: slot.read(leaves) for name, slot in FORMAT.names(cfg).items()}
    return {**theirs, "score.weight": leaves["class_head/kernel"].T}


def of_kind(tensors, kind):
    """Their tensors of one kind, by the names that our map has."""
    return {FORMAT.clean(name) or name: value for name, value in tensors[kind].items()}


def norm(tensors):
    return np.sqrt(sum(np.square(np.float64(value)).sum() for value in tensors))


def batch(tensors, i):
    rows = {"inputs": tensors["texts"][""][i], "lengths": tensors["lengths"][""][i], "labels": tensors["labels"][""][i]}
    return {**rows, "weights": np.ones(len(rows["labels"]), np.float32)}


def test_a_classifiers_logits(golden):
    cfg, params, tensors, _ = golden
    model = GPTClassifier(cfg, n_classes=3)
    for i, expected in enumerate(tensors["logits"][""]):
        logits = model.apply({"params": params}, *(jnp.asarray(tensors[name][""][i]) for name in ("texts", "lengths")))
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_steps_on_the_last_block(golden):
    """Losses, gradient norms and parameters of three clipped steps, all but the last block, norm and head frozen."""
    cfg, params, tensors, figures = golden
    config = FinetuneConfig(trainable="last_block")
    trainable, frozen = split_params(params, config, jax.random.key(0))
    optimizer = optax.clip_by_global_norm(figures["clip_norm"])
    loss_fn = classification.make_loss_fn(GPTClassifier(cfg, n_classes=3))
    step = jax.jit(make_train_step(without_bias(loss_fn), optimizer, lambda _: figures["sgd_rate"]))
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable), jax.random.key(0))
    for i, (loss, grad_norm) in enumerate(zip(figures["losses"], figures["grad_norms"], strict=True)):
        state, metrics = step(state, frozen, batch(tensors, i))
        assert float(metrics.loss) == pytest.approx(loss, rel=1e-5)
        assert float(metrics.grad_norm) == pytest.approx(grad_norm, rel=1e-5)
    ours = in_their_names(cfg, whole_params(state.trainable, frozen))
    theirs = of_kind(tensors, "sgd")
    before = in_their_names(cfg, params)
    assert norm(theirs[name] - before[name] for name in theirs) > 1e-2 * norm(theirs.values())
    assert norm(ours[name] - theirs[name] for name in theirs) <= 1e-5 * norm(theirs.values())
    for name in ours.keys() - theirs.keys():
        np.testing.assert_array_equal(ours[name], before[name])


def without_bias(loss_fn):
    """Keep the head's bias, which theirs does not have, at zero."""

    def wrapped(trainable, frozen, batch, key):
        head = {**trainable["class_head"], "bias": jax.lax.stop_gradient(trainable["class_head"]["bias"])}
        return loss_fn({**trainable, "class_head": head}, frozen, batch, key)

    return wrapped


def test_the_loss_of_responses(golden):
    """Loss and gradients where only some targets count."""
    cfg, params, tensors, figures = golden
    params = {name: tree for name, tree in params.items() if name != "class_head"}
    tokens, counts = tensors["tokens"][""], tensors["supervised"][""].astype(np.float32)
    rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": counts[:, 1:]}
    rows = jax.tree.map(jnp.asarray, rows)

    def mean_loss(params):
        loss_sum, weight_sum, _ = pretraining.make_loss_fn(GPTModel(cfg))(params, {}, rows, None)
        return loss_sum / weight_sum

    loss, gradients = jax.value_and_grad(mean_loss)(params)
    assert float(loss) == pytest.approx(figures["response_loss"], rel=1e-5)
    head = {"class_head": {"kernel": np.zeros((cfg.emb_dim, 3))}}
    ours, theirs = in_their_names(cfg, {**gradients, **head}), of_kind(tensors, "gradients")
    assert theirs.keys() == ours.keys() - {"score.weight"}
    assert norm(ours[name] - theirs[name] for name in theirs) <= 1e-5 * norm(theirs.values())
