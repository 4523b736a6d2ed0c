"""What must hold of a page: it is written of whatever a folder holds, and says what is not there."""

import json
import time

import pytest
from reports import CONFIG, Page, make_run, train, val

from slm_jax.errors import InputError, MissingInputError
from slm_jax.tools.report import read
from slm_jax.tools.report.classes import MOST_CLASSES, classes_section
from slm_jax.tools.report.compare import write_comparison
from slm_jax.tools.report.page import MOST_SAMPLES, facts, write_page
from slm_jax.tools.report.read import defaults, figure, read_records, read_responses, read_samples, steps_to_try


def page_of(*folders):
    """Return the page of a run, or of several."""
    records = read_records([str(folder) for folder in folders])
    return Page(write_page(records[0]) if len(records) == 1 else write_comparison(records)).check_whole()


def test_an_empty_folder_but_for_its_configuration(tmp_path):
    page = page_of(make_run(tmp_path / "a"))
    for said in ("The log is empty.", "no checkpoint yet", "no checkpoint can be read", "Not recorded"):
        assert said in page.text


def test_a_run_in_progress(tmp_path):
    page = page_of(make_run(tmp_path / "a", [train(i) for i in range(1, 8)]))
    assert "not finished" in page.text
    assert "7 of 100" in page.text
    assert "No validation loss yet." in page.text


def test_a_run_that_diverged(tmp_path):
    rows = [val(0, 8.0), *(train(i, 5.0) for i in range(1, 5)), val(5, None), train(6, None), train(7, None)]
    page = page_of(make_run(tmp_path / "a", rows))
    assert "in 2 logged steps loss or gradients were not finite" in page.text
    assert "8.0000 at step 0" in page.text
    assert "No figure of the log" in page_of(make_run(tmp_path / "b", [val(1, None)])).text


def test_a_long_log_is_quick_and_small(tmp_path):
    folder = make_run(tmp_path / "a", [train(i, 2 + (i % 7) / 10) for i in range(1, 20_001)])
    began = time.process_time()
    page = page_of(folder)
    assert time.process_time() - began < 10  # less than 1 s
    assert len(page.html) < 200_000


def test_names_and_samples_are_escaped(tmp_path):
    text = "## Step 5\n\n    <script>alert(1)</script> 日本 \x00\n    ## Step 6\n\n## Step 10\n\n    ok\n\n"
    folder = make_run(tmp_path / '<b>&"', [train(1)], samples_md=text)
    page = page_of(folder)
    assert '<b>&"' in page.texts
    assert "b" not in page.elements
    assert "<script>alert(1)</script> 日本 \ufffd\n## Step 6" in page.texts
    assert page.elements.count("details") == 3  # two samples, all keys
    assert page.values("open") == [None, None]


def test_samples_first_and_last_are_open(tmp_path):
    text = "".join(f"## Step {i}\n\n    text {i}\n\n" for i in range(100))
    folder = make_run(tmp_path / "a", [train(1)], samples_md=text)
    (record,) = read_records([str(folder)])
    assert read_samples(record.folder)[7] == (7, "text 7")
    page = page_of(folder)
    assert {"text 0", "text 99"} <= set(page.texts)
    assert f"{MOST_SAMPLES} of 100; samples.md has all of them." in page.text


@pytest.mark.parametrize(
    "content", ["[1, 2", "7", "[]", "null", '{"before": 3, "after": {"test": []}, "environment": 3}']
)
@pytest.mark.parametrize("task", ["pretraining", "classification", "instruction"])
def test_files_that_say_something_else(tmp_path, task, content):
    files = dict.fromkeys(("summary_json", "before_json", "responses_json", "responses_before_json"), content)
    rows = [{"step": "x", "split": "train"}, {"step": 2, "split": 3}, {"step": 2, "split": "val"}]
    page_of(make_run(tmp_path / "a", rows, f"task: {task}\n", **files))


NO_FIGURES = (3, "x", 10**400, 1e300, -1, [3], [[1], [2, 3]], [[10**400, 1e300], [-1, 0.5]], {"a": 1}, [])


@pytest.mark.parametrize("value", NO_FIGURES)
@pytest.mark.parametrize("key", ["classes", "confusion", "support", "precision", "loss", "accuracy"])
def test_figures_of_a_classifier_that_are_none_are_left_out(tmp_path, key, value):
    measured = {"classes": ["a", "b"], "confusion": [[1, 2], [3, 4]], "support": [3, 7], "accuracy": 0.5, "loss": 0.5}
    measured |= {name: [0.5, 0.5] for name in ("precision", "recall", "f1")}
    summary = {"step": 1, "seconds": value, "after": {"test": {**measured, key: value}}}
    (record,) = read_records(
        [str(make_run(tmp_path / "a", [train(1)], "task: classification", summary_json=json.dumps(summary)))]
    )
    page = Page("".join(classes_section(record)))
    assert facts(record)["steps"] == "1"
    assert page.text
    assert ("true ↓, predicted →" in page.text) == (key not in ("classes", "confusion"))


