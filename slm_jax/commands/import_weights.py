"""``slm-jax import``: weights of another program as a run."""

import dataclasses

from slm_jax.commands import LoadOptions, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LoadOptions):
    """Make a run of pretrained weights: a file or folder of any supported format, or a name such as gpt2.

    Attributes:
        source: file or folder of weights, or a name such as gpt2 or smollm2-135m-instruct.
        run: name of the new run; it must not exist.
        runs_dir: folder of the runs.
    """

    source: str
    run: str
    runs_dir: str = "runs"


def run(options: Options) -> int:
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
