"""What must hold of a model loaded for use: the right weights and their tokenizer, or one line that says why not."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import refused
from safetensors.numpy import load_file, save_file

from slm_jax.data.chat_template import ChatTemplate
from slm_jax.errors import InputError, MissingInputError
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.runs import find_run, load_gpt2, load_model, load_run, split_step
from slm_jax.tokenizer import CharTokenizer, GPT2Tokenizer
from slm_jax.training.checkpoint import Checkpoints
from slm_jax.training.manifest import METADATA, write_manifest
from slm_jax.training.step import TrainState
from slm_jax.weights.writer import save_gpt2

TOKENIZER = CharTokenizer("abcdefgh")
CONFIG = GPTConfig(vocab_size=9, context_length=8, emb_dim=8, n_heads=2, n_layers=2)


def make_params(cfg=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype), param_shapes(cfg)
    )


def assert_same(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(a, e, strict=True), actual, expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with checkpoints of the steps 10, 20 and 30, of which 20 is the best, and one without any."""
    folder = tmp_path_factory.mktemp("runs")
    # Executed otherwise than here; that must not come back.
    model = dataclasses.asdict(CONFIG) | {"remat": "full", "attention": "explicit", "unroll": True}
    metadata = {"model": model, "tokenizer": TOKENIZER.to_dict()}
    with Checkpoints(folder / "x" / "checkpoints", keep=3) as checkpoints:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            params = make_params(seed=step)
            opt_state = optax.sgd(0.1).init(params)
            checkpoints.save(TrainState(jnp.int32(step), params, opt_state, jax.random.key(0)), metadata, loss)
    (folder / "new" / "checkpoints").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("name", "step"),
    [("x", 20), ("x@best", 20), ("x@latest", 30), ("x@10", 10), ("x/checkpoints/10", 10)],
)
def test_a_run_is_named_with_or_without_a_step(name, step, runs):
    for load in (load_run, load_model):
        run = load(runs / name)
        assert (run.folder, run.step) == (runs / "x", step)
        assert run.model_config == CONFIG
        assert run.tokenizer.to_dict() == TOKENIZER.to_dict()
        assert_same(run.params, make_params(seed=step))
    cfg, params = load_gpt2(str(runs / name), param_dtype="bfloat16")
    assert cfg == dataclasses.replace(CONFIG, param_dtype="bfloat16")
    assert_same(params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), make_params(seed=step)))
    assert load_run(runs / "x", 10).step == 10
    assert load_run(runs / "x", "latest").step == 30
    with pytest.raises(InputError, match=r"given as 4.*run has 2"):
        load_gpt2(runs / name, n_heads=4)


