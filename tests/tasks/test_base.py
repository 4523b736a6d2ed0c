"""What must hold of what training starts from: the base as it is, with its tokenizer and shape, or a new model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from slm_jax import cli
from slm_jax.config import dump_config
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.errors import InputError, MissingInputError
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.runs import Run, save_run
from slm_jax.tasks import pretraining
from slm_jax.tasks.base import count_steps, find_base
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import CharTokenizer, same_tokens
from slm_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from slm_jax.training.manifest import saved_steps
from slm_jax.training.resume import find_start
from slm_jax.training.step import make_eval_step
from slm_jax.training.trainable import whole_params
from slm_jax.weights.writer import save_gpt2

# Checkpoints are read here as they lie on the disk, without saying onto which devices.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")

TOKENIZER = CharTokenizer("abcdefgh \n")
CFG = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=16, emb_dim=16, n_heads=2, n_layers=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base as a run and as GPT-2's weights, and a text that it knows every letter of."""
    folder, rng = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.1, 0.3, leaf.shape)), param_shapes(CFG))
    save_run(folder / "run", Run(folder, None, CFG, params, TOKENIZER))
    save_gpt2(CFG, params, folder / "weights", tokenizer=TOKENIZER)
    save_gpt2(CFG, params, folder / "bare")
    (folder / "text.txt").write_text("bad cafe a bed\n" * 60)
    TOKENIZER.save(folder / "same")
    CharTokenizer("abcdefgh \nz").save(folder / "other")
    return folder, params


def config(place, base="run", **more):
    folder, _ = place
    fields = {
        "base": None if base is None else str(folder / base),
        "runs_dir": str(folder / "runs"),
        "model": ModelConfig(unroll=False),
        "data": DataConfig(source=f"text:{folder / 'text.txt'}"),
        "train": TrainConfig(steps=4, batch_size=4, eval_batch_size=8),
        "optimizer": OptimizerConfig(warmup_steps=0),
        "sample": SampleConfig(every=0),
    }
    return RunConfig(**{**fields, **more})


def find(config):
    return find_base(config, find_start(config))


def build(config):
    return pretraining.Pretraining.build(config, find_start(config))


def same_bits(*trees):
    a, b = ({path: np.asarray(leaf).tobytes() for path, leaf in flatten_dict(tree, sep="/").items()} for tree in trees)
    return a == b


def same_ids(tokenizer):
    """Weights have the tokenizer as a tokenizer.json."""
    return tokenizer.encode("bad cafe\n") == TOKENIZER.encode("bad cafe\n") and same_tokens(tokenizer, TOKENIZER)


@pytest.mark.parametrize("base", ["run", "run@0", "run/checkpoints/0", "weights", "weights/model.safetensors"])
def test_a_base_is_a_run_or_weights_taken_as_they_are(place, base):
    found = find(config(place, base))
    assert same_bits(found.params, place[1])
    assert same_ids(found.tokenizer)
    assert dataclasses.replace(found.model_config, unroll=None) == CFG


def test_without_a_base_there_is_none_and_one_that_is_not_there_is_named(place):
    assert find(config(place, None)) is None
    for name in ("nothing", "run@7"):
        with pytest.raises(MissingInputError, match=name.partition("@")[0]):
            find(config(place, name))


def test_execution_of_a_base_may_change_and_its_shape_may_not(place):
    execution = {"drop_rate": 0.25, "remat": "full", "attention": "explicit", "unroll": True, "dtype": "bfloat16"}
    cfg = find(config(place, model=ModelConfig(**execution, emb_dim=16, n_layers=2))).model_config
    assert cfg == dataclasses.replace(CFG, **execution)
    other = {"emb_dim": 32, "n_layers": 3, "context_length": 32, "vocab_size": 50, "tie_weights": False}
    for name, value in other.items():
        message = rf"model\.{name} is {value}, and the base's is {getattr(CFG, name)}; leave it out"
        with pytest.raises(InputError, match=message):
            find(config(place, model=ModelConfig(**{name: value})))


@pytest.mark.parametrize("base", ["run", "weights", "bare"])
def test_another_tokenizer_than_the_bases_is_refused(place, base):
    folder, _ = place
    same = config(place, base, tokenizer=TokenizerConfig(path=str(folder / "same")))
    assert same_ids(find(same).tokenizer)
    if base == "bare":  # weights without a tokenizer need one
        with pytest.raises(InputError, match="no tokenizer with these weights"):
            find(config(place, base))
        return
    for other in (TokenizerConfig(path=str(folder / "other")), TokenizerConfig(kind="gpt2")):
        with pytest.raises(InputError, match=f"base {folder / base} has another tokenizer"):
            find(config(place, base, tokenizer=other))


