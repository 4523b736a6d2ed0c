"""``slm-jax generate``: write text."""

import dataclasses
import sys
from typing import Literal

from slm_jax.commands import SamplingOptions, load, set_up
from slm_jax.config import Positive
from slm_jax.errors import InputError, for_terminal
from slm_jax.files import user_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Write text with a trained run or pretrained weights.

    Attributes:
        prompt: start of the text; empty: the start of a document.
        prompt_file: UTF-8 file with the prompt instead; a line break at its end is removed.
        instruction: an instruction instead of a prompt; it is written in the model's own template (Alpaca's if it has
            none), and only the answer is printed.
        input: the input of the instruction.
        num_samples: number of texts to write.
        stop: text that ends the writing; may be given several times.
        past_context: when the model's context is full, slide continues from the latest tokens, stop ends the text.
    """

    prompt: str = ""
    prompt_file: str | None = None
    instruction: str | None = None
    input: str = ""
    num_samples: Positive = 1
    stop: tuple[str, ...] = ()
    past_context: Literal["slide", "stop"] = "slide"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"prompt": self.prompt or None, "prompt_file": self.prompt_file, "instruction": self.instruction}
        if len(named := [name for name, value in given.items() if value is not None]) > 1:
            raise InputError(f"{' and '.join(named)} are given; expected only one")
        if self.instruction is not None and not self.instruction.strip():
            raise InputError("instruction is empty; expected text")
        if self.input and self.instruction is None:
            raise InputError(f"input is {self.input!r:.60} without an instruction; expected --instruction, too")
        if "" in self.stop:
            raise InputError("stop is empty; expected text, such as a line break")


def run(options: Options) -> int:
    import jax

    from slm_jax.data.file_sources import read_text
    from slm_jax.data.templates import Message, encode_prompt
    from slm_jax.generation.conversation import template_or_alpaca
    from slm_jax.generation.decode import stream_text
    from slm_jax.model import GPTModel
    from slm_jax.nn.blocks import unstack_blocks

    set_up()
    start = options.prompt
    if options.prompt_file is not None:
        start = read_text(user_path(options.prompt_file)).removesuffix("\n")
    loaded = load(options.run, options.tokenizer, options.n_heads, options.mesh, options.weights)
    stop: tuple[str, ...] = options.stop
    prompt: str | list[int] = start
    if options.instruction is not None:
        template = template_or_alpaca(loaded.template, loaded.folder)
        prompt = encode_prompt(loaded.tokenizer, template, [Message("user", options.instruction, options.input)])
        stop = (*stop, *template.stop)
    model, params, key = GPTModel(loaded.model_config), unstack_blocks(loaded.params), jax.random.key(options.seed)
    texts = [
        stream_text(
            model, params, loaded.tokenizer, prompt, options, max_new_tokens=options.max_new_tokens,
            stop=stop, past_context=options.past_context, key=jax.random.fold_in(key, index),
        )
        for index in range(options.num_samples)
    ]  # fmt: skip
    checkpoint = "" if loaded.step is None else f", checkpoint of step {loaded.step:,}"
    print(f"{loaded.folder}{checkpoint}", file=sys.stderr)
    for number, pieces in enumerate(texts, start=1):
        if options.num_samples > 1:
            print(f"--- {number} of {options.num_samples} ---")
        print(for_terminal(start), end="", flush=True)
        begun = options.instruction is None  # the first token of an answer may have a space in front
        for piece in pieces:
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            print(for_terminal(shown), end="", flush=True)
        print()
    return 0
