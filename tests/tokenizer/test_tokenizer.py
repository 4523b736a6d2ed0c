"""What must hold for every tokenizer, and what each of them promises by itself."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused

from slm_jax.errors import InputError, MissingInputError
from slm_jax.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    SimpleTokenizer,
    Tokenizer,
    cut_pieces,
    fingerprint,
    get_tokenizer,
    load_tokenizer,
    tokenizer_from_dict,
)

TEXT = """The cat sat on the mat; the dog -- a good dog, wasn't he? -- sat on the cat.
    "Well," said the cat, "that isn't what we'd agreed!"   It was 1908, and they'll be sorry.

Once upon a time there was a tokenizer. It cut the words into pieces and the pieces into smaller pieces (bytes).
"""
SPACES = "\t\n\x0b\x0c\r\x1c\x1f \x85\xa0\u1680\u2003\u2028\u3000"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    SPACES + "aÉ1.'🙂\u0301\0", max_size=60
)

HAS_GPT2 = "TIKTOKEN_CACHE_DIR" in os.environ
needs_gpt2 = pytest.mark.skipif(not HAS_GPT2, reason="TIKTOKEN_CACHE_DIR does not name a folder with GPT-2's files")
KINDS = ["simple", "char", "bpe", pytest.param("gpt2", marks=needs_gpt2)]


def make(kind: str) -> Tokenizer:
    match kind:
        case "simple":
            return SimpleTokenizer().build_vocab(TEXT)
        case "char":
            return CharTokenizer().build_vocab(TEXT)
        case "bpe":
            return BPETokenizer.train(TEXT, vocab_size=320)
        case _:
            return GPT2Tokenizer()


def english() -> str:
    """Real prose that ships with Python, so that it needs no download; it differs by version."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


# Every kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kind):
    tokenizer = make(kind)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.kind == kind
    ids = tokenizer.encode(TEXT)
    assert ids
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert 0 <= tokenizer.eot_id < tokenizer.vocab_size
    assert tokenizer.eot_id not in ids
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.eot_id]) == END_OF_TEXT
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)
    ids = tokenizer.encode("the cat")
    for form in (tuple(ids), iter(ids), np.array(ids, np.uint16), list(np.array(ids)), jnp.array(ids)):
        assert tokenizer.decode(form) == "the cat"


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_tokenizer(kind, tmp_path):
    tokenizer = make(kind)
    assert tokenizer.save(tmp_path / "tok.json") == tmp_path / "tok.json"
    assert tokenizer.save(tmp_path / "run" / "tokenizer") == tmp_path / "run" / "tokenizer" / "tokenizer.json"
    tokenizer.save(tmp_path / "run" / "tokenizer")  # replaces
    assert [p.name for p in (tmp_path / "run" / "tokenizer").iterdir()] == ["tokenizer.json"]
    copies = [
        type(tokenizer).load(tmp_path / "tok.json"),
        load_tokenizer(str(tmp_path / "run" / "tokenizer")),
        get_tokenizer(tmp_path / "run"),
        tokenizer_from_dict(tokenizer.to_dict()),
        type(tokenizer).from_dict(json.loads(json.dumps(tokenizer.to_dict()))),
    ]
    for copy in copies:
        assert type(copy) is type(tokenizer)
        assert copy.to_dict() == tokenizer.to_dict()
        assert fingerprint(copy) == fingerprint(tokenizer)
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)
        assert (copy.vocab_size, copy.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)


def test_fingerprints_tell_tokenizers_apart():
    others = [*map(make, ("simple", "char", "bpe", "gpt2")), CharTokenizer().build_vocab(TEXT + "é")]
    others.append(BPETokenizer.train(TEXT, vocab_size=319))
    assert len({fingerprint(tokenizer) for tokenizer in others}) == len(others)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_names_the_first_bad_id_and_the_vocabulary(kind):
    tokenizer = make(kind)
    size = tokenizer.vocab_size
    for bad in (size, -1, 10**30, 1.0, "1", None, True, [0], np.float32(1)):
        with pytest.raises(InputError, match=rf"position 1 .* vocabulary of {size} ") as caught:
            tokenizer.decode([0, bad, size + 5])
        assert repr(bad)[:10] in str(caught.value)
    for form in (np.array([[0, 1]]), np.array([0.5]), "ab", jnp.array([True]), jnp.zeros((0, 2)).T.reshape(1, 0)):
        with pytest.raises(InputError, match="position 0"):
            tokenizer.decode(form)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_refuses_what_is_not_text(kind):
    tokenizer = make(kind)
    for bad in (b"the", None, 3, ["the"]):
        with pytest.raises(TypeError):
            tokenizer.encode(bad)
    with pytest.raises(InputError, match=r"surrogate.* at offset 4"):
        tokenizer.encode("the \ud83d cat")


