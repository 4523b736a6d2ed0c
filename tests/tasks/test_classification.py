"""What must hold of classification as a task: its loss by hand, sums that add up, and what it refuses to build."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.data.config import ClassificationConfig, DataConfig, TokenizerConfig
from slm_jax.errors import InputError
from slm_jax.model import GPTClassifier, GPTConfig
from slm_jax.tasks.classification import Classification, make_loss_fn
from slm_jax.tasks.config import RunConfig
from slm_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
from slm_jax.training.resume import find_start
from slm_jax.training.step import TrainState, accumulated_gradients, make_eval_step, make_train_step
from slm_jax.training.task import EvaluationSums

BATCH, SEQ, VOCAB, CLASSES = 8, 16, 29, 3
MODEL = GPTClassifier(
    GPTConfig(vocab_size=VOCAB, context_length=SEQ, emb_dim=16, n_heads=2, n_layers=1, unroll=False), n_classes=CLASSES
)


def make_batch(seed=0):
    """Texts of uneven lengths and weights, the last row one that only fills the batch."""
    rng = np.random.default_rng(seed)
    return {
        "inputs": jnp.int32(rng.integers(VOCAB, size=(BATCH, SEQ))),
        "lengths": jnp.int32(rng.integers(1, SEQ + 1, BATCH)),
        "labels": jnp.int32(rng.integers(CLASSES, size=BATCH)),
        "weights": jnp.float32([*rng.uniform(0.2, 3, BATCH - 1), 0]),
    }


@pytest.fixture(scope="module")
def params():
    batch = make_batch()
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), batch["inputs"], batch["lengths"])["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.05, 0.3, leaf.shape)), shapes)


@pytest.fixture(scope="module")
def evaluate():
    return jax.jit(make_eval_step(make_loss_fn(MODEL)))


def norm(tree):
    return np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def distance(a, b):
    return norm(jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), a, b))


def logits_of(params, batch):
    return np.float64(MODEL.apply({"params": params}, batch["inputs"], batch["lengths"]))


# The loss


def test_the_loss_is_the_weighted_cross_entropy_of_the_class(params, evaluate):
    batch = make_batch()
    loss, weight, _ = evaluate(params, {}, batch)
    logits = logits_of(params, batch)
    assert np.ptp(logits) > 0.3
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(BATCH), batch["labels"]]
    assert float(weight) == pytest.approx(float(batch["weights"].sum()), rel=1e-6)
    assert float(loss) == pytest.approx(float((losses * batch["weights"]).sum()), rel=1e-6)


def test_confusion_counts_texts_by_class_and_prediction_whatever_their_weight(params, evaluate):
    batch = make_batch()
    confusion = np.asarray(evaluate(params, {}, batch)[2]["confusion"])
    expected = np.zeros((CLASSES, CLASSES))
    for label, predicted in zip(batch["labels"][:-1], logits_of(params, batch).argmax(-1)[:-1], strict=True):
        expected[label, predicted] += 1
    assert confusion.tolist() == expected.tolist()
    assert confusion.sum() == BATCH - 1


def test_rows_that_fill_a_batch_change_no_sum(params, evaluate):
    batch = make_batch()
    other = {name: value.at[-1].set(1) for name, value in batch.items()}
    other["weights"] = batch["weights"]
    assert not np.array_equal(other["inputs"], batch["inputs"])
    for one, two in zip(*(jax.tree.leaves(evaluate(params, {}, b)) for b in (batch, other)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-7)


# Accumulation


def gradients(accumulate):
    key = jax.random.key(0)
    return jax.jit(lambda p, b: accumulated_gradients(make_loss_fn(MODEL), p, {}, b, key, accumulate))


def test_accumulated_gradients_are_those_of_the_whole_batch(params):
    batch = make_batch()
    whole_grads, (whole_loss, whole_weight, _) = gradients(1)(params, batch)
    for accumulate in (2, 4, 8):
        grads, (loss, weight, _) = gradients(accumulate)(params, batch)
        assert float(weight) == pytest.approx(float(whole_weight), rel=1e-6)
        assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
        assert distance(grads, whole_grads) <= 1e-6 * norm(whole_grads)


@pytest.mark.slow
def test_parameters_after_ten_steps_do_not_depend_on_accumulation(params):
    optimizer, ends = optax.identity(), {}
    for accumulate in (1, 2, 4, 8):
        step = jax.jit(make_train_step(make_loss_fn(MODEL), optimizer, lambda step: 0.1, accumulate))
        state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))
        for i in range(10):
            state, metrics = step(state, {}, make_batch(i))
            assert not metrics.skipped
        ends[accumulate] = state.trainable
    assert distance(ends[1], params) > 1e-2 * norm(params)
    for accumulate in (2, 4, 8):
        assert distance(ends[accumulate], ends[1]) <= 1e-6 * norm(ends[1])


# What is built


def config(folder, rows, section=None):
    """A run on these rows, of a new model of letters."""
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return RunConfig(
        task="classification",
        runs_dir=str(folder),
        model=ModelConfig(emb_dim=16, n_heads=2, n_layers=1, context_length=SEQ, unroll=False),
        tokenizer=TokenizerConfig(kind="char"),
        data=DataConfig(source=f"jsonl:{file}"),
        train=TrainConfig(steps=5, batch_size=4, eval_batch_size=4),
        optimizer=OptimizerConfig(warmup_steps=0),
        classification=ClassificationConfig(**(section or {})),
    )


def make(config):
    return Classification.build(config, find_start(config))


def rows(n_a=20, n_b=10):
    letters = "abcdefghij"
    return [(letters[i % 10] * (1 + i), "a") for i in range(n_a)] + [
        (f"{letters[i]} {letters[3 * i % 10]}", "b") for i in range(n_b)
    ]


def test_a_new_model_learns_without_a_base(tmp_path):
    task = make(config(tmp_path, rows()))
    assert task.params.init is not None
    assert task.params.frozen == {}
    assert task.metadata["classes"] == ["a", "b"]
    trained = task.params.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, task.train_batches[0])
    loss, weight, _ = jax.jit(task.loss_fn, static_argnums=3)(trained, {}, batch, None)
    assert float(loss / weight) == pytest.approx(np.log(2), abs=0.1)  # it knows nothing


def test_class_weights_weigh_the_loss_of_training_and_not_that_of_evaluation(tmp_path):
    task = make(config(tmp_path, rows(), {"balance": "class_weights"}))
    found = {}
    for i in range(20):
        batch = task.train_batches[i]
        found.update(zip(batch["labels"].tolist(), batch["weights"].tolist(), strict=True))
    # 14 and 7 of the 21 texts train: 21 / (2 · 14) and 21 / (2 · 7)
    assert found == pytest.approx({0: 0.75, 1: 1.5})
    for batch in task.validation_batches():
        assert set(batch["weights"].tolist()) <= {0.0, 1.0}
    even = make(config(tmp_path, rows()))
    assert set(even.train_batches[0]["weights"].tolist()) == {1.0}


def test_accuracy_is_read_off_the_sums_of_all_batches(tmp_path):
    task = make(config(tmp_path, rows()))
    sums = EvaluationSums(3.0, 4.0, {"confusion": np.array([[2.0, 1.0], [0.0, 1.0]])})
    assert task.figures(sums) == {"accuracy": 0.75}
    assert sums.loss == 0.75


@pytest.mark.parametrize("pad_to", ["batch", "longest"])
def test_texts_longer_than_may_be_are_cut_off_and_counted(tmp_path, pad_to):
    task = make(config(tmp_path, rows(), {"max_length": 8, "pad_to": pad_to}))
    assert task.longest == task.metadata["max_length"] == 8
    assert any("texts truncated to 8 tokens" in note for note in task.notes)
    for batch in (task.train_batches[0], *task.validation_batches()):
        assert batch["inputs"].shape[1] == 8
        assert batch["lengths"].max() <= 8


def test_nothing_is_cut_off_where_all_fit(tmp_path):
    task = make(config(tmp_path, [row for row in rows() if len(row[0]) <= 8]))
    assert not any("truncated" in note for note in task.notes)


def test_more_than_the_context_cannot_be_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"classification\.max_length is 17; expected at most .* 16"):
        make(config(tmp_path, rows(), {"max_length": 17}))


def test_one_class_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"one class only \('a'\)"):
        make(config(tmp_path, rows(n_b=0)))


def test_a_split_that_gets_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="split is empty"):
        make(config(tmp_path, rows(2, 2)))


def test_the_data_is_identified(tmp_path):
    one = make(config(tmp_path, rows()))
    assert make(config(tmp_path, rows())).fingerprint == one.fingerprint
    changed = rows()
    changed[3] = ("dddz", "a")
    assert make(config(tmp_path, changed)).fingerprint != one.fingerprint
