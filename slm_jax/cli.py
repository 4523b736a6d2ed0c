"""The commands: ``slm-jax COMMAND``, also ``python -m slm_jax`` and ``train.py``.

Exit status: 0 the work was done; 1 training diverged, or doctor found a problem; 2 the user made a mistake, reported in
one line on stderr; 75 another process of the job was lost; 129, 130 or 143 a signal stopped the command after
everything was saved.
"""

import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import slm_jax
from slm_jax.errors import InputError, SaveError, printable
from slm_jax.training.process import end_now

# Problems of the place that is written to, not of the program.
_PLACE_ERRORS = (
    *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)

# Module of each command, imported only when it is called, and what it does.
COMMANDS = {
    "train": ("slm_jax.commands.train", "pretrain a GPT: --config RECIPE, then --any.key value"),
    "finetune": ("slm_jax.commands.finetune", "fine-tune a pretrained GPT as a classifier or an assistant"),
    "classify": ("slm_jax.commands.classify", "predict the classes of texts with a fine-tuned run"),
    "generate": ("slm_jax.commands.generate", "generate text with a trained run or pretrained weights"),
    "chat": ("slm_jax.commands.chat", "chat with a model in the terminal"),
    "evaluate": ("slm_jax.commands.evaluate", "measure loss on a text, LAMBADA, HellaSwag, responses to instructions"),
    "prepare": ("slm_jax.commands.prepare", "tokenize a text source into a file for train --data.source tokens:FILE"),
    "plan": ("slm_jax.commands.plan", "estimate memory, speed and hours of a run on an accelerator"),
    "bench": ("slm_jax.commands.bench", "measure speed and memory here: train, generate, data, startup or memory"),
    "import": ("slm_jax.commands.import_weights", "make a run from pretrained weights: Hugging Face, GGUF, nanoGPT, …"),
    "export": ("slm_jax.commands.export", "write a model for transformers, llama.cpp, nanoGPT or the book's code"),
    "doctor": ("slm_jax.commands.doctor", "check this machine or a run, and suggest fixes"),
    "report": ("slm_jax.commands.report", "write an HTML report of a run, or a comparison of several"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command of ``args`` (by default those of the process); return the exit status."""
    try:
        try:
            return _main(sys.argv[1:] if args is None else list(args), is_process=args is None)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(words: list[str], *, is_process: bool) -> int:
    if not words or words[0] in ("-h", "--help"):
        print("usage: slm-jax COMMAND [OPTIONS]\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<10} {what}")
        print("\nslm-jax COMMAND --help shows every option with its default.")
        return 0 if words else 2
    name = words[0]
    if name == "--version":
        print(f"slm-jax {slm_jax.__version__}")
        return 0
    if name not in COMMANDS:
        return _fail("slm-jax", f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    gc.set_threshold(100_000)  # imported, parsed and traced objects stay: collecting them takes a third of a start
    for library in ("absl", "gcsfs", "s3fs"):  # Orbax and they log tracebacks of errors that they also raise
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character shows "?"
    if isinstance(sys.stdin, io.TextIOWrapper):
        # The tokenizer refuses invalid bytes in one line.
        sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8-sig", errors="surrogateescape")
    try:
        with _ending_on_interrupt() if is_process else contextlib.nullcontext():
            _import_jax()
            module = importlib.import_module(COMMANDS[name][0])
            from slm_jax.config import parse
        if hasattr(module, "main"):  # it chooses the class of its options itself
            return int(module.main(words[1:]))
        return int(module.run(parse(module.Options, words[1:], f"slm-jax {name}")))
    except InputError as error:
        status = _fail(f"slm-jax {name}", str(error))
        if is_process and isinstance(error, SaveError):
            end_now(status)
        return status
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        return _fail(f"slm-jax {name}", printable(f"{error.filename or 'file'}: {error.strerror}"))
    except KeyboardInterrupt:
        return 130


def _import_jax() -> None:
    try:
        importlib.import_module("jax")
    except ValueError as error:  # an environment variable such as JAX_DEFAULT_MATMUL_PRECISION
        raise InputError(f"JAX cannot start: {error}") from None


@contextlib.contextmanager
def _ending_on_interrupt() -> Iterator[None]:
    """End the process at Ctrl-C while modules are imported: C extensions turn KeyboardInterrupt into other errors."""
    previous = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _fail(program: str, message: str) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return 2