def test_a_log_whose_figures_are_too_large(tmp_path):
    rows = [val(0, 3.0), train(1), train(2, 10**400, tokens=10**400), val(2, 1e308), train(-1), val(10**400)]
    folder = make_run(tmp_path / "a", rows, summary_json="[" * 100_000)
    (record,) = read_records([str(folder)])
    assert [row["step"] for row in record.rows] == [0, 1, 2, 2]
    assert record.best() == (0, 3.0)
    assert "in 1 logged steps loss or gradients were not finite" in page_of(folder).text


@pytest.mark.parametrize(
    "config",
    [
        "[1, 2",
        "7",
        "",
        "task: [1]\n",
        "task: other\nfoo: {bar: '\\'}\n",
        'a: "\\ud800"',
        "a: &b [*b]",
        "a: [2020-01-01: 1]",
    ],
)
def test_configurations_of_another_kind(tmp_path, config):
    page_of(make_run(tmp_path / "a", (), config))


def test_what_differs_from_the_defaults_is_marked(tmp_path):
    page = page_of(make_run(tmp_path / "a", [train(1)], CONFIG + "seed: 0\noptimizer: {learning_rate: 0.5}\n"))
    marks = page.html.count("<mark>")
    assert marks == 2  # the steps and the learning rate
    assert "0.004" in page.texts  # the default
    assert "all 4 keys" in page.text
    assert defaults("classification")["optimizer.learning_rate"] == 1e-3
    assert defaults("instruction")["data.source"] == "builtin:docstrings"


def test_a_classifier(tmp_path):
    def figures(right):
        matrix = [[right, 10 - right], [3, 7]]
        measured = {"classes": ["ham", "<spam>"], "confusion": matrix, "accuracy": (right + 7) / 20, "macro_f1": 0.5}
        measured |= {"precision": [0.5, 0.5], "recall": [0.5, 0.5], "f1": [0.5, 0.5], "support": [10, 10], "loss": 0.5}
        return dict.fromkeys(("train", "validation", "test"), measured)

    summary = json.dumps({"step": 1, "before": figures(4), "after": figures(9)})
    page = page_of(make_run(tmp_path / "a", [train(1), val(1)], "task: classification", summary_json=summary))
    assert "80.00%" in page.text
    assert "test texts, before training" in page.texts
    assert page.texts.count("<spam>") == 13  # of rows and columns of six matrices, and of a table
    assert "--share: 0.900" in page.values("style")
    before = make_run(tmp_path / "b", [train(1)], "task: classification", before_json=json.dumps(figures(4)))
    assert "test texts, after training" not in page_of(before).text
    assert "55.00%" in page_of(before).text


def test_responses_before_and_after(tmp_path):
    asked = [{"instruction": f"<i>{i}</i>", "input": "", "output": "right"} for i in range(40)]
    before, after = (json.dumps([{**entry, "model_response": when} for entry in asked]) for when in ("old", "new"))
    files = {"responses_before_json": before, "responses_json": after}
    page = page_of(make_run(tmp_path / "a", [train(1)], "task: instruction", **files))
    assert "<i>3</i>" in page.texts
    assert page.texts.count("old") == page.texts.count("new") == page.texts.count("right") == 24
    assert "24 of 40; responses.json has all of them." in page.text
    (record,) = read_records([str(make_run(tmp_path / "b", [], responses_before_json=before))])
    assert read_responses(record)[0] == ({**asked[0], "model_response": "old"}, "old", None)
    before_alone = make_run(tmp_path / "c", [train(1)], "task: instruction", responses_before_json=before)
    assert "24 of 40; responses-before.json has all of them." in page_of(before_alone).text


def test_a_finished_run_that_goes_on_shows_no_figures_of_its_earlier_end(tmp_path):
    summary = json.dumps(
        {"step": 1, "seconds": 60.0, "before": {"test": {"loss": 3.0}}, "after": {"test": {"loss": 2.0}}}
    )
    folders = [
        make_run(tmp_path / name, [train(1), *rows], "task: classification", summary_json=summary)
        for name, rows in (("finished", []), ("goes_on", [train(2, seconds=90.0)]))
    ]
    finished, goes_on = read_records([str(folder) for folder in folders])
    assert (finished.measured("after", "test"), facts(finished)["time"]) == ({"loss": 2.0}, "1 min 00 s")
    assert (goes_on.measured("after", "test"), facts(goes_on)["time"]) == ({}, "1 min 30 s")
    assert goes_on.measured("before", "test") == {"loss": 3.0}


