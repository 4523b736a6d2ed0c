"""What must hold of preparing: the ids are those of encoding every document whole, however it is cut."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from slm_jax.data import file_sources, parts, prepare
from slm_jax.data.builtin import Builtin
from slm_jax.data.corpus import encode_documents
from slm_jax.data.filters import Rules
from slm_jax.data.prepare import Prepared, cut_pieces, train_tokenizer
from slm_jax.data.rows import Source
from slm_jax.data.sources import parse_source
from slm_jax.data.token_file import open_token_file
from slm_jax.errors import MissingInputError
from slm_jax.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, SimpleTokenizer, Tokenizer

ALL = Rules(deduplicate=False)
# What the tokenizers' patterns treat differently, white space that only some call so, and what is cut in UTF-8.
PARTS = [*" \n\t\r", "  ", " " * 9, *"\u3000\xa0\x1c\x85", "a", "lower", *"é中😀", "e\u0301", "12", "'s"]
PARTS += ["'", "'ll", "--", "_", "...", "#", "<|", "\ufeff", "\u200b", "A"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    everything = "".join(PARTS)
    words = "low lower lowest 12 newer\n\n\twider   's 'll -- ... a é 中 😀 " * 20
    return {
        "char": CharTokenizer().build_vocab(everything),
        "simple": SimpleTokenizer().build_vocab("a lower 's -- ... é 12 中"),
        "bpe": BPETokenizer.train(words + everything, vocab_size=330),
        "gpt2": GPT2Tokenizer(),
    }


def tokenizer_of(tokenizers: dict[str, Tokenizer], kind: str) -> Tokenizer:
    if kind == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR does not point at GPT-2's tokenizer files")
    return tokenizers[kind]


# Cutting


@pytest.mark.parametrize("kind", ["char", "simple", "bpe", "gpt2"])
def test_pieces_have_the_ids_of_the_whole(tokenizers, kind):
    tokenizer = tokenizer_of(tokenizers, kind)

    @settings(max_examples=150, deadline=None)
    @given(TEXTS, st.integers(1, 9), st.integers(1, 9))
    def check(text, size, length):
        given_pieces = [text[i : i + size] for i in range(0, len(text), size)]
        pieces = list(cut_pieces(given_pieces, length))
        assert "".join(pieces) == text
        assert all(pieces)
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)

    check()


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
@pytest.mark.parametrize("unit", [" ", "a", "\n", "ab!", "中", "a ", "\t\n "])
def test_very_long_runs_have_the_ids_of_the_whole(tokenizers, kind, unit):
    tokenizer = tokenizer_of(tokenizers, kind)
    for text in (unit * 9000, f"start {unit * 9000}end", f"start{unit * 9000}"):
        pieces = list(cut_pieces([text], 1000))
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@given(st.lists(st.sampled_from(["a ", "bb\n", "ccc "])).map("".join), st.integers(1, 20), st.integers(1, 20))
def test_no_piece_is_more_than_twice_as_long_but_for_a_word(text, size, length):
    pieces = list(cut_pieces([text[i : i + size] for i in range(0, len(text), size)], length))
    assert all(len(piece) <= 2 * length + len("ccc ") for piece in pieces)


# Preparing


@pytest.fixture
def sources(tmp_path) -> dict[str, Source]:
    """Texts that are hard to cut, as files of several kinds."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(PARTS, size=n)) for n in (1, 5, 300, 40, 2000, 3)]
    texts += ["a" * 500, " " * 500 + "a", "low lower", "low lower", f"one<|endoftext|> two{'<|endoftext|>' * 2}\n"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return {"text": parse_source(f"text:{tmp_path}/*.txt"), "jsonl": parse_source(f"jsonl:{tmp_path}/a.jsonl")}


@pytest.mark.parametrize("kind", ["char", "simple", "bpe", "gpt2"])
@pytest.mark.parametrize(("source", "piece"), [("text", 3), ("text", 1 << 20), ("jsonl", 50)])
def test_a_source_has_the_ids_of_reading_and_encoding_it_whole(
    tokenizers, sources, tmp_path, monkeypatch, kind, piece, source
):
    tokenizer = tokenizer_of(tokenizers, kind)
    whole = sources[source].read_documents()
    if kind == "char":
        tokenizer = CharTokenizer().build_vocab("".join(whole))
    expected = encode_documents(whole, tokenizer)
    monkeypatch.setattr(file_sources, "PIECE", piece)
    monkeypatch.setattr(parts, "PIECE", piece)
    monkeypatch.setattr(prepare, "PART", piece)
    prepared = prepare.prepare([sources[source]], tmp_path / "ids.bin", tokenizer, rules=ALL)
    opened = open_token_file(tmp_path / "ids.bin")
    np.testing.assert_array_equal(opened.tokens, expected)
    assert (prepared.documents, prepared.tokens) == (len(whole), expected.size)
    assert prepared.text_bytes == sum(len(text.encode()) for text in whole)
    assert prepared.sha256 == opened.sha256
    assert json.loads((tmp_path / "ids.bin.json").read_text())["documents"] == len(whole)


def test_the_order_is_that_of_the_source_with_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART", 30)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    texts = [f"document {i} " + "word " * (i * 37 % 50) for i in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer, reports = CharTokenizer().build_vocab("".join(texts)), []
    source, report = parse_source(f"jsonl:{tmp_path}/a.jsonl"), lambda file: reports.append(file.tokens)
    prepare.prepare([source], tmp_path / "ids.bin", tokenizer, report=report)
    assert tokenizer.decode(open_token_file(tmp_path / "ids.bin").tokens).split("<|endoftext|>") == texts
    assert reports == sorted(reports)
    assert reports[-1] == open_token_file(tmp_path / "ids.bin").tokens.size


def test_progress_is_of_what_was_encoded_not_of_what_was_read_ahead(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(file_sources, "PIECE", 100)
    monkeypatch.setattr(prepare, "PART", 100)
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"low lower {i:090}" for i in range(20)))
    source, reports = parse_source(f"text:{tmp_path}/a.txt"), []

    def report(file):
        reports.append((file.bytes_read, file.text_bytes + 13 * file.documents))

    prepare.prepare([source], tmp_path / "ids.bin", tokenizers["bpe"], report=report)
    assert len(reports) > 10
    assert all(n_read - n_encoded <= 200 for n_read, n_encoded in reports)
    assert reports[-1] == (20 * 113 - 13, 20 * 113)


