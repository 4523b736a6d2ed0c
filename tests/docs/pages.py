"""The code blocks of a page, and how the tests run each kind as a reader would, with trainings cut short."""

import contextlib
import dataclasses
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import unittest.mock
from pathlib import Path
from typing import Any

import yaml

from slm_jax import cli
from slm_jax.tasks.config import parse_args

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?P<before>[^\n]*)\n(?P<indent> *)```(?P<language>[\w+-]*)(?P<rest>[^\n]*)\n(?P<body>.*?)^(?P=indent)```",
    re.M | re.S,
)
LANGUAGES = ("sh", "python", "yaml", "text", "csv", "tsv", "json", "jsonl")  # from text on only shown, or written
# Other programs in blocks marked "not run", of which nothing is checked.
OTHER_PROGRAMS = re.compile(
    "cd|cp|git|hf|jupyter|lint-imports|llama-cli|mkdocs|ollama|pip|pre-commit|pytest|python|srun|tensorboard"
)
# Programs that change the machine, serve pages or take long.
NOT_HERE = ("pip install", "pre-commit", "mkdocs serve", "slm-jax bench startup")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
# What makes a training short, and its compilation; a base brings its own model.
SHORT = {
    "train.batch_size": 8, "train.eval_every": 4, "train.eval_batch_size": 64, "model.unroll": "false",
}  # fmt: skip
SMALL = {"model.emb_dim": 16, "model.n_heads": 2, "model.n_layers": 4, "model.context_length": 128}
# Trainings that several pages begin with: done once for all pages.
TINY, CLASSIFY, ASSISTANT = ("configs/tiny.yaml", "configs/classify_builtin.yaml", "configs/sft_builtin.yaml")
SHARED = (["train", "--config", TINY], ["finetune", "--config", CLASSIFY], ["finetune", "--config", ASSISTANT])
PRETRAINED = {"gpt2": "stand-in", "smollm2-135m-instruct": "stand-in-chat"}  # what stands in for each here
STAND_IN = re.compile(rf"""(?:(?<=--run )|(?<=--base )|(?<=load_model\("))({"|".join(PRETRAINED)})\b(?!-)""")
NEEDS_NAMED = re.compile(
    r"named:|tinyshakespeare|(configs/|config )(shakespeare|verdict|classify_spam|sft_instruction|dpo_instruction)"
)
NEEDS_GPT2_TOKENS = re.compile(r"gpt2|configs/verdict|tokenizer(\.kind)? gpt2|slm-jax prepare(?!.*--tokenizer)")


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it is named after, and why it is not run, if it is not."""

    language: str
    title: str | None
    body: str
    not_run: str | None
    line: int


def blocks(text: str) -> list[Block]:
    found = []
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(FENCE.findall("\n" + text)), "a fence without its end"
    for match in FENCE.finditer("\n" + text):
        title, reason = re.search(r'title="([^"]+)"', match["rest"]), NOT_RUN.search(match["before"])
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.M)
        line = text.count("\n", 0, match.start("body") - 1)
        found.append(Block(match["language"], title and title[1], body, reason and reason[1], line))
    return found


def commands(body: str) -> list[str]:
    """Return the commands of a shell block: one a line, continued lines joined, ``a && b`` split, comments removed."""
    lines = re.sub(r"\s*\\\n\s*", " ", body).splitlines()
    parts = [re.sub(r"(^|\s+)#.*", "", part).strip() for line in lines for part in re.split(r"\s+&&\s+", line)]
    return [part for part in parts if part]


def stand_in(code: str) -> str:
    """Replace the names of pretrained models, which would be downloaded."""
    return STAND_IN.sub(lambda match: PRETRAINED[match[1]], code)


class Reader:
    """Runs the blocks of one page in a folder that looks like a checkout; ``namespace`` is the page's Python so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.namespace: dict[str, Any] = {}

    def read(self, block: Block) -> None:
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body)
        assert block.language in LANGUAGES, f"a block of {block.language!r}; expected one of {', '.join(LANGUAGES)}"
        if block.language == "sh":
            for command in commands(block.body):
                self.check(command) if block.not_run else self.run(command)
        elif block.language == "python":
            compile(block.body, "block.py", "exec") if block.not_run else self.python(block.body)
        elif block.language == "yaml":
            path = self.folder / "block.yaml"
            path.write_text(block.body)
            assert isinstance(yaml.safe_load(block.body), dict)
            parse_args(["--config", str(path)])

    def python(self, code: str) -> None:
        path = self.folder / "block.py"
        path.write_text(stand_in(code))
        with contextlib.redirect_stdout(io.StringIO()):
            self.namespace = runpy.run_path(str(path), self.namespace, "block")

    def run(self, command: str) -> None:
        if missing(command) or command.startswith(NOT_HERE):
            self.check(command)
            return
        command = re.sub(r"(?<=runs/)([\w-]+)@\d+", r"\1", stand_in(command))  # the run has few steps
        words = shlex.split(command)
        own = slm_jax_words(words)
        if own is None:
            self.shell(command)
            return
        if own[1:] in [["train"], ["finetune"], *SHARED]:
            return
        environment = dict(word.split("=", 1) for word in words[: words.index(own[0])])
        own = shorter(own[1:])
        if environment:
            program = [sys.executable, "-m", "slm_jax", *own]
            done = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return
        status = in_this_process(own)
        assert status == 0 or (own[0] == "doctor" and status == 1), f"{command}: exit status {status}"

    def shell(self, command: str) -> None:
        """Run another program in a shell that finds this environment's programs."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        if short := re.match(r"python benchmarks/[^ ]+|pytest", command):  # they take long and have tests of their own
            command = f"{short[0]} --help"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-ec", command], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def check(self, command: str) -> None:
        """Check that the options of a command exist, without running it."""
        words = shlex.split(command)
        if command.startswith("pip install"):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for extras in re.findall(r"(?:slm-jax|\.)\[([\w,]+)\]", command):
                assert set(extras.split(",")) <= set(known), command
        own = slm_jax_words(words)
        assert own or OTHER_PROGRAMS.fullmatch(words[0]) or "=" in words[0], f"{command}: unknown program"
        if own is not None and own[1:] and not own[1].startswith("-"):
            with unittest.mock.patch(f"{cli.COMMANDS[own[1]][0]}.run", return_value=0):
                assert in_this_process(own[1:]) == 0, command


def slm_jax_words(words: list[str]) -> list[str] | None:
    """Return the words of a command of slm_jax without the environment before it; None for other programs."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words or {"|", ">", "<", ";"} & set(words):
        return None
    if words[0] == "slm-jax":
        return words
    if words[:1] == ["python"] and words[1:2] in (["train.py"], ["finetune.py"]):
        return [words[0], words[1].removesuffix(".py"), *words[2:]]
    return None


