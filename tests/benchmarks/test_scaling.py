"""The scaling page: what is measured and what is computed stands where it says so, and the bounds are right."""

import json
import re

import numpy as np
import pytest
from programs import FOLDER, load

SHAPE = {"preset": "tiny", "emb_dim": 16, "n_heads": 2, "n_layers": 2}
BPE = ("--tokenizer.kind", "bpe", "--tokenizer.vocab_size", "300")


@pytest.fixture(scope="module")
def scaling():
    return load("scaling")


@pytest.fixture
def content():
    """The figures that the project shows."""
    return json.loads((FOLDER / "results" / "scaling.json").read_text())


@pytest.mark.slow
def test_a_measured_and_a_computed_point_and_the_reader(scaling, tmp_path):
    """A tiny step is measured; GPT-2 XL takes too long; the file has a megabyte."""
    tiny = scaling.point("parameters", "smallest", BPE, 2, 16, **SHAPE)
    xl = next(point for point in scaling.POINTS if "xl" in point.name)
    scaling.write(tmp_path, [tiny, xl], gigabytes=[0.001], seconds=0.2)
    content = json.loads((tmp_path / "results" / "scaling.json").read_text())
    tiny, xl = content["steps"]
    n_parameters = 300 * 16 + 16 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert (tiny["parameters"], tiny["tokens"]) == (n_parameters, 32)
    assert tiny["flops"] == 32 * (6 * (n_parameters - 16 * 16) + 12 * 2 * 16 * 16)
    assert len(tiny["repeats"]) in range(3, 8)
    assert tiny["seconds"] == np.median(tiny["repeats"])
    assert tiny["bytes"] > 12 * n_parameters
    for row in (tiny, xl):
        assert row["bounds_seconds"]["arithmetic"] == pytest.approx(row["flops"] / content["ceilings"]["flops"])
        traffic = 24 * row["parameters"] / content["ceilings"]["bandwidth"]
        assert row["bounds_seconds"]["memory"] == pytest.approx(traffic)

    assert xl["seconds"] is None
    assert xl["bytes"] is None
    assert xl["planned_bytes"] > 16 * xl["parameters"]
    share = tiny["bounds_seconds"]["arithmetic"] / tiny["seconds"]
    assert xl["estimated_seconds"] == pytest.approx(xl["bounds_seconds"]["arithmetic"] / share)

    text = (tmp_path / "SCALING.md").read_text()
    line = {name: next(row for row in text.splitlines() if row.startswith(f"| {name}")) for name in ("smallest", "GPT")}
    assert len(re.findall(r"\*[^*]+\*", line["smallest"])) == 1  # what is planned
    assert len(re.findall(r"\*[^*]+\*", line["GPT"])) == 3  # and its time, and share of the peak
    assert "{" not in text
    assert 0 < (tmp_path / "scaling.png").stat().st_size < 100_000

    (row,) = content["readers"]
    assert row["tokens"] == 500_000
    assert row["tokens_per_second"] == pytest.approx(8 * 1024 / row["batch_seconds"]["median"])


def test_a_reader_that_fails_leaves_the_rest_of_the_page(scaling, content, capsys):
    row = scaling.reader_row(1e-9)  # no room for an id: the file is refused, not mapped
    assert row == {"gigabytes": 1e-9, "missing": "failed"}
    assert "the reader of 1e-09 GB: " in capsys.readouterr().err
    unknown = {**content["readers"][0], "own_bytes": None}
    page = scaling.page({**content, "readers": [row, unknown]})
    assert "| 1e-09 GB | failed |" in page
    assert "| not known |" in page
    assert scaling.grown_bytes(None) is None


def test_an_accelerator_that_is_not_known_is_not_planned_as_a_cpu(scaling, monkeypatch):
    assert scaling.plan_device() == "cpu"
    monkeypatch.setattr(scaling.jax, "default_backend", lambda: "gpu")  # the device's kind stays the CPU's
    with pytest.raises(scaling.InputError, match="are not known; expected a CPU or one of h200, "):
        scaling.plan_device()


def test_a_token_file_of_ten_gigabytes_takes_32_megabytes_of_disk(scaling, tmp_path):
    path = tmp_path / "tokens.bin"
    scaling.write_ids(path, 10**10)
    assert path.stat().st_size == 10**10
    assert path.stat().st_blocks * 512 < 40e6
    ids = np.fromfile(path, np.uint16, 100_000)
    assert ids.max() == 50_256  # the end of a text
    assert 100 < np.sum(ids == 50_256) < 300