def test_sources_follow_each_other_as_if_they_were_one(tokenizers, tmp_path):
    (tmp_path / "a.txt").write_text("low lower")
    (tmp_path / "b.jsonl").write_text('{"text": "newer"}\n{"text": "low lower"}\n')
    sources = [parse_source(f"jsonl:{tmp_path}/b.jsonl"), parse_source(f"text:{tmp_path}/a.txt")]
    prepared = prepare.prepare(sources, tmp_path / "ids.bin", tokenizers["bpe"])
    opened, about = open_token_file(tmp_path / "ids.bin"), json.loads((tmp_path / "ids.bin.json").read_text())
    assert opened.tokenizer.decode(opened.tokens) == "newer<|endoftext|>low lower"
    assert prepared.counts["duplicates"] == 1
    assert (about["source"], about["counts"]) == (" ".join(map(str, sources)), prepared.counts)
    with refused("gone", MissingInputError):
        prepare.prepare([*sources, parse_source("text:gone.txt")], tmp_path / "o" / "ids.bin", tokenizers["bpe"])
    assert not (tmp_path / "o").exists()


def test_an_error_leaves_nothing(tokenizers, sources, tmp_path):
    for tokenizer, rules, expected in (
        (tokenizers["bpe"], Rules(min_characters=10_000), r"no document is left \(.* short.*\); loosen the filter"),
        (CharTokenizer("abc"), Rules(), r"source 'text:.*': in '.*' …: character .* is not in the vocabulary"),
    ):
        with refused(expected):
            prepare.prepare([sources["text"]], tmp_path / "o" / "ids.bin", tokenizer, rules=rules)
        assert list((tmp_path / "o").iterdir()) == []


