"""Check exported folders with Hugging Face's transformers: tokenizer, chat template and greedy text must be ours.

    pip install torch==2.13.0 transformers==5.24.0
    slm-jax export --run runs/tiny --out tiny-hf
    python benchmarks/exports.py tiny-hf --prompt "The function returns"

For each folder: ids of texts (Python's language reference, and every character of Unicode), a conversation in the chat
template, and the text of ``transformers.pipeline`` at temperature 0, each compared with slm_jax's own, which reads the
same folder, or the run that --run names.

Exit status: 0 all equal, 1 something differs.
"""

import argparse
import sys

from transformers import AutoTokenizer, pipeline

import slm_jax
from slm_jax.data.sources import parse_source
from slm_jax.data.templates import Message
from slm_jax.errors import InputError
from slm_jax.runs import Run, load_model

CONVERSATION = [("system", "Be brief."), ("user", "Who wrote it?"), ("assistant", "Ada."), ("user", "When?\n")]


def main() -> int:
    """Print a line for each comparison; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--run", help="the run that was exported (default: the folder)")
    parser.add_argument("--prompt", action="append", help="start of a greedy text; several are possible")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    results = []
    for folder in options.folders:
        run = load_model(options.run or folder)
        results.append(compare_ids(folder, run))
        if run.template is not None:
            results.append(compare_conversation(folder, run))
        results += [compare_text(folder, run, prompt, options.max_new_tokens) for prompt in options.prompt or ()]
    return 0 if all(results) else 1


def texts() -> list[str]:
    """Return Python's language reference, and every character of Unicode among letters, digits, marks and spaces."""
    pieces = parse_source("builtin:python-docs").texts()
    reference = ["".join(document) for document in pieces]
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    words = [f"a{chr(code)}a {chr(code)}1{chr(code)}1 .{chr(code)}. \n" for code in codes]
    return reference + ["".join(words[i : i + 2000]) for i in range(0, len(words), 2000)]


def compare_ids(folder: str, run: Run) -> bool:
    """Compare the ids of texts; those that our tokenizer refuses (characters without an id) are left out."""
    theirs = AutoTokenizer.from_pretrained(folder)
    n_equal = n_texts = n_tokens = 0
    for text in texts():
        try:
            ours = run.tokenizer.start_ids + run.tokenizer.encode(text)
        except InputError:
            continue
        n_texts, n_tokens = n_texts + 1, n_tokens + len(ours)
        n_equal += theirs(text)["input_ids"] == ours
    print(f"{folder}: ids of {n_equal:,} of {n_texts:,} texts are equal ({n_tokens:,} tokens, {type(theirs).__name__})")
    return n_equal == n_texts > 0


def compare_conversation(folder: str, run: Run) -> bool:
    """Compare what a conversation becomes."""
    theirs = AutoTokenizer.from_pretrained(folder)
    dicts = [{"role": role, "content": content} for role, content in CONVERSATION]
    text = theirs.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    equal = text == run.template.prompt([Message(role, content) for role, content in CONVERSATION])
    print(f"{folder}: the conversation is {'equal' if equal else 'NOT equal'} ({len(text)} characters)")
    return equal


def compare_text(folder: str, run: Run, prompt: str, max_new_tokens: int) -> bool:
    """Compare greedy texts, up to the end of the text or of the context."""
    ids = run.tokenizer.start_ids + run.tokenizer.encode(prompt)
    room = min(max_new_tokens, run.model_config.context_length - len(ids))
    model = slm_jax.GPTModel(run.model_config)
    (row,) = slm_jax.generate(model, run.params, [ids], max_new_tokens=room, temperature=0.0)
    end = next((i for i, id_ in enumerate(row[len(ids) :]) if id_ in run.tokenizer.eos_ids), room)
    ours = run.tokenizer.decode(row[len(ids) : len(ids) + end])
    generate = pipeline("text-generation", model=folder)
    theirs = generate(prompt, do_sample=False, max_new_tokens=room, return_full_text=False)[0]["generated_text"]
    print(f"{folder}: {end} greedy tokens are {'equal' if ours == theirs else f'NOT equal: {ours!r} {theirs!r}'}")
    return ours == theirs


if __name__ == "__main__":
    sys.exit(main())
