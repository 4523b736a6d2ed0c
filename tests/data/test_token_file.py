"""What must hold of token files: whole and as they were written, or refused."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from refusals import full_disk, refused

from slm_jax.data import token_file
from slm_jax.data.token_file import check_ids, json_path, open_token_file, write_token_file
from slm_jax.errors import MissingInputError
from slm_jax.tokenizer import CharTokenizer, fingerprint

TOKENIZER = CharTokenizer().build_vocab("abcdefghij")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two documents, with its description."""
    path = tmp_path / "new" / "ids.bin"
    with write_token_file(path, TOKENIZER, "text:a.txt") as file:
        file.write([0, 1, 2])
        file.write(np.array([10, 9], np.uint16))
        file.documents = 2
        file.counts = {"duplicates": 3}
    return path


# Our own files


def test_what_was_written_is_read(path):
    opened = open_token_file(path)
    assert isinstance(opened.tokens, np.memmap)
    assert opened.tokens.tolist() == [0, 1, 2, 10, 9]
    assert opened.tokens.dtype == np.uint16
    assert fingerprint(opened.tokenizer) == fingerprint(TOKENIZER)
    with pytest.raises(ValueError, match="read-only"):
        opened.tokens[0] = 1


def test_nanogpt_can_read_it_and_sha256sum_can_check_it(path):
    assert np.fromfile(path, "<u2").tolist() == [0, 1, 2, 10, 9]
    about = json.loads(json_path(path).read_text())
    assert subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0] == about["sha256"]
    assert (about["tokens"], about["documents"], about["counts"]) == (5, 2, {"duplicates": 3})
    assert (about["source"], about["vocab_size"], about["dtype"]) == ("text:a.txt", 11, "uint16")
    assert open_token_file(path).sha256 == about["sha256"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["ids.bin", "ids.bin.json"]


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(2**16, 2), (2**16 + 1, 4)])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, bytes_each):
    chars = [chr(0x10000 + i) for i in range(vocab_size - 1)]
    tokenizer = CharTokenizer(chars)
    with write_token_file(tmp_path / "ids.bin", tokenizer, "") as file:
        file.write([tokenizer.eot_id, 0])
    assert (tmp_path / "ids.bin").stat().st_size == 2 * bytes_each
    assert open_token_file(tmp_path / "ids.bin").tokens.tolist() == [vocab_size - 1, 0]


