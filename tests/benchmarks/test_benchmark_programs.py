"""What must hold of the programs: words tell classes apart, and a mistake is one line before anything runs."""

import importlib.util
import re

import pytest
from programs import run


def test_accuracy_on_what_words_tell(tmp_path):
    rows = [f"{label}\tthe {word} {i:02d}" for i in range(50) for label, word in (("a", "cat"), ("b", "dog"))]
    (tmp_path / "words.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
    done = run("bag_of_words", "--source", f"tsv:{tmp_path / 'words.tsv'}")
    if importlib.util.find_spec("sklearn") is None:
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line == "bag_of_words: scikit-learn is not installed; install it with: pip install scikit-learn"
        return
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["grouped, stratified", "the book's"]
    assert all(line.endswith("mean 100.00%") for line in done.stdout.splitlines())


def test_files_changed_at_random_are_read_or_refused_in_one_line():
    pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    done = run("faults_files", "--runs", 200, "--seconds", 1, "--only", "FILE")
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(r"(\d+)/\1 ended .*", done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("bag_of_words", ["--source", "tsv:none.tsv"], "none.tsv: no such file"),
        ("gpu", ["--dry-run", "--parts", "all"], "there is no 'all'"),
        ("gpu", ["--dry-run", "--nanogpt", "nowhere"], "--nanogpt: nowhere is not a folder"),
        ("peers", ["--contestants", "torch"], "there is no 'torch'; expected some of slm_jax, nanogpt"),
        ("peers", ["--width=15", "--heads=2"], "--width is 15, which --heads 2 does not divide"),
        ("peers", ["--work=generate", "--context=16"], "--prompt 64 and --new 128 are more than --context 16"),
        ("peers", ["--output", "nowhere/result.json"], "nowhere is not a folder; make it first"),
        ("peers", ["--picture", "result.doc"], "result.doc has no known format; expected one of .png"),
        ("scaling", ["--step", '["--model.preset", "giant"]'], "giant"),
        ("speedrun", ["--seeds", "0", "0"], "--seeds 0 0: one is given twice"),
        ("speedrun", ["--output", "nowhere/speedrun.json"], "nowhere/speedrun.json: expected a file in a folder"),
        ("speedrun", ["--nanogpt", "."], "has no train.py; expected a checkout of nanoGPT"),
        ("step_profile", ["--contestants", "nanogpt"], "unrecognized arguments: --contestants"),
    ],
)
def test_mistakes_end_with_status_2(program, words, message, tmp_path):
    done = run(program, *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
