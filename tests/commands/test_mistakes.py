"""What must hold of every command: a mistake is answered in one line before any work, and nothing is left behind."""

import shlex

import pytest
from refusals import fails

MISTAKES = {
    "bench": [
        ("", "nothing to measure; expected one of train, generate, data, startup, memory"),
        ("tokens", "unknown measurement 'tokens'; expected one of train, generate, data, startup, memory"),
        ("train --peak many", "peak is 'many'"),
        ("train --device h20", "device is 'h20'; expected one of h200"),
        ("train --task instruction", "task is instruction; expected pretraining"),
        ("train --plot a.jpg", "plot is 'a.jpg'; expected a file whose name ends in .png"),
        ("train --out /dev/null/figures.json", "is not a writable folder"),
        ("generate --batch_sizes 1,no", "batch_sizes is '1,no'; expected whole numbers"),
        ("generate --run x --model.preset mini", "--run and --model.* are both given; expected one of them"),
        ("generate --run runs/none", "runs/none"),
        ("data --data.source text:nowhere/*.txt", "nowhere"),
    ],
    "chat": [
        ("--run none --you ' '", "you is empty"),
        ("--run none --template nonsense", "no such file or built-in template"),
        ("--run none --template phi3 --you Me", "--template none"),
    ],
    "classify": [
        ("cat", "--run is missing; expected folder of a run"),
        ("--run", "--run has no value"),
        ("--run x cat", "x: no run with checkpoints there"),
        ("--run x --file y cat", "text and file are given; expected only one"),
        ("--run x --file none.txt", "none.txt: no such file"),
        ("--run x --file latin1.txt", "latin1.txt: not UTF-8: byte 3 (line 1) is 0xe9"),
    ],
    "doctor": [
        ("--run runs/none", "runs/none: no run there; expected a run's folder"),
        ("--run ~nouser/x", "cannot be used as a path"),
    ],
    "evaluate": [
        ("--run WEIGHTS", "nothing to measure; expected --source, --lambada, --hellaswag or --responses"),
        ("--source text:x --responses x.json", "no model to measure; expected --run"),
        ("--responses none.json", "none.json: no such file"),
        ("--responses a.txt", "a.txt: not JSON"),
        ("--run WEIGHTS --source text:x --stride 0", "stride is 0"),
        ("--run WEIGHTS --lambada lambada.jsonl", "lambada.jsonl"),
        ("--run WEIGHTS --source named:the-verdict --lambada jsonl:none.jsonl", "none.jsonl: no such file"),
        ("--run WEIGHTS --source text:x --out ''", "out is ''; expected a file"),
        ("--run WEIGHTS --source text:x --out a.txt/x.json", "is not a writable folder"),
        ("--run WEIGHTS --source text:x --text-column body", "text_column is 'body', but text:x has no columns"),
        ("--run WEIGHTS --lambada jsonl:x --text-column body", "text_column is 'body', but there is no --source"),
    ],
    "export": [
        ("--run x", "--out is missing"),
        ("--run x --out y --format onnx", "expected one of huggingface, nanogpt, book, gguf, adapter"),
    ],
    "generate": [
        ("", "--run is missing"),
        ("--run none", "none: no such file or folder"),
        ("--run none --top-p 0", "top_p is 0"),
        ("--run none --mesh.fsdp 2 --weights int8", "weights is int8 and mesh has 2 devices; expected one device"),
        ("--run none --mesh.tensor 1000", "mesh.tensor is 1000; expected a divisor of the"),
        ("--run none --stop ''", "stop is empty"),
        ("--run none --prompt a --prompt-file b", "prompt and prompt_file are given; expected only one"),
        ("--run none --prompt-file latin1.txt", "latin1.txt: not UTF-8"),
        ("--run none --instruction a --prompt b", "prompt and instruction are given"),
        ("--run none --instruction ' '", "instruction is empty"),
        ("--run none --input a", "input is 'a' without an instruction"),
        ("--run none --step 800", "unknown key step; did you mean stop?"),
    ],
    "import": [
        ("--run x", "--source is missing"),
        ("--source x", "--run is missing"),
        ("--source x --run ../y", "run is '../y'; expected a folder name"),
        ("--source x --run 'a\nb'", "without control characters"),
    ],
    "plan": [
        ("--device a100", "device is 'a100'; expected one of h200"),
        ("--device h100 --tokens many", "tokens is 'many'"),
        ("--device h100 --task classification --base runs/no", "base runs/no is no existing run"),
    ],
    "prepare": [
        ("--source text:a.txt", "--out is missing"),
        ("--out a.bin", "--source is missing; expected the text: text:GLOB"),
        ("--source text:a.txt --out a.npy", "out is 'a.npy'; expected a file FILE.bin"),
        ("--source text:gone.txt --out a.bin", "gone.txt: no such file"),
        ("--source tokens:a.bin --out b.bin", "holds token ids, expected text"),
        ("--source text:a.txt --out a.bin --text-column body", "text:a.txt has no columns"),
        ("--source text:a.txt --out a.bin --vocab-size 300", "gpt2 has its own; add --tokenizer bpe"),
        ("--source text:a.txt --out a.bin --tokenizer bpe --vocab-size 1000001", "vocab_size is 1000001"),
        ("--source text:a.txt --out a.bin --max-repeated-lines .nan", "max_repeated_lines is nan"),
        ("--source text:a.txt --out a.bin --tokenizer nowhere", "no tokenizer at 'nowhere'"),
        ("--source text:a.txt --out a.txt/b/a.bin", "cannot"),
    ],
}


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [(command, *row) for command, rows in MISTAKES.items() for row in rows],
)
def test_a_mistake_is_answered_in_one_line(command, words, expected, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    given = (weights if word == "WEIGHTS" else word for word in shlex.split(words))
    assert fails([command, *given], capsys, f"slm-jax {command}: ", expected) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "latin1.txt"}
