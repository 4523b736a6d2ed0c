"""What must hold of GGUF files that lie: one line that says what is wrong, before anything is allocated for it."""

import struct
import tracemalloc

import pytest
from gguf_files import ARRAY, LLAMA, PLAIN, Q8_0, TEXT, U32, U64, file, header, llama_tensors, tensor, text, value

from slm_jax.errors import InputError
from slm_jax.runs import load_gpt2

GOOD = file(LLAMA, llama_tensors())
ENTRIES = [text(key) + value(*content) for key, content in LLAMA.items()]


def entry(key, kind, content):
    return text(key) + value(kind, content)


def array_header(of, length):
    return text("a") + struct.pack("<IIQ", ARRAY, of, length)


def tables(*entries, data=64):
    start = header(ENTRIES, entries)
    return start + bytes(-len(start) % 32) + bytes(data)


def changed(**metadata):
    return file(
        {**LLAMA, **{f"llama.{key.replace('__', '.')}": found for key, found in metadata.items()}}, llama_tensors()
    )


CASES = {
    "cut in the version": (GOOD[:6], "the version takes 4 bytes at 4, where 2 are left"),
    "cut in the metadata": (GOOD[:100], "metadata"),
    "cut in the tensors": (GOOD[:-40], r"tensor 'blk.0.ffn_down.weight' takes 384 bytes at [\d,]+ of a file of"),
    "version 1": (header([], [], version=1), "GGUF version 1; expected 2 or 3"),
    "big-endian": (header([], [], version=3 << 24), "GGUF version 50331648; expected 2 or 3, little-endian"),
    "more entries than bytes": (header(ENTRIES, [], n_entries=1 << 60), "metadata of .* entries takes"),
    "more tensors than bytes": (header(ENTRIES, [], n_tensors=1 << 60), "a table of .* tensors takes"),
    "long key": (header([struct.pack("<Q", 1 << 62) + bytes(20)], []), "a metadata key has .* bytes; expected at most"),
    "long text": (header([text("a") + struct.pack("<IQ", TEXT, 9_999) + bytes(9)], []), "'a' takes 9,999 bytes"),
    "key that is not UTF-8": (header([text(b"\xff\xfe") + value(U32, 1)], []), "a metadata key is not UTF-8"),
    "unknown type": (header([text("a") + struct.pack("<I", 77) + bytes(9)], []), "'a' has the unknown type 77"),
    "array of 10^9 texts": (header([array_header(TEXT, 10**9)], []), "'a' has 1,000,000,000 elements"),
    "array of 10^9 numbers": (header([array_header(U64, 10**9)], []), "'a' has 1,000,000,000 elements"),
    "array longer than the file": (header([array_header(TEXT, 10**6)], []), "'a' takes 8,000,000 bytes"),
    "array of arrays": (header([array_header(ARRAY, 1) + bytes(12)], []), "an array of the type 9"),
    "key twice": (header([entry("a", U32, 1)] * 2, []), "'a' is there twice"),
    "alignment 0": (
        header([entry("general.alignment", U32, 0)], []),
        "general.alignment is 0; expected a power of two",
    ),
    "no axes": (tables(tensor("t", ())), "tensor 't' has 0 axes"),
    "many axes": (tables(tensor("t", (1,) * 9)), "tensor 't' has 9 axes"),
    "axis of 0": (tables(tensor("t", (2, 0))), r"tensor 't' has the shape \(2, 0\)"),
    "shape that overflows": (
        tables(tensor("t", (1 << 33, 1 << 33))),
        "tensor 't' takes 295,147,905,179,352,825,856 bytes",
    ),
    "shape that overflows to 0": (
        tables(tensor("t", (1 << 32, 1 << 32))),
        "tensor 't' takes 73,786,976,294,838,206,464",
    ),
    "part of a block": (tables(tensor("t", (2, 33), Q8_0)), r"the shape \(2, 33\); expected rows of whole Q8_0 blocks"),
    "unknown quantization": (
        tables(tensor("t", (4,), 16)),
        "quantization (IQ2_XXS|number 16); expected F32, F16, BF16",
    ),
    "removed quantization": (tables(tensor("t", (4,), 4)), "quantization number 4; expected F32"),
    "offset outside": (
        tables(tensor("t", (4,), PLAIN, 1 << 40)),
        r"tensor 't' takes 16 bytes at 1,099,511,6[\d,]+ of a",
    ),
    "tensor twice": (tables(tensor("t", (4,)), tensor("t", (4,), PLAIN, 32)), "tensor t is there twice"),
    "overlapping": (tables(tensor("t", (4,)), tensor("u", (4,), PLAIN, 8)), "tensor 'u' begins at .*, within another"),
    "name of two lines": (tables(tensor("a\nb", (4,))), r"a tensor is called 'a\\nb'"),
    "one of several parts": (
        header([*ENTRIES, entry("split.count", U32, 3)], []),
        "one of several parts; join them with: llama-gguf-split --merge",
    ),
    "other architecture": (
        header([entry("general.architecture", TEXT, "mamba")], []),
        "architecture 'mamba'; expected one",
    ),
    "no architecture": (header([], []), "the architecture None; expected one of gpt2, llama, qwen3"),
    "LoRA": (header([*ENTRIES, entry("general.type", TEXT, "adapter")], []), "GGUF of the type 'adapter'"),
    "experts": (changed(expert_count=(U32, 8)), "llama.expert_count is 8; expected 0"),
    "partial rotations": (
        changed(rope__dimension_count=(U32, 2)),
        "dimension_count is 2; expected the size of a head, 4",
    ),
    "YaRN": (changed(rope__scaling__type=(TEXT, "yarn")), "scaling.type is 'yarn'; expected 'none' or 'linear'"),
    "text for a number": (changed(block_count=(TEXT, "1")), "llama.block_count is '1'; expected a whole number"),
    "other numbers of layers": (
        changed(block_count=(U32, 10**9)),
        "n_layers is 1000000000 as stated, but 1 by its tensors",
    ),
    "kv heads": (changed(attention__head_count_kv=(U32, 3)), "n_kv_heads"),
    "kv heads by layer": (changed(attention__head_count_kv=(ARRAY, (U32, [2, 1]))), "head_count_kv is array"),
    "no heads": (changed(attention__head_count=(U32, 0)), "n_heads"),
    "no tensors": (file(LLAMA, {}), "n_layers is 1 as stated, but 0 by its tensors"),
}


@pytest.mark.hostile
@pytest.mark.parametrize(("content", "message"), CASES.values(), ids=CASES.keys())
def test_one_line_and_no_memory(content, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as raised:
            load_gpt2(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_file_that_the_others_were_made_of_is_good(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD)
    assert load_gpt2(path)[0].n_layers == 1


@pytest.mark.hostile
def test_every_cut_and_many_flipped_bits_give_one_line_or_a_model(tmp_path):
    path = tmp_path / "model.gguf"
    ends = [*range(1, len(GOOD), 97)]
    flips = [
        GOOD[:i] + bytes([GOOD[i] ^ 0x81]) + GOOD[i + 1 :] for i in range(4, GOOD.index(b"blk.0.ffn_down") + 60, 7)
    ]
    messages = []
    for content in [*(GOOD[:end] for end in ends), *flips]:
        path.write_bytes(content)
        try:
            load_gpt2(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > len(ends)
    assert not [message for message in messages if "\n" in message]
