"""What must hold of the Beam pipeline: the documents and counts of one machine; a pipeline for every runner."""

import json

import numpy as np
import pytest
from refusals import contents, refused

from slm_jax.data import beam as pipeline
from slm_jax.data import filters
from slm_jax.data.filters import Rules
from slm_jax.data.prepare import prepare
from slm_jax.data.sources import parse_source
from slm_jax.data.token_file import open_token_file
from slm_jax.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer().build_vocab("abcdefghijklmnopqrstuvwxyz0123456789 !\n")
RULES = Rules(near_duplicates=0.7, min_characters=4, max_symbol_ratio=0.5, max_repeated_lines=0.5)


@pytest.fixture
def sources(tmp_path):
    """Files of several kinds with exact and near copies, short, repeated and empty texts, and one that is long."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("apache_beam")
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for i in range(60):
        words = " ".join(map(str, rng.integers(1000, size=40)))
        texts.append(texts[-1] + " more" if i % 5 == 4 else texts[-1] if i % 7 == 6 else words)
    texts += ["abc", "a line\n" * 4, "!" * 9, "", f"one more<|endoftext|>and another{'<|endoftext|>'}abc"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:30]))
    pq.write_table(pa.table({"text": texts[20:50]}), tmp_path / "b.parquet")
    for i, text in enumerate(texts[50:]):
        (tmp_path / f"{i:02}.txt").write_text(text)
    (tmp_path / "99.txt").write_text(" ".join(map(str, rng.integers(1000, size=600))))
    names = [f"jsonl:{tmp_path}/*.jsonl", f"parquet:{tmp_path}/*.parquet", f"text:{tmp_path}/*.txt"]
    return list(map(parse_source, names))


def documents(path) -> list[str]:
    return TOKENIZER.decode(open_token_file(path).tokens[:]).split("<|endoftext|>")


@pytest.mark.parametrize("rules", [RULES, Rules(deduplicate=False)], ids=["all", "none"])
def test_it_keeps_the_documents_of_one_machine(sources, tmp_path, monkeypatch, rules):
    monkeypatch.setattr(filters, "LONGEST", 2000)
    monkeypatch.setattr(filters, "PIECE", 500)
    alone = prepare(sources, tmp_path / "alone.bin", TOKENIZER, rules=rules)
    out = tmp_path / "new" / "ids.bin"
    beam = pipeline.prepare(sources, str(out), TOKENIZER, runner="direct", rules=rules, shard_tokens=1000)
    assert sorted(documents(out)) == sorted(documents(tmp_path / "alone.bin"))
    assert documents(out) != documents(tmp_path / "alone.bin")
    assert (beam.documents, beam.tokens, beam.text_bytes) == (alone.documents, alone.tokens, alone.text_bytes)
    assert beam.counts == alone.counts
    assert beam.sha256 == open_token_file(out).sha256
    n_shards = -(-(beam.tokens + 1) // 1000)
    expected = ["ids.bin.json", *(f"ids-{i:05}.bin" for i in range(n_shards))]
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(expected)
    ids = open_token_file(out).tokens[:]
    pipeline.prepare(sources, str(out), TOKENIZER, runner="direct", rules=rules, shard_tokens=10**6)
    np.testing.assert_array_equal(open_token_file(out).tokens[:], ids)  # the order does not depend on the shards
    assert sorted(contents(out.parent)) == ["ids-00000.bin", "ids.bin.json"]


def test_an_error_in_a_worker_is_one_line_and_nothing_is_left(sources, tmp_path):
    out = str(tmp_path / "new" / "ids.bin")
    with refused("no document is left .* short.*; loosen the filter$"):
        pipeline.prepare(sources, out, TOKENIZER, runner="direct", rules=Rules(min_characters=10**6))
    with refused(r"in '.*' …: character 'm' at offset .* is not in the vocabulary .* bpe$"):
        pipeline.prepare(sources, out, CharTokenizer().build_vocab("0123456789 "), runner="direct")
    assert list((tmp_path / "new").rglob("*")) == []
    with refused("/proc/none"):
        pipeline.prepare(sources, "/proc/none/ids.bin", TOKENIZER, runner="direct")


def test_nothing_is_left_of_a_pipeline_that_ends_before_its_last_step(sources, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "write_index", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        pipeline.prepare(sources, str(tmp_path / "new" / "ids.bin"), TOKENIZER, runner="direct", rules=RULES)
    assert list((tmp_path / "new").rglob("*")) == []


@pytest.mark.parametrize("runner", ["spark", "flink", "dataflow"])
def test_a_pipeline_is_constructed_for_other_runners(sources, tmp_path, runner):
    if runner == "dataflow":
        module = "apache_beam.runners.dataflow.dataflow_runner"
        pytest.importorskip(module, reason="needs apache-beam[gcp]", exc_type=ImportError)
    made = pipeline.make_pipeline(
        runner, ["--project=a-project", "--region=a-region", "--temp_location=gs://bucket/temp"]
    )
    pipeline.build(made, sources, "gs://bucket/ids.bin", "gs://bucket/partial", TOKENIZER, rules=RULES)
    steps = {transform.unique_name for transform in made.to_runner_api().components.transforms.values()}
    assert {"read and filter", "shuffle", "index"} <= steps
