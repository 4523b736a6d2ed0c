"""What must hold of the tasks' losses: as computed by hand, whatever fills a batch, packed or in micro-batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.data.instructions import Tokens, instruction_eval_batches, pack
from slm_jax.model import GPTClassifier, GPTConfig, GPTModel, init_classifier, init_params
from slm_jax.nn.lora import add_adapters, init_adapters
from slm_jax.tasks import classification, pretraining
from slm_jax.training.step import accumulated_gradients, make_eval_step

BATCH, SEQ, CLASSES = 8, 32, 3
CFG = GPTConfig(vocab_size=29, context_length=SEQ, emb_dim=16, n_heads=2, n_layers=1, unroll=False)
MODEL, CLASSIFIER = GPTModel(CFG), GPTClassifier(CFG, n_classes=CLASSES)
LOSSES = {"texts": classification.make_loss_fn(CLASSIFIER), "responses": pretraining.make_loss_fn(MODEL)}


@pytest.fixture(scope="module")
def params():
    """Random parameters of the model that has each loss."""
    rng = np.random.default_rng(1)
    inits = {"texts": partial(init_classifier, CLASSIFIER), "responses": partial(init_params, CFG)}
    shapes = {name: jax.eval_shape(init, jax.random.key(0)) for name, init in inits.items()}
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.05, 0.3, leaf.shape)), shapes)


@pytest.fixture(scope="module")
def evaluate(params):
    steps = {name: jax.jit(make_eval_step(loss)) for name, loss in LOSSES.items()}
    return lambda name, batch: steps[name](params[name], {}, batch)


def texts():
    """Texts of uneven lengths and weights, the last row one that only fills the batch."""
    rng = np.random.default_rng(0)
    return {
        "inputs": jnp.int32(rng.integers(CFG.vocab_size, size=(BATCH, SEQ))),
        "lengths": jnp.int32(rng.integers(1, SEQ + 1, BATCH)),
        "labels": jnp.int32(rng.integers(CLASSES, size=BATCH)),
        "weights": jnp.float32([*rng.uniform(0.2, 3, BATCH - 1), 0]),
    }


def examples():
    """Examples of uneven lengths of which uneven parts are learned."""
    rng = np.random.default_rng(2)
    lengths = [4 + (7 * i) % 26 for i in range(BATCH)]
    ids = [rng.integers(CFG.vocab_size, size=length).astype(np.int32) for length in lengths]
    return [Tokens(one, np.arange(one.size) >= 1 + i % (one.size - 2)) for i, one in enumerate(ids)]


def responses(packed=False):
    rows = pack(examples(), SEQ, seed=0) if packed else [[example] for example in examples()]
    batches = instruction_eval_batches(rows, batch_size=BATCH, limit=SEQ, bucketed=not packed, packed=packed)
    return jax.tree.map(jnp.asarray, next(iter(batches)))


def test_the_loss_of_texts_is_the_weighted_cross_entropy_of_their_classes(params, evaluate):
    """Confusion counts texts by class and prediction, whatever their weight."""
    batch = texts()
    loss, weight, metrics = evaluate("texts", batch)
    apply = jax.jit(lambda batch: CLASSIFIER.apply({"params": params["texts"]}, batch["inputs"], batch["lengths"]))
    logits = np.float64(apply(batch))
    assert np.ptp(logits) > 0.3
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(BATCH), batch["labels"]]
    assert float(weight) == pytest.approx(float(batch["weights"].sum()), rel=1e-6)
    assert float(loss) == pytest.approx(float((losses * batch["weights"]).sum()), rel=1e-6)
    confusion = np.zeros((CLASSES, CLASSES))
    np.add.at(confusion, (batch["labels"][:-1], logits.argmax(-1)[:-1]), 1)
    assert metrics["confusion"].tolist() == confusion.tolist()


def test_rows_that_fill_a_batch_change_no_sum(evaluate):
    batch = texts()
    other = {name: value if name == "weights" else value.at[-1].set(1) for name, value in batch.items()}
    assert not np.array_equal(other["inputs"], batch["inputs"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-7), evaluate("texts", batch), evaluate("texts", other))


def test_the_loss_of_responses_is_the_cross_entropy_of_what_is_learned(params, evaluate):
    """By hand, each example alone."""
    total, n = 0.0, 0
    apply = jax.jit(lambda tokens: MODEL.apply({"params": params["responses"]}, tokens))
    for ids, counts in ((tokens.ids, tokens.counts[1:]) for tokens in examples()):
        logits = np.float64(apply(jnp.asarray(np.pad(ids, (0, SEQ - ids.size)))[None])[0, : ids.size - 1])
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(ids.size - 1), ids[1:]]
        total, n = total + losses[counts].sum(), n + counts.sum()
    loss, weight, _ = evaluate("responses", responses())
    assert float(weight) == n
    assert float(loss) == pytest.approx(total, rel=1e-6)


def test_packed_examples_have_the_loss_that_each_has_alone(evaluate):
    assert len(pack(examples(), SEQ, seed=0)) < BATCH
    expected, packed = evaluate("responses", responses()), evaluate("responses", responses(packed=True))
    assert float(packed[1]) == float(expected[1])
    assert float(packed[0]) == pytest.approx(float(expected[0]), rel=1e-6)


def norm(tree):
    return np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("kind", ["texts", "responses", "packed responses"])
def test_accumulated_gradients_are_those_of_the_whole_batch(params, kind):
    name = kind.removeprefix("packed ")
    batch = texts() if name == "texts" else responses(packed=kind != name)

    @partial(jax.jit, static_argnums=2)
    def gradients(params, batch, accumulate):
        return accumulated_gradients(LOSSES[name], params, {}, batch, jax.random.key(0), accumulate)

    whole, (whole_loss, whole_weight, _) = gradients(params[name], batch, 1)
    for accumulate in (4,) if kind == "packed responses" else (2, 8):
        grads, (loss, weight, _) = gradients(params[name], batch, accumulate)
        assert float(weight) == pytest.approx(float(whole_weight), rel=1e-6)
        assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
        difference = jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), grads, whole)
        assert norm(difference) <= 1e-6 * norm(whole)


@pytest.mark.parametrize("head", ["tied", "untied", "with an adapter"])
def test_the_loss_of_text_is_that_of_the_models_logits(head):
    """With dropout, also on what goes into the head's adapter, packed rows, and targets that do not count."""
    cfg = GPTConfig(50, 16, 8, 2, 1, drop_rate=0.2, tie_weights=head == "tied", unroll=False)
    model, (key, dropout) = GPTModel(cfg), jax.random.split(jax.random.key(0))

    @jax.jit
    def init():
        params = init_params(cfg, key)
        if head != "with an adapter":
            return params
        adapters = init_adapters(key, params, ("out_head",), rank=2, alpha=4, drop_rate=0.5)
        return add_adapters(params, jax.tree.map(lambda leaf: leaf + 0.1, adapters))

    rng = np.random.default_rng(0)
    batch = {name: jnp.asarray(rng.integers(0, 50, (2, 16)), jnp.int32) for name in ("inputs", "targets")}
    batch |= {
        "weights": jnp.float32(rng.integers(0, 2, (2, 16))),
        "positions": jnp.tile(jnp.arange(8), (2, 2)),
        "segment_ids": jnp.repeat(jnp.array([[1, 2]] * 2), 8, axis=1),
    }

    def expected_loss(params, frozen, batch, key):
        packed = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = model.apply({"params": params}, batch["inputs"], **packed, deterministic=False, rngs={"dropout": key})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["weights"])

    def loss(*arguments):
        return pretraining.make_loss_fn(model)(*arguments)[0]

    params = init()
    found, expected = (jax.jit(jax.value_and_grad(f))(params, {}, batch, dropout) for f in (loss, expected_loss))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest), found[1], expected[1])
