"""What must hold of pretraining: its batches and notes, and that a packed run resumes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pretraining import metrics, options

from slm_jax import cli
from slm_jax.data.config import DataConfig
from slm_jax.data.token_file import write_token_file
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, GPTModel, init_params
from slm_jax.nn.lora import add_adapters, init_adapters
from slm_jax.tasks import pretraining
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import CharTokenizer
from slm_jax.training.config import ModelConfig, SampleConfig, TrainConfig
from slm_jax.training.resume import find_start

CHARS = CharTokenizer().build_vocab("abcdefghijklmnopqrstuvwxyz")
CONTEXT = 16


@pytest.fixture
def prepared(tmp_path):
    """Write documents as `slm-jax prepare` does; return their source."""

    def write(documents, name="ids.bin"):
        ids = [token for document in documents for token in (*CHARS.encode(document), CHARS.eot_id)][:-1]
        with write_token_file(tmp_path / name, CHARS, "") as file:
            file.write(np.array(ids, np.uint16))
        return f"tokens:{tmp_path / name}"

    return write


def build(folder, source, *, validation_source=None, batch_size=4, epochs=None, **data):
    config = RunConfig(
        runs_dir=str(folder),
        data=DataConfig(source, validation_source=validation_source, **data),
        model=ModelConfig(n_layers=1, emb_dim=8, n_heads=2, context_length=CONTEXT),
        train=TrainConfig(steps=1000, epochs=epochs, batch_size=batch_size, eval_batch_size=3),
        sample=SampleConfig(every=0),
    )
    return pretraining.Pretraining.build(config, find_start(config))


@pytest.mark.parametrize("head", ["tied", "untied", "with an adapter"])
def test_the_loss_is_that_of_the_models_logits(head):
    """With dropout, also on what goes into the head's adapter, packed rows, and targets that do not count."""
    cfg = GPTConfig(50, CONTEXT, 8, 2, 1, drop_rate=0.2, tie_weights=head == "tied")
    model, (key, *keys) = GPTModel(cfg), jax.random.split(jax.random.key(0), 4)
    params = init_params(cfg, key)
    if head == "with an adapter":
        adapters = init_adapters(keys[0], params, ("out_head",), rank=2, alpha=4, drop_rate=0.5)
        params = add_adapters(params, jax.tree.map(lambda leaf: leaf + 0.1, adapters))
    batch = {
        "inputs": jax.random.randint(keys[0], (2, CONTEXT), 0, 50),
        "targets": jax.random.randint(keys[1], (2, CONTEXT), 0, 50),
        "weights": jax.random.bernoulli(keys[2], shape=(2, CONTEXT)).astype(jnp.float32),
        "positions": jnp.tile(jnp.arange(CONTEXT // 2), (2, 2)),
        "segment_ids": jnp.repeat(jnp.array([[1, 2]] * 2), CONTEXT // 2, axis=1),
    }

    def expected_loss(params, frozen, batch, key):
        packed = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = model.apply({"params": params}, batch["inputs"], **packed, deterministic=False, rngs={"dropout": key})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["weights"])

    def loss(*arguments):
        loss, weight, _ = pretraining.make_loss_fn(model)(*arguments)
        return loss + 0 * weight

    found, expected = (jax.jit(jax.value_and_grad(f))(params, {}, batch, keys[0]) for f in (loss, expected_loss))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest), found[1], expected[1])


WORDS = ["abc" * (i % 4) + "xy" + "z" * (i % 3) for i in range(60)]


