"""The commands as a person uses them: what they print, what they leave, how they end."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from pretraining import metrics, options
from refusals import contents, fails
from sharing import make_once

import slm_jax
from slm_jax import cli
from slm_jax.training import program
from slm_jax.training.manifest import saved_steps

TEXT, RUNS = Path("cats.txt"), Path("runs")


@pytest.fixture
def workplace(text_file, tmp_path, monkeypatch):
    """An empty folder, as the current one, with a text to train on."""
    shutil.copy(text_file, tmp_path / TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(text_file, workplace, tmp_path_factory):
    """A copy of an uninterrupted run, in the workplace, and beside it what the command printed."""

    def make(folder):
        shutil.copy(text_file, folder / TEXT)
        with contextlib.chdir(folder), Path("printed.txt").open("w") as file, contextlib.redirect_stdout(file):
            assert train() == 0

    shutil.copytree(make_once(tmp_path_factory, "cli_run", make), workplace, dirs_exist_ok=True)
    return RUNS / "small"


def train(**more: object) -> int:
    return cli.main(["train", *options(TEXT, RUNS, **more)])


def training_fails(capsys, *parts: str, **more: object) -> None:
    fails(["train", *options(TEXT, RUNS, **more)], capsys, *parts)


def test_a_run_leaves_what_the_manual_promises(trained):
    names = {path.name for path in trained.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "loss.png", "samples.md", "summary.json", "tokenizer", "checkpoints"}
    assert names - {".lock"} == expected
    rows = metrics(trained)
    validation = [row for row in rows if row["split"] == "val"]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 31))
    assert [row["step"] for row in validation] == [0, 10, 20, 30]
    assert validation[-1]["loss"] < 0.8 * validation[0]["loss"]
    assert {"loss", "perplexity", "learning_rate", "grad_norm", "tokens"} < rows[-2].keys()
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["step"] == 30
    assert summary["best_validation_loss"] == min(row["loss"] for row in validation)
    assert re.findall(r"^## Step (\d+)$", (trained / "samples.md").read_text(), re.M) == ["15", "30"]


def test_it_prints_what_was_written_and_what_to_try_next(trained):
    out = Path("printed.txt").read_text()
    for text in ("tok_emb/embedding", "a step needs", "validation loss", "metrics.jsonl"):
        assert text in out
    commands = re.findall(r"^  (slm-jax .*)$", out, re.M)
    assert len(commands) == 3
    assert "slm-jax generate --run runs/small" in commands[0]
    assert commands[-1] == "slm-jax report --run runs/small"


def test_a_finished_run_is_left_as_it_is_and_resumes_with_more_steps(trained, capsys):
    before = (trained / "metrics.jsonl").read_bytes()
    assert train() == 0
    assert "--train.steps" in capsys.readouterr().out
    assert cli.main(["train", "--config", str(trained / "config.yaml")]) == 0  # the second command that a run suggests
    assert train(train__steps=20) == 0  # fewer than were done
    assert (trained / "metrics.jsonl").read_bytes() == before
    assert train(train__steps=34, checkpoint__every=7, model__remat="full", sample__every=0) == 0
    assert [row["step"] for row in metrics(trained) if row["split"] == "train"] == list(range(1, 35))


# Signals


def start(*words: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(Path(slm_jax.__file__).parent.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, words)], **pipes, text=True, env=environment)


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_saves_and_the_run_resumes_bit_for_bit(trained):
    unbroken = (metrics(trained), (trained / "samples.md").read_text())
    shutil.rmtree(RUNS)
    process = start("-m", "slm_jax", "train", *options(TEXT, RUNS))
    wait_for(lambda: (trained / "metrics.jsonl").exists() and len(metrics(trained)) > 4)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 0), err
    assert "Traceback" not in err
    if process.returncode:  # else the run was faster than the signal
        assert "stopped by SIGTERM" in err
        assert max(row["step"] for row in metrics(trained)) == saved_steps(trained / "checkpoints")[-1]
    assert train() == 0
    assert (metrics(trained), (trained / "samples.md").read_text()) == unbroken


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_cleanly(workplace):
    process = start("-m", "slm_jax", "train", *options(TEXT, RUNS))
    wait_for(lambda: (RUNS / "small" / "config.yaml").exists())  # about to compile
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err.splitlines() == ["slm-jax train: stopped by SIGTERM"], err
    assert train(train__steps=2) == 0


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "jaxlib._jax":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["slm-jax", "train"]
from slm_jax.cli import main
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are sent differently there")
def test_ctrl_c_while_jax_is_imported_ends_without_a_traceback(workplace):
    process = start("-c", INTERRUPTED)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_not_finite_steps_change_nothing_and_three_stop(workplace, capsys):
    assert train(optimizer__learning_rate=1e30, optimizer__warmup_steps=0) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite" in line
    skipped = [row for row in metrics(RUNS / "small") if row.get("skipped")]
    assert len(skipped) == 3
    assert all(row["loss"] is None or row["grad_norm"] is None for row in skipped)


def test_generate_is_decided_by_its_seed_and_checkpoint(trained, capsys):
    args = ["generate", "--run", str(trained), "--prompt", "the cat", "--max-new-tokens", "20"]
    texts = []
    for more in ([], [], ["--seed", "1"], ["--temperature", "0"], ["--temperature", "0", "--seed", "5"]):
        assert cli.main([*args, *more]) == 0
        shown = capsys.readouterr()
        assert "checkpoint of step 30" in shown.err  # the best
        assert shown.out.startswith("the cat")
        assert len(shown.out) <= len("the cat") + 20 + 1
        texts.append(shown.out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]
    fails(["generate", "--run", f"{trained}@7"], capsys, "no checkpoint of step 7", "20, 30")
    fails(["generate", "--run", trained, "--prompt", "a" * 17], capsys, "17 tokens", "16")
    fails(["generate", "--run", trained, "--prompt", "Ω"], capsys, "Ω")


def test_generate_writes_several_samples_from_a_prompt_file_up_to_a_stop(trained, capsys):
    Path("prompt.txt").write_text("the cat\n", encoding="utf-8")
    args = ["generate", "--run", str(trained), "--prompt-file", "prompt.txt", "--max-new-tokens", "12"]
    assert cli.main([*args, "--num-samples", "3"]) == 0
    first, *headed = re.split(r"--- (\d) of 3 ---\n", capsys.readouterr().out)
    numbers, samples = headed[0::2], headed[1::2]
    assert (first, numbers) == ("", ["1", "2", "3"])
    assert all(sample.startswith("the cat") for sample in samples)
    assert len(set(samples)) > 1
    end = samples[0].removeprefix("the cat").rstrip("\n")[-1]
    assert cli.main([*args, "--stop", end, "--stop", "not in it"]) == 0  # one sample is the first of several
    shorter = capsys.readouterr().out.removesuffix("\n")
    assert samples[0].startswith(shorter + end)
    assert end not in shorter.removeprefix("the cat")


# What is refused


def test_damaged_checkpoints_are_noticed(trained, capsys):
    unbroken = metrics(trained)
    damage(trained / "checkpoints" / "30")
    fails(["generate", "--run", f"{trained}@30"], capsys, "damaged", "SHA-256", "20")
    assert train() == 0
    assert "earlier checkpoint" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert metrics(trained) == unbroken
    for step in saved_steps(trained / "checkpoints"):
        damage(trained / "checkpoints" / str(step))
    training_fails(capsys, "every checkpoint is damaged", "--run")


def damage(checkpoint: Path) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_another_identity_is_refused_and_nothing_lost(trained, capsys):
    before = contents(trained)
    for more, line in (
        ({"seed": 1}, "seed is 1 now and was 0"),
        ({"model__emb_dim": 64}, "model.emb_dim is 64 now and was 32"),
        ({"train__batch_size": 4}, "train.batch_size is 4 now and was 8"),
        ({"tokenizer__kind": "bpe"}, "tokenizer.kind is 'bpe' now and was 'char'"),
        ({"data__packing": "true"}, "data.packing is true now and was false"),
        ({"resume": "never"}, "already holds a run"),
    ):
        training_fails(capsys, line, "--run", **more)
    TEXT.write_text(TEXT.read_text().replace("mat", "hat", 1))
    training_fails(capsys, "data.source has changed", "--run")
    assert contents(trained) == before


BAD = [
    (b"  \n ", "empty text", {}),
    (b"only a few words", "fewer than one window of 17", {}),
    (b"a b c " * 200, "prompt", {"sample__prompt": "Q"}),
    (b"\x01\x00\xff\xff" * 100, "65535", {"data__source": f"tokens:{TEXT}", "tokenizer__kind": "gpt2"}),
    (None, "model.emb_dim is 33", {"model__emb_dim": 33}),
    (None, "mesh.fsdp", {"mesh__fsdp": 64}),
    (None, "sample.prompt has 17 tokens", {"sample__prompt": "a" * 17}),
]


def test_mistakes_are_refused_before_anything_is_written(workplace, capsys):
    text = TEXT.read_bytes()
    for content, part, more in BAD:
        TEXT.write_bytes(content or text)
        training_fails(capsys, part, **more)
    assert not RUNS.exists() or not list(RUNS.iterdir())


def test_a_run_that_does_not_fit_is_refused_with_what_to_change(workplace, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(program, "device_memory", lambda: 1000)
        training_fails(capsys, "--train.accumulate", "--model.remat")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    training_fails(capsys, "free", "--checkpoint.keep", "--runs_dir")


def test_a_platform_that_jax_lacks_is_refused(workplace, capsys, monkeypatch):
    def devices():
        reason = "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so"
        raise RuntimeError(f"{reason} (set JAX_PLATFORMS='' to choose another)")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    training_fails(capsys, "JAX cannot start its devices (Failed to open libtpu.so); JAX_PLATFORMS is tpu: unset it")
    monkeypatch.delenv("JAX_PLATFORMS")
    training_fails(capsys, "try JAX_PLATFORMS=cpu")


@pytest.mark.parametrize("words", ["--help", "plan --help", "plan --device h100"])
def test_a_closed_pipe_ends_a_command_that_only_prints_quietly(words):
    read_end, write_end = os.pipe()
    os.close(read_end)  # as head does once it has its lines
    command = [sys.executable, "-m", "slm_jax", *words.split()]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_has_help_at_once(capsys):
    """No command's module is imported before it is called."""
    script = "import sys; from slm_jax import cli; cli.main(['--help']); print(*sys.modules)"
    listed = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert not {"jax", "numpy", "yaml", "slm_jax.commands"} & set(listed.split())
    for name in cli.COMMANDS:
        assert f"  {name} " in listed
        with contextlib.suppress(SystemExit):
            assert cli.main([name, "--help"]) == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    for key in ("--model.emb_dim", "--optimizer.learning_rate", "--train.epochs", "--resume", "default: 0.004"):
        assert key in out
    fails(["trian"], capsys, "unknown command 'trian'", "train, finetune")
    assert cli.main(["--version"]) == 0
    assert slm_jax.__version__ in capsys.readouterr().out
