"""Every command and code block in README and docs runs, in a folder like a checkout."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import PRETRAINED, ROOT, SHARED, Reader, blocks, in_this_process, shorter
from sharing import make_once

import slm_jax

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if any(block.language != "text" for block in blocks(page.read_text()))]
REVIEWS = [("a delight from start to end", "good"), ("dull and far too long", "bad")]


def make_runs(folder: Path) -> None:
    """Make what a page may have from the pages before it: shared runs, and stand-ins for pretrained models."""
    (folder / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(folder):
        for words in SHARED:
            assert in_this_process(shorter(words)) == 0
        assert in_this_process(["export", "--run", "runs/sft_builtin", "--out", "stand-in-chat"]) == 0
    cfg = slm_jax.get_gpt_config("gpt2-small", emb_dim=16, n_heads=2, n_layers=1, context_length=128)
    params = slm_jax.GPTModel(cfg).init(jax.random.key(0), jax.numpy.zeros((1, 8), "int32"))["params"]
    slm_jax.save_gpt2(cfg, params, folder / "stand-in")


@pytest.fixture
def reader(tmp_path_factory, tmp_path, monkeypatch):
    """A reader whose folder has the checkout's programs and recipes, and files of the kinds that pages name."""
    made = make_once(tmp_path_factory, "docs-runs", make_runs)
    shutil.copytree(made / "runs", tmp_path / "runs")
    for name in ("train.py", "finetune.py", "configs", "benchmarks", "notebooks", "pyproject.toml", "slm_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in PRETRAINED.values():
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "weights").symlink_to(made / "stand-in")
    (tmp_path / "books").mkdir()
    text = " ".join(
        f"In year {n} of the tale the miller had {n * 7 % 31} sacks of flour and no donkey." for n in range(900)
    )
    (tmp_path / "books" / "tale.txt").write_text(text)
    (tmp_path / "story.txt").write_text("Once upon a time")
    (tmp_path / "new_reviews.txt").write_text("a fine film\n")
    (tmp_path / "corpus").mkdir()
    rows = pa.table({"text": [f"{n}. {text[n : n + 500]}" for n in range(100)]})
    pq.write_table(rows, tmp_path / "corpus" / "a.parquet")
    lines = [f"{text} number {n},{label}" for n in range(40) for text, label in REVIEWS]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]))
    entries = [{"instruction": f"Add one to {n}.", "output": str(n + 1)} for n in range(40)]
    (tmp_path / "instructions.json").write_text(json.dumps(entries))
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "The cat sat on the mat"}\n')
    endings = ["a mat.", "a cloud of soup.", "the sum.", "seven."]
    row = {"ind": 0, "activity_label": "Cats", "ctx_a": "A cat sits on", "ctx_b": "", "endings": endings, "label": 0}
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    return Reader(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_the_page_runs(page: Path, reader):
    for block in blocks(page.read_text()):
        try:
            reader.read(block)
        except BaseException as error:
            error.add_note(f"in {page.relative_to(ROOT)}, line {block.line}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "```sh\nslm-jax generate --run runs/none\n```",
        "```python\nassert 1 == 2\n```",
        "<!-- not run: no TPU -->\n```sh\nslm-jax train --train.stepz 3\n```",
    ],
)
def test_a_block_that_fails_is_noticed(page, reader):
    with pytest.raises(AssertionError):
        reader.read(blocks(page)[0])
