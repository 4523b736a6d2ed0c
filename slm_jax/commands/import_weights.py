"""``slm-jax import``: GPT-2 weights of another program as a run."""

import dataclasses
from collections.abc import Sequence

from slm_jax.commands import load
from slm_jax.config import Positive, parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a run of GPT-2 weights: Hugging Face's, nanoGPT's, the book's, or gpt2, gpt2-medium, -large, -xl by name.

    Attributes:
        source: a file or folder of weights, or a name such as gpt2.
        run: the new run's name; it must not exist.
        runs_dir: where runs are kept.
        tokenizer: gpt2, or a saved one: its file or folder, or a run's folder; null: the weights' own, or GPT-2's.
        n_heads: attention heads, where weights do not say how many.
    """

    source: str
    run: str
    runs_dir: str = "runs"
    tokenizer: str | None = None
    n_heads: Positive | None = None


def main(args: Sequence[str]) -> int:
    """Read the options and run; see ``slm-jax import --help``."""
    return run(parse(Options, args, "slm-jax import"))


def run(options: Options) -> int:
    """Write the run, and say what to do with it; return 0."""
    from slm_jax.files import check_new_folder, user_path
    from slm_jax.model import count_params
    from slm_jax.runs import save_run
    from slm_jax.training.config import check_run_name

    check_run_name(options.run)
    folder = user_path(options.runs_dir) / options.run
    check_new_folder(folder)
    loaded = load(options.source, options.tokenizer, options.n_heads)
    save_run(folder, loaded)
    print(f"{folder} written: {count_params(loaded.model_config):,} parameters")
    print(f"next: slm-jax generate --run {folder}")
    return 0
