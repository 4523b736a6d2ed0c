"""``slm-jax chat``: a conversation in the terminal."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from slm_jax.commands import load, set_up
from slm_jax.config import Positive, Seed, parse
from slm_jax.data.templates import Message, Template, load_template
from slm_jax.errors import InputError

if TYPE_CHECKING:
    from slm_jax.generation.sampler import Sampling
    from slm_jax.runs import Run

HELP = """\
  /help               this list
  /reset              forget the conversation
  /temperature 0.5    below 1 safer, above 1 wilder, 0 always the likeliest token; without a number: what it is
  /quit               leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Talk with a trained run or GPT-2 weights. A model that has learned no conversations will only write on.

    Attributes:
        run: a run's folder such as runs/tiny, or runs/tiny@800 for one of its checkpoints; or GPT-2 weights: a file,
            a folder or a name such as gpt2.
        tokenizer: gpt2, or a saved one: its file or folder, or a run's folder; null: the run's own, or GPT-2's.
        n_heads: attention heads, where weights do not say how many.
        template: how the conversation is written for the model: alpaca, phi3, chatml, a JSON file, or none for plain
            text with names; null: as the run was shown instructions, or none.
        introduction: text before the conversation, which the model always sees; with a template the system message.
        you: your name in the text that the model sees, where there is no template; null: User.
        model: the model's name there; null: Assistant.
        max_new_tokens: the most tokens of an answer.
        temperature: below 1 safer, above 1 wilder, 0 always the likeliest token.
        top_k: how many of the likeliest tokens are drawn from; 0 or null: all.
        top_p: draw from the likeliest tokens that together have this probability, above 0 to 1; null: all.
        min_p: draw from tokens at least this share as likely as the likeliest, 0 to 1; null: all.
        repetition_penalty: above 1 makes tokens that are already in the text less likely; null: none.
        seed: decides the random draws.
    """

    run: str
    tokenizer: str | None = None
    n_heads: Positive | None = None
    template: str | None = None
    introduction: str = ""
    you: str | None = None
    model: str | None = None
    max_new_tokens: Positive = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        self.sampling()
        for key in ("you", "model"):
            name = getattr(self, key)
            if name is not None and not name.strip():
                raise InputError(f"{key} is empty; expected a name")
        self.conversation(None)

    def sampling(self) -> "Sampling":
        """Return how tokens are chosen."""
        from slm_jax.generation.sampler import Sampling

        return Sampling(self.temperature, self.top_k or None, self.top_p, self.min_p, self.repetition_penalty)

    def conversation(self, learned: Template | None) -> Template:
        """Return how the conversation is written, where the model has learned to see it in a template or in none."""
        template = learned
        if self.template is not None:
            template = None if self.template == "none" else load_template(self.template)
        if template is None:
            return Template(user_start=f"\n{self.you or 'User'}: ", assistant_start=f"\n{self.model or 'Assistant'}:")
        if self.you or self.model:
            raise InputError(
                "you and model are names in plain text, and there is a template; leave them out or pass --template none"
            )
        return template


def main(args: Sequence[str]) -> int:
    """Read the options and run; see ``slm-jax chat --help``."""
    return run(parse(Options, args, "slm-jax chat"))


def run(options: Options) -> int:
    """Answer each line of the standard input until it ends; return 0."""

    set_up()
    chat = Chat(load(options.run, options.tokenizer, options.n_heads), options)
    with contextlib.suppress(ImportError):  # arrow keys and history in input(), where there is readline
        import readline  # noqa: F401
    print("Type a message, /help for what else there is, /quit to leave.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if line == "/quit":
            return 0
        try:
            if line.startswith("/"):
                print(chat.command(line))
            elif line:
                _show(chat.answer(line))
        except InputError as error:  # the conversation goes on
            print(error, file=sys.stderr)


def _show(pieces: Iterator[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    print(flush=True)


class Chat:
    """A conversation: what was said so far, and how the model goes on with it."""

    def __init__(self, loaded: "Run", options: Options):
        import jax

        from slm_jax.model import GPTModel
        from slm_jax.nn.blocks import unstack_blocks

        self._model = GPTModel(loaded.model_config)
        self._params = unstack_blocks(loaded.params)
        self._tokenizer = loaded.tokenizer
        self._options = options
        self._sampling = options.sampling()
        self._template = options.conversation(loaded.template)
        self._key = jax.random.key(options.seed)
        self._n_answers = 0
        self.turns: list[tuple[str, str]] = []  # message and answer

    def command(self, line: str) -> str:
        """Carry out a line that starts with a slash; return what to show.

        Raises:
            InputError: a command or temperature that is none.
        """
        name, _, value = line.partition(" ")
        if name == "/help":
            return HELP
        if name == "/reset":
            self.turns.clear()
            return "The conversation is forgotten."
        if name == "/temperature":
            if value:
                self._sampling = dataclasses.replace(self._sampling, temperature=_number(value))
            return f"The temperature is {self._sampling.temperature:g}."
        raise InputError(f"{name} is no command; expected /help, /reset, /temperature or /quit")

    def answer(self, message: str) -> Iterator[str]:
        """Yield the answer piece by piece, and remember it, also one that is not taken to its end.

        Raises:
            InputError: a message that is too long, or that the tokenizer cannot encode.
        """
        import jax

        from slm_jax.generation.decode import stream_text

        pieces = stream_text(
            self._model,
            self._params,
            self._tokenizer,
            self._prompt(message),
            self._sampling,
            max_new_tokens=self._options.max_new_tokens,
            stop=self._template.stop,
            past_context="stop",
            key=jax.random.fold_in(self._key, self._n_answers),
        )
        self._n_answers += 1
        return self._remember(message, pieces)

    def _remember(self, message: str, pieces: Iterator[str]) -> Iterator[str]:
        answer = ""
        try:
            for piece in pieces:
                shown = piece if answer.strip() else piece.lstrip()
                answer += piece
                yield shown
        finally:
            self.turns.append((message, answer.rstrip()))  # with the space before it: the model will see what it wrote

    def _prompt(self, message: str) -> str:
        """Return the text that the answer continues; the oldest turns go when it would leave no room for the answer."""
        context = self._model.cfg.context_length
        room = context - min(self._options.max_new_tokens, context // 2)
        turns = list(self.turns)
        while True:
            prompt = self._text(turns, message)
            n_tokens = len(self._tokenizer.encode(prompt))
            if n_tokens <= room:
                self.turns = turns
                return prompt
            if not turns:
                raise InputError(
                    f"the message, with what always stands around it, makes {n_tokens} tokens, and the model's context "
                    f"of {context} has room for {room} beside the answer; shorten it, or lower --max-new-tokens"
                )
            del turns[0]

    def _text(self, turns: Sequence[tuple[str, str]], message: str) -> str:
        introduction = self._options.introduction
        messages = [Message("system", introduction)] if introduction else []
        for said, answer in turns:
            messages += [Message("user", said), Message("assistant", answer)]
        return self._template.prompt([*messages, Message("user", message)])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"temperature is {text!r}; expected a number, such as /temperature 0.5") from None
