"""Check the real GPT-2 weights: loss on The Verdict and a greedy continuation, against the figures known for them.

    python benchmarks/gpt2_reference.py
    python benchmarks/gpt2_reference.py --model path/to/gpt2

The text is The Verdict (from $SLM_JAX_DATA, else downloaded), cut by characters into the first 90% and the rest, each
encoded with GPT-2's tokenizer and cut into windows of 256 tokens that do not overlap, whole ones only: 18 and 2. The
book takes the mean over batches of two windows, which here is the mean over all targets.

Exit status: 0 all as expected, 1 something differs, 2 no weights or no text (one line says which).
"""

import argparse
import sys

import jax
import numpy as np

from slm_jax import GPTModel, generate, get_tokenizer
from slm_jax.data.named import named_file
from slm_jax.errors import InputError
from slm_jax.evaluation.logprobs import target_logprobs
from slm_jax.model import Params
from slm_jax.runs import load_gpt2
from slm_jax.tokenizer import Tokenizer

WINDOW = 256
# Source: Raschka, Build a Large Language Model (From Scratch), exercise 5.5 and section 5.5; OpenAI's 124M weights.
EXPECTED_LOSS = {"first 90%": 3.75475, "last 10%": 3.55962}
TOLERANCE = 1e-4  # float32 on another device moves such a mean in its sixth digit
PROMPT = "Every effort moves you"
EXPECTED_TEXT = " forward.\n\nThe first step is to understand the importance of your work"


def main(arguments: list[str] | None = None) -> int:
    """Print each figure beside the expected one; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="a name or path that load_gpt2 takes (default: gpt2)")
    options = parser.parse_args(arguments)
    try:
        with jax.default_matmul_precision("highest"):
            ok = compare(options.model)
    except InputError as error:
        print(f"gpt2_reference: {error}", file=sys.stderr)
        return 2
    print("all as expected" if ok else "NOT as expected")
    return 0 if ok else 1


def compare(source: str) -> bool:
    """Compare losses and continuation; return whether all are as expected."""
    tokenizer = get_tokenizer("gpt2")
    text = named_file("the-verdict").read_text(encoding="utf-8")
    cfg, params = load_gpt2(source)
    if cfg.vocab_size < tokenizer.vocab_size or cfg.context_length < WINDOW:
        raise InputError(
            f"{source}: {cfg.vocab_size} ids and a context of {cfg.context_length} tokens; expected at least "
            f"{tokenizer.vocab_size} and {WINDOW}: these are not OpenAI's weights"
        )
    model = GPTModel(cfg)
    cut = int(0.9 * len(text))
    ok = True
    for (name, expected), part in zip(EXPECTED_LOSS.items(), (text[:cut], text[cut:]), strict=True):
        loss = window_loss(model, params, tokenizer.encode(part))
        ok &= abs(loss - expected) <= TOLERANCE
        print(f"loss on the {name} of The Verdict: {loss:.5f}, expected {expected:.5f} ± {TOLERANCE}")
    found = continuation(model, params, tokenizer)
    print(f"continuation of {PROMPT!r}: {found!r}, expected {EXPECTED_TEXT!r}")
    return ok and found == EXPECTED_TEXT


def window_loss(model: GPTModel, params: Params, ids: list[int]) -> float:
    """Return the mean over all targets of whole windows, in nats."""
    starts = range(0, len(ids) - WINDOW, WINDOW)
    tokens = np.array([ids[start : start + WINDOW + 1] for start in starts], np.int32)
    logprobs, _ = target_logprobs(model, params, tokens[:, :-1], tokens[:, 1:])
    return -float(logprobs.mean())


def continuation(model: GPTModel, params: Params, tokenizer: Tokenizer) -> str:
    """Continue the prompt greedily by as many tokens as are expected."""
    prompt = tokenizer.encode(PROMPT)
    n_tokens = len(tokenizer.encode(EXPECTED_TEXT))
    ids = generate(model, params, np.array([prompt]), max_new_tokens=n_tokens, temperature=0.0)[0]
    return tokenizer.decode(ids[len(prompt) :].tolist())


if __name__ == "__main__":
    raise SystemExit(main())
