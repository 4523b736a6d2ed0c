"""What must hold of near duplicates: signatures estimate the Jaccard similarity, and copies are found, others not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.near_duplicates import ENTRIES, SHINGLE, find_near_duplicates, signature

WORDS = np.array([f"{i:x}" for i in range(5000)])


def text_of(rng: np.random.Generator, n_words: int) -> list[str]:
    return rng.choice(WORDS, size=n_words).tolist()


def jaccard(first: list[str], second: list[str]) -> float:
    """The definition: runs of words that are in both, as a share of those in one of them."""
    sets = [{tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)} for words in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def estimate(first: str, second: str) -> float:
    return float(np.mean(signature(first) == signature(second)))


def test_equal_entries_estimate_the_jaccard_similarity():
    rng = np.random.default_rng(0)
    errors = []
    for n_words, changed in [(200, 0), (200, 2), (200, 10), (500, 60), (3000, 100), (60_000, 2000), (300, 299)]:
        first = text_of(rng, n_words)
        second = list(first)
        for i in rng.choice(n_words, size=changed, replace=False):
            second[i] = "changed"
        errors.append(estimate(" ".join(first), " ".join(second)) - jaccard(first, second))
    assert np.abs(errors).max() < 4 * 0.5 / ENTRIES**0.5  # four standard errors
    assert errors[0] == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The quick, brown fox; jumps", "the  quick\nBROWN fox -- jumps!"),
        ("Ärger im Übermaß", "ärger   im übermaß."),
        ("short", "Short."),
        ("!!!", "!!!"),
        ("", ""),
    ],
)
def test_case_punctuation_and_white_space_make_no_difference(first, second):
    assert estimate(first, second) == 1


def test_texts_without_spaces_have_shingles_too():
    rng = np.random.default_rng(1)
    characters = [chr(0x4E00 + i) for i in rng.integers(3000, size=400)]
    other = [*characters[:200], "新", *characters[200:]]
    assert 0.9 < estimate("".join(characters), "".join(other)) < 1


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=50), st.text(max_size=50))
def test_any_text_has_a_signature(first, second):
    assert signature(first).shape == (ENTRIES,)
    assert estimate(first, first) == 1
    assert signature(f"{first} {second}").any()


def test_near_copies_are_found_and_others_are_not():
    """Also that the first document of each group stays, wherever its copies are."""
    rng = np.random.default_rng(2)
    originals = [text_of(rng, int(n)) for n in rng.integers(50, 400, size=600)]
    texts, is_copy = [" ".join(words) for words in originals], [False] * len(originals)
    for words in originals[:300]:
        changed = list(words)
        for i in rng.choice(len(words), size=max(1, len(words) // 50), replace=False):
            changed[i] = "changed"
        texts.append(" ".join(changed))
        is_copy.append(True)
    found = find_near_duplicates(np.stack([signature(text) for text in texts]), 0.7)
    assert found[is_copy].mean() >= 0.95
    assert not found[np.invert(is_copy)].any()


def test_no_document_and_one_document_are_no_duplicates():
    assert find_near_duplicates(np.zeros((0, ENTRIES), np.uint32), 0.5).tolist() == []
    assert find_near_duplicates(signature("a text")[None], 0.5).tolist() == [False]
    assert find_near_duplicates(np.stack([signature("a text")] * 3), 1.0).tolist() == [False, True, True]
