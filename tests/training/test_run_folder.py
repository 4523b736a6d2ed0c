"""What must hold of a run's folder: a log that reads as one unbroken run, whatever was cut off or sampled in it."""

import json
import math
import os
import shutil
import threading

import jax
import pytest
from refusals import refused

from slm_jax.errors import InputError
from slm_jax.training.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.create()
    return folder


def row(step, split="train", **more):
    return {"step": step, "split": split, "loss": 1.0 / (step + 1), **more}


def sampled(run):
    return [step for step, _ in run.samples()]


def test_metrics_are_one_json_object_a_line_in_order(run):
    assert run.metrics() == []
    rows = [row(1), row(1, "val", perplexity=2.5), row(2, mfu=None)]
    for r in rows:
        run.add_metrics(r)
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == rows
    assert run.metrics() == rows
    assert run.metrics("val") == [rows[1]]
    assert run.metrics("train") == [rows[0], rows[2]]


def test_what_json_has_no_number_for_becomes_null(run):
    run.add_metrics({"step": 3, "split": "train", "loss": math.nan, "grad_norm": math.inf, "perplexity": -math.inf})
    line = run.metrics_file.read_text()
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed == {"step": 3, "split": "train", "loss": None, "grad_norm": None, "perplexity": None}


@pytest.mark.parametrize("torn", ['{"step": 3, "spl', "{", '{"step": 3, "split": "train", "loss": 1.'])
def test_a_last_line_that_was_cut_off_is_left_out_and_cleared_away(run, torn):
    rows = [row(1), row(2)]
    for r in rows:
        run.add_metrics(r)
    with run.metrics_file.open("a") as file:
        file.write(torn)
    assert run.metrics() == rows
    run.cut_back(10)
    run.add_metrics(row(3))
    assert run.metrics() == [*rows, row(3)]


def test_damaged_lines_are_left_out_and_the_others_kept(run):
    rows = [row(step) for step in range(1, 6)]
    for r in rows:
        run.add_metrics(r)
        run.add_sample(r["step"], f"text {r['step']}")
    seal = run.seal()
    assert run.changes(seal) == []
    for file, found, put in ((run.metrics_file, '"step": 3', '"step"; 3'), (run.samples_file, "## Step 3", '#"Step 3')):
        file.write_text(file.read_text().replace(found, put))
    assert run.changes(seal) == [run.metrics_file, run.samples_file]
    assert run.metrics() == [r for r in rows if r["step"] != 3]
    run.cut_back(4)
    assert [r["step"] for r in run.metrics()] == [1, 2, 4]
    assert sampled(run) == [1, 2, 4]
    assert "text 3" in run.samples_file.read_text()
    run.samples_file.write_text(run.samples_file.read_text().replace("## Step 1", "#!Step 1"))
    run.cut_back(4)
    assert "text 1" in run.samples_file.read_text()


def test_what_is_appended_and_cut_off_again_does_not_change_what_was_logged_before(run):
    run.add_metrics(row(1, loss=1e-05, name="ünïcode \u2028"))
    run.add_sample(1, "text")
    seal = run.seal()
    run.add_metrics(row(2))
    run.add_sample(2, "more")
    run.cut_back(1)
    assert run.changes(seal) == []
    assert run.seal() == seal
    run.metrics_file.unlink()
    assert run.changes(seal) == [run.metrics_file]


def test_cutting_back_drops_what_came_after_the_step(run):
    rows = [row(0, "val"), row(1), row(2), row(2, "val"), row(3), row(4, "val")]
    for r in rows:
        run.add_metrics(r)
    for step in (1, 2, 4):
        run.add_sample(step, f"text {step}")
    run.cut_back(2)
    assert run.metrics() == rows[:4]
    assert sampled(run) == [1, 2]
    run.cut_back(-1)
    assert run.metrics() == []
    assert sampled(run) == []


