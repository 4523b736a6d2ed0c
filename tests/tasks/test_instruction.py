"""What must hold of instruction following as a task: which tokens are learned, loss by hand, answers as trained."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.data.config import DataConfig, InstructionConfig, TokenizerConfig
from slm_jax.data.instructions import Tokens, instruction_batches, instruction_eval_batches, pack
from slm_jax.data.templates import Message, Template
from slm_jax.errors import InputError
from slm_jax.generation.conversation import answer
from slm_jax.model import GPTConfig, GPTModel, init_params
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.instruction import Instruction
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.tokenizer import CharTokenizer
from slm_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from slm_jax.training.resume import find_start
from slm_jax.training.step import TrainState, accumulated_gradients, make_eval_step, make_train_step

TOKENIZER = CharTokenizer("abcdefghij QA:\n0123456789")
TEMPLATE = Template(user_start="Q:", assistant_start="\nA:", assistant_end="\n")
CFG = GPTConfig(
    vocab_size=TOKENIZER.vocab_size, context_length=32, emb_dim=16, n_heads=2, n_layers=1, unroll=False
)  # fmt: skip
MODEL = GPTModel(CFG)
BATCH = 8


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(partial(init_params, CFG), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.05, 0.3, leaf.shape)), shapes)


def examples(n=BATCH, longest=30):
    """Examples of uneven lengths of which uneven parts are learned."""
    rng = np.random.default_rng(2)
    made = []
    for i in range(n):
        ids = rng.integers(CFG.vocab_size, size=4 + (7 * i) % (longest - 4)).astype(np.int32)
        made.append(Tokens(ids, np.arange(ids.size) >= 1 + i % (ids.size - 2)))
    return made


def batch_of(rows, batch_size=BATCH, packed=False):
    batches = instruction_eval_batches(rows, batch_size=batch_size, limit=32, bucketed=not packed, packed=packed)
    return jax.tree.map(jnp.asarray, next(iter(batches)))


def alone(examples):
    return [[example] for example in examples]


@pytest.fixture(scope="module")
def evaluate():
    return jax.jit(make_eval_step(make_loss_fn(MODEL)))


def norm(tree):
    return np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def distance(a, b):
    return norm(jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), a, b))


# The loss


def test_the_loss_is_the_cross_entropy_of_what_is_learned(params, evaluate):
    """By hand, each example alone."""
    total, n = 0.0, 0
    apply = jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens))
    for tokens in examples():
        logits = np.float64(
            apply(jnp.asarray(np.pad(tokens.ids, (0, 32 - tokens.ids.size)))[None])[0, : tokens.ids.size]
        )
        losses = np.log(np.exp(logits[:-1]).sum(-1)) - logits[np.arange(len(tokens.ids) - 1), tokens.ids[1:]]
        total, n = total + losses[tokens.counts[1:]].sum(), n + tokens.counts[1:].sum()
    loss, weight, _ = evaluate(params, {}, batch_of(alone(examples())))
    assert float(weight) == n
    assert float(loss) == pytest.approx(total, rel=1e-6)


def test_packed_examples_have_the_loss_that_each_has_alone(params, evaluate):
    rows = pack(examples(), 32, seed=0)
    assert len(rows) < BATCH
    expected = evaluate(params, {}, batch_of(alone(examples())))
    packed = evaluate(params, {}, batch_of(rows, packed=True))
    assert float(packed[1]) == float(expected[1])
    assert float(packed[0]) == pytest.approx(float(expected[0]), rel=1e-6)


# Accumulation


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_accumulated_gradients_are_those_of_the_whole_batch(params, packed):
    batch = batch_of(pack(examples(24), 32, 0)[:BATCH], packed=True) if packed else batch_of(alone(examples()))
    assert len(set(np.asarray(batch["weights"]).sum(1).tolist())) > 3  # uneven
    grads_of = {
        n: jax.jit(
            lambda p, b, n=n: accumulated_gradients(make_loss_fn(MODEL), p, {}, b, jax.random.key(0), n)
        )(params, batch)
        for n in ((1, 4) if packed else (1, 2, 4, 8))
    }  # fmt: skip
    whole_grads, (whole_loss, whole_weight, _) = grads_of.pop(1)
    for grads, (loss, weight, _) in grads_of.values():
        assert float(weight) == float(whole_weight)
        assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
        assert distance(grads, whole_grads) <= 1e-6 * norm(whole_grads)


@pytest.mark.slow
def test_parameters_after_ten_steps_do_not_depend_on_accumulation(params):
    batches = instruction_batches(alone(examples(20)), batch_size=BATCH, limit=32, bucketed=False, packed=False, seed=0)
    optimizer, ends = optax.identity(), {}
    for accumulate in (1, 2, 4, 8):
        step = jax.jit(make_train_step(make_loss_fn(MODEL), optimizer, lambda step: 0.1, accumulate))
        state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))
        for i in range(10):
            state, metrics = step(state, {}, batch_of_step(batches, i))
            assert not metrics.skipped
        ends[accumulate] = state.trainable
    assert distance(ends[1], params) > 1e-2 * norm(params)
    for accumulate in (2, 4, 8):
        assert distance(ends[accumulate], ends[1]) <= 1e-6 * norm(ends[1])


def batch_of_step(batches, i):
    batch = {name: value for name, value in batches[i].items() if name in ("inputs", "targets", "weights")}
    return jax.tree.map(jnp.asarray, batch)


# What is built


def config(folder, entries, section=None):
    """A run on these entries, of a new model of letters."""
    (folder / "data.json").write_text(json.dumps(entries))
    (folder / "template.json").write_text(json.dumps(TEMPLATE.to_dict()))
    TOKENIZER.save(folder / "tokenizer")
    return RunConfig(
        task="instruction",
        runs_dir=str(folder),
        model=ModelConfig(emb_dim=16, n_heads=2, n_layers=1, context_length=32, unroll=False),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer")),
        data=DataConfig(source=f"json:{folder / 'data.json'}"),
        train=TrainConfig(steps=5, batch_size=4, eval_batch_size=4),
        optimizer=OptimizerConfig(warmup_steps=0),
        sample=SampleConfig(max_new_tokens=4, temperature=0.0),
        instruction=InstructionConfig(**{"template": str(folder / "template.json"), **(section or {})}),
    )


def entries(n=20):
    return [{"instruction": f"add {i}", "output": f"{i + 1}"} for i in range(n)]


def make(config):
    return Instruction.build(config, find_start(config))


def learned(batch):
    """Of each row the text of its targets that count; the end of the text as $."""
    eot = TOKENIZER.eot_id
    rows = [targets[weights > 0] for targets, weights in zip(batch["targets"], batch["weights"], strict=True)]
    return ["".join("$" if i == eot else TOKENIZER.decode([i]) for i in row.tolist()) for row in rows]


def test_responses_with_their_ends_are_learned_and_prompts_are_not(tmp_path):
    task = make(config(tmp_path, entries()))
    assert task.metadata["template"] == TEMPLATE.to_dict()
    texts = learned(task.train_batches[0])
    assert len(texts) == 4
    assert set(texts) <= {f"{i + 1}\n$" for i in range(20)}


def test_prompts_are_learned_too_if_asked_for(tmp_path):
    texts = learned(make(config(tmp_path, entries(), {"mask_prompt": False})).train_batches[0])
    assert set(texts) <= {f":add {i}\nA:{i + 1}\n$" for i in range(20)}  # all but the first token


def test_packing_makes_fewer_rows_and_says_so(tmp_path):
    task = make(config(tmp_path, entries(), {"packing": True}))
    batch = task.train_batches[0]
    assert batch["inputs"].shape == (4, 32)
    assert batch["segment_ids"].max() >= 2
    assert any(note.startswith("packed 14 training examples into 7 rows") for note in task.notes)


def test_too_long_examples_are_counted_in_the_notes(tmp_path):
    long = [*entries(), *({"instruction": "j" * (40 + i), "output": "0"} for i in range(10))]
    notes = make(config(tmp_path, long)).notes
    assert any("left out" in note and "longer than 32 tokens" in note for note in notes)
    cut = make(config(tmp_path, long, {"too_long": "truncate"}))
    assert any("off the front" in note for note in cut.notes)
    assert not any("left out" in note for note in cut.notes)


def test_nothing_left_to_learn_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to learn from"):
        make(config(tmp_path, [{"instruction": "j" * (40 + i), "output": "0"} for i in range(20)]))


def test_more_than_the_context_cannot_be_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"instruction\.max_length is 33; expected at most .* 32"):
        make(config(tmp_path, entries(), {"max_length": 33}))


def test_what_is_learned_is_identified(tmp_path):
    one = make(config(tmp_path, entries())).fingerprint
    assert make(config(tmp_path, entries())).fingerprint == one
    changed = [*entries(19), {"instruction": "add 19", "output": "21"}]
    assert make(config(tmp_path, changed)).fingerprint != one
    assert make(config(tmp_path, entries(), {"mask_prompt": False})).fingerprint != one


# Answers


@pytest.fixture(scope="module")
def trained(params):
    """A model that has learned four answers by heart."""
    pairs = [("a", "1"), ("b", "22"), ("c", "3 4"), ("d", "5")]
    eot = TOKENIZER.eot_id
    made = []
    for question, reply in pairs:
        prompt = TOKENIZER.encode(TEMPLATE.prompt([Message("user", question)]))
        ids = [*prompt, *TOKENIZER.encode(reply + "\n"), eot]
        made.append(Tokens(np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt)))
    batch = batch_of(alone(made), batch_size=4)
    optimizer = optax.scale_by_adam()
    start = jax.jit(partial(init_params, CFG))(jax.random.key(0))
    state = TrainState(jnp.int32(0), start, optimizer.init(start), jax.random.key(0))
    step = jax.jit(make_train_step(make_loss_fn(MODEL), optimizer, lambda step: 0.01))
    for _ in range(150):
        state, metrics = step(state, {}, batch)
    assert float(metrics.loss) < 0.05
    return state.trainable, pairs


def test_answers_end_where_the_model_ends_them(trained):
    learned, pairs = trained
    prompts = [[Message("user", question)] for question, _ in pairs]
    respond = partial(answer, MODEL, learned, tokenizer=TOKENIZER, template=TEMPLATE)
    replies = respond(prompts, max_new_tokens=8)
    assert replies == [reply for _, reply in pairs]
    assert respond(prompts[2:3], max_new_tokens=8) == replies[2:3]  # alone as among others
    assert respond(prompts, max_new_tokens=1) == ["1", "2", "3", "5"]


def test_a_prompt_that_is_too_long_is_cut_at_the_front(trained):
    learned, _ = trained
    long = [Message("user", "j" * 60 + "a")]
    replies = answer(MODEL, learned, [long], tokenizer=TOKENIZER, template=TEMPLATE, max_new_tokens=8)
    assert len(replies) == 1
    assert len(replies[0]) <= 8
