"""``slm-jax generate``: write text."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slm_jax.commands import load, set_up, template_of
from slm_jax.config import Positive, Seed, parse
from slm_jax.errors import InputError, MissingInputError

if TYPE_CHECKING:
    from slm_jax.generation.sampler import Sampling


@dataclasses.dataclass(frozen=True)
class Options:
    """Write text with a trained run or GPT-2 weights.

    Attributes:
        run: a run's folder such as runs/tiny, or runs/tiny@800 for one of its checkpoints; or GPT-2 weights: a file,
            a folder or a name such as gpt2.
        tokenizer: gpt2, or a saved one: its file or folder, or a run's folder; null: the run's own, or GPT-2's.
        n_heads: attention heads, where weights do not say how many.
        prompt: what the text starts with; empty: the start of a document.
        prompt_file: a UTF-8 file with the prompt instead; a line break at its end does not count.
        instruction: what to do, instead of a prompt; it is shown in the run's template, or Alpaca's if it has none,
            and only the answer is printed.
        input: what the instruction is about.
        num_samples: how many texts to write.
        max_new_tokens: the most tokens to add to the prompt.
        temperature: below 1 safer, above 1 wilder, 0 always the likeliest token.
        top_k: how many of the likeliest tokens are drawn from; 0 or null: all.
        top_p: draw from the likeliest tokens that together have this probability, above 0 to 1; null: all.
        min_p: draw from tokens at least this share as likely as the likeliest, 0 to 1; null: all.
        repetition_penalty: above 1 makes tokens that are already in the text less likely; null: none.
        stop: a text that ends the writing; may be given several times.
        past_context: when the model's context is full, slide goes on from the latest tokens, stop ends the text.
        seed: decides the random draws.
    """

    run: str
    tokenizer: str | None = None
    n_heads: Positive | None = None
    prompt: str = ""
    prompt_file: str | None = None
    instruction: str | None = None
    input: str = ""
    num_samples: Positive = 1
    max_new_tokens: Positive = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    past_context: Literal["slide", "stop"] = "slide"
    seed: Seed = 0

    def __post_init__(self) -> None:
        self.sampling()
        if self.prompt and self.prompt_file is not None:
            raise InputError(f"prompt is {self.prompt!r:.60} and prompt_file {self.prompt_file}; expected only one")
        if self.instruction is not None and (self.prompt or self.prompt_file is not None):
            raise InputError(f"instruction is {self.instruction!r:.60} and there is a prompt; expected only one")
        if self.instruction is not None and not self.instruction.strip():
            raise InputError("instruction is empty; expected text")
        if self.input and self.instruction is None:
            raise InputError(f"input is {self.input!r:.60} without an instruction; expected --instruction, too")
        if "" in self.stop:
            raise InputError("stop is empty; expected text, such as a line break")

    def sampling(self) -> "Sampling":
        """Return how tokens are chosen."""
        from slm_jax.generation.sampler import Sampling

        return Sampling(self.temperature, self.top_k or None, self.top_p, self.min_p, self.repetition_penalty)


def main(args: Sequence[str]) -> int:
    """Read the options and run; see ``slm-jax generate --help``."""
    return run(parse(Options, args, "slm-jax generate"))


def run(options: Options) -> int:
    """Print each text as it is written; return 0."""
    import jax

    from slm_jax.data.templates import Message
    from slm_jax.generation.decode import stream_text
    from slm_jax.model import GPTModel
    from slm_jax.nn.blocks import unstack_blocks

    set_up()
    start = options.prompt if options.prompt_file is None else read_prompt(Path(options.prompt_file))
    loaded = load(options.run, options.tokenizer, options.n_heads)
    prompt, stop = start, options.stop
    if options.instruction is not None:
        template = template_of(loaded)
        prompt = template.prompt([Message("user", options.instruction, options.input)])
        stop = (*stop, *template.stop)
    loaded = dataclasses.replace(loaded, params=unstack_blocks(loaded.params))
    texts = [
        stream_text(
            GPTModel(loaded.model_config),
            loaded.params,
            loaded.tokenizer,
            prompt,
            options.sampling(),
            max_new_tokens=options.max_new_tokens,
            stop=stop,
            past_context=options.past_context,
            key=jax.random.fold_in(jax.random.key(options.seed), index),
        )
        for index in range(options.num_samples)
    ]
    checkpoint = "" if loaded.step is None else f", checkpoint of step {loaded.step:,}"
    print(f"{loaded.folder}{checkpoint}", file=sys.stderr)
    for number, pieces in enumerate(texts, start=1):
        if options.num_samples > 1:
            print(f"--- {number} of {options.num_samples} ---")
        print(start, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


def read_prompt(path: Path) -> str:
    """Read a prompt from a UTF-8 file, without the line break that editors put at its end.

    Raises:
        MissingInputError: no such file.
        InputError: not UTF-8.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}; expected a text file with the prompt") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; expected a UTF-8 text file") from None
