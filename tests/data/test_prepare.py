"""What must hold of preparing: the ids are those of encoding every document whole, however it is cut."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from slm_jax.data import file_sources, prepare
from slm_jax.data.builtin import Builtin
from slm_jax.data.corpus import encode_documents
from slm_jax.data.prepare import REASONS, Rules, cut_pieces, select, train_tokenizer
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
    monkeypatch.setattr(prepare, "PIECE", piece)
    prepared = prepare.prepare([sources[source]], tmp_path / "ids.bin", tokenizer, rules=ALL)
    opened = open_token_file(tmp_path / "ids.bin")
    np.testing.assert_array_equal(opened.tokens, expected)
    assert (prepared.documents, prepared.tokens) == (len(whole), expected.size)
    assert prepared.text_bytes == sum(len(text.encode()) for text in whole)
    assert prepared.sha256 == opened.sha256
    assert json.loads((tmp_path / "ids.bin.json").read_text())["documents"] == len(whole)


def test_the_order_is_that_of_the_source_with_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 30)
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
    monkeypatch.setattr(prepare, "PIECE", 100)
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


# What is left out


def selected(rules: Rules, documents: list[list[str]]) -> tuple[list[str], dict[str, int]]:
    """What stays, and the counts that are not 0."""
    counts = dict.fromkeys(REASONS, 0)
    kept = ["".join(document) for document in select(documents, rules, counts)]
    assert len(documents) - len(kept) == sum(counts.values()) - counts["unfiltered"]
    return kept, {reason: n for reason, n in counts.items() if n}


def test_copies_are_left_out_however_they_are_cut():
    documents = [["ab", "c"], ["a", "bc"], ["abc\n"], ["ab c"], ["abd"], [" abd"], ["abc"]]
    assert selected(Rules(), documents) == (["abc", "ab c", "abd"], {"duplicates": 4})
    assert selected(ALL, documents)[1] == {}


def test_each_reason_is_counted_once():
    documents = [["word"], ["a longer word"], ["##########"], ["same line\n" * 4], ["a longer word"]]
    rules = Rules(min_characters=5, max_symbol_ratio=0.5, max_repeated_lines=0.5)
    expected = {"short": 1, "symbols": 1, "repeated_lines": 1, "duplicates": 1}
    assert selected(rules, documents) == (["a longer word"], expected)
    # what is left out for its quality is no earlier document
    assert selected(rules, [["word"], ["word"], ["another word"]])[1] == {"short": 2}
    # a limit is what is still kept
    assert selected(Rules(min_characters=4), [["word"], ["wor"]])[0] == ["word"]
    assert selected(Rules(max_symbol_ratio=0.25), [["abc!"], ["ab!!"]])[0] == ["abc!"]
    assert selected(Rules(max_repeated_lines=0.5), [["a\na"], ["a\na\na"]])[0] == ["a\na"]


def test_a_document_that_is_too_long_streams_through(monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST", 5)
    read = []

    def endless():
        while True:
            read.append("abc")
            yield "abc"

    counts = dict.fromkeys(REASONS, 0)
    first = next(select([endless()], Rules(min_characters=100), counts))
    assert len(read) == 2
    assert [next(first) for _ in range(4)] == ["abc"] * 4
    assert len(read) == 4
    assert counts == dict.fromkeys(REASONS, 0) | {"unfiltered": 1}
    assert selected(Rules(), [["abcde"], ["abcde"], ["abcdef"], ["abcdef"]])[1] == {"duplicates": 1, "unfiltered": 2}


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