def test_a_tokenizer_without_its_files_is_found_out_before_reading(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(Builtin, "texts", lambda *_: pytest.fail("was read"))
    with refused("TIKTOKEN_CACHE_DIR", MissingInputError):
        prepare.prepare([parse_source("builtin:python-docs")], tmp_path / "ids.bin", GPT2Tokenizer())


# Shards, processes, restarts


@pytest.fixture
def corpus(tmp_path) -> Source:
    """200 documents, of which every fourth is a near copy of the one before and every tenth an exact one."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(1000)])
    texts: list[str] = []
    for i in range(200):
        text = texts[-1] + " more" if i % 4 == 3 else texts[-1] if i % 10 == 9 else " ".join(rng.choice(words, size=60))
        texts.append(text)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return parse_source(f"jsonl:{tmp_path}/corpus.jsonl")


NEAR = Rules(near_duplicates=0.7)


def prepared(corpus: Source, out, tokenizer: Tokenizer, **options) -> tuple[Prepared, list[int]]:
    """Prepare with near duplicates left out; return what was counted, and the ids."""
    result = prepare.prepare([corpus], out, tokenizer, rules=NEAR, **options)
    assert [path.name for path in out.parent.iterdir() if "partial" in path.name or path.is_dir()] == []
    return result, open_token_file(out).tokens[:].tolist()


def test_shards_hold_the_ids_of_one_file(corpus, tokenizers, tmp_path):
    whole, ids = prepared(corpus, tmp_path / "whole.bin", tokenizers["bpe"])
    assert whole.counts["near_duplicates"] == 50
    assert whole.counts["duplicates"] == 10  # the tenths that are no fourth
    assert (whole.documents, whole.tokens) == (140, len(ids))
    sharded, same_ids = prepared(corpus, tmp_path / "new" / "ids.bin", tokenizers["bpe"], shard_tokens=1000)
    assert same_ids == ids
    shards = sorted((tmp_path / "new").glob("*.bin"))
    assert [path.name for path in shards] == [f"ids-{i:05}.bin" for i in range(-(-len(ids) // 1000))]
    assert [path.stat().st_size for path in shards[:-1]] == [2000] * (len(shards) - 1)
    assert sharded.sha256 == open_token_file(tmp_path / "new" / "ids.bin").sha256 != whole.sha256
    assert (sharded.documents, sharded.counts) == (whole.documents, whole.counts)


def test_fewer_shards_or_one_file_replace_all_of_the_old_ones(corpus, tokenizers, tmp_path):
    out = tmp_path / "new" / "ids.bin"
    for shard_tokens, files in ((5_000, 14), (20_000, 4), (None, 1), (30_000, 3)):
        prepared(corpus, out, tokenizers["bpe"], shard_tokens=shard_tokens)
        assert len(list(out.parent.glob("*.bin"))) == files


def test_two_processes_write_the_file_of_one(corpus, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART", 5000)
    one = prepared(corpus, tmp_path / "one.bin", tokenizers["bpe"])
    assert prepared(corpus, tmp_path / "two.bin", tokenizers["bpe"], processes=2) == one
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_an_interrupted_run_is_resumed_and_damaged_parts_are_made_again(corpus, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART", 5000)
    out, tokenizer = tmp_path / "ids.bin", tokenizers["bpe"]
    unbroken = prepared(corpus, tmp_path / "unbroken.bin", tokenizer)

    def interrupt(result):
        if result.documents > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(corpus, out, tokenizer, report=interrupt)
    done = sorted((tmp_path / "ids.bin.parts").glob("*.npz"))
    assert len(done) > 5
    done[0].write_bytes(done[0].read_bytes()[:-100])
    changed = bytearray(done[1].read_bytes())
    changed[1000] ^= 1
    done[1].write_bytes(changed)
    for name in ("ids.bin.parts/x.partial", "ids.bin.0a1b2c3d.partial", "ids-00000.bin.0a1b2c3d.partial"):
        (tmp_path / name).write_bytes(b"of a process that was killed")
    encoded = []
    encode_part = parts.encode_part
    monkeypatch.setattr(parts, "encode_part", lambda job, texts: encoded.append(1) or encode_part(job, texts))
    assert prepared(corpus, out, tokenizer) == unbroken
    assert out.read_bytes() == (tmp_path / "unbroken.bin").read_bytes()
    n_parts = -(-corpus.files()[0].stat().st_size // 5000)
    assert len(encoded) <= n_parts - len(done) + 3


@pytest.mark.parametrize("change", ["rules", "tokenizer", "text"])
def test_parts_of_another_run_are_not_taken(corpus, tokenizers, tmp_path, monkeypatch, change):
    monkeypatch.setattr(prepare, "PART", 5000)

    def interrupt(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare([corpus], tmp_path / "ids.bin", tokenizers["bpe"], report=interrupt)
    tokenizer, rules, path = tokenizers["bpe"], Rules(), tmp_path / "corpus.jsonl"
    if change == "rules":
        rules = Rules(min_characters=473)
    elif change == "tokenizer":
        tokenizer = BPETokenizer.train("word1 word2 word3 " * 9, vocab_size=270)
    else:
        path.write_text(path.read_text().replace("word1", "words"))
    expected = prepare.prepare([corpus], tmp_path / "expected.bin", tokenizer, rules=rules)
    assert (expected.counts["short"] > 0) == (change == "rules")
    assert prepare.prepare([corpus], tmp_path / "ids.bin", tokenizer, rules=rules) == expected


def test_two_runs_do_not_write_one_file_at_once(corpus, tokenizers, tmp_path):
    def again(_):
        prepare.prepare([corpus], tmp_path / "ids.bin", tokenizers["bpe"])

    with refused("ids.bin.parts: another process is preparing ids.bin"):
        prepare.prepare([corpus], tmp_path / "ids.bin", tokenizers["bpe"], report=again)


# Training a tokenizer


def test_a_tokenizer_trained_in_pieces_is_the_one_trained_on_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 100)
    text = "".join(f"the {i} low lower\tlowest\n newer and wider " for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    whole = BPETokenizer.train(text, vocab_size=300).to_dict()
    assert train_tokenizer([parse_source(f"text:{tmp_path}/a.txt")], 300).to_dict() == whole


def test_it_is_trained_on_the_start_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TRAINING_CHARACTERS", 2000)
    (tmp_path / "a.txt").write_text("low lower " * 200)
    (tmp_path / "b.txt").write_bytes(b"\xff")  # not even looked at
    reports = []
    tokenizer = train_tokenizer([parse_source(f"text:{tmp_path}/*.txt")], 300, report=reports.append)
    assert reports == [2000]
    assert tokenizer.decode(tokenizer.encode("low lower")) == "low lower"