# Special tokens


@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_special_text_is_refused_unless_allowed(kind):
    tokenizer = make(kind)
    with pytest.raises(InputError, match=r"offset 4; expected text without it"):
        tokenizer.encode(f"the {END_OF_TEXT} cat")
    allowed = tokenizer.encode(f"the {END_OF_TEXT} cat{END_OF_TEXT}", allow_special=True)
    eot = tokenizer.eot_id
    assert allowed == [*tokenizer.encode("the "), eot, *tokenizer.encode(" cat"), eot]
    assert tokenizer.encode("<|endoftext|", allow_special=True) == tokenizer.encode("<|endoftext|")


def test_special_text_in_a_character_vocabulary_is_spelled_out_unless_allowed():
    tokenizer = CharTokenizer().build_vocab(TEXT + END_OF_TEXT)
    text = f"cat{END_OF_TEXT}dog"
    spelled = tokenizer.encode(text)
    assert len(spelled) == len(text)
    assert tokenizer.eot_id not in spelled
    allowed = tokenizer.encode(text, allow_special=True)
    assert allowed == [*tokenizer.encode("cat"), tokenizer.eot_id, *tokenizer.encode("dog")]
    assert tokenizer.decode(spelled) == tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


def test_end_of_text_in_training_text_separates_documents():
    plain = BPETokenizer.train([TEXT, "other words"], vocab_size=300)
    marked = BPETokenizer.train(TEXT + END_OF_TEXT + "other words", vocab_size=300)
    assert marked.to_dict() == plain.to_dict()


# The book's tokenizer