def test_a_process_that_is_killed_leaves_nothing_that_looks_finished(tmp_path):
    program = (
        "import os, signal; from pathlib import Path; from slm_jax.data.token_file import write_token_file\n"
        "from slm_jax.tokenizer import CharTokenizer\n"
        f"with write_token_file(Path({str(tmp_path / 'ids.bin')!r}), CharTokenizer().build_vocab('ab'), '') as file:\n"
        "    file.write([0, 1] * 100_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.json"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    name = r"ids\.bin: cannot be written: "
    with refused(name), full_disk(), write_token_file(tmp_path / "ids.bin", TOKENIZER, "") as file:
        file.write([1] * 1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_fails_changes_nothing_and_of_two_writers_at_once_the_later_one_wins_whole(path):
    with pytest.raises(ZeroDivisionError), write_token_file(path, TOKENIZER, "") as file:
        file.write([1 // file.tokens])
    assert open_token_file(path).tokens.tolist() == [0, 1, 2, 10, 9]
    assert sorted(file.name for file in path.parent.iterdir()) == ["ids.bin", "ids.bin.json"]
    with write_token_file(path, TOKENIZER, "first") as first:
        first.write([1, 2, 3])
        with write_token_file(path, TOKENIZER, "second") as second:
            second.write([4] * 5)
        assert open_token_file(path).tokens.tolist() == [4] * 5
    assert open_token_file(path).tokens.tolist() == [1, 2, 3]
    assert json.loads(json_path(path).read_text())["source"] == "first"


def test_a_changed_file_is_refused(path):
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\7" + data[5:])
    with refused(r"ids\.bin: SHA-256 is .*, but ids\.bin\.json says .*prepare"):
        open_token_file(path)
    for changed in (data[:-2], data + b"\0\0", data[:-1]):
        path.write_bytes(changed)
        with refused(r"bytes, but ids\.bin\.json says 5 ids of uint16"):
            open_token_file(path)
    path.unlink()
    with refused(r"ids\.bin: no such file", MissingInputError):
        open_token_file(path)


def test_changed_and_missing_shards_are_refused(tmp_path):
    with write_token_file(tmp_path / "ids.bin", TOKENIZER, "", shard_tokens=3) as file:
        file.write([0, 1, 2, 10, 9, 8, 7])
    assert open_token_file(tmp_path / "ids.bin").tokens[2:5].tolist() == [2, 10, 9]
    shard, about = tmp_path / "ids-00001.bin", tmp_path / "ids.bin.json"
    data, text = shard.read_bytes(), about.read_text()
    shard.write_bytes(data[:-2] + bytes(2))
    with refused(r"ids-00001\.bin: SHA-256 is .*, but ids\.bin\.json says"):
        open_token_file(tmp_path / "ids.bin")
    assert open_token_file(tmp_path / "ids.bin", verify=False).tokens[5] == 0
    shard.write_bytes(data[:-2])
    with refused(r"ids-00001\.bin: 4 bytes, but ids\.bin\.json says 3 ids"):
        open_token_file(tmp_path / "ids.bin")
    shard.unlink()
    with refused(r"ids-00001\.bin: no such file", MissingInputError):
        open_token_file(tmp_path / "ids.bin")
    for changed in (text.replace('"tokens": 7', '"tokens": 8'), text.replace('"tokens": 3', '"tokens": "3"')):
        about.write_text(changed)
        with refused("ids.bin.json: shards"):
            open_token_file(tmp_path / "ids.bin")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text[:50], "not JSON"),
        (
            lambda text: text.replace('"tokens": 5', '"tokens": 5, "tokens": 5'),
            r"not JSON .key .tokens. occurs twice",
        ),
        (lambda text: text.replace('"version": 1', '"version": 2'), "does not describe token ids"),
        (lambda text: text.replace('"tokens": 5', '"tokens": "5"'), "tokens: expected `int`, got `str`"),
        (lambda text: text.replace('"uint16"', '"uint8"'), "dtype: .*'uint8'"),
        (lambda text: text.replace('"kind": "char"', '"kind": "word"'), "tokenizer: not a tokenizer of slm_jax"),
        (lambda text: text.replace('"a"', '"z"'), "tokenizer: not the one that tokenizer_sha256"),
    ],
)
def test_a_damaged_description_is_refused(path, change, expected):
    file = json_path(path)
    changed = change(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with refused(rf"ids\.bin\.json: {expected}") as error:
        open_token_file(path)
    assert "prepare" in str(error.value)


# Bare ids


def bare(tmp_path: Path, ids: list[int]) -> Path:
    path = tmp_path / "ids.bin"
    path.write_bytes(b"".join(i.to_bytes(2, "little") for i in ids))
    return path


def test_bare_ids_are_mapped_and_have_no_tokenizer(tmp_path, monkeypatch):
    opened = open_token_file(bare(tmp_path, [0, 1, 258, 65535]))
    assert opened.tokens.tolist() == [0, 1, 258, 65535]
    assert isinstance(opened.tokens, np.memmap)
    assert (opened.tokenizer, opened.sha256) == (None, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_token_file("~/ids.bin").tokens.tolist() == opened.tokens.tolist()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_first_id_outside_the_vocabulary_is_named(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(token_file, "_CHUNK", chunk)
    path = bare(tmp_path, [5, 6, 9, 9, 9, 10, 3, 12])
    tokens = open_token_file(path).tokens
    check_ids(tokens, 13, path)
    with refused(rf"{path}: token 5 has id 10, but the vocabulary has 10 ids; .* tokenizer"):
        check_ids(tokens, 10, path)


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4"), (20251013, 1, "<u4")]
)
def test_files_of_llmc(tmp_path, magic, version, dtype):
    path, ids = tmp_path / "ids.bin", [50256, 5, 6, 2**16 - 1]
    path.write_bytes(struct.pack("<3i", magic, version, 4).ljust(1024, b"\0") + np.array(ids, dtype).tobytes())
    opened = open_token_file(path)
    assert opened.tokens.tolist() == ids
    assert opened.tokens.dtype == np.dtype(dtype)
    with refused(f"{path}: token 3 has id 65535"):
        check_ids(opened.tokens, 50257, path)


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected uint16"),
        (b"\1\0\2", "expected uint16"),
        (b"\x93NUMPY\1\0 and so on ", r"\.npy"),
        (np.arange(50_000, 50_099).tobytes(), "looks like int64 ids; convert it"),
        (np.arange(70_000, 70_099, dtype="<u4").tobytes(), "looks like uint32 ids; convert it"),
        (np.arange(99, dtype="<u4").tobytes() + bytes(4), "looks like uint32 ids; convert it"),
        ("Ein Text mit ü und é, so long that it is one.\n".encode() * 4, r"found text \('Ein Text"),
        (b"PK\x03\x04 and so on", "found a zip archive"),
        (struct.pack("<3i", 20240520, 2, 0).ljust(1024, b"\0"), "version 2; expected version 1"),
        (struct.pack("<3i", 20240520, 1, 3).ljust(1029, b"\0"), "1029 bytes, but its llm.c header says 3 ids"),
        (struct.pack("<3i", 20240801, 7, -1).ljust(1024, b"\0"), "its llm.c header says 4294967295 ids"),
        (struct.pack("<3i", 20240520, 1, 0).ljust(1024, b"\0"), "header says 0 ids"),
    ],
)
def test_files_that_are_not_bare_ids(tmp_path, content, expected):
    path = tmp_path / "ids.bin"
    path.write_bytes(content)
    with refused(f"{path}: .*{expected}"):
        open_token_file(path)
