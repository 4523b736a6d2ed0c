"""What must hold of ``slm-jax bench``: figures to read and to compute with, one line for a mistake."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from slm_jax import cli

SMALL = [
    *("--model.vocab_size", "64", "--model.context_length", "16", "--model.n_layers", "1", "--model.emb_dim", "32"),
    *("--model.n_heads", "2"),
]


@pytest.fixture
def compile_cache(tmp_path: Path) -> Iterator[Path]:
    """The folder of an empty compile cache that keeps all programs, as a user may have set it."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    reset_cache()
    yield tmp_path / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_train_prints_writes_and_draws(tmp_path, compile_cache, capsys):
    files = ["--out", str(tmp_path / "new" / "train.json"), "--plot", str(tmp_path / "pictures" / "train.png")]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "train.png").symlink_to(tmp_path / "there.png")
    words = [*SMALL, "--tokenizer.kind", "char", "--train.batch_size", "4", "--repeats", "2", "--device", "h200"]
    assert cli.main(["bench", "train", *words, *files]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("compilation", "tokens", "MFU", "6 N + 12", "peak memory", "data sheet of h200", "loss"):
        assert part in printed
    content = json.loads((tmp_path / "new" / "train.json").read_text())
    assert content["what"] == "train"
    assert content["config"]["train"]["batch_size"] == 4
    assert not {"format", "out", "plot", "repeats", "device"} & content["config"].keys()
    assert not compile_cache.exists()  # else the time of compiling would be that of reading
    assert content["figures"]["loss_finite"] is True
    assert (tmp_path / "there.png").read_bytes().startswith(b"\x89PNG")


def test_generate_prints_json_and_measures_a_run(weights, compile_cache, monkeypatch, capsys):
    monkeypatch.setattr("slm_jax.tools.bench.instruments._SECONDS", 0.01)
    words = [*SMALL, "--prompt-tokens", "4", "--new_tokens", "5", "--batch_sizes", "2", "--repeats", "1"]
    assert cli.main(["bench", "generate", *words, "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (case,) = content["figures"]["cases"]
    assert case["batch_size"] == 2
    assert case["decode_step_seconds"]["repeats"]
    assert content["config"]["emb_dim"] == 32
    assert content["figures"]["ceilings"]["bandwidth"] > 0
    assert compile_cache.exists()
    words = ["--run", str(weights), "--prompt_tokens", "3", "--new_tokens", "2", "--batch_sizes", "1", "--repeats", "1"]
    assert cli.main(["bench", "generate", *words]) == 0
    assert "batch 1: each token after" in capsys.readouterr().out
    assert cli.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {kind} " in printed for kind in ("train", "generate", "data", "startup", "memory"))


def test_a_generation_that_does_not_fit_says_what_to_lower(monkeypatch, capsys):
    monkeypatch.setattr("slm_jax.tools.bench.instruments._SECONDS", 0.01)
    words = [*SMALL, "--prompt_tokens", "4", "--new_tokens", "5"]
    assert cli.main(["bench", "generate", *words, "--batch_sizes", str(10**14)]) == 2  # more than can be addressed

    def full(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr("slm_jax.tools.bench.generation.time_generation", full)
    assert cli.main(["bench", "generate", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("out of memory; lower --batch_sizes, --prompt_tokens" in line for line in lines)
