"""The commands: ``slm-jax COMMAND``, also ``python -m slm_jax`` and ``train.py``.

Exit status 0 means that the work was done; 2 that the user can mend it, with one line on stderr; 1 that training
diverged; 130 or 143 that a signal stopped it, with everything saved.
"""

import argparse
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from slm_jax.errors import InputError

# What is wrong with a place to write to, not with the program.
_PLACE_ERRORS = (
    *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)

COMMANDS = {
    "train": "pretrain a GPT: --config FILE.yaml, then --any.key value",
    "generate": "write text with a trained run",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    args = sys.argv[1:] if args is None else list(args)
    commands: dict[str, Callable[[Sequence[str]], int]] = {"train": train_command, "generate": generate_command}
    if not args or args[0] in ("-h", "--help"):
        print("usage: slm-jax COMMAND [OPTIONS]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:<10} {what}")
        print("\nslm-jax COMMAND --help shows every option with its default.")
        return 0 if args else 2
    if args[0] == "--version":
        from slm_jax import __version__

        print(f"slm-jax {__version__}")
        return 0
    if args[0] not in commands:
        print(f"slm-jax: unknown command {args[0]!r}; expected one of {', '.join(commands)}", file=sys.stderr)
        return 2
    # Orbax logs whole tracebacks of errors that it raises too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return commands[args[0]](args[1:])
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


def _fail(command: str, message: str, status: int = 2) -> int:
    print(f"slm-jax {command}: {' '.join(message.split())}", file=sys.stderr)
    return status


def train_command(args: Sequence[str]) -> int:
    """Pretrain; see ``slm-jax train --help``."""
    from slm_jax.config import parse_args

    config = parse_args(args)
    from rich.console import Console

    from slm_jax.tasks import pretraining
    from slm_jax.training.interrupt import Interrupted, StopRequest
    from slm_jax.training.loop import TrainingDiverged, train
    from slm_jax.training.sharding import initialize_distributed
    from slm_jax.training.start import find_start

    with StopRequest() as stop:
        try:
            use_compile_cache()
            initialize_distributed()
            start = find_start(config)
            task = pretraining.build(config, start.tokenizer, stop.check)
            console = Console(quiet=not start.folder.writes)
            train(config, task, start, stop, console)
        except Interrupted as interruption:
            return _fail("train", f"stopped by {interruption}", status=128 + interruption.signum)
        except TrainingDiverged as diverged:
            return _fail("train", str(diverged), status=1)
    return 0


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told of another place."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm_jax" / "xla"
        with contextlib.suppress(OSError):  # a cache that cannot be written only makes the next start slower
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are raised as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`InputError` instead of printing the usage."""
        raise InputError(f"{message}; see slm-jax generate --help")


def generate_command(args: Sequence[str]) -> int:
    """Write text with a trained run; see ``slm-jax generate --help``."""
    parser = OneLineParser(prog="slm-jax generate", description="Write text with a trained run.", allow_abbrev=False)
    parser.add_argument("--run", required=True, help="the run's folder, such as runs/tiny")
    parser.add_argument("--step", help="which checkpoint: a step, best or latest (default: best)", default="best")
    parser.add_argument("--prompt", default="", help="what the text starts with (default: the start of a document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="how many tokens to add (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; higher is wilder (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the likeliest K; 0: from all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default: 0)")
    options = parser.parse_args(list(args))
    if options.top_k < 0:
        raise InputError(f"top-k is {options.top_k}; expected at least 1, or 0 to draw from all tokens")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"seed is {options.seed}; expected at least 0 and below 2**32")

    import jax

    from slm_jax.generate import stream
    from slm_jax.model import GPTModel
    from slm_jax.run import load_run

    use_compile_cache()
    run = load_run(options.run, options.step)
    prompt = run.tokenizer.encode(options.prompt) or [run.tokenizer.eot_id]
    context = run.model_config.context_length
    if len(prompt) > context:
        raise InputError(f"the prompt has {len(prompt)} tokens, more than the context of {context}; shorten it")
    columns = stream(
        GPTModel(run.model_config),
        run.params,
        [prompt],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        eos_id=run.tokenizer.eot_id,
        key=jax.random.key(options.seed),
    )
    print(f"{run.folder}, checkpoint of step {run.step:,}", file=sys.stderr)
    ids, shown = (list(prompt) if options.prompt else []), ""
    for column in columns:
        if column[0] == run.tokenizer.eot_id:
            break
        ids.append(int(column[0]))
        text = run.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(run.tokenizer.decode(ids)[len(shown) :])
    return 0
