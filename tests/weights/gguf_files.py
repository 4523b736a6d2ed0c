"""GGUF files made byte by byte from the specification, so that they can lie."""

import struct

import numpy as np

U8, U32, F32, BOOL, TEXT, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
PLAIN, HALF, Q8_0 = 0, 1, 8
_FORMATS = {U8: "<B", U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q"}

WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 8, 12, 4, 2, 4, 11
LLAMA = {
    "general.architecture": (TEXT, "llama"),
    "llama.context_length": (U32, 16),
    "llama.embedding_length": (U32, WIDTH),
    "llama.block_count": (U32, 1),
    "llama.feed_forward_length": (U32, HIDDEN),
    "llama.attention.head_count": (U32, HEADS),
    "llama.attention.head_count_kv": (U32, KV_HEADS),
    "llama.attention.key_length": (U32, HEAD_DIM),
    "llama.attention.value_length": (U32, HEAD_DIM),
    "llama.rope.dimension_count": (U32, HEAD_DIM),
    "llama.rope.freq_base": (F32, 500.0),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-6),
}


def text(content):
    data = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, content):
    """A value with its type; an array is given as (type of the elements, elements)."""
    if kind == TEXT:
        return struct.pack("<I", kind) + text(content)
    if kind != ARRAY:
        return struct.pack("<I", kind) + struct.pack(_FORMATS[kind], content)
    of, elements = content
    packed = [text(each) if of == TEXT else struct.pack(_FORMATS[of], each) for each in elements]
    return struct.pack("<IIQ", kind, of, len(packed)) + b"".join(packed)


def tensor(name, shape, kind=PLAIN, offset=0):
    """An entry of the table; the shape as in NumPy."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def header(entries, table, magic=b"GGUF", version=3, n_entries=None, n_tensors=None):
    counts = (len(table) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    return magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(table)


def file(metadata, tensors):
    """A whole file: float32 tensors by name."""
    entries = [text(key) + value(*content) for key, content in metadata.items()]
    table, data = [], b""
    for name, array in tensors.items():
        table.append(tensor(name, array.shape, PLAIN, len(data)))
        data += array.astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    start = header(entries, table)
    return start + bytes(-len(start) % 32) + data


def llama_tensors(seed=0, untied=False):
    """The tensors of the Llama that LLAMA describes; matrices are (out, in)."""
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate.weight": (HIDDEN, WIDTH),
        "blk.0.ffn_up.weight": (HIDDEN, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, HIDDEN),
    }
    if untied:
        shapes["output.weight"] = (VOCAB, WIDTH)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
