"""The commands: ``slm-jax COMMAND``, also ``python -m slm_jax`` and ``train.py``.

Exit status 0 means that the work was done; 2 that the user can mend it, with one line on stderr; 1 that training
diverged, or that doctor found a problem; 130 or 143 that a signal stopped it, with everything saved.
"""

import errno
import gc
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from slm_jax.errors import InputError

# What is wrong with a place to write to, not with the program.
_PLACE_ERRORS = (
    *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)

# The module of each, imported only when it is called, and what it does.
COMMANDS = {
    "train": ("slm_jax.commands.train", "pretrain a GPT: --config FILE.yaml, then --any.key value"),
    "finetune": ("slm_jax.commands.finetune", "make a classifier or an assistant of a pretrained GPT"),
    "classify": ("slm_jax.commands.classify", "tell the classes of texts with a fine-tuned run"),
    "generate": ("slm_jax.commands.generate", "write text with a trained run or GPT-2 weights"),
    "chat": ("slm_jax.commands.chat", "talk with a model in the terminal"),
    "evaluate": ("slm_jax.commands.evaluate", "measure loss of a text, LAMBADA, HellaSwag, responses to instructions"),
    "prepare": ("slm_jax.commands.prepare", "make a token file of any text, once, for train --data.source tokens:FILE"),
    "plan": ("slm_jax.commands.plan", "what a run will need of an accelerator: memory, speed, hours"),
    "bench": ("slm_jax.commands.bench", "measure speed and memory here: train, generate, data, startup or memory"),
    "import": ("slm_jax.commands.import_weights", "make a run of GPT-2 weights: Hugging Face's, nanoGPT's, the book's"),
    "export": ("slm_jax.commands.export", "write a model for transformers, nanoGPT or the book's code"),
    "doctor": ("slm_jax.commands.doctor", "look at this machine and at a run: what works, what does not, what to do"),
    "report": ("slm_jax.commands.report", "write a run as one HTML page, or several to compare them"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    args = sys.argv[1:] if args is None else list(args)
    if not args or args[0] in ("-h", "--help"):
        print("usage: slm-jax COMMAND [OPTIONS]\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<10} {what}")
        print("\nslm-jax COMMAND --help shows every option with its default.")
        return 0 if args else 2
    if args[0] == "--version":
        from slm_jax import __version__

        print(f"slm-jax {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"slm-jax: unknown command {args[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    gc.set_threshold(100_000)  # what is imported, parsed and traced stays: searching it takes a third of a start
    # Orbax logs whole tracebacks of errors that it raises too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console or pipe that lacks a character shows "?" for it
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer refuses bytes that are no text, in one line
    try:
        status: int = importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
        return status
    except InputError as error:
        return _fail(args[0], str(error))
    except BrokenPipeError:  # who read the output has had enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        return _fail(args[0], f"{error.filename or 'file'}: {error.strerror}; what was saved before is kept")
    except KeyboardInterrupt:
        return 130


def _fail(command: str, message: str) -> int:
    print(f"slm-jax {command}: {' '.join(message.split())}", file=sys.stderr)
    return 2
