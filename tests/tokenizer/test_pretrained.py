"""What must hold of pretrained models' tokenizers: the ids of the programs that made them, roles, and bad files."""

import json
import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from slm_jax.tokenizer import BPETokenizer, PretrainedTokenizer, cut_pieces, fingerprint, get_tokenizer
from slm_jax.tokenizer.from_gguf import from_gguf

TEXT = """The cat sat on the mat; the dog -- a good dog, wasn't he? -- sat on the cat in 1908 and 2024.
    "Well," said the cat, "that isn't what we'd agreed!"   It was 1908, and they'll be sorry.\n\n\nOnce upon a time
"""
SAMPLES = [TEXT, "", "a", " a", "cat  sat \n", "naïve 東京 🙂", "12345 it's", "\t\n cat.\n\ncat", "▁ cat", "e\u0301"]
SPECIAL = ["<|end|>", "<s>", "</s>"]
CONFIG = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ messages }}"}


def trained(texts=TEXT, size=400):
    """Hugging Face's own byte-level BPE with special tokens, which is the reference."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator([texts], trainer)
    return reference


REFERENCE = trained()


def write(folder, content=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(REFERENCE.to_str() if content is None else json.dumps(content))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def encode_all(tokenizer, reference):
    for text in SAMPLES:
        assert tokenizer.encode(text) == reference(text)


# Hugging Face's files


def test_a_folder_has_the_ids_the_roles_and_the_template(tmp_path):
    folder = write(tmp_path / "model", tokenizer_config=CONFIG, generation_config={"eos_token_id": [2, 0]})
    tokenizer = get_tokenizer(folder)
    encode_all(tokenizer, lambda text: REFERENCE.encode(text).ids)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in SAMPLES)
    assert tokenizer.vocab_size == REFERENCE.get_vocab_size()
    assert (tokenizer.eos_ids, tokenizer.eot_id, tokenizer.start_ids) == ((2, 0), 2, [])
    assert tokenizer.roles == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template == "{{ messages }}"
    (folder / "chat_template.jinja").write_text("own")
    assert get_tokenizer(folder / "tokenizer.json").chat_template == "own"


def test_special_tokens_in_text_are_spelled_unless_allowed(tmp_path):
    tokenizer = get_tokenizer(write(tmp_path, tokenizer_config=CONFIG))
    spelled = tokenizer.encode("cat</s> <s>")
    assert tokenizer.decode(spelled) == "cat</s> <s>"
    assert not {1, 2} & {*spelled}
    with refused("special token </s> at offset 4"):
        tokenizer.encode_prompt("cat </s> <s>")
    ids = tokenizer.encode("cat</s><s>", allow_special=True)
    assert ids == [*tokenizer.encode("cat"), 2, 1]
    assert tokenizer.decode(ids) == "cat</s><s>"
    assert tokenizer.encode_parts(["cat</", "s>", "", "<s> c", "at"]) == [
        [*tokenizer.encode("cat"), 2], [], [], [1, *tokenizer.encode(" cat")], [],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "post", "expected"),
    [
        ({}, False, []),
        ({}, True, [1]),
        ({"add_bos_token": True}, False, [1]),
        ({"add_bos_token": False}, True, [1]),
    ],
)
def test_whether_a_text_begins_with_bos_is_decided_as_by_transformers(config, post, expected, tmp_path):
    content = json.loads(REFERENCE.to_str())
    if post:
        pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        kind = "TemplateProcessing"
        content["post_processor"] = {"type": kind, "single": pieces, "pair": pieces, "special_tokens": special}
    tokenizer = get_tokenizer(write(tmp_path, content, tokenizer_config=CONFIG | config))
    assert tokenizer.start_ids == expected
    assert tokenizer.encode("cat") == REFERENCE.encode("cat").ids
    assert tokenizer.encode_prompt("cat") == [*expected, *tokenizer.encode("cat")]
    assert tokenizer.encode_prompt("") == (expected or [2])
    assert tokenizer.document_ids == [2, *expected]
    assert tokenizer.decode(tokenizer.encode_prompt("cat")) == "cat"


def test_a_run_keeps_all_of_it(tmp_path):
    tokenizer = get_tokenizer(write(tmp_path / "model", tokenizer_config=CONFIG | {"add_bos_token": True}))
    tokenizer.save(tmp_path / "run" / "tokenizer")
    copy = get_tokenizer(tmp_path / "run")
    assert copy.to_dict() == tokenizer.to_dict()
    assert fingerprint(copy) == fingerprint(tokenizer)
    assert isinstance(copy, PretrainedTokenizer)
    encode_all(copy, tokenizer.encode)
    other = PretrainedTokenizer(**{**settings_of(tokenizer), "chat_template": "other"})
    assert fingerprint(other) == fingerprint(tokenizer)
    for change in ({"eos_ids": [0]}, {"add_bos": False}, {"model": json.loads(trained(size=320).to_str())}):
        assert fingerprint(PretrainedTokenizer(**{**settings_of(tokenizer), **change})) != fingerprint(tokenizer)


def settings_of(tokenizer):
    return {name: value for name, value in tokenizer.to_dict().items() if name != "kind"}


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    content = json.loads(REFERENCE.to_str())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = get_tokenizer(write(tmp_path, content, tokenizer_config=CONFIG))
    encode_all(tokenizer, lambda text: REFERENCE.encode(text).ids)


@pytest.mark.parametrize(
    ("change", "files", "message"),
    [
        ({"pre_tokenizer": {"type": "Clairvoyant"}}, {}, "pre_tokenizer Clairvoyant"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, {}, "cannot read"),
        ({"model": None}, {}, "cannot read"),
        ({"added_tokens": 7}, {}, "cannot read"),
        ({}, {"tokenizer_config": {"eos_token": "<none>"}}, "eos_token is '<none>'"),
        ({}, {"generation_config": {"eos_token_id": 10**6}}, "eos_ids.*below 344"),
        ({}, {"tokenizer_config": {**CONFIG, "bos_token": "<none>", "add_bos_token": True}}, "bos_token is '<none>'"),
        ({}, {"tokenizer_config": {**CONFIG, "chat_template": 3}}, "chat_template is 3"),
        (
            {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            {},
            "which token ends a text",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(change, files, message, tmp_path):
    folder = write(tmp_path, json.loads(REFERENCE.to_str()) | change, **files)
    with refused(rf"tokenizer.*{message}"):
        get_tokenizer(folder)


def test_a_damaged_file_is_refused(tmp_path):
    whole = REFERENCE.to_str()
    write(tmp_path)
    for cut in (0, 10, len(whole) // 2, len(whole) - 2):
        (tmp_path / "tokenizer.json").write_text(whole[:cut])
        with refused("tokenizer.json: .*JSON"):
            get_tokenizer(tmp_path)
    good = get_tokenizer(write(tmp_path, tokenizer_config=CONFIG))
    for change in ({"eos_ids": ["2"]}, {"roles": {"eos_token": 2}}, {"model": []}, {"add_bos": 1}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**good.to_dict(), **change}))
        with refused(f"tokenizer.json: tokenizer: {next(iter(change))}.*: expected"):
            get_tokenizer(tmp_path)


# SentencePiece


@pytest.fixture(scope="module", params=["bpe", "bpe-bytes", "unigram"])
def sentencepiece(request, tmp_path_factory):
    """A model of SentencePiece, and its file."""
    library = pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    (folder / "text.txt").write_text(TEXT * 4)
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    if request.param == "unigram":
        options = {"normalization_rule_name": "nmt_nfkc", "hard_vocab_limit": False}
    elif request.param == "bpe":
        options["byte_fallback"] = False
    library.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type=request.param.split("-")[0],
        vocab_size=330 if "bytes" in request.param else 70, character_coverage=1.0, minloglevel=2, **options,
    )  # fmt: skip
    file = folder / "tokenizer.model"
    return library.SentencePieceProcessor(model_file=str(file)), file


def test_sentencepieces_ids(sentencepiece):
    reference, file = sentencepiece
    tokenizer = get_tokenizer(file.parent)
    assert (tokenizer.vocab_size, tokenizer.start_ids) == (reference.vocab_size(), [reference.bos_id()])
    for text in [*SAMPLES, " the cat", "tthhee", "aaaa aaa"]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        if reference.unk_id() not in ids:  # which SentencePiece shows as another character
            assert tokenizer.decode(ids) == reference.decode(ids)


def test_pieces_of_a_document_are_those_of_the_whole(sentencepiece):
    tokenizer = get_tokenizer(sentencepiece[1])
    first, *rest = cut_pieces([TEXT], 20)
    assert len(rest) > 2
    assert [*tokenizer.encode(first), *(id_ for piece in rest for id_ in tokenizer.continued().encode(piece))] == (
        tokenizer.encode(TEXT)
    )
    part = tokenizer.continued()
    assert "".join(part.decode([id_]) for id_ in [*tokenizer.start_ids, *tokenizer.encode("the cat")]) == "<s> the cat"


def test_a_damaged_model_of_sentencepiece_is_refused(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    for content in (b"", b"\xff" * 50, b"no model"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with refused("tokenizer.model: not a model of SentencePiece"):
            get_tokenizer(tmp_path)


# llama2.c


def llama2c_ids(pieces, scores, text):
    """The algorithm of llama2.c's run.c: characters or bytes, then the best of all neighbours is merged."""
    lookup = {piece: i for i, piece in reversed([*enumerate(pieces)])}
    ids = [lookup[" "]] if text else []
    for char in text:
        ids += [lookup[char]] if char in lookup else [byte + 3 for byte in char.encode()]
    while True:
        neighbours = [(i, pieces[left] + pieces[right]) for i, (left, right) in enumerate(pairwise(ids))]
        merged = [(scores[lookup[both]], -i, lookup[both]) for i, both in neighbours if both in lookup]
        if not merged:
            return ids
        _, place, id_ = max(merged)
        ids[-place : -place + 2] = [id_]


