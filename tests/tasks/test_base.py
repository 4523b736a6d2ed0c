"""What must hold of what fine-tuning starts from: the base as it is, with its tokenizer and shape, or a new model."""

import dataclasses
import json
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
from slm_jax.model import GPTConfig, init_params
from slm_jax.runs import Run, save_run
from slm_jax.tasks import pretraining
from slm_jax.tasks.base import count_steps, find_base
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import CharTokenizer
from slm_jax.training.checkpoint import saved_steps
from slm_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from slm_jax.training.resume import find_start
from slm_jax.training.step import make_eval_step
from slm_jax.training.trainable import from_leaf_table, leaf_table, whole_params
from slm_jax.weights.writer import save_gpt2

# Checkpoints are read here as they lie on the disk, without saying onto which devices.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")

TOKENIZER = CharTokenizer("abcdefgh \n")
CFG = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=16, emb_dim=16, n_heads=2, n_layers=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base as a run and as GPT-2's weights, and a text that it knows every letter of."""
    folder = tmp_path_factory.mktemp("base")
    shapes = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.1, 0.3, leaf.shape)), shapes)
    save_run(folder / "run", Run(folder, None, CFG, params, TOKENIZER))
    save_gpt2(CFG, params, folder / "weights", tokenizer=TOKENIZER)
    (folder / "text.txt").write_text("bad cafe, a bed\n".replace(",", "") * 60)
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
    }
    return RunConfig(**{**fields, **more})


def find(config):
    return find_base(config, find_start(config))


def build(config):
    return pretraining.Pretraining.build(config, find_start(config))


def same_bits(a, b):
    a, b = ({path: np.asarray(leaf).tobytes() for path, leaf in flatten_dict(tree, sep="/").items()} for tree in (a, b))
    return a == b


@pytest.mark.parametrize("base", ["run", "run@0", "run/checkpoints/0", "weights", "weights/model.safetensors"])
def test_a_base_is_a_run_or_weights_taken_as_they_are(place, base):
    found = find(config(place, base))
    assert same_bits(found.params, place[1])
    assert found.tokenizer.to_dict() == TOKENIZER.to_dict()
    assert dataclasses.replace(found.model_config, unroll=None) == CFG


def test_without_a_base_there_is_none(place):
    assert find(config(place, None)) is None


def test_execution_of_a_base_may_change_and_its_shape_may_not(place):
    section = ModelConfig(drop_rate=0.25, remat="full", attention="explicit", unroll=True, dtype="bfloat16")
    cfg = find(config(place, model=section)).model_config
    assert (cfg.drop_rate, cfg.remat, cfg.attention, cfg.unroll, cfg.dtype) == (
        0.25,
        "full",
        "explicit",
        True,
        "bfloat16",
    )
    assert (cfg.emb_dim, cfg.param_dtype) == (16, "float32")
    assert find(config(place, model=ModelConfig(emb_dim=16, n_layers=2))).model_config.emb_dim == 16


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"emb_dim": 32}, r"model\.emb_dim is 32, and the base's is 16; leave it out"),
        ({"n_layers": 3}, r"model\.n_layers is 3, and the base's is 2"),
        ({"context_length": 32}, r"model\.context_length is 32, and the base's is 16"),
        ({"vocab_size": 50}, r"model\.vocab_size is 50, and the base's is 11"),
        ({"tie_weights": False}, r"model\.tie_weights is False, and the base's is True"),
    ],
    ids=str,
)
def test_another_shape_than_the_bases_is_refused(place, section, said):
    with pytest.raises(InputError, match=said):
        find(config(place, model=ModelConfig(**section)))


@pytest.mark.parametrize("base", ["run", "weights"])
def test_another_tokenizer_than_the_bases_is_refused(place, base):
    folder, _ = place
    same = config(place, base, tokenizer=TokenizerConfig(path=str(folder / "same")))
    assert find(same).tokenizer.to_dict() == TOKENIZER.to_dict()
    for other in (TokenizerConfig(path=str(folder / "other")), TokenizerConfig(kind="gpt2")):
        with pytest.raises(InputError, match=r"tokenizer") as caught:
            find(config(place, base, tokenizer=other))
        assert str(folder / base) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_base_that_is_not_there_is_said(place):
    for name in ("nothing", "run@7"):
        with pytest.raises(MissingInputError, match=name.partition("@")[0]):
            find(config(place, name))


# Continued pretraining


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


