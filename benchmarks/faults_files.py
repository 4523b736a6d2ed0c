"""Change files at random and see how their readers take it: with an answer, or with one line that says what is wrong.

    python benchmarks/faults_files.py --seed 1 --runs 50000 --seconds 60

Half of the changes keep the form of a file and change its values (another type, a huge number, a missing or unknown
key, a deep nest); the others change bytes. A reader may return, or raise an InputError of one line. Everything else is
a failure and printed with the first file that caused it, as are seconds. ``--only NAME`` selects readers by name.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "weights"))
import foreign_files
import gguf_files

from slm_jax import cli
from slm_jax.config import given
from slm_jax.data.chat_template import template_from_dict
from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.file_sources import read_text
from slm_jax.data.instructions import read_examples
from slm_jax.data.labelled import load_labelled
from slm_jax.data.sources import parse_source
from slm_jax.data.templates import load_template
from slm_jax.data.token_file import open_token_file, write_token_file
from slm_jax.errors import InputError
from slm_jax.files import read_json
from slm_jax.model import GPTConfig, GPTModel
from slm_jax.runs import read_checkpoint
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import BPETokenizer, CharTokenizer, SimpleTokenizer, load_tokenizer
from slm_jax.tools.report.run_data import read_runs
from slm_jax.training.checkpoint import parse_metadata
from slm_jax.training.run_folder import RunFolder
from slm_jax.weights.adapters import add_adapters, init_adapters, load_adapters, save_adapters
from slm_jax.weights.reader import read_weights
from slm_jax.weights.tensor_files import open_tensors, shard_names

SLOW = 5.0  # seconds of processor time
MEMORY = 6 << 30  # bytes of address space, of which JAX reserves most
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "0",
    "\ud800", "\x1b[31m", "\n", "é" * 99, "<|endoftext|>", [], [[]], [0], ["x"], [None], {}, {"x": 1}, {"": {}}, [{}],
    "float32", [1] * 999, ["a", "b"], [0, 1], [[0, 1]], {"type": "x"}, "null", "{{", {"0": "x"},
]  # fmt: skip
KEYS = ("", "x", "source", "type", "messages", "\x1b", "a\nb")
PARTS = (*(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"[" * 5_000, b"9" * 5_000, b"- ", b"&a ", b"*a ", b"\r", b"\n"),)
Read = Callable[[bytes], Any]
Readers = dict[str, tuple[list[bytes], Read]]  # by name: files as they should be, and the reader


def main() -> None:
    """Fuzz every reader, print a line for each, and exit with 1 if there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=50_000, help="of each reader")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each reader, at most")
    parser.add_argument("--only", default="", help="part of the readers' names")
    args = parser.parse_args()
    with contextlib.suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    total = failed = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.chdir(folder)
        for name, (seeds, read) in all_readers(Path(folder)).items():
            if args.only in name:
                began = time.perf_counter()
                rng = random.Random(f"{args.seed} {name}")
                n, refused, failures = fuzz(rng, name, seeds, read, args.runs, began + args.seconds)
                total, failed = total + n, failed + sum(failures.values())
                seconds = time.perf_counter() - began
                print(
                    f"{name:28} {n:9,} runs {refused:9,} refused {sum(failures.values()):4} failures {seconds:5.0f} s"
                )
                sys.stdout.flush()
    print(f"{total - failed}/{total} ended with an answer or with one line")
    sys.exit(failed > 0)


