"""Every YAML under configs/ parses, says what it promises, and makes a training step of its real shapes."""

import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from recipes import RECIPES, initial_params, read, training_step, with_tokens

from slm_jax.config import flatten, to_dict
from slm_jax.data.builtin import python_docs
from slm_jax.data.named import NAMED_FILES
from slm_jax.errors import MissingInputError
from slm_jax.model import count_params, get_gpt_config, init_params
from slm_jax.runs import Run, save_run
from slm_jax.tasks.config import FinetuneConfig, RunConfig, get_task, parse_args
from slm_jax.tokenizer import BPETokenizer, get_tokenizer
from slm_jax.training.resume import find_start
from slm_jax.training.step import make_eval_step

MAX_PARAMETERS = 5_000_000  # what is run here and not only lowered


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small new model in place of what fine-tuning starts from."""
    tokenizer = BPETokenizer.train(python_docs()[:300_000], vocab_size=2048)  # few tokens a text
    cfg = get_gpt_config("tiny", vocab_size=2048, context_length=1024, emb_dim=32, n_heads=2, n_layers=1)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    folder = tmp_path_factory.mktemp("base") / "new"
    save_run(folder, Run(folder, None, cfg, params, tokenizer))
    return folder


def available(config: RunConfig) -> None:
    """Skip what needs files that are not on this machine; nothing is downloaded in the tests."""
    sources = (config.data.source, config.data.validation_source or "")
    if any(source.startswith("tfds:") for source in sources):
        pytest.skip("a data set of TensorFlow Datasets would be downloaded")
    for name in (source.removeprefix("named:") for source in sources if source.startswith("named:")):
        folder = os.environ.get("SLM_JAX_DATA")
        if not folder or not (Path(folder) / NAMED_FILES[name].file).is_file():
            pytest.skip(f"SLM_JAX_DATA does not point at a folder with {NAMED_FILES[name].file}")
    if config.tokenizer.kind == "gpt2":
        if "TIKTOKEN_CACHE_DIR" not in os.environ:
            pytest.skip("TIKTOKEN_CACHE_DIR does not point at GPT-2's tokenizer")
        try:
            get_tokenizer("gpt2").encode("a")
        except MissingInputError:
            pytest.skip("GPT-2's tokenizer is not in TIKTOKEN_CACHE_DIR")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_names_its_run(path):
    assert read(path.stem).folder == Path("runs") / path.stem
    assert f"--config configs/{path.name}" in path.read_text() or path.stem == "tiny"


STEPS = [pytest.param(path, id=path.stem, marks=[] if path.stem == "tiny" else pytest.mark.slow) for path in RECIPES]


@pytest.mark.parametrize("path", STEPS)
def test_a_recipe_makes_a_training_step(path, request, tmp_path):
    """With its own data, tokenizer, model and batches: two steps where that is quick; test_lowering.py has all."""
    # As a loop of layers, which compiles several times faster; that it is the same model is tested elsewhere.
    config = read(path.stem, "--model.unroll", "false", "--runs_dir", str(tmp_path), "--checkpoint.mirror", "null")
    available(config)
    config = with_tokens(config, tmp_path)
    if config.base is not None:
        config = dataclasses.replace(config, base=str(request.getfixturevalue("base")))
    task = get_task(config.task).build(config, find_start(config))
    assert task.total_steps > 1
    batch = task.train_batches[0]
    rows, width = batch["inputs"].shape
    assert rows == config.train.batch_size
    assert width == task.model_config.context_length or (task.longest is not None and width <= task.longest)
    assert batch["inputs"].max() < task.model_config.vocab_size
    validation = next(iter(task.validation_batches()))
    assert len(validation["inputs"]) == (config.train.eval_batch_size or config.train.batch_size)

    if count_params(task.model_config) <= MAX_PARAMETERS:
        step, initial_state = training_step(config, task.loss_fn, initial_params(task), task.total_steps)
        state, losses = jax.jit(initial_state)(jax.random.key(config.seed)), []
        for i in range(2):
            own = task.train_batches[i]
            wide = own if "pairs" in own else padded(own, batch)  # a pair is padded on both sides
            state, metrics = step(state, task.params.frozen, wide)
            losses.append(float(metrics.loss))
            assert not metrics.skipped
        n_outcomes = 2 if "pairs" in batch else len(task.metadata.get("classes", range(task.model_config.vocab_size)))
        uniform = math.log(n_outcomes)
        assert losses == pytest.approx([uniform, uniform], abs=0.3)  # a new model knows nothing
        assert int(state.step) == 2
        *sums, _ = jax.eval_shape(make_eval_step(task.loss_fn), state.trainable, task.params.frozen, validation)
        assert [total.shape for total in sums] == [(), ()]


def padded(batch, like):
    """Make a batch as wide as another, with what does not count."""
    return {
        name: jnp.pad(value, [(0, other - own) for own, other in zip(value.shape, like[name].shape, strict=True)])
        for name, value in batch.items()
    }


# Keys of the recipe, and fields of its model (with GPT-2's vocabulary) as model.FIELD.
PROMISES = {
    "tiny": {"data.source": "builtin:python-docs", "tokenizer.kind": "bpe"},
    # nanoGPT's config/train_shakespeare_char.py and the arguments that its README gives for a CPU
    "shakespeare_char": {
        "model.n_layers": 4, "model.n_heads": 4, "model.emb_dim": 128, "model.context_length": 64,
        "model.drop_rate": 0.0, "model.bias": False, "model.tie_weights": True,
        "train.batch_size": 12, "train.steps": 2000, "train.epochs": None, "train.accumulate": 1,
        "data.source": "named:tinyshakespeare", "data.sampling": "random", "data.validation_fraction": 0.1,
        "tokenizer.kind": "char", "optimizer.weight_decay": 0.1, "optimizer.beta1": 0.9, "optimizer.beta2": 0.99,
        "optimizer.clip_norm": 1.0, "optimizer.schedule": "cosine", "optimizer.warmup_steps": 100,
        "optimizer.decay_steps": 2000,
    },
    "shakespeare_speedrun": {"data.source": "named:tinyshakespeare", "data.validation_fraction": 0.1},
    # the book's chapter 5, with torch's defaults and no clipping
    "verdict": {
        "model.n_layers": 12, "model.n_heads": 12, "model.emb_dim": 768, "model.context_length": 256,
        "model.drop_rate": 0.1, "model.tie_weights": False, "model.qkv_bias": False,
        "train.batch_size": 2, "train.epochs": 10, "train.steps": None,
        "optimizer.learning_rate": 4e-4, "optimizer.weight_decay": 0.1, "optimizer.schedule": "constant",
        "optimizer.beta1": 0.9, "optimizer.beta2": 0.999, "optimizer.clip_norm": None,
        "data.source": "named:the-verdict", "tokenizer.kind": "gpt2", "data.sampling": "stride",
    },
    # GPT-3's of this size (Brown et al. 2020, table 2.1 and appendix B)
    "gpt2_124m": {
        "model.dtype": "auto", "data.sampling": "stride", "data.packing": False, "checkpoint.mirror": None,
        "optimizer.learning_rate": 6e-4, "optimizer.beta1": 0.9, "optimizer.beta2": 0.95,
        "optimizer.weight_decay": 0.1, "optimizer.clip_norm": 1.0, "optimizer.schedule": "cosine",
    },
    # Can be ended at any step, as the decay is of a fixed length and comes last; runs_dir is on the machine itself.
    "gpt2_124m_colab": {
        "checkpoint.mirror": "/content/drive/MyDrive/slm_jax", "runs_dir": "runs", "model.dtype": "auto",
        "optimizer.schedule": "wsd", "optimizer.decay_steps": 600,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PROMISES)
def test_a_recipe_keeps_its_promises(name):
    config = read(name)
    model = {f"model.{key}": value for key, value in dataclasses.asdict(config.gpt_config(50_257)).items()}
    found = {**model, **{key: value for key, value in flatten(to_dict(config)).items() if value is not None}}
    assert {key: found.get(key) for key in PROMISES[name]} == PROMISES[name]


def test_the_defaults_are_those_of_recipes():
    assert dataclasses.replace(read("tiny"), run=None) == RunConfig()
    assert dataclasses.replace(read("classify_builtin"), run=None) == parse_args([], FinetuneConfig) == FinetuneConfig()
    assert read("classify_builtin").name == FinetuneConfig().name == "classify_builtin"


@pytest.mark.parametrize(
    ("speedrun", "other", "vocab_size"),
    [("shakespeare_speedrun", "shakespeare_char", 66), ("gpt2_124m_speedrun", "gpt2_124m", 50_257)],
)
def test_a_speedrun_trains_the_same_model_in_less(speedrun, other, vocab_size):
    fast, slow = read(speedrun), read(other)
    assert fast.gpt_config(vocab_size) == slow.gpt_config(vocab_size)
    assert (fast.tokenizer, fast.optimizer.kind) == (slow.tokenizer, "muon")
    assert fast.train.steps * fast.train.batch_size < slow.train.steps * slow.train.batch_size / 3
    assert fast.optimizer.final_learning_rate == 0.0  # each ends where its course does


def test_sizes():
    verdict = dataclasses.replace(read("verdict").gpt_config(50_257), context_length=1024)
    assert count_params(verdict) == 163_009_536
    fast, large, colab = read("shakespeare_speedrun"), read("gpt2_124m"), read("gpt2_124m_colab")
    assert fast.train.eval_every == fast.checkpoint.every == fast.train.steps  # once, at the end
    cfg = large.gpt_config(50_257)
    assert cfg == colab.gpt_config(50_257) == get_gpt_config("gpt2-small")
    assert large.train.batch_size * cfg.context_length == 2**19
    assert large.train.steps * 2**19 == pytest.approx(10e9, rel=1e-4)
    assert colab.train.eval_every % colab.checkpoint.every == 0


def test_epochs_become_steps(named_data, tmp_path):
    config = read("verdict", "--runs_dir", str(tmp_path))
    available(config)
    task = get_task("pretraining").build(config, find_start(config))
    # 5,145 tokens, nine tenths of the characters to train on: 18 windows of 256 in nine batches of two
    assert task.total_steps == 90
    assert task.tokens_per_step == 512
