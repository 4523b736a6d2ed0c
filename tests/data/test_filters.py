"""What must hold of the filter: what it leaves out and counts, and that it looks at no document that is too long."""

from slm_jax.data import filters
from slm_jax.data.filters import DocumentFilter, Rules

OFF = Rules(deduplicate=False)


def select(rules: Rules, documents: list[list[str]]) -> tuple[list[str], dict[str, int]]:
    """What stays, and the counts that are not 0."""
    document_filter = DocumentFilter(rules)
    kept = ["".join(document) for document in document_filter.select(documents)]
    assert len(documents) - len(kept) == sum(
        n for reason, n in document_filter.counts.items() if reason != "unfiltered"
    )
    return kept, {reason: n for reason, n in document_filter.counts.items() if n}


def test_copies_are_left_out_however_they_are_cut():
    documents = [["ab", "c"], ["a", "bc"], ["abc\n"], ["ab c"], ["abd"], [" abd"], ["abc"]]
    assert select(Rules(), documents) == (["abc", "ab c", "abd"], {"duplicates": 4})
    assert select(OFF, documents)[1] == {}


def test_each_reason_is_counted_once():
    documents = [["word"], ["a longer word"], ["##########"], ["same line\n" * 4], ["a longer word"]]
    rules = Rules(min_characters=5, max_symbol_ratio=0.5, max_repeated_lines=0.5)
    expected = {"short": 1, "symbols": 1, "repeated_lines": 1, "duplicates": 1}
    assert select(rules, documents) == (["a longer word"], expected)
    # what is left out for its quality is no earlier document
    assert select(rules, [["word"], ["word"], ["another word"]])[1] == {"short": 2}


def test_a_limit_is_what_is_still_kept():
    assert select(Rules(min_characters=4), [["word"], ["wor"]])[0] == ["word"]
    assert select(Rules(max_symbol_ratio=0.25), [["abc!"], ["ab!!"]])[0] == ["abc!"]
    assert select(Rules(max_repeated_lines=0.5), [["a\na"], ["a\na\na"]])[0] == ["a\na"]


def test_a_document_that_is_too_long_streams_through(monkeypatch):
    monkeypatch.setattr(filters, "LONGEST", 5)
    read = []

    def endless():
        while True:
            read.append("abc")
            yield "abc"

    document_filter = DocumentFilter(Rules(min_characters=100))
    first = next(document_filter.select([endless()]))
    assert len(read) == 2
    assert [next(first) for _ in range(4)] == ["abc"] * 4
    assert len(read) == 4
    assert document_filter.counts == dict.fromkeys(document_filter.counts, 0) | {"unfiltered": 1}
    assert select(Rules(), [["abcde"], ["abcde"], ["abcdef"], ["abcdef"]])[1] == {"duplicates": 1, "unfiltered": 2}
