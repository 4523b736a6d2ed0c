"""What must hold of ``slm-jax plan``: tables to read, JSON to compute with, one line for a mistake."""

import json
import shutil
from pathlib import Path

import pytest

from slm_jax import cli
from slm_jax.training.hardware import DEVICES

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_it_prints_what_a_run_needs_without_reading_its_text(capsys):
    words = ["--device", "t4", "--model.preset", "gpt2-small", "--tokenizer.kind", "gpt2", "--train.batch_size", "64"]
    assert cli.main(["plan", *words, "--data.source", "text:nowhere/*.txt"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("124,439,808", "float32", "optimizer state", "It does not fit", "--train.accumulate", "assumption"):
        assert part in printed


def test_json_is_the_same_plan(capsys):
    assert cli.main(["plan", "--device", "v5e", "--devices", "4", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["device"], plan["n_devices"], plan["dtype"], plan["fits"]) == ("v5e", 4, "bfloat16", True)
    assert plan["by_remat"]["none"]["memory"]["total"] > plan["by_remat"]["full"]["memory"]["total"]


@pytest.mark.parametrize("recipe", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_recipe_can_be_planned(recipe, tmp_path, monkeypatch, capsys):
    """Those of fine-tuning too, before their base is there; two of them start from another recipe's run."""
    monkeypatch.chdir(tmp_path)
    words = ["--base", "runs/tiny"] if recipe in ("sft_instruction.yaml", "dpo_builtin.yaml") else []
    assert cli.main(["plan", "--config", str(CONFIGS / recipe), "--device", "a100-40g", *words]) == 0
    assert "total" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_base_may_be_weights_which_are_not_read(weights, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(weights, base)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64] + bytes(64))  # another SHA-256
    assert (
        cli.main(["plan", "--device", "t4", "--task", "classification", "--base", str(base), "--format", "json"]) == 0
    )
    shapes = {name: shape for name, shape, *_ in json.loads(capsys.readouterr().out)["shares"]}
    assert shapes["blocks_0/ff/fc/kernel"][-2:] == [16, 64]


@pytest.mark.parametrize("words", [[], ["--task", "instruction"]])
def test_help_names_every_device(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", *words, "--help"])
    listed = " ".join(capsys.readouterr().out.split()).split("--device TEXT ")[1].partition(": this machine")[0]
    assert set(listed.replace(", or", ",").split(", ")) == {*(device.name for device in DEVICES), "cpu"}
