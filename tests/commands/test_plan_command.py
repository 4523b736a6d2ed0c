"""What must hold of ``slm-jax plan``: tables to read, JSON to compute with, one line for a mistake."""

import json
from pathlib import Path

import pytest

from slm_jax import cli
from slm_jax.training.hardware import DEVICES

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_it_prints_what_a_run_needs_without_reading_its_text(capsys):
    words = ["--device", "t4", "--model.preset", "gpt2-small", "--tokenizer.kind", "gpt2", "--train.batch_size", "64"]
    assert cli.main(["plan", *words, "--data.source", "text:nowhere/*.txt"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("124,439,808", "float32", "optimizer state", "It does not fit", "--train.accumulate", "an assumption"):
        assert part in printed


def test_json_is_the_same_plan(capsys):
    assert cli.main(["plan", "--device", "v5e", "--devices", "4", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["device"], plan["n_devices"], plan["dtype"], plan["fits"]) == ("v5e", 4, "bfloat16", True)
    assert plan["by_remat"]["none"]["memory"]["total"] > plan["by_remat"]["full"]["memory"]["total"]


@pytest.mark.parametrize("recipe", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_recipe_can_be_planned(recipe, tmp_path, monkeypatch, capsys):
    """Those of fine-tuning too, before their base is there; the book's chapter 7 goes on from a run of our own."""
    monkeypatch.chdir(tmp_path)
    words = ["--base", "runs/tiny"] if recipe == "sft_instruction.yaml" else []
    assert cli.main(["plan", "--config", str(CONFIGS / recipe), "--device", "a100-40g", *words]) == 0
    assert "total" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "a100"], "device is 'a100'; did you mean a100-80g or a100-40g?"),
        (["--device", "h100", "--mfu", "40"], "mfu is 40.0; expected above 0 and at most 1"),
        (["--device", "h100", "--devices", "0"], "devices is 0; expected at least 1"),
        (["--device", "h100", "--tokens", "many"], "tokens is 'many'; expected a number"),
        (["--device", "h100", "--task", "classification", "--base", "runs/no"], "base runs/no is no existing run"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, message, capsys):
    assert cli.main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("words", [[], ["--task", "instruction"]])
def test_help_names_every_device(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", *words, "--help"])
    listed = " ".join(capsys.readouterr().out.split()).split("--device TEXT ")[1].partition(": this machine")[0]
    assert set(listed.replace(", or", ",").split(", ")) == {*(device.name for device in DEVICES), "cpu"}
