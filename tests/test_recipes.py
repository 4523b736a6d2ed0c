"""Every YAML under configs/ parses, says what it promises, and makes a training step of its real shapes."""

import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from recipes import CONFIGS, RECIPES, initial_params, read, training_step, with_tokens

from slm_jax.data.builtin import python_docs
from slm_jax.data.named import NAMED_FILES
from slm_jax.errors import MissingInputError
from slm_jax.model import count_params, get_gpt_config, init_params
from slm_jax.runs import Run, save_run
from slm_jax.tasks import pretraining
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


def test_there_are_recipes():
    assert {"tiny", "shakespeare_char", "verdict"} <= {path.stem for path in RECIPES}
    assert not list(CONFIGS.rglob("*.yml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_names_its_run(path):
    config = read(path.stem)
    assert config.name == path.stem
    assert config.folder == Path("runs") / path.stem
    assert f"--config configs/{path.name}" in path.read_text() or path.stem == "tiny"


QUICK = ("tiny", "classify_builtin", "sft_builtin")
STEPS = [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow) for path in RECIPES]


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
            state, metrics = step(state, task.params.frozen, padded(task.train_batches[i], batch))
            losses.append(float(metrics.loss))
            assert not metrics.skipped
        uniform = math.log(len(task.metadata.get("classes", range(task.model_config.vocab_size))))
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


# What a recipe promises


def test_tiny_needs_nothing_but_python():
    config = read("tiny")
    assert config.data.source == "builtin:python-docs"
    assert config.tokenizer.kind == "bpe"
    assert dataclasses.replace(config, run=None) == RunConfig()


def test_classify_builtin_is_what_finetune_does_by_itself():
    assert dataclasses.replace(read("classify_builtin"), run=None) == parse_args([], FinetuneConfig) == FinetuneConfig()
    assert read("classify_builtin").name == FinetuneConfig().name == "classify_builtin"


def test_shakespeare_is_nanogpts_recipe_for_a_cpu():
    config = read("shakespeare_char")
    cfg = config.gpt_config(66)
    assert (cfg.n_layers, cfg.n_heads, cfg.emb_dim, cfg.context_length, cfg.drop_rate) == (4, 4, 128, 64, 0.0)
    assert (config.train.batch_size, config.train.steps, config.train.epochs) == (12, 2000, None)
    assert config.train.accumulate == 1
    assert (config.data.source, config.data.sampling) == ("named:tinyshakespeare", "random")
    assert config.data.validation_fraction == 0.1
    assert config.tokenizer.kind == "char"
    assert (cfg.bias, cfg.tie_weights) == (False, True)
    # nanoGPT's config/train_shakespeare_char.py and the arguments that its README gives for a CPU
    optimizer = config.optimizer
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (0.1, 0.9, 0.99, 1.0)
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.decay_steps) == ("cosine", 100, 2000)


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


def test_shakespeare_speedrun_is_measured_as_shakespeare_char_is():
    fast, slow = read("shakespeare_speedrun"), read("shakespeare_char")
    assert (fast.data.source, fast.data.validation_fraction) == (slow.data.source, slow.data.validation_fraction)
    assert fast.train.eval_every == fast.checkpoint.every == fast.train.steps  # once, at the end


def test_verdict_is_the_books_chapter_5():
    config = read("verdict")
    cfg = config.gpt_config(50_257)
    assert (cfg.n_layers, cfg.n_heads, cfg.emb_dim, cfg.context_length, cfg.drop_rate) == (12, 12, 768, 256, 0.1)
    assert (cfg.tie_weights, cfg.qkv_bias) == (False, False)
    assert count_params(dataclasses.replace(cfg, context_length=1024)) == 163_009_536
    assert (config.train.batch_size, config.train.epochs, config.train.steps) == (2, 10, None)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.schedule) == (4e-4, 0.1, "constant")
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (
        0.9,
        0.999,
        None,
    )  # torch's defaults, no clipping
    assert (config.data.source, config.tokenizer.kind) == ("named:the-verdict", "gpt2")
    assert config.data.sampling == "stride"


def test_epochs_become_steps(named_data, tmp_path):
    config = read("verdict", "--runs_dir", str(tmp_path))
    available(config)
    task = pretraining.Pretraining.build(config, find_start(config))
    # 5,145 tokens, nine tenths of the characters to train on: 18 windows of 256 in nine batches of two
    assert task.total_steps == 90
    assert task.tokens_per_step == 512


def test_gpt2_124m_is_gpt2_small_on_ten_billion_tokens_half_a_million_a_step():
    config = read("gpt2_124m")
    cfg = config.gpt_config(50_257)
    assert cfg == get_gpt_config("gpt2-small")
    tokens_per_step = config.train.batch_size * cfg.context_length
    assert tokens_per_step == 2**19
    assert config.train.steps * tokens_per_step == pytest.approx(10e9, rel=1e-4)
    assert config.model.dtype == "auto"
    assert (config.data.sampling, config.data.packing, config.checkpoint.mirror) == ("stride", False, None)
    # GPT-3's of this size (Brown et al. 2020, table 2.1 and appendix B)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (6e-4, 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.schedule) == (0.1, 1.0, "cosine")


def test_gpt2_124m_colab_is_the_same_model_and_survives_its_machine():
    config = read("gpt2_124m_colab")
    assert config.gpt_config(50_257) == read("gpt2_124m").gpt_config(50_257)
    assert config.checkpoint.mirror == "/content/drive/MyDrive/slm_jax"
    assert config.runs_dir == "runs"  # on the machine itself, not on the Drive
    assert config.model.dtype == "auto"
    # Can be ended at any step: the decay is of a fixed length, and comes last.
    assert (config.optimizer.schedule, config.optimizer.decay_steps) == ("wsd", 600)
    assert config.train.eval_every % config.checkpoint.every == 0
