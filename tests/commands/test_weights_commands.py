"""What must hold of ``slm-jax import`` and ``slm-jax export``: what goes in comes out, bit for bit."""

import json
from pathlib import Path

import jax
import numpy as np
from refusals import fails
from safetensors.numpy import load_file

from slm_jax import cli
from slm_jax.data.templates import Message
from slm_jax.runs import load_gpt2, load_model, load_run
from slm_jax.training import checkpoint
from slm_jax.weights.adapters import add_adapters, load_adapters, merge_adapters


def bits(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_weights_become_a_run_and_come_out_again(weights, tmp_path, capsys):
    runs = ["--runs-dir", str(tmp_path)]
    assert cli.main(["import", "--source", str(weights), "--run", "mine", *runs]) == 0
    out = capsys.readouterr().out
    assert f"slm-jax generate --run {tmp_path / 'mine'}" in out
    assert load_run(tmp_path / "mine").step == 0
    assert cli.main(["generate", "--run", str(tmp_path / "mine"), "--prompt", "the ", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the ")
    assert cli.main(["export", "--run", str(tmp_path / "mine"), "--out", str(tmp_path / "back")]) == 0
    assert f"model='{tmp_path / 'back'}'" in capsys.readouterr().out
    assert bits(tmp_path / "back") == bits(weights)
    for format in ("nanogpt", "book"):
        out = tmp_path / format
        assert cli.main(["export", "--run", str(weights), "--format", format, "--out", str(out)]) == 0
        assert cli.main(["export", "--run", str(out), "--out", str(tmp_path / f"hf-{format}")]) == 0
        for name, tensor in load_file(weights / "model.safetensors").items():
            assert np.array_equal(load_file(tmp_path / f"hf-{format}" / "model.safetensors")[name], tensor)


def test_nothing_is_overwritten_or_left_half_written(weights, tmp_path, capsys):
    args = ["import", "--source", str(weights), "--run", "mine", "--runs-dir", str(tmp_path)]
    assert cli.main(args) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fails(args, capsys, "exists")
    fails(["export", "--run", weights, "--out", tmp_path / "mine"], capsys, "new or empty folder")
    fails(["import", "--source", tmp_path / "none", "--run", "x", "--runs-dir", tmp_path], capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_training_does_not_resume_from_imported_weights(weights, tmp_path, capsys):
    """They have no optimizer state and no data; and nothing of them is lost."""
    assert cli.main(["import", "--source", str(weights), "--run", "mine", "--runs-dir", str(tmp_path)]) == 0
    text = tmp_path / "cats.txt"
    text.write_text("the cat sat on the mat, " * 200)
    source = ["--data.source", f"text:{text}", "--model.context_length", "16"]
    fails(["train", "--run", "mine", "--runs_dir", tmp_path, *source], capsys, "holds another run")
    assert load_run(tmp_path / "mine").step == 0


def test_weights_without_a_tokenizer_can_be_converted(weights, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        (bare / name).write_bytes((weights / name).read_bytes())
    assert cli.main(["export", "--run", str(bare), "--out", str(tmp_path / "out"), "--format", "nanogpt"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "the weights only" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    fails(["import", "--source", bare, "--run", "x", "--runs-dir", tmp_path], capsys, "pass the tokenizer")


def test_adapters_leave_alone_and_come_back_to_their_base(weights, instructed, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert cli.main(["export", "--run", str(instructed), "--format", "adapter", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} written: adapter.safetensors\n"
    adapters = load_adapters(out / "adapter.safetensors")
    base = load_gpt2(weights)[1]
    merged, trained = merge_adapters(add_adapters(base, adapters)), load_gpt2(instructed)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, trained)
    assert not np.allclose(merged["blocks"]["ff"]["fc"]["kernel"], base["blocks"]["ff"]["fc"]["kernel"])
    assert cli.main(["export", "--run", str(instructed), "--out", str(tmp_path / "hf")]) == 0  # with them merged
    jax.tree.map(np.testing.assert_array_equal, load_gpt2(tmp_path / "hf")[1], load_run(instructed).params)
    ours, theirs = load_run(instructed), load_model(tmp_path / "hf")  # and with tokenizer and template
    messages = [Message("system", "cats"), Message("user", "the dog", "and"), Message("assistant", "cat.")]
    assert theirs.template.pieces(messages) == ours.template.pieces(messages)
    assert theirs.template.prompt(messages) == ours.template.prompt(messages)
    assert theirs.tokenizer.encode("the dog") == ours.tokenizer.encode("the dog")


def test_what_has_no_adapters_exports_none(weights, classifier, tmp_path, capsys):
    for source, said in (
        (classifier, "has no adapters, as trainable was last_block; expected a run with trainable: lora"),
        (weights, "no run with checkpoints there; expected a folder such as runs/tiny"),
    ):
        words = ["export", "--run", source, "--format", "adapter", "--out", tmp_path / "out"]
        fails(words, capsys, f"slm-jax export: {source}: {said}")
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_exported_with_its_classes(classifier, tmp_path, capsys, monkeypatch):
    """The fixture's pools by the mean, which other programs cannot; say that it pools by the last token."""
    known = checkpoint.read_metadata
    monkeypatch.setattr(checkpoint, "read_metadata", lambda *args: {**known(*args), "pooling": "last"})
    assert cli.main(["export", "--run", str(classifier), "--out", str(tmp_path / "out")]) == 0
    assert "text-classification" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert (config["id2label"], config["label2id"]) == ({"0": "cat", "1": "dog"}, {"cat": 0, "dog": 1})
    assert config["pad_token_id"] == config["eos_token_id"]
    assert not (tmp_path / "out" / "generation_config.json").exists()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["score.weight"].shape == (2, 16)
    assert "lm_head.weight" not in tensors
    fails(["export", "--run", classifier, "--out", tmp_path / "book", "--format", "book"], capsys, "no classifiers")
