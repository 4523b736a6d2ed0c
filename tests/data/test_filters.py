"""What must hold of filters: each document that is left out is counted once, in order, and long ones stream through."""

import itertools
import unicodedata

import numpy as np

from slm_jax.data import filters
from slm_jax.data.filters import REASONS, Rules, mark_copies
from slm_jax.data.parts import Job, encode_part
from slm_jax.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer().build_vocab(" abcdefghijklmnopqrstuvwxyz!#\n")


def selected(rules: Rules, documents: list[list[str]]) -> tuple[list[str], dict[str, int]]:
    """What stays, and the counts that are not 0."""
    part = encode_part(Job("", rules, TOKENIZER), list(mark_copies(documents, rules)))
    counts = {reason: n for reason, n in zip(REASONS, part.counts.tolist(), strict=True) if n}
    kept = TOKENIZER.decode(part.ids).split("<|endoftext|>")[1:]
    assert len(documents) - len(kept) == sum(counts.values()) - counts.get("unfiltered", 0)
    assert part.lengths.sum() == part.ids.size
    assert part.sizes.sum() == sum(map(len, kept))
    return kept, counts


def test_copies_are_left_out_however_they_are_cut():
    documents = [["ab", "c"], ["a", "bc"], ["abc\n"], ["ab c"], ["abd"], [" abd"], ["abc"]]
    assert selected(Rules(), documents) == (["abc", "ab c", "abd"], {"duplicates": 4})
    assert selected(Rules(deduplicate=False), documents)[1] == {}


def test_each_reason_is_counted_once():
    documents = [["word"], ["a longer word"], ["##########"], ["same line\n" * 4], ["a longer word"]]
    rules = Rules(min_characters=5, max_symbol_ratio=0.5, max_repeated_lines=0.5)
    expected = {"short": 1, "symbols": 1, "repeated_lines": 1, "duplicates": 1}
    assert selected(rules, documents) == (["a longer word"], expected)
    # what is left out for its quality is no earlier document
    assert selected(rules, [["word"], ["word  "], ["another word"]])[1] == {"short": 2}
    # a limit is what is still kept
    assert selected(Rules(min_characters=4), [["word"], ["wor"]])[0] == ["word"]
    assert selected(Rules(max_symbol_ratio=0.25), [["abc!"], ["ab!!"]])[0] == ["abc!"]
    assert selected(Rules(max_repeated_lines=0.5), [["a\na"], ["a\na\na"]])[0] == ["a\na"]


def test_texts_are_brought_to_a_normal_form_before_anything_else(monkeypatch):
    monkeypatch.setattr(filters, "LONGEST", 9)
    documents = [["ﬁ", "ne"], ["fine"], ["ﬁne " * 9]]
    texts = list(mark_copies(documents, Rules(normalize="NFKC")))
    assert [text.is_copy for text in texts[:2]] == [False, True]
    assert "".join(text.text for text in texts) == "fine" * 2 + "fine " * 9
    decomposed = [[unicodedata.normalize("NFD", "é")]]
    assert [text.text for text in mark_copies(decomposed, Rules(normalize="NFC"))] == ["é"]
    assert [text.text for text in mark_copies(decomposed)] == decomposed[0]


def test_a_document_that_is_too_long_streams_through(monkeypatch):
    monkeypatch.setattr(filters, "LONGEST", 5)
    monkeypatch.setattr(filters, "PIECE", 3)
    read = []

    def endless():
        while True:
            read.append("abc ")
            yield "abc "

    texts = list(itertools.islice(mark_copies([endless()]), 4))
    assert [(text.is_start, text.is_whole) for text in texts] == [(True, False)] + [(False, False)] * 3
    assert len(read) <= 12
    kept, counts = selected(Rules(min_characters=100), [["abc ", "abc ", "abc"]])
    assert (kept, counts) == (["abc abc abc"], {"unfiltered": 1})
    documents = [["abcde"], ["abcde"], ["abcdef"], ["abcdef"]]
    assert selected(Rules(near_duplicates=0.5), documents)[1] == {"duplicates": 1, "unfiltered": 2}
    part = encode_part(Job("", Rules(near_duplicates=0.5), TOKENIZER), list(mark_copies(documents)))
    assert part.signatures.any(axis=1).tolist() == [True, False, False]
    np.testing.assert_array_equal(part.starts, 1)
