"""What must hold of classes: predictions that don't depend on the batch, and scikit-learn's figures."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from slm_jax.evaluation.classes import Classifier, class_figures, class_table, draw_confusion
from slm_jax.model import GPTClassifier, GPTConfig, init_classifier
from slm_jax.tokenizer import CharTokenizer

# scikit-learn 1.9.1, classification_report(true, predicted, labels=range(n), zero_division=0): precision, recall, F1
# and support of each class, then accuracy and macro F1.
REPORTS = [
    (
        [[140, 9], [4, 147]],
        [[0.9722222222, 0.9395973154, 0.9556313993, 149], [0.9423076923, 0.9735099338, 0.9576547231, 151]],
        (0.9566666667, 0.9566430612),
    ),
    (
        [[5, 2, 0, 0], [1, 0, 0, 3], [0, 0, 0, 0], [2, 1, 0, 7]],  # class 2: neither texts nor predictions
        [[0.625, 0.7142857143, 0.6666666667, 7], [0, 0, 0, 4], [0, 0, 0, 0], [0.7, 0.7, 0.7, 10]],
        (0.5714285714, 0.3416666667),
    ),
    ([[3, 0], [2, 0]], [[0.6, 1.0, 0.75, 3], [0, 0, 0, 2]], (0.6, 0.375)),
]


def figures_of(confusion, classes=None):
    return class_figures(np.array(confusion), classes or [f"class {i}" for i in range(len(confusion))])


@pytest.mark.parametrize(("confusion", "by_class", "overall"), REPORTS)
def test_figures_are_those_of_scikit_learn(confusion, by_class, overall):
    figures = figures_of(confusion)
    ours = [figures.precision, figures.recall, figures.f1, figures.support]
    np.testing.assert_allclose(np.transpose(ours), by_class, atol=1e-9)
    np.testing.assert_allclose([figures.accuracy, figures.macro_f1], overall, atol=1e-9)


def test_json_holds_everything():
    figures = figures_of([[5, 1], [0, 4]], ["ham", "spam"])
    content = json.loads(json.dumps(figures.to_dict(), allow_nan=False))
    assert (content["support"], content["accuracy"]) == ([6, 4], 0.9)
    assert class_figures(np.array(content["confusion"]), content["classes"]).to_dict() == figures.to_dict()


def test_a_table_shows_each_class_and_the_matrix():
    assert class_table(figures_of([[140, 9], [4, 147]], ["ham", "spam"])).splitlines() == [
        "        precision  recall      F1  texts",
        "0 ham      0.9722  0.9396  0.9556    149",
        "1 spam     0.9423  0.9735  0.9577    151",
        "",
        "accuracy 0.9567, macro F1 0.9566",
        "",
        "true class (row) and predicted class (column), number of texts",
        "          0   1",
        "0 ham   140   9",
        "1 spam    4 147",
    ]


def test_a_table_fits_80_columns_without_the_matrix_of_many_classes():
    confusion = np.arange(100).reshape(10, 10) + 9_000
    table = class_table(figures_of(confusion, [f"{i}: a very long name\nof a class" for i in range(10)]))
    assert max(map(len, table.splitlines())) <= 80
    for row in confusion:
        assert " ".join(map(str, row)) in " ".join(table.split())
    lines = class_table(figures_of(np.full((11, 11), 7777))).splitlines()
    assert lines[-1] == "(the confusion matrix of 11 classes is too wide to show here)"
    assert sum("class" in line for line in lines) == 12
    assert not any("7777" in line for line in lines)


@pytest.mark.parametrize("n_classes", [2, 40])
def test_a_picture_is_written(tmp_path, n_classes):
    confusion = np.eye(n_classes, dtype=int) * 1234
    names = [f"a $name_ of $a {i} that is long" for i in range(n_classes)]  # would be an error as a formula
    panels = {split: figures_of(confusion, names) for split in ("train", "validation", "test")}
    draw_confusion(panels, tmp_path / "confusion.png", "a $_ b$")
    content = (tmp_path / "confusion.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 400


TEXTS = ["the cat sat", "a dog", "so the dog sat on a log", "the cat " * 10, "cat"]
LENGTH = 24


@pytest.fixture(scope="module")
def untrained():
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=32, emb_dim=16, n_heads=2, n_layers=2)
    model = GPTClassifier(cfg, n_classes=2, pooling="mean")
    params = jax.tree.map(lambda leaf: leaf * 8, init_classifier(model, jax.random.key(0)))
    return model, params, tokenizer


@pytest.fixture
def classifier(untrained):
    return Classifier(*untrained, classes=("cat", "dog"), max_length=LENGTH)


@pytest.mark.slow
def test_probabilities_are_the_models_in_the_order_of_the_texts_whatever_the_batch(classifier, untrained):
    model, params, tokenizer = untrained
    expected = []
    for text in TEXTS:
        ids = jnp.array([tokenizer.encode(text)[:LENGTH]], jnp.int32)
        expected.append(jax.nn.softmax(model.apply({"params": params}, ids, jnp.array([ids.shape[1]])))[0])
    for batch_size in (1, 3, 32):
        for order in (range(5), range(4, -1, -1)):
            predictions = classifier([TEXTS[i] for i in order], batch_size)
            for i, prediction in zip(order, predictions, strict=True):
                np.testing.assert_allclose(list(prediction.probabilities.values()), expected[i], atol=1e-6)
                assert prediction.label == ("cat", "dog")[int(expected[i].argmax())]
                assert prediction.probability == max(prediction.probabilities.values())
                assert prediction.truncated == (len(TEXTS[i]) > LENGTH)
    assert len({prediction.label for prediction in classifier(TEXTS)}) == 2
    assert classifier([]) == []


def test_one_program_is_compiled_per_width(classifier):
    for texts in (["a cat"] * 5, ["the dog", "cat"] * 4, ["cat"] * 7):
        classifier(texts)
    assert classifier._probabilities._cache_size() == 1


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("the cat", "texts is 'the cat'; expected a list"),
        (["a cat", ""], "a text is ''"),
        (["a cat", "Müller"], "'M' at offset 0"),
    ],
)
def test_texts_that_cannot_be_classified_are_refused(classifier, texts, expected):
    with refused(expected):
        classifier(texts)