def fuzz(
    rng: random.Random, name: str, seeds: list[bytes], read: Read, runs: int, end: float
) -> tuple[int, int, dict[str, int]]:
    """Return the numbers of runs and of refusals, and how often each kind of failure occurred."""
    failures: dict[str, int] = collections.Counter()
    n = refused = 0
    for seed in seeds:
        read(seed)
    while n < runs and time.perf_counter() < end:
        data, began, failure = mutated(rng, rng.choice(seeds)), time.process_time(), ""
        n += 1
        try:
            read(data)
        except InputError as error:
            refused += 1
            failure = "not one line" if "\n" in str(error) or "\x1b" in str(error) else ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a package in Rust is no Exception
            frames = [each for each in traceback.extract_tb(error.__traceback__) if "/slm_jax/" in each.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
            failure = f"{type(error).__name__} in {where}"
        if not failure and (seconds := time.process_time() - began) > SLOW:
            failure = f"{seconds:.0f} s"
        if failure and not failures[failure]:
            print(f"  {name}: {failure}: {data[:300]!r}")
        failures[failure] += bool(failure)
    with contextlib.suppress(InputError):
        read(seeds[0])  # the next reader may need the file
    return n, refused, +failures


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return a file with some changes, mostly one."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        changed = None
        if rng.random() < 0.5:
            with contextlib.suppress(ValueError, RecursionError):
                changed = json.dumps(changed_value(rng, json.loads(data))).encode()
        data = changed_bytes(rng, data) if changed is None else changed
    return data


def changed_value(rng: random.Random, value: Any) -> Any:
    """Return a tree in which one value is another one, is there several times, or is missing."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key: Any = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
        new: Any = dict(value) if isinstance(value, dict) else list(value)
        chance = rng.random()
        if chance < 0.1:
            del new[key]
        elif chance < 0.2:
            new.update({rng.choice(KEYS): rng.choice(VALUES)}) if isinstance(new, dict) else new.extend([new[key]] * 30)
        else:
            new[key] = changed_value(rng, value[key])
        return new
    if rng.random() < 0.05:
        for _ in range(rng.choice((3, 900, 6_000))):
            value = [value]
        return value
    return rng.choice(VALUES)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return a file in which bytes are changed, removed, inserted or repeated."""
    at, chance = rng.randrange(len(data) + 1), rng.random()
    if chance < 0.4:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if chance < 0.6:
        return data[:at] + data[at + rng.choice((1, 4, 50)) :]
    if chance < 0.8:
        return data[:at] + rng.choice(PARTS) + data[at:]
    return data[:at] + (data[rng.randrange(len(data) + 1) :] if chance > 0.9 else b"")


# The readers


def all_readers(folder: Path) -> Readers:
    """Return every reader; they write what they read into the folder."""
    kinds = (texts, rows, token_files, tokenizers, runs, weights)
    found: Readers = {}
    for kind in kinds:
        (folder / kind.__name__).mkdir()
        found |= kind(folder / kind.__name__)
    return found


def by_file(file: Path, read: Callable[[Path], Any]) -> Read:
    """Return a reader of bytes that are first written to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)

    def write_and_read(data: bytes) -> Any:
        file.write_bytes(data)
        return read(file)

    return write_and_read


def as_json(*contents: Any) -> list[bytes]:
    """Return each as a file."""
    return [json.dumps(content).encode() for content in contents]


def texts(folder: Path) -> Readers:
    """Recipes, options, plain text and templates."""
    recipe = (
        b"task: pretraining\nseed: 3\ndata: {source: 'text:x', validation_fraction: 0.2}\nrun: null\nresume: auto\n"
    )
    aliases = b"seed: 1\nmodel: {n_layers: &a 2, n_heads: *a}\ntrain: &t {steps: 9}\n"
    template = {"user_start": "\nQ: ", "assistant_start": "\nA: ", "input_start": " ", "assistant_end": "\n"}
    jinja = {"source": "{{ messages }}", "tokens": {"eos_token": "</s>"}, "date": ""}

    def option(data: bytes) -> Any:
        return given(RunConfig, [f"--train.steps={data.decode(errors='surrogateescape')}"])

    def from_checkpoint(file: Path) -> Any:
        return template_from_dict(read_json(file))

    return {
        "recipe": ([aliases, recipe], by_file(folder / "a.yaml", lambda f: given(RunConfig, ["--config", str(f)]))),
        "option": ([b"3", b"null"], option),
        "config.yaml of a run": ([aliases], by_file(folder / "config.yaml", lambda f: RunFolder(f.parent).config())),
        "text": ([b"a text\r\nof lines \xc3\xa9\n"], by_file(folder / "a.txt", read_text)),
        "template": (as_json(template), by_file(folder / "t.json", lambda f: load_template(str(f)))),
        "template of a checkpoint": (as_json(template, jinja), by_file(folder / "u.json", from_checkpoint)),
    }


def rows(folder: Path) -> Readers:
    """Rows of texts, labelled texts and instructions."""
    alpaca = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    dolly = {"instruction": "a", "context": None, "response": "b"}
    table = b"".join(b"text %d,%s\n" % (i, b"xy"[i % 2 : i % 2 + 1]) for i in range(20))
    labelled = [{"text": f"text {i}", "label": label} for i, label in enumerate(["a", "b"] * 10)]

    def labels(scheme: str) -> Callable[[Path], Any]:
        return lambda f: load_labelled(DataConfig(source=f"{scheme}:{f}"), ClassificationConfig(), 1)

    def documents(scheme: str, column: str) -> Callable[[Path], Any]:
        return lambda f: parse_source(f"{scheme}:{f}").read_documents(column)

    return {
        "jsonl: instructions": (
            [b"\n".join(as_json(alpaca, chat, dolly))],
            by_file(folder / "i.jsonl", lambda f: read_examples(f"jsonl:{f}")),
        ),
        "json: instructions": (
            as_json([alpaca, chat]),
            by_file(folder / "i.json", lambda f: read_examples(f"json:{f}")),
        ),
        "jsonl: texts": (as_json(alpaca), by_file(folder / "x.jsonl", documents("jsonl", "instruction"))),
        "json: labelled": (as_json(labelled), by_file(folder / "l.json", labels("json"))),
        "csv: labelled": ([b"text,label\n" + table], by_file(folder / "l.csv", labels("csv"))),
        "tsv: labelled": ([b"text\tlabel\n" + table.replace(b",", b"\t")], by_file(folder / "l.tsv", labels("tsv"))),
        "parquet: texts": ([_parquet(folder)], by_file(folder / "x.parquet", documents("parquet", "text"))),
    }


def _parquet(folder: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), folder / "seed.parquet")
    return (folder / "seed.parquet").read_bytes()


def token_files(folder: Path) -> Readers:
    """Files of token ids and their descriptions."""
    tokenizer = CharTokenizer().build_vocab("abcdef")
    for name, shard in (("ids.bin", None), ("shards.bin", 2)):
        with write_token_file(folder / name, tokenizer, "text:x", shard) as writer:
            writer.write([1, 2, 3])

    def description(name: str) -> tuple[list[bytes], Read]:
        file = folder / f"{name}.json"
        return [file.read_bytes()], by_file(file, lambda _: open_token_file(folder / name))

    return {
        "FILE.bin.json": description("ids.bin"),
        "FILE.bin.json of shards": description("shards.bin"),
        "FILE.bin": ([np.arange(999, dtype="<u2").tobytes()], by_file(folder / "bare.bin", open_token_file)),
    }


def tokenizers(folder: Path) -> Readers:
    """Tokenizers, ours and those of other programs."""
    text, home, other = "the cat sat on the mat, the end", folder / "home", folder / "other"
    ours = [BPETokenizer.train(text, 270), CharTokenizer().build_vocab(text), SimpleTokenizer().build_vocab(text)]
    config = {
        "eos_token": {"content": "</s>"}, "bos_token": "<s>", "add_bos_token": True, "chat_template": "{{ messages }}",
    }  # fmt: skip
    foreign = _tokenizer_json(text)
    for each in (home, other):
        each.mkdir()
        (each / "tokenizer.json").write_bytes(foreign)
        (each / "tokenizer_config.json").write_bytes(as_json(config)[0])
    own = [tokenizer.to_dict() for tokenizer in (*ours, load_tokenizer(home))]
    gguf = gguf_files.file(_gguf_tokenizer(), gguf_files.llama_tensors())
    return {
        "tokenizer of slm_jax": (as_json(*own), by_file(folder / "own" / "tokenizer.json", load_tokenizer)),
        "tokenizer.json": ([foreign], by_file(other / "tokenizer.json", load_tokenizer)),
        "tokenizer_config.json": (
            as_json(config),
            by_file(home / "tokenizer_config.json", lambda f: load_tokenizer(f.parent)),
        ),
        "tokenizer of llama2.c": ([_llama2c()], by_file(folder / "tok.bin", load_tokenizer)),
        "tokenizer.model": ([_sentencepiece(folder)], by_file(folder / "tok.model", load_tokenizer)),
        "tokenizer in GGUF": ([gguf], by_file(folder / "tok.gguf", load_tokenizer)),
    }


def _tokenizer_json(text: str) -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE(byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"], show_progress=False)
    model.train_from_iterator([text], trainer)
    return model.to_str().encode()


def _llama2c() -> bytes:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256)), b"a", b"b", b"ab"]
    entries = (np.float32(-i).tobytes() + len(p).to_bytes(4, "little") + p for i, p in enumerate(pieces))
    return (9).to_bytes(4, "little") + b"".join(entries)


def _sentencepiece(folder: Path) -> bytes:
    import sentencepiece

    (folder / "spm.txt").write_text("the cat sat on the mat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "spm.txt"), model_prefix=str(folder / "spm"), vocab_size=40, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return (folder / "spm.model").read_bytes()


def _gguf_tokenizer() -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *"abcdefgh"]
    return {
        **gguf_files.LLAMA,
        "tokenizer.ggml.model": (gguf_files.TEXT, "llama"),
        "tokenizer.ggml.tokens": (gguf_files.ARRAY, (gguf_files.TEXT, pieces)),
        "tokenizer.ggml.scores": (gguf_files.ARRAY, (gguf_files.F32, [0.0] * 11)),
        "tokenizer.ggml.token_type": (gguf_files.ARRAY, (gguf_files.U32, [2, 3, 3] + [1] * 8)),
        "tokenizer.ggml.eos_token_id": (gguf_files.U32, 2),
        "tokenizer.ggml.bos_token_id": (gguf_files.U32, 1),
    }


def runs(folder: Path) -> Readers:
    """A run's folder: metadata of checkpoints, the log, figures, and the report that shows them."""
    model = {"vocab_size": 29, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1}
    metadata = {
        "config": {"seed": 1, "task": "pretraining", "data": {"source": "text:x"}}, "model": vars(GPTConfig(**model)),
        "identity": {"seed": 1}, "tokenizer": {"kind": "char", "chars": ["a"]}, "validation_loss": 2.5, "format": 2,
        "leaves": {"blocks/attn/q/kernel": [1, 8, 2, 4, "float32"]}, "trainable": "all", "checksums": {"x": 1},
        "data": {"step": 1}, "classes": ["a", "b"],
    }  # fmt: skip
    figures = {
        "loss": 2.0, "perplexity": 7.0, "accuracy": 0.5, "tokens": 9, "confusion": [[1, 2], [3, 4]],
        "classes": ["a", "b"], "precision": [0.5, 1], "recall": [0.5, 1], "f1": [0.5, 1], "support": [4, 5],
    }  # fmt: skip
    summary = {
        "task": "classification", "step": 2, "before": {"test": figures}, "after": {"test": figures, "train": figures},
        "best_step": 1, "environment": {"jax": "0.9", "devices": 1, "device": "cpu"}, "parameters": 9, "seconds": 3.0,
    }  # fmt: skip
    row = {
        "loss": 2.0, "perplexity": 7.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 9, "tokens_per_second": 5.0,
        "seconds": 1.0, "mfu": None, "accuracy": 0.5,
    }  # fmt: skip
    log = b"\n".join(as_json(*({"step": i, "split": split, **row} for i in (1, 2) for split in ("train", "val"))))
    answers = [{"instruction": "a", "input": "", "output": "b", "model_response": "c"}]
    whole = as_json({"custom_metadata": metadata, "init_timestamp_nsecs": 1})
    home, step = folder / "run", folder / "run" / "checkpoints" / "1"
    step.mkdir(parents=True)
    (home / "config.yaml").write_text("task: classification\n")
    (home / "samples.md").write_text("## Step 1\n\n    a\n\n")

    def read_run(_: Path) -> Any:
        (run,) = read_runs([str(home)])
        return run.state, run.task, run.measured("after"), run.measured("before"), run.environment, run.responses()

    def report(_: Path) -> Any:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            if status := cli.main(["report", str(home), "--out", str(folder / "page.html")]):
                raise InputError(f"status {status}")

    def model_of_checkpoint(_: Path) -> Any:
        with contextlib.suppress(InputError):  # there are no arrays
            return read_checkpoint(home, 1, "float32")

    return {
        "metadata of a checkpoint": (whole, functools.partial(parse_metadata, where="x")),
        "model of a checkpoint": (whole, by_file(step / "_CHECKPOINT_METADATA", model_of_checkpoint)),
        "metrics.jsonl": ([log], by_file(home / "metrics.jsonl", lambda f: RunFolder(f.parent).metrics("val"))),
        "summary.json": (as_json(summary), by_file(home / "summary.json", read_run)),
        "responses.json": (as_json(answers), by_file(home / "responses.json", read_run)),
        "report: metrics.jsonl": ([log], by_file(home / "metrics.jsonl", report)),
        "report: summary.json": (as_json(summary), by_file(home / "summary.json", report)),
        "report: responses.json": (as_json(answers), by_file(home / "responses.json", report)),
    }


_LLAMA = {
    "model_type": "llama", "vocab_size": 29, "max_position_embeddings": 10, "hidden_size": 8, "rms_norm_eps": 1e-6,
    "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "silu", "layer_types": ["full_attention"],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8},
}  # fmt: skip
_LLAMA_SHAPES = {
    "embed_tokens": (29, 8), "norm": (8,), "layers.0.input_layernorm": (8,), "layers.0.post_attention_layernorm": (8,),
    "layers.0.self_attn.q_proj": (8, 8), "layers.0.self_attn.k_proj": (4, 8), "layers.0.self_attn.v_proj": (4, 8),
    "layers.0.self_attn.o_proj": (8, 8), "layers.0.mlp.gate_proj": (12, 8), "layers.0.mlp.up_proj": (12, 8),
    "layers.0.mlp.down_proj": (8, 12),
}  # fmt: skip


def weights(folder: Path) -> Readers:
    """Weights of other programs, what lies beside them, and adapters."""
    tensors, gpt2, llama = foreign_files.huggingface(), folder / "gpt2", folder / "llama"
    foreign_files.write(gpt2, tensors, foreign_files.CONFIG)
    ones = {f"model.{name}.weight": np.ones(shape, np.float32) for name, shape in _LLAMA_SHAPES.items()}
    foreign_files.write(llama, ones, _LLAMA)
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(list(tensors)[:5], "model.safetensors")}
    ours = {"n_heads": 3, "drop_rate": 0.0, "exact_gelu": False, "unpadded_vocab_size": None}
    cfg, key = GPTConfig(vocab_size=29, context_length=8, emb_dim=8, n_heads=2, n_layers=1), jax.random.key(0)
    params = GPTModel(cfg).init(key, np.zeros((1, 2), np.int32))["params"]
    adapters = init_adapters(key, params, ("attn/*",), rank=2, alpha=4.0)
    save_adapters(folder / "seed.safetensors", add_adapters(params, adapters))

    def read(file: Path) -> Any:
        return read_weights(file.parent, None, "float32", "float32")

    def with_metadata(data: bytes) -> Any:
        text = data.decode(errors="replace")
        save_file(tensors, gpt2 / "model.safetensors", {"slm_jax": text, "sha256": json.dumps({})})
        with contextlib.suppress(InputError):  # no tensor has a checksum
            return read(gpt2 / "model.safetensors")

    small = foreign_files.write(folder / "small", {"a": np.ones((2, 3), np.float32)}) / "model.safetensors"
    gguf = gguf_files.file(gguf_files.LLAMA, gguf_files.llama_tensors())
    found: Readers = {
        "config.json of GPT-2": (as_json(foreign_files.CONFIG), by_file(gpt2 / "config.json", read)),
        "config.json of Llama": (as_json(_LLAMA), by_file(llama / "config.json", read)),
        "index of shards": (as_json(index), by_file(folder / "model.safetensors.index.json", shard_names)),
        "safetensors": ([small.read_bytes()], by_file(folder / "x.safetensors", open_tensors)),
        "adapters": ([(folder / "seed.safetensors").read_bytes()], by_file(folder / "l.safetensors", load_adapters)),
        "GGUF": ([gguf], by_file(folder / "x.gguf", open_tensors)),
        "metadata of safetensors": (as_json(ours), with_metadata),
    }
    return found


if __name__ == "__main__":
    main()