@pytest.mark.parametrize("trainable", ["all", "last_block", "lora"])
def test_continued_pretraining_starts_from_the_loss_of_the_base(place, trainable):
    task = build(config(place, trainable=trainable))
    assert task.params.init is None
    assert same_bits(whole_params(task.params.trainable, task.params.frozen), place[1])
    assert task.tokenizer.to_dict() == TOKENIZER.to_dict()
    evaluate = jax.jit(make_eval_step(task.loss_fn))
    batch = jax.tree.map(jnp.asarray, next(iter(task.validation_batches())))
    loss, weight, _ = evaluate(task.params.trainable, task.params.frozen, batch)
    whole, _, _ = evaluate(place[1], {}, batch)
    assert float(loss) == pytest.approx(float(whole), rel=1e-6)
    assert abs(float(loss / weight) - math.log(CFG.vocab_size)) > 0.1  # not that of a new model


def test_the_text_must_be_of_the_bases_letters(place, tmp_path):
    (tmp_path / "new.txt").write_text("xyz " * 100)
    with pytest.raises(InputError, match="'x'"):
        build(config(place, data=DataConfig(source=f"text:{tmp_path / 'new.txt'}")))


def test_training_ends_after_steps_or_epochs_whichever_comes_first():
    """Of 11 rows in batches of 4: two and a half epochs are 27.5 rows."""
    for steps, epochs, expected in ((7, None, 7), (None, 1.0, 3), (None, 2.5, 7), (5, 2.5, 5), (9, 2.5, 7)):
        train = TrainConfig(batch_size=4, steps=steps, epochs=epochs)
        assert count_steps(RunConfig(train=train), 11) == expected


def train(place, base, run, **more):
    cfg = config(place, base, runs_dir=str(place[0]), run=run, trainable="last_block", **more)
    (place[0] / f"{run}.yaml").write_text(dump_config(cfg))
    assert cli.main(["train", "--config", str(place[0] / f"{run}.yaml")]) == 0


@pytest.fixture(scope="module")
def trained(place):
    """A run of four steps of the base's last block."""
    train(place, "run", "trained")
    return place[0] / "trained"


def saved_opt_state(run, step):
    state = ocp.load_checkpointables(run / "checkpoints" / str(step), {"state": None})["state"]
    return jax.tree.map(np.asarray, jax.tree.leaves(state["opt_state"]))


def test_a_fork_counts_on_with_the_optimizer_of_its_base(place, trained):
    """Four steps of the base and four of its own; the step itself begins at 0."""
    for _ in range(2):  # then it is done, and not refused
        train(place, "trained@4", "fork", base_optimizer=True, seed=1)
    run = place[0] / "fork"
    assert saved_steps(run / "checkpoints") == [0, 4]
    for step in (0, 4):
        counts = [leaf for leaf in saved_opt_state(run, step) if leaf.shape == ()]
        assert counts == [4 + step]


def test_the_moments_are_those_of_the_base_bit_for_bit_if_asked_for(place, trained):
    cfg = config(place, "trained@4", base_optimizer=True, trainable="last_block")
    found, expected = jax.tree.leaves(build(cfg).params.opt_state), saved_opt_state(trained, 4)
    assert sum(leaf.size for leaf in found) > 100
    assert sorted(np.asarray(leaf).tobytes() for leaf in found) == sorted(leaf.tobytes() for leaf in expected)
    assert build(dataclasses.replace(cfg, base_optimizer=False)).params.opt_state is None


@pytest.mark.parametrize(
    ("base", "trainable", "message"),
    [
        (None, "all", "base is null"),
        ("weights", "all", "is no run"),
        ("run", "all", "no state of this optimizer|other parameters"),
        ("trained", "all", "trained other parameters; expected the same trainable"),
        ("trained", "lora", "trained other parameters; expected the same trainable"),
    ],
)
def test_a_base_without_that_optimizers_state_is_refused(place, trained, base, trainable, message):
    with pytest.raises(InputError, match=message) as caught:
        build(config(place, base, trainable=trainable, base_optimizer=True))
    assert "base_optimizer is true" in str(caught.value)
