"""What must hold between a source and two splits: no token in both, documents apart, ids that mean what they say."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from slm_jax.data import corpus as corpus_module
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.data.corpus import Corpus, encode_documents, load_corpus, split_documents
from slm_jax.data.token_file import write_token_file
from slm_jax.tokenizer import BPETokenizer, CharTokenizer, SimpleTokenizer, fingerprint

CHAR, SIMPLE = TokenizerConfig(kind="char"), TokenizerConfig(kind="simple")
BPE = TokenizerConfig(kind="bpe", vocab_size=300)
KINDS = pytest.mark.parametrize("kind", [CHAR, BPE], ids=["char", "bpe"])


@pytest.fixture
def text_file(tmp_path):
    """Write a text file; return its source."""

    def write(text, name="text.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return f"text:{tmp_path / name}"

    return write


def documents_of(tokens, tokenizer):
    """Decode what stands between the end-of-text ids."""
    cuts = np.flatnonzero(np.asarray(tokens) == tokenizer.eot_id)
    return [tokenizer.decode(part[part != tokenizer.eot_id].tolist()) for part in np.split(np.asarray(tokens), cuts)]


def letters(n):
    """A text in which each character stands once."""
    return "".join(chr(0x4E00 + i) for i in range(n))


# The split


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), fraction=st.floats(0.01, 0.99))
def test_the_split_shares_nothing_and_has_the_fraction(lengths, fraction):
    text, documents = letters(sum(lengths)), []
    for length in lengths:
        documents.append(text[:length])
        text = text[length:]
    train, validation = split_documents(documents, fraction)
    trained, validated = "".join(train), "".join(validation)
    assert not set(trained) & set(validated)
    assert set(trained) | set(validated) == set(letters(sum(lengths)))
    assert len(trained) + len(validated) == sum(lengths)
    assert abs(len(validated) - fraction * sum(lengths)) <= 1
    assert "" not in [*train, *validation]
    # Nothing is torn but the document at the cut.
    whole = [part for part in [*train, *validation] if part in documents]
    assert len(whole) >= len(documents) - 1
    assert (train, validation) == split_documents(documents, fraction)


def test_both_splits_of_many_documents_are_alike():
    """A plain cut at the end would put one half of an ordered source in one split."""
    documents = ["a" * 10] * 100 + ["b" * 10] * 100
    _, validation = split_documents(documents, 0.5)
    assert 0.35 < "".join(validation).count("a") / 1000 < 0.65


@KINDS
def test_a_corpus_is_the_text_cut_once(text_file, kind):
    text = letters(50) * 3 + "the end"
    corpus = load_corpus(DataConfig(text_file(text), validation_fraction=0.2), kind)
    decode = corpus.tokenizer.decode
    train, validation = decode(corpus.train.tolist()), decode(corpus.validation.tolist())
    assert train + validation == text
    assert len(validation) == pytest.approx(0.2 * len(text), abs=1)
    assert corpus.bytes_per_token == pytest.approx(len(validation.encode()) / corpus.validation.size)


def test_the_tokenizer_learns_from_the_training_split_only(text_file):
    text = "the cat sat " * 200 + "zzzzqqqq" * 100
    corpus = load_corpus(DataConfig(text_file(text), validation_fraction=0.25), BPE)
    assert corpus.tokenizer.to_dict() == BPETokenizer.train(text[: int(len(text) * 0.75)], vocab_size=300).to_dict()
    words = load_corpus(DataConfig(text_file("one two three four"), validation_fraction=0.3), SIMPLE)
    assert isinstance(words.tokenizer, SimpleTokenizer)
    assert words.validation.tolist()[-1] == words.tokenizer.vocab_size - 1  # four: unknown


def test_a_runs_own_tokenizer_is_used(text_file):
    saved = CharTokenizer().build_vocab("abcdefgh ")
    corpus = load_corpus(DataConfig(text_file("bad cab bead")), BPE, saved=saved)
    assert corpus.tokenizer is saved
    with refused("not in the vocabulary"):
        load_corpus(DataConfig(text_file("xyz " * 9)), BPE, saved=saved)


# Documents


@pytest.mark.parametrize("kind", [CHAR, SIMPLE, BPE], ids=["char", "simple", "bpe"])
def test_documents_are_separated_and_nothing_else_is_special(tmp_path, kind):
    documents = ["alpha beta", "gamma beta", "delta beta", "theta beta"]  # of one length: none is cut in two
    for i, document in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(document)
    corpus = load_corpus(DataConfig(f"text:{tmp_path}/*.txt", validation_fraction=0.5), kind)
    eot = corpus.tokenizer.eot_id
    found = []
    for tokens in (corpus.train, corpus.validation):
        assert eot not in (tokens[0], tokens[-1])
        assert (tokens == eot).sum() == 1
        found += documents_of(tokens, corpus.tokenizer)
    if kind is not SIMPLE:  # to which the validation split's first words are unknown
        assert sorted(found) == sorted(documents)


def test_documents_without_a_token_leave_no_separator():
    """White space at the cut between the splits is no word of the word tokenizer."""
    words = SimpleTokenizer().build_vocab("a b")
    for documents in (["\n", "a", " ", "b", "\n"], ["a", "b"]):
        assert encode_documents(documents, words).tolist() == [0, words.eot_id, 1]
    assert encode_documents(["\n"], words).size == 0
    assert encode_documents([], words).size == 0


# Fingerprint


def test_every_token_changes_the_fingerprint(monkeypatch):
    monkeypatch.setattr(corpus_module, "_CHUNK", 3)
    tokens = np.arange(12, dtype=np.uint16)
    corpus = Corpus(tokens[:8], tokens[8:], CharTokenizer().build_vocab("abc"), None)
    seen = {corpus.fingerprint()}
    for i in range(12):
        changed = tokens.copy()
        changed[i] += 1
        seen.add(dataclasses.replace(corpus, train=changed[:8], validation=changed[8:]).fingerprint())
    seen |= {dataclasses.replace(corpus, train=tokens[:n], validation=tokens[n:]).fingerprint() for n in (7, 9)}
    assert len(seen) == 15
    wider = dataclasses.replace(corpus, train=tokens[:8].astype(np.uint32))  # how ids are stored makes no difference
    assert wider.fingerprint() == corpus.fingerprint()


# Token files


@pytest.fixture
def token_file(tmp_path):
    """Write a file of uint16 ids; return its source."""

    def write(ids, name="ids.bin"):
        np.asarray(ids, "<u2").tofile(tmp_path / name)
        return f"tokens:{tmp_path / name}"

    return write


@pytest.fixture
def saved_tokenizer(tmp_path):
    """A tokenizer of nine characters and end-of-text, in a file."""
    return TokenizerConfig(path=str(CharTokenizer().build_vocab("abcdefghi").save(tmp_path / "tokenizer.json")))


def test_a_token_file_of_another_vocabulary_or_beside_text_is_refused(token_file, text_file, saved_tokenizer):
    with refused(r"ids\.bin: token 2 has id 10, but the vocabulary has 10"):
        load_corpus(DataConfig(token_file([1], "good.bin"), validation_source=token_file([1, 2, 10])), saved_tokenizer)
    ids, text = token_file([1, 2]), text_file("abc")
    for source in (DataConfig(ids, validation_source=text), DataConfig(text, validation_source=ids)):
        with refused("one is tokens, the other text"):
            load_corpus(source, saved_tokenizer)


# Prepared token files, which carry their tokenizer

CHARS, OTHERS = CharTokenizer().build_vocab("abcdefghi"), CharTokenizer().build_vocab("abcdefghz")
DEFAULT = TokenizerConfig()


@pytest.fixture
def prepared(tmp_path):
    """Write a file of ids as `slm-jax prepare` does; return its source."""

    def write(ids, tokenizer=CHARS, name="prepared.bin"):
        with write_token_file(tmp_path / name, tokenizer, "text:somewhere") as file:
            file.write(np.asarray(ids, np.uint16))
        return f"tokens:{tmp_path / name}"

    return write


IDS = [0, 1, 2, 9, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("prepared", DEFAULT), ("prepared", CHAR), ("prepared", None), ("token_file", None)],
    ids=["nothing", "its kind", "its file", "bare"],
)
def test_token_files_are_split_without_sharing_a_token(request, saved_tokenizer, kind, asked):
    """A prepared file needs no tokenizer, but may be read with the same one."""
    write, asked = request.getfixturevalue(kind), asked or saved_tokenizer
    corpus = load_corpus(DataConfig(write(IDS), validation_fraction=0.3), asked)
    assert [*corpus.train, *corpus.validation] == IDS
    assert (len(corpus.validation), corpus.bytes_per_token) == (3, None)
    assert corpus.tokenizer.to_dict() == CHARS.to_dict()
    assert isinstance(corpus.train, np.memmap)
    with_second = load_corpus(DataConfig(write(IDS), validation_source=write([3, 1], name="val.bin")), asked)
    assert (with_second.train.tolist(), with_second.validation.tolist()) == (IDS, [3, 1])


def test_a_prepared_file_of_the_models_tokenizer_is_read_and_of_another_refused(prepared, tmp_path):
    source = prepared(IDS)
    assert load_corpus(DataConfig(source), DEFAULT, saved=CHARS).tokenizer is CHARS
    one, other = (f"the char tokenizer {fingerprint(tokenizer)[:8]}" for tokenizer in (CHARS, OTHERS))
    data, made = DataConfig(source), f"{source}: made with {one}, expected"

    path = str(OTHERS.save(tmp_path / "others.json"))
    with refused(f"{made} {other}; prepare"):
        load_corpus(data, TokenizerConfig(path=path))
    with refused(f"{made} the gpt2 tokenizer"):
        load_corpus(data, TokenizerConfig(kind="gpt2"))
    with refused(f"{source}: made with {one}, but tokenizer.kind is simple; leave it out"):
        load_corpus(data, SIMPLE)
    with refused(f"{made} {other}; prepare the text with that one: slm-jax prepare"):
        load_corpus(data, DEFAULT, saved=OTHERS)
    validation = prepared(IDS, OTHERS, "val.bin")
    with refused(f"{validation}: made with {other}, expected {one}"):
        load_corpus(DataConfig(source, validation_source=validation), DEFAULT)


def test_a_bare_file_beside_a_prepared_one_is_read_with_its_tokenizer(prepared, token_file):
    source = DataConfig(prepared(IDS), validation_source=token_file([3, 1]))
    assert load_corpus(source, DEFAULT).validation.tolist() == [3, 1]
    outside = DataConfig(prepared(IDS), validation_source=token_file([3, 10]))
    with refused("token 1 has id 10, but the vocabulary has 10"):
        load_corpus(outside, DEFAULT)
    with refused("bare token ids.*--tokenizer.kind gpt2"):
        load_corpus(dataclasses.replace(source, source=token_file([1])), DEFAULT)


def test_the_fingerprint_of_prepared_files_is_of_their_ids_and_the_cut(prepared):
    """It is made from the SHA-256 of the files, without reading them again."""

    def fingerprint_of(ids, fraction=0.3, validation=None):
        data = DataConfig(prepared(ids), validation_fraction=fraction)
        if validation is not None:
            data = dataclasses.replace(data, validation_source=prepared(validation, name="val.bin"))
        corpus = load_corpus(data, DEFAULT)
        unread = np.zeros(0, np.uint16)
        assert len(corpus.sha256) == (1 if validation is None else 2)
        assert dataclasses.replace(corpus, sha256=()).fingerprint() != corpus.fingerprint()
        assert dataclasses.replace(corpus, train=unread).fingerprint() != corpus.fingerprint()
        return corpus.fingerprint()

    assert fingerprint_of(IDS) == fingerprint_of(IDS)
    others = [fingerprint_of(IDS, 0.4), fingerprint_of([1, *IDS[1:]]), fingerprint_of(IDS, validation=[1, 2])]
    assert len({fingerprint_of(IDS), *others}) == 4


# Columns, long texts


def test_texts_come_from_a_column(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": "abc abc", "id": i}) for i in range(6)))
    source = f"jsonl:{tmp_path}/a.jsonl"
    corpus = load_corpus(DataConfig(source, validation_source=source, text_column="body"), CHAR)
    for tokens in (corpus.train, corpus.validation):
        assert documents_of(tokens, corpus.tokenizer) == ["abc abc"] * 6
    assert corpus.notes == ()


def test_a_long_text_is_better_prepared(text_file, monkeypatch):
    monkeypatch.setattr(corpus_module, "_LONG", 1000)
    source = text_file("abc " * 300, "my text.txt")
    (note,) = load_corpus(DataConfig(source), CHAR).notes
    assert f"slm-jax prepare --source '{source}' --out FILE.bin" in note


def test_a_stop_is_asked_for_between_the_phases(text_file):
    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    with pytest.raises(Stopped):
        load_corpus(DataConfig(text_file("abc" * 50)), CHAR, stop=stop)


def test_shakespeare_is_cut_where_nanogpt_cuts_it(named_data):
    corpus = load_corpus(DataConfig("named:tinyshakespeare"), CHAR)
    assert (corpus.train.size, corpus.validation.size) == (1_003_854, 111_540)  # nanoGPT's data/shakespeare_char
    assert corpus.tokenizer.vocab_size == 65 + 1