# Steps


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"steps": 7, "epochs": None}, 7),
        ({"steps": None, "epochs": 1.0}, 3),
        ({"steps": None, "epochs": 2.5}, 7),
        ({"steps": 5, "epochs": 2.5}, 5),
        ({"steps": 9, "epochs": 2.5}, 7),
    ],
    ids=str,
)
def test_training_ends_after_steps_or_epochs_whichever_comes_first(limits, steps):
    """Of 11 rows in batches of 4: two and a half epochs are 27.5 rows."""
    assert count_steps(RunConfig(train=TrainConfig(batch_size=4, **limits)), 11) == steps


def test_the_leaves_of_a_checkpoint_are_described_as_json(place):
    trainable = build(config(place, trainable="last_block")).params.trainable
    table = json.loads(json.dumps(leaf_table(trainable)))
    assert table["final_norm/scale"] == [16, "float32"]
    assert jax.tree.map(shape_of, from_leaf_table(table)) == jax.tree.map(shape_of, trainable)


def shape_of(leaf):
    return leaf.shape, str(leaf.dtype)


# The state of the base's optimizer


@pytest.fixture(scope="module")
def trained(place):
    """A run of four steps from the base; the last block of it, and all of it."""
    folder = place[0] / "trained"
    for trainable in ("all", "last_block"):
        file = folder / f"{trainable}.yaml"
        folder.mkdir(exist_ok=True)
        cfg = config(place, runs_dir=str(folder), run=trainable, trainable=trainable, sample=SampleConfig(every=0))
        file.write_text(dump_config(cfg))
        assert cli.main(["train", "--config", str(file)]) == 0
    return folder


def saved_opt_state(run, step):
    state = ocp.load_checkpointables(run / "checkpoints" / str(step), {"state": None})["state"]
    return jax.tree.map(np.asarray, jax.tree.leaves(state["opt_state"]))


def test_a_fork_counts_on_with_the_optimizer_of_its_base(place, trained):
    """Four steps of the base and four of its own; the step itself begins at 0."""
    fork = config(
        (trained, None),
        "last_block@4",
        base_optimizer=True,
        trainable="last_block",
        run="fork",
        runs_dir=str(trained),
        seed=1,
        data=DataConfig(source=f"text:{place[0] / 'text.txt'}"),
        sample=SampleConfig(every=0),
    )
    file = trained / "fork.yaml"
    file.write_text(dump_config(fork))
    assert cli.main(["train", "--config", str(file)]) == 0
    run = trained / "fork"
    assert saved_steps(run / "checkpoints") == [0, 4]
    for step in (0, 4):
        counts = [leaf for leaf in saved_opt_state(run, step) if leaf.shape == ()]
        assert counts == [4 + step]
    assert cli.main(["train", "--config", str(file)]) == 0  # done, and not refused


@pytest.mark.parametrize("trainable", ["all", "last_block"])
def test_the_moments_are_those_of_the_base_bit_for_bit(place, trained, trainable):
    data = DataConfig(source=f"text:{place[0] / 'text.txt'}")
    cfg = config((trained, None), f"{trainable}@4", base_optimizer=True, trainable=trainable, data=data)
    found, expected = jax.tree.leaves(build(cfg).params.opt_state), saved_opt_state(trained / trainable, 4)
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in found)
    assert sum(leaf.size for leaf in found) > 100
    assert sorted(np.asarray(leaf).tobytes() for leaf in found) == sorted(leaf.tobytes() for leaf in expected)


def test_without_asking_the_optimizer_begins_anew(place, trained):
    cfg = config((trained, None), "all@4", data=DataConfig(source=f"text:{place[0] / 'text.txt'}"))
    assert build(cfg).params.opt_state is None


@pytest.mark.parametrize(
    ("base", "trainable", "said"),
    [
        (None, "all", "base is null"),
        ("weights", "all", "is no run"),
        ("run", "all", "no state of this optimizer|other parameters"),
        ("trained/all", "last_block", "trained other parameters than trainable: last_block"),
        ("trained/last_block", "all", "trained other parameters than trainable: all"),
        ("trained/all", "lora", "trained other parameters than trainable: lora"),
    ],
)
def test_a_base_without_that_optimizers_state_is_refused(place, trained, base, trainable, said):
    with pytest.raises(InputError, match=said) as caught:
        build(config(place, base, trainable=trainable, base_optimizer=True))
    assert "base_optimizer is true" in str(caught.value)
    assert "\n" not in str(caught.value)