def shorter(words: list[str]) -> list[str]:
    more: dict[str, object] = {}
    if words[0] in ("train", "finetune") and "--help" not in words:
        more = dict(SHORT)
        # Sampling compiles two programs; the shared runs and commands that name it do.
        more |= (
            {"sample.max_new_tokens": 4} if words in SHARED or "--sample." in " ".join(words) else {"sample.every": 0}
        )
        if "--train.epochs" not in words:
            more["train.steps"] = 4
        if words[0] == "train" and "--base" not in words:
            more |= SMALL
            if "--data." not in " ".join(words):
                more["data.validation_fraction"] = 0.02  # evaluating a tenth takes longer than the steps
            if not re.search(r"--(data|tokenizer)\.|--config (?!configs/tiny)", " ".join(words)):
                more["tokenizer.vocab_size"] = 512  # the same for all pages, so that compiled programs are reused
        if "--optimizer.decay_steps" in words:
            more["optimizer.decay_steps"] = 2
        if words[0] == "finetune":
            more["instruction.responses"] = 2
    elif words[0] in ("generate", "chat"):
        more = {"max-new-tokens": 4}
    elif words[0] == "bench":
        more = ({} if words[1] == "memory" else {"repeats": 2}) | (SMALL if "--config" in words else {})
    return [*words, *(part for key, value in more.items() for part in (f"--{key}", str(value)))]


def in_this_process(words: list[str]) -> int:
    before, sys.stdin = sys.stdin, io.StringIO("Hello\n")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return cli.main(words)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdin = before


def missing(command: str) -> bool:
    """Return whether a command needs texts or GPT-2's tokens that are not on this machine."""
    if NEEDS_NAMED.search(command) and not os.environ.get("SLM_JAX_DATA"):
        return True
    return bool(NEEDS_GPT2_TOKENS.search(command)) and not os.environ.get("TIKTOKEN_CACHE_DIR")