def read_pieces(data):
    pieces, scores, at = [], [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode())
        scores.append(score)
        at += 8 + length
    return pieces, scores


@settings(max_examples=60, deadline=None)
@given(text=st.text("Once upona time.lily \n'ñ🙂Td", max_size=40))
def test_llama2cs_ids(text):
    file = Path(os.environ.get("SLM_JAX_DATA", "")) / "tok512.bin"
    if not file.is_file():
        pytest.skip("SLM_JAX_DATA does not point at tok512.bin")
    tokenizer = get_tokenizer(file)
    assert tokenizer.encode(text) == llama2c_ids(*read_pieces(file.read_bytes()), text)
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == text


def test_a_tokenizer_of_llama2c_knows_its_roles(named_data):
    tokenizer = get_tokenizer(named_data / "tok512.bin")
    assert (tokenizer.vocab_size, tokenizer.start_ids, tokenizer.eos_ids) == (512, [1], (2, 1))
    assert tokenizer.encode_prompt("") == [1]


def test_a_damaged_tokenizer_of_llama2c_is_refused(tmp_path):
    def pieces(*texts):
        return struct.pack("<i", 9) + b"".join(struct.pack("<fi", 0, len(text)) + text for text in texts)

    special = (b"<unk>", b"\n<s>\n", b"\n</s>\n")
    huge = struct.pack("<ifi", 2**31 - 1, 0, 2**31 - 1)
    for content in (b"", b"abc", huge, pieces(b"\xff"), pieces(*special), pieces(b"a", b"b"), pieces(*special)[:-1]):
        (tmp_path / "tok.bin").write_bytes(content)
        with refused("tok.bin: "):
            get_tokenizer(tmp_path / "tok.bin")


