"""A report's page: it shows what a folder holds, and says what is missing."""

import base64
import io
import json

import numpy as np
import pytest
from matplotlib.image import imread
from reports import CONFIG, Page, make_run, train, val

from slm_jax.errors import InputError, MissingInputError
from slm_jax.tokenizer import BPETokenizer, CharTokenizer
from slm_jax.tools.report import page as pages
from slm_jax.tools.report import run_data as reading
from slm_jax.tools.report.page import MOST_CLASSES, MOST_SAMPLES, defaults, facts, write_comparison, write_page
from slm_jax.tools.report.pictures import Maps, draw_curves, encode, format_tick, to_png
from slm_jax.tools.report.run_data import read_runs, steps_to_try

MARKUP = "<b>&\"'</b> 日本語 😀 </style></pre><script>alert(1)</script>"


def page_of(*folders):
    """Return the page of a run, or of several."""
    records = read_runs([str(folder) for folder in folders])
    return Page(write_page(records[0]) if len(records) == 1 else write_comparison(records)).check_whole()


def record_of(folder, rows=(), config=CONFIG, **files):
    (record,) = read_runs([str(make_run(folder, rows, config, **files))])
    return record


def test_a_folder_that_holds_only_a_configuration(tmp_path):
    page = page_of(make_run(tmp_path / "a"))
    for text in ("The log is empty.", "no checkpoint yet", "no checkpoint can be read", "Not recorded"):
        assert text in page.text