@pytest.mark.parametrize(
    ("name", "expected", "kind"),
    [
        ("x@15", "there are 10, 20, 30", MissingInputError),
        ("x@soon", "step is 'soon'", InputError),
        ("new", "no checkpoint in this run yet", MissingInputError),
        ("y@10", "no run with checkpoints there", MissingInputError),
        ("y", "y", MissingInputError),
    ],
)
def test_what_is_no_run_or_no_step_of_it_is_named(name, expected, kind, runs):
    for load in (load_run, load_model, load_gpt2):
        with pytest.raises(kind, match=expected):
            load(runs / name)


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata: metadata.pop("model"),
        lambda metadata: metadata["model"].update(vocab_size=10**30),
        lambda metadata: metadata["model"].update(rotary=True),
    ],
    ids=["none", "huge", "unknown"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's other reads, given up
def test_metadata_that_were_edited_are_refused_by_their_checksum_and_by_what_they_say(edit, runs, tmp_path):
    step = shutil.copytree(runs / "x", tmp_path / "x") / "checkpoints" / "20"
    content = json.loads((step / METADATA).read_text())
    edit(content["custom_metadata"])
    (step / METADATA).write_text(json.dumps(content))
    with refused(f"{step / METADATA} is damaged.*other step"):
        load_gpt2(step)
    write_manifest(step, 20)
    with refused(f"{step}.*other step"):
        load_gpt2(step)


def test_weights_come_with_the_tokenizer_beside_them(tmp_path):
    for format in ("huggingface", "nanogpt", "book"):
        folder = save_gpt2(CONFIG, make_params(), tmp_path / format, format=format, tokenizer=TOKENIZER)
        for source in (folder, folder / "model.safetensors"):
            run = load_model(source)
            assert (run.folder, run.step) == (source, None)
            assert run.tokenizer.encode("abc") == TOKENIZER.encode("abc")
            assert run.tokenizer.eot_id == TOKENIZER.eot_id
            assert run.model_config.n_heads == 2
    assert_same(load_model(tmp_path / "huggingface").params, make_params())


def test_without_a_tokenizer_it_must_be_given(tmp_path):
    folder = save_gpt2(CONFIG, make_params(), tmp_path / "out")
    with pytest.raises(InputError, match="vocabulary of 9 is not GPT-2's"):
        load_model(folder)
    assert load_model(folder, TOKENIZER).tokenizer is TOKENIZER
    with pytest.raises(InputError, match="vocabulary of 9 and the tokenizer of 11"):
        load_model(folder, CharTokenizer("abcdefghij"))
    run = load_model(folder, CharTokenizer("abc"))
    assert (run.model_config.vocab_size, run.model_config.unpadded_vocab_size) == (9, 4)


def test_a_vocabulary_of_gpt2s_size_is_gpt2s_unless_its_files_say_otherwise(tmp_path):
    for vocab_size, unpadded in ((50_304, 50_257), (50_257, None)):
        cfg = dataclasses.replace(CONFIG, vocab_size=vocab_size, emb_dim=2, n_layers=1, unpadded_vocab_size=unpadded)
        folder = save_gpt2(cfg, make_params(cfg), tmp_path / str(vocab_size))
        run = load_model(folder)
        assert isinstance(run.tokenizer, GPT2Tokenizer)
        assert run.model_config.unpadded_vocab_size == unpadded
    spanish = {f"palabra{i}": i for i in range(50_257)}
    (folder / "vocab.json").write_text(json.dumps(spanish))
    with pytest.raises(InputError, match="not GPT-2's"):
        load_model(folder)
    (folder / "vocab.json").unlink()
    model = {"type": "WordLevel", "vocab": spanish, "unk_token": "palabra0"}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "palabra1", "chat_template": "own"}))
    run = load_model(folder)
    assert (run.tokenizer.kind, run.tokenizer.encode("palabra7")) == ("huggingface", [7])
    assert isinstance(run.template, ChatTemplate)
    (folder / "tokenizer.json").unlink()
    if GPT2Tokenizer().lacking():
        pytest.skip("TIKTOKEN_CACHE_DIR has not GPT-2's two files")
    folder = save_gpt2(cfg, make_params(cfg), tmp_path / "out", tokenizer=GPT2Tokenizer())
    assert isinstance(load_model(folder).tokenizer, GPT2Tokenizer)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]  # in any order
    (folder / "vocab.json").write_text(json.dumps(dict(reversed(vocabulary.items())), ensure_ascii=False))
    assert isinstance(load_model(folder).tokenizer, GPT2Tokenizer)


def test_foreign_weights_may_need_their_heads(tmp_path):
    folder = save_gpt2(CONFIG, make_params(), tmp_path / "out", format="nanogpt")
    save_file(load_file(folder / "model.safetensors"), tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="n_heads"):
        load_model(tmp_path / "plain.safetensors", TOKENIZER)
    assert load_model(tmp_path / "plain.safetensors", TOKENIZER, n_heads=4).model_config.n_heads == 4


def test_a_run_is_found_by_folder_or_name(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert find_run(str(folder)).path == folder
    monkeypatch.chdir(tmp_path)
    assert find_run("a").path == find_run("runs/a").path == Path("runs/a")
    with pytest.raises(MissingInputError, match=r"runs/b: no run there; .* there are runs/a"):
        find_run("runs/b")
    (tmp_path / "runs" / "b" / "checkpoints" / ".saving" / "params").mkdir(parents=True)  # left of a removed run
    (tmp_path / "runs" / "b" / ".lock").touch()
    (tmp_path / "runs" / "b" / "checkpoints" / ".saving" / "params" / "_METADATA").touch()
    with pytest.raises(MissingInputError, match="runs/b: no run there"):
        find_run("runs/b")


def test_a_step_is_what_follows_the_last_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_step("runs/a") == (Path("runs/a"), None)
    assert split_step("runs/a@800") == (Path("runs/a"), "800")
    assert split_step("a@b@best") == (Path("a@b"), "best")
    assert split_step(".@3") == (Path(), "3")
    assert split_step("@3") == (Path("@3"), "3")
    Path("a@b").mkdir()
    assert split_step("a@b") == (Path("a@b"), None)
