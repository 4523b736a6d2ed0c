"""Every command and block of code in README and docs does what it says it does, in a folder like the repository."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import ROOT, SHORT, SMALL, Reader, blocks, commands, in_this_process

import slm_jax
from slm_jax.errors import InputError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REVIEWS = [("a delight from start to end", "good"), ("dull and far too long", "bad")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """What a page may have from those before it: the run of train.py without arguments, and weights like GPT-2's."""
    folder = tmp_path_factory.mktemp("before")
    options = {**SHORT, **SMALL, "train.steps": 4, "runs_dir": folder / "runs"}
    words = ["train", "--config", str(ROOT / "configs" / "tiny.yaml")]
    in_this_process([*words, *(word for key, value in options.items() for word in (f"--{key}", str(value)))], (0,))
    cfg = slm_jax.get_gpt_config("gpt2-small", emb_dim=16, n_heads=2, n_layers=2, context_length=128)
    params = slm_jax.GPTModel(cfg).init(jax.random.key(0), jax.numpy.zeros((1, 8), "int32"))["params"]
    slm_jax.save_gpt2(cfg, params, folder / "stand-in")
    return folder


@pytest.fixture
def reader(runs, tmp_path, monkeypatch):
    """A reader whose folder has the repository's programs and recipes, and files of the kind that pages speak of."""
    for name in ("train.py", "finetune.py", "configs", "benchmarks", "notebooks", "pyproject.toml", "slm_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "stand-in").symlink_to(runs / "stand-in")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "weights").symlink_to(runs / "stand-in")
    (tmp_path / "books").mkdir()
    text = " ".join(
        f"In year {n} of the tale the miller had {n * 7 % 31} sacks of flour and no donkey." for n in range(900)
    )
    (tmp_path / "books" / "tale.txt").write_text(text)
    (tmp_path / "story.txt").write_text("Once upon a time")
    (tmp_path / "new_reviews.txt").write_text("a fine film\n")
    (tmp_path / "corpus").mkdir()
    pq.write_table(
        pa.table({"text": [f"{n}. {text[n : n + 500]}" for n in range(100)]}), tmp_path / "corpus" / "a.parquet"
    )
    rows = [f"{text} number {n},{label}" for n in range(40) for text, label in REVIEWS]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    entries = [{"instruction": f"Add one to {n}.", "output": str(n + 1)} for n in range(40)]
    (tmp_path / "instructions.json").write_text(json.dumps(entries))
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "The cat sat on the mat"}\n')
    endings = ["a mat.", "a cloud of soup.", "the sum.", "seven."]
    row = {"ind": 0, "activity_label": "Cats", "ctx_a": "A cat sits on", "ctx_b": "", "endings": endings, "label": 0}
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    return Reader(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_the_page_runs(page: Path, reader, runs):
    found = blocks(page.read_text())
    lines = [line for block in found if block.language == "sh" for line in commands(block.body)]
    if not any(line.split("#")[0].split() == ["python", "train.py"] for line in lines):
        shutil.copytree(runs / "runs", reader.folder / "runs")
    for block in found:
        try:
            reader.read(block)
        except BaseException as error:
            error.add_note(f"in {page.relative_to(ROOT)}, line {block.line}")
            raise


def test_all_pages_name_one_repository():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    cloned = [url for page in PAGES for url in re.findall(r"git clone (?:-\S+ \S+ )*(https\S+)", page.read_text())]
    assert len(cloned) >= 2
    assert set(cloned) == {address}


def test_blocks_are_found_with_their_reasons_and_names():
    page = """One.

```sh
slm-jax doctor   # look
python train.py --run a \\
    --seed 1 && slm-jax plan
```

<!-- not run: needs a TPU -->
```sh
slm-jax train
```

    ```csv title="a/b.csv"
    text,label
    ```
"""
    one, two, three = blocks(page)
    assert commands(one.body) == ["slm-jax doctor   # look", "python train.py --run a --seed 1", "slm-jax plan"]
    assert (one.not_run, two.not_run, three.not_run) == (None, "needs a TPU", None)
    assert (three.language, three.title, three.body) == ("csv", "a/b.csv", "text,label\n")
    assert one.line == 3


@pytest.mark.parametrize("page", ["~~~sh\nls\n~~~", "> ```sh\n> ls\n> ```", "````sh\nls\n````", "```sh\nls"])
def test_a_fence_that_would_escape_is_seen(page):
    with pytest.raises(AssertionError, match="a fence"):
        blocks(page)


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```sh\nslm-jax generate --run runs/none\n```", AssertionError),
        ("```sh\nls nothing-like-this\n```", AssertionError),
        ("```python\nassert 1 == 2\n```", AssertionError),
        ("```yaml\ntrain:\n  stepz: 3\n```", InputError),
        ("<!-- not run: no TPU -->\n```sh\nslm-jax train --train.stepz 3\n```", AssertionError),
        ("```sh\npip install -e .[test,nothing]\n```", AssertionError),
        ("<!-- not run: no TPU -->\n```sh\nslm-jx train\n```", AssertionError),
        ("<!-- not run: no TPU -->\n```python\ndef (:\n```", SyntaxError),
        ("```console\nls\n```", AssertionError),
        ("```sh\npip install -e .[wandb,nothing]\n```", AssertionError),
    ],
)
def test_a_block_that_does_not_run_is_seen(page, error, reader):
    [block] = blocks(page)
    with pytest.raises(error):
        reader.read(block)
