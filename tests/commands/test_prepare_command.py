"""What must hold of ``slm-jax prepare``: a file that training takes, or one line and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusals import fails

from slm_jax import cli
from slm_jax.data.token_file import open_token_file
from slm_jax.tokenizer import CharTokenizer

DOCUMENTS = ["one small step", "two small steps", "one small step", "!!!!!!!!", "x", "a line\na line\na line"]


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    return f"text:{tmp_path}/a.txt"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return str(CharTokenizer().build_vocab("".join(DOCUMENTS)).save(tmp_path / "tokenizer.json"))


def prepare(*args: object) -> int:
    return cli.main(["prepare", *map(str, args)])


def test_it_writes_a_token_file_and_summarizes_it(source, tokenizer, tmp_path, capsys):
    out = tmp_path / "new" / "ids.bin"
    rules = ["--near-duplicates", 0.7, "--min-characters", 2, "--max-symbol-ratio", 0.5, "--max-repeated-lines", 0.5]
    assert prepare("--source", source, "--out", out, "--tokenizer", tokenizer, *rules) == 0
    opened = open_token_file(out)
    assert opened.tokenizer.decode(opened.tokens) == "one small step<|endoftext|>two small steps"
    text = capsys.readouterr().out
    assert f"{out} written, SHA-256 {opened.sha256[:12]}" in text
    assert "2 documents, 30 tokens, " in text
    for reason in ("copies of an earlier", "fewer characters", "more symbols", "more repeated lines"):
        assert f"1 left out: {reason}" in text
    assert f"try next: slm-jax train --data.source tokens:{out}" in text
    assert "0 left out: near duplicates" in text
    assert json.loads(Path(f"{out}.json").read_text())["source"] == source


def test_shards_are_written_and_shown(source, tokenizer, tmp_path, capsys):
    out = tmp_path / "ids.bin"
    given = ["--source", source, "--out", out, "--tokenizer", tokenizer, "--shard-tokens", 20]
    assert prepare(*given, "--show", 1, "--context-length", 16) == 0
    assert "batch 1 of 1" in capsys.readouterr().out
    assert (tmp_path / "ids-00002.bin").exists()
    assert open_token_file(out).tokens[:4].tolist() == open_token_file(out).tokens[:20].tolist()[:4]
    fails(["prepare", *given], capsys, "ids.bin.json: exists")
    Path(f"{out}.json").unlink()
    fails(["prepare", *given], capsys, "ids-00000.bin: exists")


def test_a_tokenizer_is_trained_on_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "low lower lowest newer wider"}\n{"body": "low low"}\n' * 3)
    out = tmp_path / "a.bin"
    bpe = ["--tokenizer", "bpe", "--vocab-size", 265, "--text-column", "body"]
    assert prepare("--source", f"jsonl:{tmp_path}/a.jsonl", "--out", out, *bpe) == 0
    opened = open_token_file(out)
    assert opened.tokenizer.vocab_size == 265
    assert opened.tokenizer.decode(opened.tokens) == "low lower lowest newer wider<|endoftext|>low low"
    (tmp_path / "b.txt").write_text("wider lowest")
    given = ["--source", f"text:{tmp_path}/b.txt", "--out", tmp_path / "b.bin", "--tokenizer", f"{out}.json"]
    assert prepare(*given) == 0
    assert open_token_file(tmp_path / "b.bin").tokenizer.to_dict() == opened.tokenizer.to_dict()


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_shown(source, tokenizer, tmp_path, capsys, packing):
    shown = ["--show", 2, "--context-length", 16, "--packing", packing]
    assert prepare("--source", source, "--out", tmp_path / "a.bin", "--tokenizer", tokenizer, *shown) == 0
    text = capsys.readouterr().out
    assert "batch 2 of 2" in text
    assert ("document" in text.partition("batch 1")[2].partition("try next")[0]) == packing


def test_what_is_there_is_replaced_only_on_request(source, tokenizer, tmp_path, capsys):
    out = tmp_path / "a.bin"
    out.write_bytes(b"precious")
    given = ["--source", source, "--out", out, "--tokenizer", tokenizer]
    fails(["prepare", *given], capsys, "a.bin: exists; choose another --out, or add --overwrite true")
    assert out.read_bytes() == b"precious"
    assert prepare(*given, "--overwrite", "true") == 0
    assert open_token_file(out).tokens.size > 10
    out.unlink()
    fails(["prepare", *given], capsys, "a.bin.json: exists")


@pytest.mark.parametrize("out", ["a.bin", "link.bin", "hard.bin", "b.bin"])
def test_a_source_is_never_replaced(tmp_path, tokenizer, capsys, out):
    (tmp_path / "a.bin").write_text("one small step")
    (tmp_path / "link.bin").symlink_to("a.bin")
    (tmp_path / "hard.bin").hardlink_to(tmp_path / "a.bin")
    (tmp_path / "b.bin.json").write_text('{"text": "one small step"}')
    sources = [f"--source=text:{tmp_path}/[a].bin", f"--source=jsonl:{tmp_path}/b.bin.json"]
    words = ["prepare", *sources, "--out", tmp_path / out, "--tokenizer", tokenizer, "--overwrite", "true"]
    fails(words, capsys, "would be replaced; choose another --out")
    assert (tmp_path / "a.bin").read_text() == "one small step"
    assert (tmp_path / "b.bin.json").read_text() == '{"text": "one small step"}'


def test_beam_is_refused_in_one_line(source, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = ["prepare", "--source", source, "--out", tmp_path / "a.bin", "--tokenizer", tokenizer]
    fails([*given, "--runner", "direct"], capsys, "needs Apache Beam; install it: pip install 'slm-jax[beam]'")
    fails([*given, "--beam-options=--project=p"], capsys, "beam_options need Beam; add --runner")
    fails([*given, "--runner", "direct", "--processes", 2], capsys, "processes is 2, but Beam starts its own")
    fails([*given[:-1], "gs://bucket/tokenizer", "--source", "text:gs://bucket/a.txt"], capsys, "--runner dataflow")
    fails([*given, "--out", "gs://bucket/a.bin", "--show", 1], capsys, "show is 1, but out is gs://bucket/a.bin")
    monkeypatch.undo()
    monkeypatch.setattr("slm_jax.commands.prepare.check_installed", lambda runner: None)
    fails([*given, "--runner", "dataflow"], capsys, "a.txt: Dataflow's machines don't see it")
    text = ["--source", "text:gs://bucket/a.txt", "--runner", "dataflow", "--out"]
    fails(["prepare", *text, tmp_path / "a.bin"], capsys, "a.bin: Dataflow's machines don't see it")
    fails(["prepare", *text, "gs://bucket/a.bin", "--tokenizer", "bpe"], capsys, "bpe cannot be trained on it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "tokenizer.json"]


def test_beam_writes_the_documents(source, tokenizer, tmp_path, capsys):
    pytest.importorskip("apache_beam")
    bad = ["prepare", "--source", source, "--runner", "direct", "--out"]
    fails([*bad, "nowhere://bucket/a.bin"], capsys, "nowhere://bucket/a.bin: Unable to get filesystem")
    given = ["--source", source, "--tokenizer", tokenizer, "--near-duplicates", 0.7, "--show", 1]
    assert prepare(*given, "--runner", "direct", "--out", tmp_path / "beam.bin") == 0
    assert "5 documents, " in capsys.readouterr().out
    assert prepare(*given, "--out", tmp_path / "alone.bin") == 0
    beam, alone = (open_token_file(tmp_path / name).tokens.tolist() for name in ("beam.bin", "alone.bin"))
    assert sorted(beam) == sorted(alone)


def test_progress_is_a_line_now_and_then(source, tokenizer, tmp_path, monkeypatch, capsys):
    given = ["--source", source, "--tokenizer", tokenizer, "--out"]
    prepare(*given, tmp_path / "a.bin")
    assert "tokens/s" not in capsys.readouterr().err
    monkeypatch.setattr("slm_jax.commands.prepare.PLAIN_INTERVAL", 0)
    prepare(*given, tmp_path / "b.bin")
    assert capsys.readouterr().err.startswith("100%, 5 documents, ")


def start(*args: str) -> "subprocess.Popen[bytes]":
    command, env = [sys.executable, "-m", "slm_jax", "prepare", *args], {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=env)


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_stop_leaves_finished_parts_and_the_same_command_resumes(tmp_path, tokenizer, signum, status):
    (tmp_path / "a.txt").write_text("one small step " * 1_200_000)
    out, processes = tmp_path / "o" / "a.bin", "2" if signum == signal.SIGKILL else "1"
    given = [
        "--source",
        f"text:{tmp_path}/a.txt",
        "--out",
        str(out),
        "--tokenizer",
        tokenizer,
        "--processes",
        processes,
    ]
    process = start(*given, "--processes", processes)
    deadline = time.monotonic() + 60
    while len(list(out.parent.glob("a.bin.parts/*.npz"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)  # the pipe ends when the last of its processes has ended
    assert process.returncode == status, error
    assert b"Traceback" not in error
    assert (b"the same command resumes" in error) == (signum != signal.SIGKILL)
    assert [path.name for path in out.parent.iterdir()] == ["a.bin.parts"]
    assert prepare(*given, "--show", 1) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.bin", "a.bin.json"]
    assert open_token_file(out).tokens.size == 18_000_000


def test_a_stop_ends_the_training_of_a_tokenizer(tmp_path):
    words = "".join(f"{i * 7919 % 1_000_003:x}{i:x} " for i in range(600_000))
    (tmp_path / "a.txt").write_text(words * 4)
    bpe = ["--tokenizer", "bpe", "--vocab-size", "1000000"]
    process = start("--source", f"text:{tmp_path}/a.txt", "--out", str(tmp_path / "o" / "a.bin"), *bpe)
    assert b"training a tokenizer" in process.stderr.readline()
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=2)
    assert process.returncode == -signal.SIGINT
    assert not (tmp_path / "o").exists()
