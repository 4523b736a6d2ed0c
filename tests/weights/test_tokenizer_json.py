"""What must hold of tokenizers for other programs: the same ids for any text, and the same text for any ids."""

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused
from tokenizers import Tokenizer as Model

from slm_jax.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, GPT2Tokenizer, SimpleTokenizer
from slm_jax.weights.tokenizer_json import tokenizer_json

TEXT = "It's 1984: the café's cat -- «Äpfel», 你好 你好! -- sat on the mat,\n\n  and sat.\tWho's there? 😀 ☃\r\n"
TEXTS = st.text() | st.text(st.sampled_from([*sorted(set(TEXT)), "\x85", "\x1c", "\u3000", "\u2028", "_"]))


@functools.cache
def both(kind):
    made = {"bpe": lambda: BPETokenizer.train(TEXT, 300), "gpt2": GPT2Tokenizer}
    made |= {"char": lambda: CharTokenizer().build_vocab(TEXT), "simple": lambda: SimpleTokenizer().build_vocab(TEXT)}
    tokenizer = made[kind]()
    return tokenizer, Model.from_str(tokenizer_json(tokenizer))


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "simple"])
def test_any_text_has_the_same_ids(kind):
    if kind == "gpt2" and GPT2Tokenizer().lacking():
        pytest.skip("TIKTOKEN_CACHE_DIR has not GPT-2's two files")
    ours, theirs = both(kind)

    @settings(max_examples=200, deadline=None)
    @example(TEXT)
    @given(TEXTS)
    def check(text):
        assert theirs.encode(text).ids == ours.encode(text)
        if kind != "simple":  # there, it is a word between spaces
            text += f"{END_OF_TEXT}a{text}"
        else:
            text += f" {END_OF_TEXT} a"
        ids = ours.encode(text, allow_special=True)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)

    check()
    assert theirs.get_vocab_size() == ours.vocab_size
    assert theirs.token_to_id(END_OF_TEXT) == ours.eot_id


def test_characters_of_the_vocabulary_have_the_same_ids_and_others_none():
    ours, theirs = both("char")

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.sampled_from(sorted(set(TEXT)))))
    def check(text):
        text += f"{END_OF_TEXT}{text}"
        ids = ours.encode(text, allow_special=True)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text

    check()
    with pytest.raises(Exception, match="UNK"):  # of this type
        theirs.encode("Z")


def test_merges_in_an_order_that_others_would_not_follow_are_refused():
    a, b, c = b"abc"
    # "abc" is (a, bc), but "ab" is merged before "bc" can be.
    with refused("merge 2 of the BPE"):
        tokenizer_json(BPETokenizer([(a, b), (b, c), (a, 257)]))
