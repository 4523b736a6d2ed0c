"""What must hold of a loaded classifier: it says of a text what was learned, whatever else it is asked."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slm_jax
from slm_jax import cli
from slm_jax.errors import InputError
from slm_jax.evaluation.classes import Classifier
from slm_jax.model import GPTConfig, init_params
from slm_jax.runs import read_checkpoint
from slm_jax.tokenizer import CharTokenizer
from slm_jax.training.checkpoint import METADATA, write_checksums
from slm_jax.weights.writer import save_gpt2

MAX_LENGTH = 24
TEXTS = ["the cat sat", "a dog", "so the dog sat on a log", "the cat " * 10, "cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned to tell texts of cats from texts of dogs, the trunk frozen."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=32, emb_dim=16, n_heads=2, n_layers=2)
    save_gpt2(cfg, init_params(cfg, jax.random.key(0)), folder / "base", tokenizer=tokenizer)
    rows = [f"{animal},{a} {animal} {b}" for animal in ("cat", "dog") for a in ("a", "the", "so") for b in TEXTS[:3]]
    rows = [row.replace("dog", "cat") if row.startswith("cat") else row.replace("cat", "dog") for row in rows]
    (folder / "animals.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
    options = {
        "run": "animals",
        "runs_dir": folder,
        "base": folder / "base",
        "data.source": f"csv:{folder / 'animals.csv'}",
        "trainable": "last_block",
        "classification.max_length": MAX_LENGTH,
        "classification.pooling": "mean",
        "train.steps": 40,
        "train.epochs": "null",
        "train.batch_size": 8,
        "train.eval_every": 20,
        "checkpoint.every": 20,
        "optimizer.learning_rate": 0.02,
        "optimizer.warmup_steps": 5,
    }
    assert cli.main(["finetune", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]) == 0
    return folder / "animals"


@pytest.fixture(scope="module")
def classifier(run: Path) -> Classifier:
    return slm_jax.load_classifier(run)


def test_it_says_what_was_learned_in_the_order_of_the_texts(classifier):
    assert classifier.classes == ("cat", "dog")
    predictions = classifier(TEXTS)
    assert [prediction.label for prediction in predictions] == ["cat", "dog", "dog", "cat", "cat"]
    for prediction in predictions:
        assert set(prediction.probabilities) == {"cat", "dog"}
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert prediction.probability == max(prediction.probabilities.values())
        assert prediction.probability == prediction.probabilities[prediction.label]
    assert classifier([]) == []


def test_it_is_that_of_the_lowest_validation_loss_unless_told_otherwise(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    checkpoint = copy / "checkpoints" / "20"
    content = json.loads((checkpoint / METADATA).read_text())
    content["custom_metadata"]["validation_loss"] = -1.0
    (checkpoint / METADATA).write_text(json.dumps(content))
    write_checksums(checkpoint)
    default, lowest, latest = (slm_jax.load_classifier(source)(TEXTS) for source in (copy, f"{copy}@20", f"{copy}@40"))
    assert default == lowest != latest


def test_it_is_the_model_of_the_checkpoint(classifier, run):
    cfg, params, metadata = read_checkpoint(run, 40, "float32", classifier=True)
    model = slm_jax.GPTClassifier(cfg, n_classes=2, pooling="mean")
    tokenizer = CharTokenizer.from_dict(metadata["tokenizer"])
    latest = slm_jax.load_classifier(f"{run}@latest")
    for text, prediction in zip(TEXTS[2:4], latest(TEXTS)[2:4], strict=True):
        ids = jnp.array([tokenizer.encode(text)[:MAX_LENGTH]], jnp.int32)
        expected = jax.nn.softmax(model.apply({"params": params}, ids, jnp.array([ids.shape[1]])))[0]
        np.testing.assert_allclose(list(prediction.probabilities.values()), expected, atol=1e-6)
    assert slm_jax.load_classifier(run, step=40)(TEXTS) == latest(TEXTS)


def test_a_text_says_the_same_whatever_is_beside_it(classifier):
    alone = [classifier([text])[0] for text in TEXTS]
    for batch_size in (1, 3, 32):
        for order in (range(len(TEXTS)), reversed(range(len(TEXTS)))):
            order = list(order)
            for i, prediction in zip(order, classifier([TEXTS[i] for i in order], batch_size), strict=True):
                assert prediction.label == alone[i].label
                assert prediction.probabilities == pytest.approx(alone[i].probabilities, abs=1e-6)


def test_what_is_longer_than_in_training_is_cut_off_and_said_to_be(classifier):
    assert classifier.max_length == MAX_LENGTH
    text = "the cat sat on a mat and a cat saw the dog"
    cut, short = classifier([text, text[:MAX_LENGTH]])
    assert cut.truncated
    assert not short.truncated
    assert cut.probabilities == short.probabilities


def test_one_program_for_a_width(run):
    classifier = slm_jax.load_classifier(run)
    for texts in (["a cat"] * 5, ["the dog", "cat"] * 4, ["cat"] * 7):
        classifier(texts)
    assert classifier._probabilities._cache_size() == 1
    classifier(["the cat sat on the mat"] * 8)
    assert classifier._probabilities._cache_size() == 2


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("the cat", "texts is 'the cat'; expected a list"),
        (["a cat", ""], "a text is ''; expected text that is not empty"),
        ([" \n"], r"a text is ' \\n'; expected text"),
        (["a cat", "Müller"], "text 'Müller': character 'M' at offset 0 is not in the vocabulary"),
    ],
)
def test_texts_that_cannot_be_classified_are_refused(classifier, texts, said):
    with pytest.raises(InputError, match=said) as caught:
        classifier(texts)
    assert "\n" not in str(caught.value)


def test_a_batch_has_a_text(classifier):
    with pytest.raises(InputError, match="batch_size is 0; expected at least 1"):
        classifier(["a cat"], 0)


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(run, tmp_path / "animals")
    frozen = copy / "frozen.safetensors"
    content = bytearray(frozen.read_bytes())
    content[-1] ^= 1
    frozen.write_bytes(content)
    return copy


def test_runs_that_are_no_classifier_are_refused(run, damaged, tmp_path):
    for source, said in (
        (tmp_path / "none", "no run with checkpoints there"),
        (run.parent / "base", "no run with checkpoints there"),
        (f"{run}@7", "no checkpoint of step 7"),
        (damaged, "is damaged: its SHA-256"),
    ):
        with pytest.raises(InputError, match=said):
            slm_jax.load_classifier(source)
    assert cli.main(["import", "--source", str(run.parent / "base"), "--run", "gpt", "--runs-dir", str(tmp_path)]) == 0
    with pytest.raises(InputError, match=r"is no classifier; expected a run of slm-jax finetune"):
        slm_jax.load_classifier(tmp_path / "gpt")
