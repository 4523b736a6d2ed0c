"""What must hold of the bag-of-words baseline: it learns what words tell, and says in one line what is missing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "bag_of_words.py"


def run_on(source):
    return subprocess.run([sys.executable, FILE, "--source", source], capture_output=True, text=True)


@pytest.fixture
def words(tmp_path):
    rows = [f"{label}\tthe {word} {i:02d}" for i in range(50) for label, word in (("a", "cat"), ("b", "dog"))]
    (tmp_path / "words.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
    return f"tsv:{tmp_path / 'words.tsv'}"


def test_accuracy_on_what_words_tell(words):
    done = run_on(words)
    if importlib.util.find_spec("sklearn") is None:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines() == [
            "bag_of_words: scikit-learn is not installed; install it with: pip install scikit-learn"
        ]
        return
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["grouped, stratified", "the book's"]
    assert all(line.endswith("mean 100.00%") for line in done.stdout.splitlines())


def test_a_missing_file_is_one_line(tmp_path):
    done = run_on(f"tsv:{tmp_path / 'none.tsv'}")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "none.tsv: no such file" in line
