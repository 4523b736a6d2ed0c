"""What must hold of a task that is built: which tokens are learned, how many steps, its notes, its fingerprint."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finetuning import jsonl
from pretraining import metrics, options

from slm_jax import cli
from slm_jax.data.config import ClassificationConfig, DataConfig, InstructionConfig, TokenizerConfig
from slm_jax.data.instructions import Tokens, instruction_eval_batches
from slm_jax.data.templates import Message, TextTemplate
from slm_jax.data.token_file import write_token_file
from slm_jax.errors import InputError
from slm_jax.generation.conversation import answer
from slm_jax.model import GPTConfig, GPTModel, init_params
from slm_jax.tasks.config import RunConfig, get_task
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.tokenizer import CharTokenizer
from slm_jax.training.config import ModelConfig, SampleConfig, TrainConfig
from slm_jax.training.resume import find_start
from slm_jax.training.step import TrainState, make_train_step
from slm_jax.training.task import EvaluationSums

TEMPLATE = TextTemplate(user_start="Q:", assistant_start="\nA:", assistant_end="\n")
CONTEXT = 32
CHARS = CharTokenizer().build_vocab("abcdefghijklmnopqrstuvwxyz")


def build(folder, task, *, train=None, context=CONTEXT, **sections):
    """A task of a new model of letters."""
    config = RunConfig(
        task=task,
        runs_dir=str(folder),
        model=ModelConfig(emb_dim=16, n_heads=2, n_layers=1, context_length=context, unroll=False),
        tokenizer=TokenizerConfig(kind="char"),
        train=TrainConfig(batch_size=4, **{"steps": 5, "eval_batch_size": 4, **(train or {})}),
        sample=SampleConfig(every=0),
        **sections,
    )
    return get_task(task).build(config, find_start(config))


def classification(folder, rows, **section):
    data = DataConfig(source=f"jsonl:{jsonl(folder / 'rows.jsonl', rows)}")
    return build(folder, "classification", data=data, classification=ClassificationConfig(**section))


def instruction(folder, rows, **section):
    data = DataConfig(source=f"jsonl:{jsonl(folder / 'rows.jsonl', rows)}")
    (folder / "template.json").write_text(json.dumps(TEMPLATE.to_dict()))
    section = InstructionConfig(template=str(folder / "template.json"), **section)
    return build(folder, "instruction", data=data, instruction=section)


def texts(n_a=20, n_b=10):
    letters = "abcdefghij"
    return [{"text": letters[i % 10] * (1 + i), "label": "a"} for i in range(n_a)] + [
        {"text": f"{letters[i]} {letters[3 * i % 10]}", "label": "b"} for i in range(n_b)
    ]


def entries(n=20):
    return [{"instruction": f"add {i}", "output": f"{i + 1}"} for i in range(n)]


# Classification


def test_a_new_classifier_knows_nothing(tmp_path):
    task = classification(tmp_path, texts())
    assert task.params.frozen == {}
    assert task.metadata["classes"] == ["a", "b"]
    batch = jax.tree.map(jnp.asarray, task.train_batches[0])
    loss = jax.jit(lambda key: task.loss_fn(task.params.init(key), {}, batch, None))
    loss, weight, _ = loss(jax.random.key(0))
    assert float(loss / weight) == pytest.approx(np.log(2), abs=0.1)


def test_class_weights_weigh_the_loss_of_training_and_not_that_of_evaluation(tmp_path):
    task = classification(tmp_path, texts(), balance="class_weights")
    found = {}
    for i in range(20):
        batch = task.train_batches[i]
        found.update(zip(batch["labels"].tolist(), batch["weights"].tolist(), strict=True))
    # 14 and 7 of the 21 texts train: 21 / (2 · 14) and 21 / (2 · 7)
    assert found == pytest.approx({0: 0.75, 1: 1.5})
    for batch in task.validation_batches():
        assert set(batch["weights"].tolist()) <= {0.0, 1.0}
    even = classification(tmp_path, texts())
    assert set(even.train_batches[0]["weights"].tolist()) == {1.0}
    sums = EvaluationSums(3.0, 4.0, {"confusion": np.array([[2.0, 1.0], [0.0, 1.0]])})
    assert (task.figures(sums), sums.loss) == ({"accuracy": 0.75}, 0.75)


@pytest.mark.parametrize("pad_to", ["batch", "longest"])
def test_texts_longer_than_may_be_are_truncated_and_counted(tmp_path, pad_to):
    task = classification(tmp_path, texts(), max_length=8, pad_to=pad_to)
    assert task.longest == task.metadata["max_length"] == 8
    assert any("texts truncated to 8 tokens" in note for note in task.notes)
    for batch in (task.train_batches[0], *task.validation_batches()):
        assert batch["inputs"].shape[1] == 8
        assert batch["lengths"].max() <= 8
    short = classification(tmp_path, [row for row in texts() if len(row["text"]) <= 8])
    assert not any("truncated" in note for note in short.notes)


@pytest.mark.parametrize(
    ("make", "rows", "change"),
    [(classification, texts(), {"text": "dddz"}), (instruction, entries(), {"output": "21"})],
)
def test_the_data_is_identified(tmp_path, make, rows, change):
    one = make(tmp_path, rows).fingerprint
    assert make(tmp_path, rows).fingerprint == one
    assert make(tmp_path, [*rows[:3], {**rows[3], **change}, *rows[4:]]).fingerprint != one


# Instruction


def learned(task):
    """Of each row of the first batch the text of its targets that count; the end of the text as $."""
    batch, tokenizer = task.train_batches[0], task.tokenizer
    rows = [targets[weights > 0] for targets, weights in zip(batch["targets"], batch["weights"], strict=True)]
    return ["".join("$" if i == tokenizer.eot_id else tokenizer.decode([i]) for i in row.tolist()) for row in rows]


def test_responses_with_their_ends_are_learned_and_prompts_only_on_request(tmp_path):
    task = instruction(tmp_path, entries())
    assert task.metadata["template"] == TEMPLATE.to_dict()
    assert len(learned(task)) == 4
    assert set(learned(task)) <= {f"{i + 1}\n$" for i in range(20)}
    whole = instruction(tmp_path, entries(), mask_prompt=False)
    assert set(learned(whole)) <= {f":add {i}\nA:{i + 1}\n$" for i in range(20)}  # all but the first token
    assert whole.fingerprint != task.fingerprint


def test_the_notes_say_what_is_packed_left_out_or_cut(tmp_path):
    task = instruction(tmp_path, entries(), packing=True)
    batch = task.train_batches[0]
    assert batch["inputs"].shape == (4, CONTEXT)
    assert batch["segment_ids"].max() >= 2
    assert any(note.startswith("packed 14 training examples into 7 rows") for note in task.notes)
    long = [*entries(), *({"instruction": "j" * (40 + i), "output": "0"} for i in range(10))]
    notes = "\n".join(instruction(tmp_path, long).notes)
    assert "left out" in notes
    assert "longer than 32 tokens" in notes
    notes = "\n".join(instruction(tmp_path, long, too_long="truncate").notes)
    assert "off the front" in notes
    assert "left out" not in notes


def test_answers_end_where_the_model_ends_them():
    """A model that has learned four answers by heart."""
    tokenizer = CharTokenizer("abcdefghij QA:\n0123456789")
    model = GPTModel(GPTConfig(tokenizer.vocab_size, CONTEXT, 16, 2, 1, unroll=False))
    pairs, rows = [("a", "1"), ("b", "22"), ("c", "3 4"), ("d", "5")], []
    prompts = [[Message("user", question)] for question, _ in pairs]
    for prompt, (_, reply) in zip(prompts, pairs, strict=True):
        asked = tokenizer.encode(TEMPLATE.prompt(prompt))
        ids = np.array([*asked, *tokenizer.encode(reply + "\n"), tokenizer.eot_id], np.int32)
        rows.append([Tokens(ids, np.arange(len(ids)) >= len(asked))])
    batches = instruction_eval_batches(rows, batch_size=4, limit=CONTEXT, bucketed=True, packed=False)
    batch, optimizer = jax.tree.map(jnp.asarray, next(iter(batches))), optax.scale_by_adam()
    start = jax.jit(partial(init_params, model.cfg))(jax.random.key(0))
    state = TrainState(jnp.int32(0), start, optimizer.init(start), jax.random.key(0))
    step = jax.jit(make_train_step(make_loss_fn(model), optimizer, lambda step: 0.01))
    for _ in range(150):
        state, figures = step(state, {}, batch)
    assert float(figures.loss) < 0.05

    respond = partial(answer, model, state.trainable, tokenizer=tokenizer, template=TEMPLATE)
    replies = respond(prompts, max_new_tokens=8)
    assert replies == [reply for _, reply in pairs]
    assert respond(prompts[2:3], max_new_tokens=8) == replies[2:3]  # alone as among others
    assert respond(prompts, max_new_tokens=1) == ["1", "2", "3", "5"]
    (cut,) = respond([[Message("user", "j" * 60 + "a")]], max_new_tokens=8)  # longer than the context
    assert len(cut) <= 8


# Pretraining

WORDS = ["abc" * (i % 4) + "xy" + "z" * (i % 3) for i in range(60)]
N_TOKENS = len("".join(WORDS)) + len(WORDS) - 1


@pytest.fixture
def pretraining(tmp_path):
    """Build a task of documents that were written as `slm-jax prepare` does."""

    def write(documents, name):
        ids = [token for document in documents for token in (*CHARS.encode(document), CHARS.eot_id)][:-1]
        with write_token_file(tmp_path / name, CHARS, "") as file:
            file.write(np.array(ids, np.uint16))
        return f"tokens:{tmp_path / name}"

    def make(documents, *, validation=None, epochs=None, **data):
        second = None if validation is None else write(validation, "validation.bin")
        data = DataConfig(write(documents, "ids.bin"), validation_source=second, **data)
        train = {"steps": 1000, "epochs": epochs, "eval_batch_size": 3}
        return build(tmp_path, "pretraining", data=data, train=train, context=16)

    return make


def test_packed_training_and_validation_see_documents_apart(pretraining):
    task = pretraining(WORDS, validation=WORDS[:7], packing=True, epochs=2)
    batch = task.train_batches[0]
    assert batch["inputs"].shape == (4, 16)
    assert batch["segment_ids"].max() > 1
    assert ((batch["inputs"] == CHARS.eot_id) <= (batch["positions"] == 0)).all()

    (note,) = task.notes
    n_rows = int(note.split(" documents into ")[1].split(" rows")[0])
    assert note.startswith("packed 60 documents into ")
    assert task.total_steps == -(-2 * n_rows // 4)
    # Tokens that are learned from, not padding: as in the rows of one epoch.
    rows = np.concatenate([task.train_batches[i]["weights"] for i in range(n_rows)])
    counted = float(rows[:n_rows].sum())
    assert counted == N_TOKENS - 1
    assert task.tokens_per_step == round(4 * counted / n_rows) < 4 * 16

    validation = list(task.validation_batches())
    assert {one["inputs"].shape for one in validation} == {(3, 16)}
    assert sum(one["weights"].sum() for one in validation) == len("".join(WORDS[:7])) + 7 - 2

    task = pretraining(WORDS, sampling="stride", epochs=1)  # windows ignore documents
    assert task.train_batches[0].keys() == {"inputs", "targets", "weights"}
    assert task.tokens_per_step == 4 * 16
    assert task.total_steps == -(-len(range(0, int(N_TOKENS * 0.9) - 16, 16)) // 4)
    assert task.notes == ()


def test_a_packed_text_may_be_one_short_document_but_not_nothing(pretraining):
    (note,) = pretraining(["abcdefgh" * 30], packing=True).notes
    assert note.startswith("packed 1 document into 14 rows of 16")
    assert "only one" in note
    assert pretraining(["abc", "d"], packing=True, validation_fraction=0.4).tokens_per_step == 4 * 2
    for fraction, n in ((0.4, 1), (0.9, 0)):
        with pytest.raises(InputError, match=f"the training split has {n} tokens"):
            pretraining(["ab"], packing=True, validation_fraction=fraction)
    with pytest.raises(InputError, match=r"^data\.stride is 4"):
        pretraining(WORDS, packing=True, stride=4)


@pytest.mark.slow
def test_a_packed_run_that_was_stopped_equals_an_unbroken_one(tmp_path):
    for i, word in enumerate(WORDS):
        (tmp_path / f"{i:02}.txt").write_text(word)
    every = {"train.eval_every": 4, "checkpoint.every": 4, "sample.every": 0, "optimizer.schedule": "constant"}
    for name, parts in (("whole", (10,)), ("parts", (7, 10))):  # 7 is in the middle of an epoch
        for steps in parts:
            more = {**every, "data.packing": "true", "train.steps": steps}
            assert cli.main(["train", *options(tmp_path / "*.txt", tmp_path / name, **more)]) == 0
    whole, parts = (
        [row for row in metrics(tmp_path / name / "small") if row["split"] == "train"] for name in ("whole", "parts")
    )
    assert [row["step"] for row in whole] == list(range(1, 11))
    assert whole == parts