def test_a_run_that_diverged(tmp_path):
    rows = [val(0, 8.0), *(train(i, 5.0) for i in range(1, 5)), val(5, None), train(6, None), train(7, None)]
    record = record_of(tmp_path / "a", rows)
    assert np.isnan(record.points("train", "loss")[1]).tolist() == [False] * 4 + [True] * 2
    text = page_of(tmp_path / "a").text
    for part in ("in 2 logged steps loss or gradients were not finite", "8.0000 at step 0", "not finished", "7 of 100"):
        assert part in text
    assert "No figure of the log" in page_of(make_run(tmp_path / "b", [val(1, None)])).text


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary_json", [1]),
        ("summary_json", {"step": [2]}),
        ("summary_json", {"after": {"test": {"confusion": [[1, 2]], "classes": ["a"]}}}),
        ("summary_json", {"after": {"test": {"loss": 10**400}}}),
        ("before_json", {"test": 5}),
        ("responses_json", [{"instruction": "a"}]),
        ("responses_json", "x"),
    ],
)
def test_a_file_of_another_form_is_left_out(tmp_path, name, content):
    folder = make_run(tmp_path / "a", [val(1, 2.0)], "task: [1]\ntrain: {steps: x}\n", **{name: json.dumps(content)})
    (folder / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n{"step": 2, "split": "val", "loss": "x"}\n')
    assert "not finished" in page_of(folder).text


def test_the_page_of_a_long_log_is_small(tmp_path):
    page = page_of(make_run(tmp_path / "a", [train(i, 2 + (i % 7) / 10) for i in range(1, 20_001)]))
    assert len(page.html) < 300_000
    assert "No validation loss yet." in page.text


@pytest.mark.hostile
def test_markup_in_names_samples_and_answers_stays_text(tmp_path):
    sample = f"## Step 5\n\n    {MARKUP} \x00\n    ## Step 6\n\n## Step 10\n\n    ok\n\n"
    answer = json.dumps([{"instruction": MARKUP, "output": MARKUP, "model_response": MARKUP}])
    files = {"samples_md": sample, "responses_json": answer, "responses_before_json": answer}
    config = f"task: instruction\ndata: {{source: {json.dumps(MARKUP, ensure_ascii=False)}}}\n"
    folder = make_run(tmp_path / '<i>&"', [train(1)], config, **files)
    for page in (page_of(folder), page_of(folder, make_run(tmp_path / "b", [train(1)], "task: instruction"))):
        assert '<i>&"' in page.texts
        assert MARKUP in page.texts
        assert not {"b", "i", "script"} & set(page.elements)
    page = page_of(folder)
    assert page.texts.count(MARKUP) == 6  # the instruction, three answers, twice in the configuration
    assert f"{MARKUP} \ufffd\n## Step 6" in page.texts


def test_samples_first_and_last_are_open(tmp_path):
    text = "".join(f"## Step {i}\n\n    text {i}\n\n" for i in range(100))
    page = page_of(make_run(tmp_path / "a", [train(1)], samples_md=text))
    assert {"text 0", "text 99"} <= set(page.texts)
    assert page.values("open") == [None, None]
    assert f"{MOST_SAMPLES} of 100; samples.md has all of them." in page.text


@pytest.mark.parametrize("content", ["[1, 2", "null"])
def test_damaged_files_are_as_good_as_none(tmp_path, content):
    names = ("summary_json", "before_json", "responses_json", "responses_before_json", "config_yaml")
    page_of(make_run(tmp_path / "a", [train(1)], **dict.fromkeys(names, content)))


def test_the_figures_of_a_classifier(tmp_path):
    def figures(right):
        figure = {"classes": ["ham", "<spam>"], "confusion": [[right, 10 - right], [3, 7]], "support": [10, 10]}
        figure |= {"accuracy": (right + 7) / 20, "macro_f1": 0.5, "loss": 0.25}
        figure |= {name: [0.5, 0.25] for name in ("precision", "recall", "f1")}
        return dict.fromkeys(("train", "validation", "test"), figure)

    summary = json.dumps({"step": 1, "before": figures(4), "after": figures(9)})
    page = page_of(make_run(tmp_path / "a", [train(1), val(1)], "task: classification", summary_json=summary))
    assert "80.00%" in page.text
    assert "test texts, before training" in page.texts
    assert page.texts.count("<spam>") == 13  # of rows and columns of six matrices, and of a table
    assert "--share: 0.900" in page.values("style")
    before = make_run(tmp_path / "b", [train(1)], "task: classification", before_json=json.dumps(figures(4)))
    assert "test texts, after training" not in page_of(before).text
    assert "55.00%" in page_of(before).text


def test_the_matrices_of_many_classes_are_left_to_the_picture(tmp_path):
    names = [f"class {number}" for number in range(MOST_CLASSES + 1)]
    figures = {"classes": names, "confusion": [[1] * len(names)] * len(names), "accuracy": 0.1}
    figures |= {name: [1] * len(names) for name in ("precision", "recall", "f1", "support")}
    summary = json.dumps({"step": 1, "before": {"test": figures}, "after": {"test": figures}})
    folder = make_run(tmp_path / "a", [train(1)], "task: classification", summary_json=summary)
    assert "Matrices of 31 classes are too large here." in page_of(folder).texts
    (folder / "confusion.png").touch()
    assert "too large here; confusion.png has that of the test texts." in page_of(folder).text


def test_responses_before_and_after(tmp_path):
    asked = [{"instruction": f"<i>{i}</i>", "input": "", "output": "right"} for i in range(40)]
    before, after = (json.dumps([{**entry, "model_response": when} for entry in asked]) for when in ("old", "new"))
    files = {"responses_before_json": before, "responses_json": after}
    page = page_of(make_run(tmp_path / "a", [train(1)], "task: instruction", **files))
    assert "<i>3</i>" in page.texts
    assert page.texts.count("old") == page.texts.count("new") == page.texts.count("right") == 24
    assert "24 of 40; responses.json has all of them." in page.text
    record = record_of(tmp_path / "b", [train(1)], "task: instruction", responses_before_json=before)
    assert record.responses()[0] == ({**asked[0], "model_response": "old"}, "old", None)
    assert "24 of 40; responses-before.json has all of them." in page_of(tmp_path / "b").text


def test_a_finished_run_that_was_continued_shows_no_figures_of_its_earlier_end(tmp_path):
    answer = {"instruction": "?", "output": "right"}
    old, new = (json.dumps([{**answer, "model_response": word}]) for word in ("old", "new"))
    summary = {"step": 1, "seconds": 60.0, "before": {"test": {"loss": 3.0}}, "after": {"test": {"loss": 2.0}}}
    files = {"summary_json": json.dumps(summary), "responses_before_json": old, "responses_json": new}
    folders = [
        make_run(tmp_path / name, [train(1), *rows], "task: instruction", **files)
        for name, rows in (("finished", []), ("continued", [train(2, seconds=90.0)]))
    ]
    finished, continued = read_runs([str(folder) for folder in folders])
    assert (finished.measured("after"), facts(finished)["time"]) == ({"loss": 2.0}, "1 min 00 s")
    assert (continued.measured("after"), facts(continued)["time"]) == ({}, "1 min 30 s")
    assert continued.measured("before") == {"loss": 3.0}
    assert {"old", "new"} <= set(page_of(folders[0]).texts)
    assert "old" in page_of(folders[1]).texts
    assert "new" not in page_of(folders[1]).texts


def test_the_configuration_against_the_defaults(tmp_path):
    text = CONFIG + "seed: 7\nold_key: 1\ndata: {source: named:the-verdict}\n"
    page = page_of(make_run(tmp_path / "a", [train(1)], text))
    assert {"seed", "old_key", "no such key now", "named:the-verdict"} <= set(page.texts)
    assert page.texts.count("task") == 1  # the default, so among all keys only
    assert defaults("classification")["task"] == "classification"


def test_the_median_of_the_speeds(tmp_path):
    rows = [train(step, tokens_per_second=speed) for step, speed in enumerate([1.0, None, 3.0, 100.0, 5.0])]
    assert facts(record_of(tmp_path / "a", rows))["tokens a second"] == "4 (median)"


def test_runs_of_one_task_share_their_axes(tmp_path):
    a = make_run(tmp_path / "a", [val(0, 3.0), train(1), val(10, 2.0)], CONFIG + "seed: 1\n")
    b = make_run(tmp_path / "b", [val(0, 3.0), train(1), val(20, 1.0)], CONFIG + "seed: 2\nrun: b\n")
    page = page_of(a, b)
    assert page.values("alt")[0] == "loss of 2 runs over 20 steps, between 1 and 3"
    assert page.elements.count("figure") == 4
    assert "seed" in page.texts
    assert "train.steps" not in page.texts  # equal
    assert "run" not in page.texts[page.texts.index("key") :]
    assert "drawn apart" not in page.text


def test_runs_of_different_tasks_are_drawn_apart(tmp_path):
    page = page_of(make_run(tmp_path / "a", [train(1)]), make_run(tmp_path / "b", [train(1)], "task: classification"))
    assert "drawn apart" in page.text
    assert {"Pretraining: a", "Classification: b"} <= set(page.texts)


def test_a_run_is_read_once_with_one_step_and_has_a_label_of_its_own(tmp_path, monkeypatch):
    run, other = (make_run(tmp_path / place / "run", [train(1)]) for place in ("one", "two"))
    records = read_runs([str(run), str(other), f"{run}/"])
    assert [record.label for record in records] == [str(run), str(other)]
    with pytest.raises(MissingInputError, match="no checkpoint in this run yet"):
        read_runs([f"{run}@3"])
    monkeypatch.setattr(reading, "find_checkpoint", lambda folder, step: (folder, int(step)))
    assert read_runs([f"{run}@350", f"{run}@350"])[0].step == 350
    with pytest.raises(InputError, match=f"{run}@350 and {run}@400: .*different steps"):
        read_runs([f"{run}@350", f"{run}@400"])


def test_the_best_checkpoint_is_tried_first_and_then_the_latest(tmp_path, monkeypatch):
    record = record_of(tmp_path / "a")
    assert steps_to_try(record.folder, None) == []
    assert steps_to_try(record.folder, 7) == [7]
    monkeypatch.setattr(reading, "saved_steps", lambda folder: [1, 2, 3])
    monkeypatch.setattr(reading, "best_step", lambda folder: 2)
    assert steps_to_try(record.folder, None) == [2, 3, 1]


def svg(chart):
    return base64.b64decode(chart["src"].removeprefix("data:image/svg+xml;base64,")).decode()


def test_equal_curves_have_equal_bytes(tmp_path):
    rows = [val(0, 3.0), *(train(i, 3 - 0.1 * i) for i in range(1, 20)), val(20, 1.5)]
    a, b = (draw_curves([record_of(tmp_path / name, rows)], bits=False) for name in "ab")
    assert a == b


def test_what_is_drawn_is_what_was_logged(tmp_path):
    rows = [val(0, 3.0, accuracy=0.5), train(1, 2.0), val(10, 2.5, accuracy=0.75), val(20, 2.75, accuracy=0.7)]
    record = record_of(tmp_path / "a", rows, "task: classification")
    drawn = {chart["title"]: chart for chart in draw_curves([record], bits=False)}
    assert len(drawn) == 5
    assert drawn["Loss"]["alt"] == "loss over 20 steps, between 2 and 3"
    assert drawn["Accuracy"]["alt"] == "accuracy over 20 steps, between 0.5 and 0.75"
    assert "nats a text" in svg(drawn["Loss"])


def test_tick_labels_are_not_rounded_away(tmp_path):
    record = record_of(tmp_path / "a", [train(i, learning_rate=4e-5 * i) for i in range(1, 9)])
    drawn = draw_curves([record], bits=False)
    assert ">0.0003<" in svg(next(chart for chart in drawn if chart["title"] == "Learning rate"))
    labels = {0.25: "0.25", 999.5: "999.5", 1000: "1,000", 2_500_000: "2,500,000", 2.5e38: "2.5e+38"}
    assert {value: format_tick(value) for value in labels} == labels


def test_the_maps_of_a_large_model(tmp_path, monkeypatch):
    weights = np.random.default_rng(0).dirichlet(np.ones(20), (6, 6, 20)).astype(np.float32)
    weights[2, 3, -1] = np.eye(20)[4]
    tokens = ["<b>", " a", "\n", "\ufffd", "a token", *"abcdefghijklmno"]
    monkeypatch.setattr(pages, "read_maps", lambda *_: Maps(7, tokens, 33, weights, n_layers=12, n_heads=25))
    page = page_of(make_run(tmp_path / "a", [train(1)]))
    assert "the first 6 of 12 layers and 6 of 25 heads" in page.text
    assert ", in the first 20 of 33 tokens of a text." in page.text
    assert page.elements.count("image") == 36
    described = "attention weights of block 2, head 3: the last token gives 100% to token 4, a·token"
    assert described in page.values("alt")
    assert described in page.values("aria-label")
    assert {"<b>", "·a", "⏎", "a·token"} <= set(page.texts)
    assert len(page.html) < 400_000


def test_a_picture_has_a_pixel_a_weight():
    address = to_png(np.array([[1.0, 0.0], [0.25, np.nan]], np.float32))
    pixels = imread(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert pixels.shape == (2, 2, 4)
    assert pixels[..., 3].tolist()[0] == [1, 0]
    assert 0 < pixels[1, 0, 3] < 1
    assert pixels[1, 1, 3] == 0


def test_a_sample_is_shown_without_what_cannot_be_encoded():
    tokenizer = CharTokenizer().build_vocab("abc")
    assert encode(tokenizer, None, "xaybzc") == tokenizer.encode("abc")
    with pytest.raises(InputError, match="text: character 'x'"):
        encode(tokenizer, "xa", "abc")


def test_a_sample_may_begin_with_the_end_of_a_text():
    tokenizer = BPETokenizer.train("the cat sat on the mat. " * 20, vocab_size=280)
    sample = [tokenizer.eot_id, *tokenizer.encode("the cat sat")]
    assert encode(tokenizer, None, tokenizer.decode(sample)) == sample
    with pytest.raises(InputError, match="text: "):
        encode(tokenizer, "<|endoftext|>", "abc")
