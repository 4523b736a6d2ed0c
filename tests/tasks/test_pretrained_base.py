"""A model with a tokenizer and chat template of its own: loaded, fine-tuned, resumed, talked with and exported."""

import io
import json
import sys
from pathlib import Path

import jax
import pytest
from finetuning import jsonl, words

from slm_jax import cli
from slm_jax.data.chat_template import ChatTemplate, own_template
from slm_jax.model import GPTConfig, init_params
from slm_jax.runs import load_model
from slm_jax.tokenizer import PretrainedTokenizer, fingerprint
from slm_jax.weights.writer import save_gpt2

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "chat_templates.json").read_text(encoding="utf-8"))
STRICT = GOLDEN["templates"]["strict"]["template"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder in Hugging Face's format; the embedding is larger than the tokenizer."""
    ids = {each["content"]: each["id"] for each in GOLDEN["tokenizer"]["added_tokens"]}
    ends = [ids["</s>"], ids["<|end|>"]]
    tokenizer = PretrainedTokenizer(GOLDEN["tokenizer"], GOLDEN["tokens"], ends, False, STRICT)
    cfg = GPTConfig(vocab_size=272, context_length=64, emb_dim=16, n_heads=2, n_layers=1, unpadded_vocab_size=263)
    folder = tmp_path_factory.mktemp("base") / "model"
    save_gpt2(cfg, init_params(cfg, jax.random.key(0)), folder, tokenizer=tokenizer, template=own_template(tokenizer))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Options of a run that learns to answer 4 and end."""
    folder = tmp_path_factory.mktemp("runs")
    jsonl(folder / "rows.jsonl", [{"instruction": f"What is {i}?", "output": "4"} for i in range(10, 30)])
    return folder / "four", options(folder, base)


def options(folder, base, **more):
    return words(
        {
            "task": "instruction",
            "base": base,
            "run": "four",
            "runs_dir": folder,
            "data.source": f"jsonl:{folder / 'rows.jsonl'}",
            "optimizer.learning_rate": 0.03,
            "optimizer.warmup_steps": 2,
            "train.epochs": "null",
            "train.batch_size": 8,
            "train.eval_every": 20,
            "train.eval_batch_size": 8,
            "checkpoint.every": 20,
            "sample.every": 0,
            "sample.max_new_tokens": 4,
            "instruction.responses": 0,
            **more,
        }
    )


def test_a_folder_is_loaded_and_imported_with_its_tokenizer_and_template(base, tmp_path):
    loaded = load_model(base)
    assert isinstance(loaded.tokenizer, PretrainedTokenizer)
    assert loaded.tokenizer.vocab_size == loaded.model_config.unpadded_vocab_size == 263
    assert loaded.tokenizer.decode([*loaded.tokenizer.eos_ids]) == "</s><|end|>"
    assert loaded.template == ChatTemplate(STRICT, GOLDEN["tokens"])
    assert cli.main(["import", *words({"source": base, "run": "own", "runs_dir": tmp_path})]) == 0
    imported = load_model(tmp_path / "own")
    assert imported.template == loaded.template
    assert fingerprint(imported.tokenizer) == fingerprint(loaded.tokenizer)
    assert imported.tokenizer.eos_ids == loaded.tokenizer.eos_ids


def test_a_run_from_it_resumes_answers_and_is_exported_with_both(run, base, tmp_path, capsys, monkeypatch):
    folder, arguments = run
    assert cli.main(["finetune", *arguments, "--train.steps", "20"]) == 0
    assert cli.main(["finetune", *arguments, "--train.steps", "40"]) == 0
    capsys.readouterr()
    trained, original = load_model(folder), load_model(base)
    assert trained.template == original.template
    assert fingerprint(trained.tokenizer) == fingerprint(original.tokenizer)

    assert cli.main(["generate", *words({"run": folder, "instruction": "What is 12?", "temperature": 0})]) == 0
    assert capsys.readouterr().out.strip() == "4"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3?\n"))
    assert cli.main(["chat", *words({"run": folder, "temperature": 0, "max-new-tokens": 5})]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == ["4"]

    assert cli.main(["export", *words({"run": folder, "out": tmp_path / "out"})]) == 0
    exported = load_model(tmp_path / "out")
    assert exported.template == original.template
    assert fingerprint(exported.tokenizer) == fingerprint(original.tokenizer)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [
        *original.tokenizer.eos_ids
    ]


@pytest.mark.hostile
def test_a_hostile_template_ends_the_commands_with_a_line(base, tmp_path, capsys):
    from refusals import fails

    (tmp_path / "model").mkdir()
    for file in base.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages.__class__ }}")
    run = words({"run": tmp_path / "model"})
    fails(["chat", *run], capsys, "chat template fails", "__class__")
    fails(["generate", *run, "--instruction", "Hi"], capsys, "chat template fails", "__class__")