def test_a_sample_may_say_what_it_likes_even_headings(run):
    """Text that looks like the file's own headings neither hides a sample nor makes one, nor is cut in two."""
    texts = {
        3: "Before\n## Step 5\nafter",
        5: "## Step 9\n\n## Step 4\r\n## Step 7\u2028## Step 8\x0c## Step 6",
        10: "the last",
    }
    run.add_sample(3, texts[3])
    assert 5 not in sampled(run)
    for step in (5, 10):
        run.add_sample(step, texts[step])
    whole = run.samples_file.read_text(encoding="utf-8")
    assert sampled(run) == [3, 5, 10]
    run.cut_back(10)
    assert run.samples_file.read_text(encoding="utf-8") == whole
    run.cut_back(6)
    kept = run.samples_file.read_text(encoding="utf-8")
    assert whole.startswith(kept)
    assert "after" in kept
    assert all(f"## Step {step}" in kept for step in (4, 6, 7, 8, 9))
    assert "the last" not in kept
    run.cut_back(4)
    assert sampled(run) == [3]


def test_hosts_other_than_the_first_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run = RunFolder(tmp_path / "a")
    run.create()
    run.add_metrics(row(1))
    run.add_sample(1, "text")
    run.write_text("config.yaml", "text")
    run.cut_back(0)
    assert not run.path.exists()
    assert run.metrics() == []


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"{tmp_path}/file/a: cannot write there.*--runs_dir"):
        RunFolder(tmp_path / "file" / "a").create()


def test_asking_who_trains_does_not_keep_a_process_from_it(run):
    fcntl = pytest.importorskip("fcntl")
    assert not run.is_locked()
    with run.lock():
        assert run.is_locked()
        with pytest.raises(InputError, match="being trained by another process"), run.lock():
            pass
    assert not run.is_locked()
    with (run.path / ".lock").open() as file:  # as is_locked does for a moment
        fcntl.flock(file, fcntl.LOCK_SH)
        release = threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        with run.lock():
            pass
        release.join()


def test_a_process_whose_lock_another_one_has_stops_at_its_next_line(run):
    """As where the lock was deleted, or on a disk without locks."""
    other = RunFolder(run.path)
    run.write_text("config.yaml", "")
    with run.lock():
        (run.path / ".lock").unlink()
        run.add_metrics(row(1))  # takes it again
        with pytest.raises(InputError, match="being trained by another process"), other.lock():
            pass
        (run.path / ".lock").unlink()
        with other.lock():
            with pytest.raises(InputError, match="another process is now training this run"):
                run.add_metrics(row(2))
            other.add_metrics(row(3))
    assert [r["step"] for r in run.metrics()] == [1, 3]
    with run.lock():
        shutil.rmtree(run.path)
        run.checkpoints.mkdir(parents=True)  # as a save does
        with refused(f"{run.path}: was removed"):
            run.add_metrics(row(4))


def test_what_a_killed_process_has_left_is_removed_by_the_next(run):
    (run.path / "tokenizer").mkdir()
    for name in ("summary.json.0123abcd.partial", "tokenizer/tokenizer.json.0123abcd.partial"):
        (run.path / name).write_text("{")
    with run.lock():
        assert {path.name for path in run.path.rglob("*")} == {"tokenizer", ".lock"}


@pytest.mark.hostile
@pytest.mark.parametrize("name", [".lock", "samples.md", "checkpoints", "checkpoints/20", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("make", [lambda path, to: path.symlink_to(to), lambda path, _: os.mkfifo(path)])
def test_links_of_a_copied_folder_are_refused(run, tmp_path, name, make):
    (run.path / name).parent.mkdir(exist_ok=True)
    make(run.path / name, tmp_path / "elsewhere")
    with refused(rf"{run.path / name} is a link"):
        run.check_links()


@pytest.mark.parametrize(
    "write", [lambda run: run.add_metrics(row(1)), lambda run: run.write_text("summary.json", "{}")]
)
def test_a_file_that_cannot_be_written_is_one_line_with_its_name(run, write):
    run.path.rmdir()
    with refused(rf"{run.path}/\w+\.jsonl?: cannot be written: No such file or directory"):
        write(run)


def test_a_folder_is_looked_at_without_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: pytest.fail("devices were asked for"))
    assert RunFolder(tmp_path).metrics() == []
    assert not RunFolder(tmp_path).is_locked()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere every path is a text")
def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(InputError, match="not UTF-8"):
        RunFolder(tmp_path / os.fsdecode(b"caf\xe9")).create()