def test_packed_training_and_validation_see_documents_apart(prepared, tmp_path):
    task = build(tmp_path, prepared(WORDS), validation_source=prepared(WORDS[:7], "val.bin"), packing=True, epochs=2)
    batch = task.train_batches[0]
    assert batch["inputs"].shape == (4, CONTEXT)
    assert batch["segment_ids"].max() > 1
    assert ((batch["inputs"] == CHARS.eot_id) <= (batch["positions"] == 0)).all()

    n_targets = len("".join(WORDS)) + len(WORDS) - 2
    (note,) = task.notes
    n_rows = int(note.split(" documents into ")[1].split(" rows")[0])
    assert note.startswith("packed 60 documents into ")
    assert task.total_steps == -(-2 * n_rows // 4)
    # Tokens that are learned from, not padding: as in the batches of one epoch.
    rows = itertools.chain.from_iterable(task.train_batches[i]["weights"] for i in range(n_rows))
    counted = sum(float(weights.sum()) for weights in itertools.islice(rows, n_rows))
    assert counted == n_targets
    assert task.tokens_per_step == round(4 * counted / n_rows) < 4 * CONTEXT

    validation = list(task.validation_batches())
    assert {one["inputs"].shape for one in validation} == {(3, CONTEXT)}
    assert sum(one["weights"].sum() for one in validation) == len("".join(WORDS[:7])) + 7 - 2


def test_windows_ignore_documents(prepared, tmp_path):
    task = build(tmp_path, prepared(WORDS), sampling="stride", epochs=1)
    assert task.train_batches[0].keys() == {"inputs", "targets", "weights"}
    assert task.tokens_per_step == 4 * CONTEXT
    n_tokens = int((len("".join(WORDS)) + len(WORDS) - 1) * 0.9)
    assert task.total_steps == -(-len(range(0, n_tokens - CONTEXT, CONTEXT)) // 4)
    assert task.notes == ()


def test_packing_of_one_document_says_that_it_is_one(prepared, tmp_path):
    (note,) = build(tmp_path, prepared(["abcdefgh" * 30]), packing=True).notes
    assert note.startswith("packed 1 document into 14 rows of 16")
    assert "only one" in note


def test_a_packed_text_may_be_shorter_than_a_row_but_not_nothing(prepared, tmp_path):
    task = build(tmp_path, prepared(["abc", "d"]), packing=True, validation_fraction=0.4)
    assert task.tokens_per_step == 4 * 2
    with pytest.raises(InputError, match="the training split has 1 tokens"):
        build(tmp_path, prepared(["ab"]), packing=True, validation_fraction=0.4)
    with pytest.raises(InputError, match="the training split has 0 tokens"):
        build(tmp_path, prepared(["ab"]), packing=True, validation_fraction=0.9)


# Runs


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Many short files."""
    folder = tmp_path_factory.mktemp("documents")
    for i, word in enumerate(WORDS):
        (folder / f"{i:02}.txt").write_text(word)
    return folder / "*.txt"


def train(documents, runs, **more):
    shape = {"data.packing": "true", "model.n_layers": 1, "model.unroll": "false", "optimizer.schedule": "constant"}
    every = {"train.eval_every": 4, "checkpoint.every": 4, "sample.every": 0}
    return cli.main(["train", *options(documents, runs, **shape, **every, **more)])


def train_rows(run):
    return [row for row in metrics(run) if row["split"] == "train"]


@pytest.mark.slow
def test_a_packed_run_that_was_stopped_equals_an_unbroken_one(documents, tmp_path):
    assert train(documents, tmp_path / "whole", train__steps=10) == 0
    for steps in (7, 10):  # 7 is in the middle of an epoch
        assert train(documents, tmp_path / "parts", train__steps=steps) == 0
    whole = train_rows(tmp_path / "whole" / "small")
    assert [row["step"] for row in whole] == list(range(1, 11))
    assert whole == train_rows(tmp_path / "parts" / "small")


def test_packing_is_a_part_of_what_a_run_is(documents, tmp_path, capsys):
    assert train(documents, tmp_path, train__steps=2) == 0
    said = capsys.readouterr()
    assert "documents into" in said.out + said.err
    assert train(documents, tmp_path, train__steps=3, data__packing="false") == 2
    assert "holds another run: data.packing is False now and was True" in capsys.readouterr().err


def test_a_stride_of_packed_rows_is_refused(prepared, tmp_path):
    with pytest.raises(InputError, match=r"^data\.stride is 4"):
        build(tmp_path, prepared(WORDS), packing=True, stride=4)
