"""``slm-jax chat``: a conversation in the terminal."""

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING

from slm_jax.commands import SamplingOptions, load, set_up
from slm_jax.data.templates import Template, TextTemplate, load_template
from slm_jax.errors import InputError, for_terminal

if TYPE_CHECKING:
    from slm_jax.generation.conversation import Conversation

HELP = """\
  /help               show this list
  /reset              forget the conversation
  /temperature 0.5    below 1 less random, above 1 more random, 0 always the most likely token; no number: show it
  /quit               leave (also Ctrl-D); Ctrl-C stops an answer"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Talk with a trained run or pretrained weights.

    A model that was not trained on conversations only continues the text.

    Attributes:
        template: how the conversation is written for the model: alpaca, phi3, chatml, a JSON file, or none for plain
            text with names; null: the model's own, or none if it has none.
        introduction: text before the conversation, which the model always sees; with a template the system message.
        you: your name in plain text without a template; null: User.
        model: the model's name in plain text without a template; null: Assistant.
    """

    template: str | None = None
    introduction: str = ""
    you: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("you", "model"):
            name = getattr(self, key)
            if name is not None and not name.strip():
                raise InputError(f"{key} is empty; expected a name")
        self.choose_template(None)

    def choose_template(self, trained: Template | None) -> Template:
        """Return the template of the conversation; ``trained``: the one that the model was trained with."""
        template = trained
        if self.template is not None:
            template = None if self.template == "none" else load_template(self.template)
        if template is None:
            return TextTemplate(
                user_start=f"\n{self.you or 'User'}: ", assistant_start=f"\n{self.model or 'Assistant'}:"
            )
        if self.you or self.model:
            raise InputError("you and model are names in plain text; expected --template none with them")
        return template


def run(options: Options) -> int:
    from slm_jax.generation.conversation import Conversation
    from slm_jax.model import GPTModel

    set_up()
    loaded = load(options.run, options.tokenizer, options.n_heads, options.mesh, options.weights)
    template = options.choose_template(loaded.template)
    _ = template.stop  # a template that fails is reported now
    conversation = Conversation(
        GPTModel(loaded.model_config), loaded.params, loaded.tokenizer, template,
        options, options.max_new_tokens, options.introduction, options.seed,
    )  # fmt: skip
    with contextlib.suppress(ImportError):  # gives input() arrow keys and history
        import readline  # noqa: F401
    print("Type a message, /help for commands, /quit to leave.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if line == "/quit":
            return 0
        try:
            if line.startswith("/"):
                print(run_command(conversation, line))
            elif line:
                pieces = conversation.answer(line)
                with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):
                    for piece in pieces:
                        print(for_terminal(piece), end="", flush=True)
                print(flush=True)
        except InputError as error:  # the conversation continues
            print(error, file=sys.stderr)


def run_command(conversation: "Conversation", line: str) -> str:
    name, _, value = line.partition(" ")
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.turns.clear()
        return "The conversation is forgotten."
    if name != "/temperature":
        raise InputError(f"{name} is no command; expected /help, /reset, /temperature or /quit")
    if value:
        try:
            temperature = float(value)
        except ValueError:
            raise InputError(f"temperature is {value!r}; expected a number, such as /temperature 0.5") from None
        conversation.sampling = dataclasses.replace(conversation.sampling, temperature=temperature)
    return f"The temperature is {conversation.sampling.temperature:g}."