def test_the_verdict_has_the_books_vocabulary(named_data):
    # 1,132: the book's chapter 2, with both special tokens. If it moves, the split moved away from the book's.
    tokenizer = SimpleTokenizer().build_vocab((named_data / "the-verdict.txt").read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == 1132
    assert (tokenizer.eot_id, tokenizer.decode([1131])) == (1130, "<|unk|>")
    # The book's example, with the ids and the text that it prints.
    text = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
    ids = tokenizer.encode(text)
    assert ids == [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
    assert tokenizer.decode(ids) == "<|unk|>, do you like tea? <|endoftext|> In the sunlit terraces of the <|unk|>."


def test_special_words_in_the_training_text_keep_their_places():
    tokenizer = SimpleTokenizer().build_vocab(f"zebra {END_OF_TEXT} ant <|unk|> --zoo")
    assert tokenizer.to_dict()["words"] == ["--", "ant", "zebra", "zoo"]
    assert tokenizer.encode(f"ant {END_OF_TEXT} bee <|unk|>") == [1, 4, 5, 5]


# Characters


def test_characters_keep_nanogpts_ids(named_data):
    # nanoGPT's prepare.py on tinyshakespeare prints 65 characters: newline is 0, "z" is 64.
    tokenizer = CharTokenizer().build_vocab((named_data / "tinyshakespeare.txt").read_text(encoding="utf-8"))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (66, 65)
    assert tokenizer.encode("\nz") == [0, 64]


def test_an_unknown_character_is_named_with_its_place():
    tokenizer = CharTokenizer().build_vocab("abc")
    with pytest.raises(InputError, match=r"'é' at offset 2 .*bpe"):
        tokenizer.encode("abéc")
    with pytest.raises(InputError, match=r"'x' at offset 15 "):
        tokenizer.encode(f"a{END_OF_TEXT}bxc", allow_special=True)


@pytest.mark.parametrize("cls", [SimpleTokenizer, CharTokenizer])
def test_a_vocabulary_comes_before_its_use(cls, tmp_path):
    for use in (lambda t: t.encode("a"), lambda t: t.decode([0]), lambda t: t.vocab_size, lambda t: t.save(tmp_path)):
        with pytest.raises(InputError, match="build_vocab"):
            use(cls())
    with pytest.raises(InputError, match=r"no (words|chars)"):
        cls().build_vocab("")


# Byte-level BPE


@given(UNICODE)
@example(TEXT)
@example("")
@example("\0\0 \0")
@example("e\u0301 \u0301\u0301")
@example("👩‍👩‍👧 🏳️‍🌈 é ü ﷽")
@example("\x1c \x1d\n" * 3)
@example("".join(map(chr, range(0x180))))
def test_any_unicode_round_trips(text):
    chars = [CharTokenizer().build_vocab(text)] if text else []
    for tokenizer in [_BPE, *chars, *([GPT2Tokenizer()] if HAS_GPT2 else [])]:
        assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


_BPE = BPETokenizer.train(TEXT, vocab_size=400)


def hf_trained(texts: list[str], vocab_size: int):
    """The reference: Hugging Face's own training and encoding, on whole texts. Returns it and its ids as bytes."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, pre_tokenizers, trainers

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(texts, trainer)
    return reference


def same_pieces(ours: BPETokenizer, reference, text: str) -> None:
    """The same ids, as learned: merged tokens have the same id in both, bytes are ordered differently."""
    theirs = reference.encode(text).ids
    mine = ours.encode(text)
    assert [i if i >= 256 else "byte" for i in mine] == [i if i >= 256 else "byte" for i in theirs]
    by_id = {}
    for a, b in zip(mine, theirs, strict=True):
        assert by_id.setdefault(a, b) == b


def test_segmentation_is_hugging_faces_on_text_not_trained_on():
    text = english()
    train, held_out = text[:250_000], text[250_000:400_000]  # long enough to be cut into pieces
    ours, reference = BPETokenizer.train(train, vocab_size=1000), hf_trained([train], 1000)
    assert ours.vocab_size == reference.get_vocab_size() + 1 == 1000
    same_pieces(ours, reference, held_out)
    same_pieces(ours, reference, TEXT + "naïve café 東京 🙂")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("aab ca\n'", max_size=80), min_size=1, max_size=4), st.text("aab ca\n'", max_size=120))
def test_segmentation_is_hugging_faces_on_overlapping_runs(train, held_out):
    ours, reference = BPETokenizer.train(train, vocab_size=290), hf_trained(train, 290)
    assert ours.vocab_size == reference.get_vocab_size() + 1
    same_pieces(ours, reference, held_out)
    assert ours.decode(ours.encode(held_out)) == held_out
    assert "\ufffd" in ours.decode(ours.encode("🙂")[:1])  # a character that is cut


def test_training_gives_the_same_merges_in_every_process():
    code = (
        "from slm_jax.tokenizer import BPETokenizer as B, fingerprint\nfrom pydoc_data.topics import topics\n"
        "print(fingerprint(B.train([topics[k] for k in sorted(topics)], 700)))"
    )
    prints = []
    for threads in ("1", "3"):
        path = os.pathsep.join(sys.path)
        env = os.environ | {"PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads, "PYTHONPATH": path}
        prints.append(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True))
    assert prints[0].stdout == prints[1].stdout != ""


@pytest.mark.real_world
@pytest.mark.parametrize("text", ["ACGTTGCAAT" * 30_000, "\n" * 300_000, "=-" * 150_000, "天地" * 50_000])
def test_one_long_word_is_trained_on_in_little_time(text):
    began = time.monotonic()
    tokenizer = BPETokenizer.train(text, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - began < 10  # of each of them minutes, when time grew with the square


def test_a_text_without_a_place_to_cut_is_cut_nevertheless():
    pieces = [*cut_pieces(["ab" * 5_000_000] * 2, 1 << 20)]
    assert "".join(pieces) == "ab" * 10_000_000
    assert max(map(len, pieces)) < 10_000_000


def test_vocabulary_size_tells_the_truth_and_what_cannot_be_trained_is_refused():
    assert BPETokenizer.train(TEXT, vocab_size=300).vocab_size == 300
    assert BPETokenizer.train(TEXT, vocab_size=257).to_dict() == {"kind": "bpe", "merges": []}
    small = BPETokenizer.train("ab ab", vocab_size=1024)
    assert small.vocab_size == 256 + 2 + 1  # "ab" and " ab"
    assert small.eot_id == 258
    assert BPETokenizer.train([], vocab_size=1024).vocab_size == 257
    for size in (256, 0, -1):
        with pytest.raises(InputError, match=rf"{size}.* 257"):
            BPETokenizer.train(TEXT, vocab_size=size)
    with pytest.raises(InputError, match="surrogate"):
        BPETokenizer.train(["fine", "not \udc80"], vocab_size=300)
    with pytest.raises(TypeError):
        BPETokenizer.train(iter(["fine", b"not"]), vocab_size=300)


@pytest.mark.real_world
@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_long_runs_of_white_space_encode(kind):
    tokenizer = make(kind)
    for text in (" " * 300_000 + "x", "a" + "\n\u3000" * 50_000 + "\x1c."):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Below what overflows, tiktoken's own answer for the uncut text is the reference.
    for text in (" " * 5000 + "x y", "a" + "\t\n" * 3000 + " b" + " " * 4500, "\r" * 4098 + "\x1c" + " " * 5000 + "1"):
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


# GPT-2


@needs_gpt2
def test_gpt2_ids():
    # The book's chapter 2 prints these ids.
    tokenizer = get_tokenizer("gpt2")
    text = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of someunknownPlace."
    ids = [15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114, 286]
    ids += [617, 34680, 27271, 13]
    assert tokenizer.encode(text, allow_special=True) == ids
    assert tokenizer.decode(ids) == text


def refusing(*args, **kwargs):
    raise socket.gaierror("Name or service not known")


@pytest.mark.parametrize("connect", [lambda *_, **__: time.sleep(4) or refusing(), refusing])
def test_offline_without_files_fails_soon_and_says_what_to_do(connect, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", connect)
    tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50257, 50256)
    assert tokenizer.to_dict() == {"kind": "gpt2"}
    start, expected = time.monotonic(), r"missing.*download .*failed.*TIKTOKEN_CACHE_DIR.*tokenizer\.kind: bpe"
    with refused(f"{tmp_path}.*{expected}", MissingInputError):
        tokenizer.encode("x")
    assert time.monotonic() - start < 2


@needs_gpt2
def test_a_corrupt_file_is_reported_offline_and_left_alone(monkeypatch, tmp_path):
    for file in Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-1] if file.name.startswith("6c7ea1a7") else content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refusing)
    with refused(r"vocab\.bpe.*corrupt|encoder\.json.*corrupt", MissingInputError) as caught:
        get_tokenizer("gpt2").decode([1])
    assert "missing" not in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 2


# Files that are not what they should be


def test_an_unknown_tokenizer_lists_what_is_accepted():
    with refused(r"gpt3.*gpt2.*tokenizer\.json.*run", MissingInputError):
        get_tokenizer("gpt3")


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "char", "chars": ["a"', "JSON"),
        ("[]", "expected `object`"),
        ('{"kind": ["char"]}', "kind is .*, expected simple, char, bpe, gpt2"),
        ('{"kind": "char"}', "chars"),
        ('{"kind": "char", "chars": ["a"], "more": 1}', "'more'"),
        ('{"kind": "char", "chars": "abc"}', "list"),
        ('{"kind": "char", "chars": ["a", "b", "a"]}', "'a' occurs twice"),
        ('{"kind": "char", "chars": ["a", "bc"]}', "'bc'"),
        ('{"kind": "simple", "words": ["a", "<|unk|>"]}', "twice"),
        ('{"kind": "bpe", "merges": [[97, 98], [97, 258]]}', "merge 1 .* below 257"),
        ('{"kind": "bpe", "merges": [[true, 98]]}', "merge 0"),
        ('{"kind": "bpe", "merges": [[97, 98], [98, 99], [256, 99], [97, 257]]}', "merge 3 .* id 258"),
        (json.dumps({"kind": "bpe", "merges": [[n, n] for n in (97, *range(256, 300))]}), "merge 10 .* 2,048 bytes"),
        ('{"kind": "gpt2", "vocab_size": 5}', "'vocab_size'"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(content, message, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with refused(rf"{file}.*{message}"):
        load_tokenizer(tmp_path)


def test_another_kinds_file_is_refused(tmp_path):
    make("char").save(tmp_path)
    with refused(r"tokenizer\.json.*'char'.*'bpe'.*load_tokenizer"):
        BPETokenizer.load(tmp_path)
