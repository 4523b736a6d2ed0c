"""What must hold of ``slm-jax report``: one page that needs nothing else, of runs that were trained."""

import shutil
from pathlib import Path

import pytest
from pretraining import options
from refusals import fails
from reports import Page

from slm_jax import cli
from slm_jax.tools.report import page as report_page


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    words = options(text_file, runs, train__steps=20, train__eval_every=20, checkpoint__every=20)
    assert cli.main(["train", *words]) == 0
    return runs / "small"


def report(capsys, *args):
    """Run the command; return its page."""
    capsys.readouterr()
    assert cli.main(["report", *map(str, args)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("written to ")
    return Page(Path(line.removeprefix("written to ")).read_text(encoding="utf-8")).check_whole()


def test_a_pretraining_run(trained, capsys):
    page = report(capsys, "--run", trained)
    assert (trained / "report.html").is_file()
    titles = ["Curves", "Samples", "Attention", "Parameters", "Configuration", "Environment"]
    assert [text for text in page.texts if text in titles] == titles * 2  # links, headings
    assert "finished" in page.text
    assert page.elements.count("image") == 2  # a layer of two heads
    assert "blocks/attn/q/kernel" in page.texts
    assert "1 × 32 × 2 × 16" in page.texts
    assert "jax" in page.texts
    assert len(page.html) < 200_000
    before = page.html
    assert report(capsys, trained).html == before


def test_the_attention_of_a_text_and_of_a_step(trained, capsys, tmp_path):
    out = tmp_path / "page.html"
    page = report(capsys, f"{trained}@20", "--out", out, "--text", "cat sat")
    assert "of step 20" in page.text
    texts = [text for text in page.texts if text.strip() and not text.isdecimal()]
    first = next(i for i, text in enumerate(texts) if text.startswith("Attention weights"))
    assert texts[first + 1 : first + 8] == ["c", "a", "t", "·", "s", "a", "t"]
    fails(["report", trained, "--out", out, "--text", "Straße"], capsys, "text: character 'S'")


def test_a_classifier(classifier, capsys, tmp_path):
    page = report(capsys, classifier, "--out", tmp_path / "x.html")
    assert "test texts, after training" in page.texts
    assert page.elements.count("image") == 4
    assert {"yes", "no", "class_head/kernel"} <= set(page.texts)


def test_an_assistant_with_adapters(instructed, capsys, tmp_path):
    page = report(capsys, instructed, "--out", tmp_path / "x.html")
    assert "ROUGE-L" in page.texts
    assert {"reference", "before training", "after training"} <= set(page.texts)
    assert any(text.endswith("lora_a") for text in page.texts)
    assert not any(text.endswith("lora_scale") for text in page.texts)


def test_a_run_whose_checkpoints_are_damaged(trained, capsys, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "damaged")
    for file in (folder / "checkpoints").rglob("sha256.json"):
        file.write_text("{}")
    page = report(capsys, folder)
    assert "no checkpoint readable" in page.text
    assert f"slm-jax doctor --run {folder}" in page.text
    assert not [said for said in ("Error", "choose another", "sha256") if said in page.text]
    assert "lowest" in page.text
    assert "the checkpoint of step 20 not readable" in report(capsys, f"{folder}@20").text
    shutil.rmtree(folder / "checkpoints")
    assert "no checkpoint yet" in report(capsys, folder).text


def test_weights_that_were_imported(weights, capsys, tmp_path):
    assert cli.main(["import", "--source", str(weights), "--run", "imported", "--runs-dir", str(tmp_path)]) == 0
    page = report(capsys, tmp_path / "imported")
    assert "The log is empty." in page.texts
    assert page.elements.count("image") == 4
    assert "tok_emb/embedding" in page.texts


def test_several_runs(trained, classifier, instructed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = report(capsys, trained, "--run", classifier, instructed)
    assert (tmp_path / "report.html").is_file()
    assert "3 runs" in page.texts
    assert "drawn apart" in page.text
    same = shutil.copytree(trained, tmp_path / "small")
    assert {str(trained), str(same)} <= set(report(capsys, trained, same).texts)
    shutil.copytree(trained, "--run")  # after two dashes all words are runs
    assert "2 runs" in report(capsys, "--out", "x.html", "--", trained, "--run").texts


def test_only_pages_are_replaced(trained, capsys, tmp_path):
    for name in ("new.txt", "x.htm", "x.htm", "x.HTML", "x.HTML"):
        report(capsys, trained, "--out", tmp_path / name)
    fails(["report", trained, "--out", tmp_path / "new.txt"], capsys, "only files")


def test_mistakes_are_one_line_before_the_page_is_made(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_page, "write_page", lambda *_: pytest.fail("made a page"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "b")
    before = {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()}
    Path("notes.txt").write_text("mine")
    Path("link.html").symlink_to("notes.txt")
    for words, expected in {
        (): "no run; expected one or several",
        ("runs/none",): "runs/none: no run there",
        ("b", tmp_path): "no run there",
        ("b@7",): "no checkpoint of step 7",
        ("b", trained, "--text", "x"): "expected one run with it",
        ("b", "--output", "x"): "unknown key output",
        ("b", "--text", ""): "text is ''; expected",
        ("b", "b@20"): "b and b@20: one run",
        ("b", "--out", ""): "out is ''; expected a file",
        ("b", "--out", "/dev/null"): "out is '/dev/null'; expected a file",
        ("b", "--out", "b/config.yaml/x.html"): "is not a writable folder",
        ("b", "--out", "b/metrics.jsonl"): "only files that end in .html are replaced",
        ("b", "--out", "link.html"): "only files that end in .html are replaced",
    }.items():
        fails(["report", *words], capsys, expected)
    assert {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()} == before
    assert Path("notes.txt").read_text() == "mine"
