"""The commands as a person uses them: what they print, what they leave, how they end."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pretraining import metrics, options

import slm_jax
from slm_jax import cli
from slm_jax.training import hardware, loop
from slm_jax.training.checkpoint import saved_steps


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never broken."""
    runs = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *options(text_file, runs)]) == 0
    return runs / "small"


def fails(capsys: pytest.CaptureFixture[str], args: list[str], *said: str) -> str:
    """The command ends with 2 and one line on stderr that says all of ``said``."""
    assert cli.main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for text in said:
        assert text in lines[0]
    return lines[0]


def test_a_run_leaves_what_it_says(trained: Path) -> None:
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


def test_it_prints_what_was_written_and_what_to_try_next(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *options(text_file, tmp_path, train__steps=2)]) == 0
    out = capsys.readouterr().out
    for text in ("tok_emb/embedding", "a step takes", "validation loss", "metrics.jsonl", "try next:"):
        assert text in out
    commands = re.findall(r"^  (slm-jax .*)$", out, re.M)
    assert len(commands) == 3
    assert f"slm-jax generate --run {tmp_path}/small" in commands[0]
    assert commands[-1] == f"slm-jax report --run {tmp_path}/small"


def test_a_finished_run_is_left_as_it_is(trained: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    assert cli.main(["train", *options(text_file, trained.parent)]) == 0
    assert (trained / "metrics.jsonl").read_bytes() == before
    assert "raise --train.steps" in capsys.readouterr().out
    assert cli.main(["train", *options(text_file, trained.parent, train__steps=20)]) == 0  # fewer than were done
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_going_on_with_more_steps_and_other_execution_keys(trained: Path, text_file: Path, tmp_path: Path) -> None:
    longer = {"optimizer__schedule": "constant"}
    assert cli.main(["train", *options(text_file, tmp_path, train__steps=10, **longer)]) == 0
    more = {"train__steps": 20, "checkpoint__every": 7, "model__remat": "full", "sample__every": 0, **longer}
    assert cli.main(["train", *options(text_file, tmp_path, **more)]) == 0
    assert [row["step"] for row in metrics(tmp_path / "small") if row["split"] == "train"] == list(range(1, 21))


def test_the_run_config_goes_on_with_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second command that a run ends with."""
    assert cli.main(["train", "--config", str(trained / "config.yaml")]) == 0
    assert "has done its 30 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(trained: Path, text_file: Path, tmp_path: Path) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        runs = tmp_path / signum.name
        process = start(options(text_file, runs, train__steps=30))
        wait_for(lambda runs=runs: (runs / "small" / "metrics.jsonl").exists() and len(metrics(runs / "small")) > 4)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (128 + signum, 0), err
        assert "Traceback" not in err
        if process.returncode:  # else the run was faster than the signal
            assert f"stopped by {signum.name}" in err
            stopped = saved_steps(runs / "small" / "checkpoints")[-1]
            assert max(row["step"] for row in metrics(runs / "small")) == stopped
        assert cli.main(["train", *options(text_file, runs)]) == 0
        assert metrics(runs / "small") == metrics(trained)
        assert (runs / "small" / "samples.md").read_text() == (trained / "samples.md").read_text()


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_cleanly(text_file: Path, tmp_path: Path) -> None:
    process = start(options(text_file, tmp_path))
    wait_for(lambda: (tmp_path / "small" / "config.yaml").exists())  # about to compile
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err.splitlines() == ["slm-jax train: stopped by SIGTERM"], err
    assert cli.main(["train", *options(text_file, tmp_path, train__steps=2)]) == 0


@pytest.mark.slow
def test_killed_equals_unbroken_bitwise() -> None:
    """Parameters, optimizer state, data state, every logged loss: the benchmark with two kills instead of twenty."""
    script = Path(__file__).parent.parent / "benchmarks" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, script, "--kills", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2/2 bitwise equal" in done.stdout


def start(args: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "slm_jax", "train", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(slm_jax.__file__).parent.parent)},
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


def test_not_finite_steps_change_nothing_and_three_stop(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = options(text_file, tmp_path, optimizer__learning_rate=1e30, optimizer__warmup_steps=0)
    assert cli.main(["train", *args]) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "not finite in the 3 steps" in captured.err
    rows = metrics(tmp_path / "small")
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert len(skipped) == 3
    assert all(row["loss"] is None or row["grad_norm"] is None for row in rows if row.get("skipped"))


def test_overfitting_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = tmp_path / "noise.txt"  # nothing to learn but by heart
    noise.write_text("".join(chr(97 + byte % 16) for byte in hashlib.shake_128(b"noise").digest(400)))
    more = {"model.n_layers": 2, "model.drop_rate": 0.0, "train.steps": 200, "train.eval_every": 20}
    args = options(noise, tmp_path, **more, checkpoint__every=500)
    assert cli.main(["train", *args]) == 0
    assert "overfitting: the validation loss was lowest at step" in capsys.readouterr().out
    rows = [row for row in metrics(tmp_path / "small") if row["split"] == "val"]
    best = min(rows, key=lambda row: row["loss"])["step"]
    assert best < 200
    assert best in saved_steps(tmp_path / "small" / "checkpoints")


def test_generate_prints_the_prompt_and_goes_on(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "--run", str(trained), "--prompt", "the cat", "--max-new-tokens", "20"]
    texts = []
    for more in ([], [], ["--seed", "1"], ["--temperature", "0"], ["--temperature", "0", "--seed", "5"]):
        assert cli.main([*args, *more]) == 0
        texts.append(capsys.readouterr().out)
        assert texts[-1].startswith("the cat")
        assert len(texts[-1]) <= len("the cat") + 20 + 1
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]


def test_generate_takes_the_best_checkpoint_or_the_one_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (str(trained), f"{trained}@30"):
        assert cli.main(["generate", "--run", name, "--max-new-tokens", "2"]) == 0
        assert "checkpoint of step 30" in capsys.readouterr().err
    run = ["generate", "--run", str(trained)]
    fails(capsys, ["generate", "--run", f"{trained}@7"], "no checkpoint of step 7", "20, 30")
    fails(capsys, [*run, "--temperature", "-1"], "temperature is -1.0")
    fails(capsys, [*run, "--prompt", "a" * 17], "17 tokens, more than the model's context of 16")
    fails(capsys, [*run, "--prompt", "Ω"], "Ω")
    fails(capsys, ["generate", "--run", str(trained.parent / "none")], "no such file or folder", "a run")
    fails(capsys, ["generate"], "--run is missing; expected a run's folder such as runs/tiny")


def test_generate_writes_several_samples_from_a_prompt_file_up_to_a_stop(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("the cat\n", encoding="utf-8")
    args = ["generate", "--run", str(trained), "--prompt-file", str(path), "--max-new-tokens", "12"]
    assert cli.main([*args, "--num-samples", "3"]) == 0
    headed = re.split(r"--- (\d) of 3 ---\n", capsys.readouterr().out)
    assert headed[0::2][0] == ""
    assert headed[1::2] == ["1", "2", "3"]
    samples = headed[2::2]
    assert all(sample.startswith("the cat") for sample in samples)
    assert len(set(samples)) > 1
    assert cli.main(args) == 0
    assert capsys.readouterr().out == samples[0]
    ends = [samples[0].removeprefix("the cat").rstrip("\n")[-1], "not in it"]
    assert cli.main([*args, "--stop", ends[0], "--stop", ends[1]]) == 0
    shorter = capsys.readouterr().out.removesuffix("\n")
    assert samples[0].startswith(shorter + ends[0])
    assert ends[0] not in shorter.removeprefix("the cat")
    fails(capsys, ["generate", "--run", str(trained), "--prompt-file", str(tmp_path / "none")], "none: No such file")


def test_damaged_checkpoints_are_noticed(
    trained: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *options(text_file, tmp_path)]) == 0
    run = tmp_path / "small"
    damage(run / "checkpoints" / "30")
    fails(capsys, ["generate", "--run", f"{run}@30"], "damaged", "SHA-256", "another step of 20")
    assert cli.main(["train", *options(text_file, tmp_path)]) == 0
    assert "going back to an earlier checkpoint" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert metrics(run) == metrics(trained)
    for step in saved_steps(run / "checkpoints"):
        damage(run / "checkpoints" / str(step))
    fails(capsys, ["train", *options(text_file, tmp_path)], "every checkpoint is damaged", "--run NAME")


def damage(checkpoint: Path) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"seed": 1}, "seed is 1 now and was 0"),
        ({"optimizer__learning_rate": 0.02}, "optimizer.learning_rate is 0.02 now and was 0.01"),
        ({"model__emb_dim": 64}, "model.emb_dim is 64 now and was 32"),
        ({"train__batch_size": 4}, "train.batch_size is 4 now and was 8"),
        ({"data__validation_fraction": 0.2}, "data.validation_fraction is 0.2 now and was 0.1"),
        ({"tokenizer__kind": "bpe"}, "tokenizer.kind is 'bpe' now and was 'char'"),
    ],
)
def test_another_identity_is_refused_and_nothing_lost(
    trained: Path, text_file: Path, capsys: pytest.CaptureFixture[str], more: dict[str, object], said: str
) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    fails(capsys, ["train", *options(text_file, trained.parent, **more)], said, "--run NAME")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_changed_text_is_another_identity(
    trained: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file.read_text()
    try:
        text_file.write_text(text.replace("mat", "hat", 1))
        fails(
            capsys,
            ["train", *options(text_file, trained.parent)],
            "the text behind data.source is not the same",
            "--run NAME",
        )
    finally:
        text_file.write_text(text)


def test_resume_never_and_must(
    trained: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["train", *options(text_file, trained.parent, resume="never")], "already holds a run", "--run")
    fails(capsys, ["train", *options(text_file, tmp_path, resume="must")], "no checkpoint to go on from")


def test_a_folder_of_something_else_is_left_alone(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.doc").write_text("x")
    fails(capsys, ["train", *options(text_file, tmp_path)], "not empty and holds no run")


def test_bad_text_is_refused_before_anything_is_written(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(content: bytes, *said: str, **more: object) -> None:
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        fails(capsys, ["train", *options(path, tmp_path, **more)], *said)
        assert not (tmp_path / "small").exists()

    refused(b"", "empty text")
    refused(b"  \n ", "empty text")
    refused(b"only a few words", "fewer than one window of 17")
    refused(b"some text \xff and more", "bad.txt", "byte 10", "UTF-8")
    refused(b"a b c " * 200, "prompt", sample__prompt="Q")
    token_file = tmp_path / "ids.bin"
    token_file.write_bytes(b"\x01\x00\xff\xff" * 100)
    args = options(text_file, tmp_path, data__source=f"tokens:{token_file}", tokenizer__kind="gpt2")
    fails(capsys, ["train", *args], "ids.bin", "token 1", "65535", "50257")
    assert not (tmp_path / "small").exists()


def test_bad_values_are_refused_before_anything_is_written(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*said: str, **more: object) -> None:
        fails(capsys, ["train", *options(text_file, tmp_path, **more)], *said)
        assert not (tmp_path / "small").exists()

    refused("model.emb_dim is 33", "n_heads 2", model__emb_dim=33)
    refused("unknown key train.stepz", "train.steps?", train__stepz=3)
    refused("train.steps is 'many'", "whole number", train__steps="many")
    refused("train.accumulate is 3", train__accumulate=3)
    refused("mesh.tensor is 2", mesh__tensor=2)
    refused("mesh.fsdp", mesh__fsdp=64)
    refused("no kind", data__source="cats.txt")
    refused("sample.prompt has 17 tokens", sample__prompt="a" * 17)


def test_what_does_not_fit_is_said_with_what_to_change(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "device_memory", lambda: 1000)
    fails(
        capsys, ["train", *options(text_file, tmp_path)], "a training step needs", "--train.accumulate", "--model.remat"
    )
    monkeypatch.undo()
    usage = type(loop.shutil.disk_usage("/"))
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    fails(capsys, ["train", *options(text_file, tmp_path)], "free", "--checkpoint.keep", "--runs_dir")


def test_places_that_cannot_be_written(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["train", *options(text_file, text_file)], "cannot write there")
    (tmp_path / "small").write_text("a file")
    fails(capsys, ["train", *options(text_file, tmp_path)], "is a file")


def test_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--help"])
    assert exit_.value.code == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    for key in ("--model.emb_dim", "--optimizer.learning_rate", "--train.epochs", "--resume", "default: 0.004"):
        assert key in out


def test_every_command_has_help_at_once() -> None:
    """No command's module is imported before it is called, and none needs more than its options for its help."""
    script = "import sys; from slm_jax import cli; cli.main(['--help']); print(*sys.modules)"
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"jax", "yaml", "slm_jax.commands.train", "slm_jax.commands.generate"} & set(listed.split())
    for name in cli.COMMANDS:
        assert f"  {name} " in listed
        status: int | str | None
        try:
            status = cli.main([name, "--help"])
        except SystemExit as end:  # as argparse ends its own
            status = end.code
        assert status == 0


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["trian"], "unknown command 'trian'", "expected one of train, finetune, ")
    assert cli.main(["--help"]) == 0
    assert cli.main(["--version"]) == 0
    assert slm_jax.__version__ in capsys.readouterr().out