def test_answers_of_an_earlier_end_are_not_shown(tmp_path):
    old, new = (
        json.dumps([{"instruction": "?", "output": "right", "model_response": word}]) for word in ("old", "new")
    )
    files = {"responses_before_json": old, "responses_json": new, "summary_json": json.dumps({"step": 1})}
    shown = {
        step: page_of(make_run(tmp_path / str(step), [train(step)], "task: instruction", **files)).texts
        for step in (1, 2)
    }
    assert {"old", "new"} <= set(shown[1])
    assert "old" in shown[2]
    assert "new" not in shown[2]


def test_the_matrices_of_many_classes_are_left_to_the_picture(tmp_path):
    names = [f"class {number}" for number in range(MOST_CLASSES + 1)]
    figures = {"classes": names, "confusion": [[1] * len(names)] * len(names), "accuracy": 0.1}
    summary = json.dumps({"step": 1, "before": {"test": figures}, "after": {"test": figures}})
    folder = make_run(tmp_path / "a", [train(1)], "task: classification", summary_json=summary)
    said = "Matrices of 31 classes are too large here"
    assert page_of(folder).texts.count(f"{said}.") == 1
    assert "Validation and training texts" not in page_of(folder).text
    (folder / "confusion.png").touch()
    assert f"{said}; confusion.png has that of the test texts." in page_of(folder).texts


def test_runs_of_one_task_share_their_axes(tmp_path):
    a = make_run(tmp_path / "a", [val(0, 3.0), train(1), val(10, 2.0)], CONFIG + "seed: 1\n")
    b = make_run(tmp_path / "b", [val(0, 3.0), train(1), val(20, 1.0)], CONFIG + "seed: 2\nrun: b\n")
    page = page_of(a, b)
    assert page.values("aria-label")[0] == "loss of 2 runs over 20 steps, between 1 and 3"
    assert page.elements.count("figure") == 4
    assert "seed" in page.texts
    assert "train.steps" not in page.texts  # equal
    assert "run" not in page.texts[page.texts.index("key") :]
    assert "drawn apart" not in page.text


def test_runs_of_different_tasks_are_drawn_apart(tmp_path):
    a = make_run(tmp_path / "a", [train(1)])
    b = make_run(tmp_path / "b", [train(1)], "task: classification")
    page = page_of(a, b)
    assert "different tasks, and their losses are drawn apart" in page.text
    assert {"Pretraining: a", "Classification: b"} <= set(page.texts)


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / place / "run", [train(1)]) for place in ("one", "two")]
    assert [record.label for record in read_records([str(folder) for folder in folders])] == [str(f) for f in folders]
    assert len(read_records([str(folders[0]), f"{folders[0]}/"])) == 1


def test_a_run_is_read_with_one_step(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [train(1)])
    monkeypatch.setattr(read, "find_checkpoint", lambda folder, step: (folder, int(step)))
    assert read_records([f"{run}@350", f"{run}@350"])[0].step == 350
    for names in ((f"{run}@350", f"{run}@400"), (str(run), f"{run}@400")):
        with pytest.raises(InputError, match=f"{names[0]} and {names[1]}: are one run with different steps"):
            read_records(names)


def test_the_best_checkpoint_is_tried_first_and_then_the_latest(tmp_path, monkeypatch):
    (record,) = read_records([str(make_run(tmp_path / "a"))])
    assert steps_to_try(record.folder, None) == []
    assert steps_to_try(record.folder, 7) == [7]
    monkeypatch.setattr(read, "saved_steps", lambda folder: [1, 2, 3])
    monkeypatch.setattr(read, "best_step", lambda folder: 2)
    assert steps_to_try(record.folder, None) == [2, 3, 1]

    def unreadable(folder):
        raise InputError("not a checkpoint")

    monkeypatch.setattr(read, "best_step", unreadable)
    assert steps_to_try(record.folder, None) == [3, 2, 1]


def test_the_median_of_the_speeds(tmp_path):
    rows = [train(step, tokens_per_second=speed) for step, speed in enumerate([1.0, None, 3.0, 100.0, 5.0])]
    (record,) = read_records([str(make_run(tmp_path / "a", rows))])
    assert facts(record)["tokens a second"] == "4 (median)"
    (record,) = read_records([str(make_run(tmp_path / "b", [train(1, tokens_per_second=None)]))])
    assert "tokens a second" not in facts(record)


def test_what_is_no_figure_is_said():
    assert figure(0.5, ".1%") == "50.0%"
    assert figure(None, ".1%") == figure(float("nan"), ".1%") == "not finite"
    assert figure("x", ".1%", "–") == "–"


def test_what_is_no_run(tmp_path):
    with pytest.raises(MissingInputError, match="no run there"):
        read_records([str(tmp_path)])
    with pytest.raises(MissingInputError, match="no checkpoint in this run yet"):
        read_records([f"{make_run(tmp_path / 'a')}@3"])