# GGUF


def metadata(**changes):
    """What a GGUF file says of the reference."""
    content = json.loads(REFERENCE.to_str())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    kinds = np.array([3] * 3 + [1] * (len(vocabulary) - 3), np.int32)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    about = {
        "model": "gpt2", "pre": "gpt-2", "tokens": vocabulary, "token_type": kinds, "merges": merges,
        "bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 0,
    }  # fmt: skip
    named = {f"tokenizer.ggml.{name}": value for name, value in (about | changes).items()}
    return named | {"tokenizer.chat_template": "own", "general.name": "x"}


def test_the_byte_level_vocabulary_of_a_gguf():
    tokenizer = from_gguf(metadata())
    encode_all(tokenizer, lambda text: REFERENCE.encode(text).ids)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in SAMPLES)
    assert (tokenizer.eos_ids, tokenizer.start_ids, tokenizer.chat_template) == ((2, 0), [], "own")
    assert tokenizer.roles == {"bos_token": "<s>", "eos_token": "</s>"}
    assert dict(tokenizer.special_tokens) == {"<|end|>": 0, "<s>": 1, "</s>": 2}


@pytest.mark.parametrize(
    ("pre", "start", "words"),
    [
        ("gpt-2", [], ["it", "'s", " 1908", ".", "\n", "\n", "A", "\n", " cat"]),
        ("smollm", [], ["it", "'s", " ", "1", "9", "0", "8", ".", "\n", "\n", "A", "\n", " cat"]),
        ("llama-bpe", [1], ["it", "'s", " ", "190", "8", ".\n\n", "A", "\n", " cat"]),
        ("qwen2", [], ["it", "'s", " ", "1", "9", "0", "8", ".\n\n", "A", "\n", " cat"]),
    ],
)
def test_how_a_text_is_split_follows_the_name_in_a_gguf(pre, start, words):
    tokenizer = from_gguf(metadata(pre=pre))
    text = "it's 1908.\n\nA\n cat"
    assert [word for word, _ in tokenizer._model.pre_tokenizer.pre_tokenize_str(text)] == [
        word.replace(" ", "Ġ").replace("\n", "Ċ") for word in words
    ]
    assert tokenizer.start_ids == start
    pieces = [*cut_pieces([TEXT * 9], 50)]
    assert [id_ for piece in pieces for id_ in tokenizer.encode(piece)] == tokenizer.encode(TEXT * 9)


def test_pieces_with_scores_of_a_gguf_are_llama2cs(named_data):
    pieces, scores = read_pieces((named_data / "tok512.bin").read_bytes())
    tokens = ["<unk>", "<s>", "</s>", *(piece.replace(" ", "▁") for piece in pieces[3:])]
    kinds = np.array([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    changes = {"model": "llama", "tokens": tokens, "scores": np.array(scores, np.float32), "token_type": kinds}
    tokenizer = from_gguf(metadata(**changes, pre="default"))
    known = get_tokenizer(named_data / "tok512.bin")
    assert all(tokenizer.encode(text) == known.encode(text) for text in SAMPLES)
    assert (tokenizer.start_ids, tokenizer.eos_ids) == ([1], (2, 0))
    bare = from_gguf(metadata(**changes, add_space_prefix=False, add_bos_token=False))
    assert bare.encode("Once") == known.continued().encode("Once")
    assert bare.start_ids == []


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "model is 't5'; expected gpt2 or llama"),
        ({"pre": ["gpt-2"]}, "pre is .*; expected one of"),
        ({"pre": "martian"}, "pre is 'martian'; expected one of gpt-2, smollm"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": ["a", 3]}, "tokens is damaged"),
        ({"merges": ["no such"]}, "cannot read"),
        ({"merges": None}, "merges is missing"),
        ({"token_type": np.array([1, 1])}, "token_type is damaged"),
        ({"eos_token_id": 10**9}, "eos_token_id is 1000000000"),
        ({"eos_token_id": None, "eot_token_id": None}, "eos_token_id is missing"),
        ({"model": "llama", "tokens": ["a" * 5000], "token_type": None}, "5,000 characters"),
    ],
)
def test_metadata_that_lie_are_refused(changes, message):
    with refused(message):
        from_gguf(metadata(**changes))


def test_a_gguf_file_has_its_tokenizer(tmp_path):
    writer = pytest.importorskip("gguf", reason="needs the extra gguf").GGUFWriter(tmp_path / "model.gguf", "llama")
    about = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*about["tokens"], "[PAD]", "[PAD2]"])
    writer.add_token_types([*about["token_type"].tolist(), 5, 5])  # which only pad the vocabulary
    writer.add_token_merges(about["merges"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("own")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = get_tokenizer(tmp_path)
    encode_all(tokenizer, lambda text: REFERENCE.encode(text).ids)
    assert (tokenizer.vocab_size, tokenizer.chat_template) == (REFERENCE.get_vocab_size(), "own")
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-2])
    with refused("model.gguf: a damaged GGUF file"):
        get_tokenizer(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"")
    with refused("model.gguf: does not begin with GGUF"):
        get_tokenizer(tmp_path / "model.gguf")


def test_other_kinds_have_one_end_and_no_beginning():
    bpe = BPETokenizer.train(TEXT, vocab_size=300)
    assert (bpe.eos_ids, bpe.start_ids, bpe.document_ids) == ((bpe.eot_id,), [], [bpe.eot_id])
    assert bpe.encode_prompt("") == [bpe.eot_id]
    assert bpe.continued() is bpe


# Where a model expects a token at the beginning of a text


@pytest.fixture
def with_bos(tmp_path):
    return get_tokenizer(write(tmp_path, tokenizer_config={**CONFIG, "add_bos_token": True}))


def test_documents_begin_as_the_model_expects(with_bos):
    from slm_jax.data.corpus import encode_documents
    from slm_jax.data.filters import DEFAULT_RULES
    from slm_jax.data.parts import Job, encode_text

    first, second = "The cat", TEXT * 400  # of several pieces
    ids = encode_documents([first, second], with_bos).tolist()
    assert ids == [1, *with_bos.encode(first), 2, 1, *with_bos.encode(second)]
    job = Job("x", DEFAULT_RULES, with_bos)
    assert encode_text(job, second).tolist() == [2, 1, *with_bos.encode(second)]
    assert encode_text(job, second, is_start=False).tolist() == with_bos.encode(second)


def test_labelled_and_scored_texts_begin_as_the_model_expects(with_bos):
    from slm_jax.data.labelled import encode_text
    from slm_jax.evaluation.logprobs import Scorer
    from slm_jax.model import GPTModel, get_gpt_config

    assert encode_text("The cat", with_bos).tolist() == [1, *with_bos.encode("The cat")]
    scorer = Scorer(GPTModel(get_gpt_config("tiny")), {}, with_bos)
    assert scorer.encode("The", " cat") == ([1, *with_bos.encode("The")], with_bos.encode(" cat"))
    assert scorer.encode("", "cat") == ([1], with_bos.encode("cat"))
