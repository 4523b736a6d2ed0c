"""A finished or unfinished run, read back from its folder."""

import dataclasses
from pathlib import Path

from slm_jax.errors import InputError, MissingInputError
from slm_jax.model import GPTConfig, Params, param_shapes
from slm_jax.tokenizer import Tokenizer, tokenizer_from_dict
from slm_jax.training.checkpoint import best_step, load_params, read_metadata, saved_steps
from slm_jax.training.hardware import best_dtype


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its tokenizer, from one checkpoint.

    Attributes:
        folder: the run's folder.
        step: the checkpoint's step.
        model_config: the model's configuration, computing in this device's dtype.
        params: the model's parameters.
        tokenizer: the run's tokenizer.
    """

    folder: Path
    step: int
    model_config: GPTConfig
    params: Params
    tokenizer: Tokenizer


def load_run(folder: str | Path, step: int | str = "best") -> Run:
    """Load a run's model and tokenizer.

    Args:
        folder: such as ``runs/tiny``.
        step: a step, ``"best"`` (the lowest validation loss) or ``"latest"``.

    Raises:
        MissingInputError: no run there, or no checkpoint of that step.
        InputError: a damaged checkpoint; a step that is none.
    """
    folder = Path(folder).expanduser()
    checkpoints = folder / "checkpoints"
    steps = saved_steps(checkpoints)
    if not steps:
        raise MissingInputError(f"{folder}: no run with checkpoints there; expected a folder such as runs/tiny")
    if step == "best":
        chosen = best_step(checkpoints)
        assert chosen is not None
    elif step == "latest":
        chosen = steps[-1]
    else:
        try:
            chosen = int(step)
        except ValueError:
            raise InputError(f"step is {step!r}; expected a number, best or latest") from None
    if chosen not in steps:
        raise MissingInputError(
            f"{checkpoints}: no checkpoint of step {chosen}; there are {', '.join(map(str, steps))}"
        )
    metadata = read_metadata(checkpoints, chosen)
    # Its shape, not how it was executed: that was for another device, perhaps.
    execution = {"dtype": best_dtype(), "attention": "auto", "remat": "none", "unroll": None}
    cfg = GPTConfig(**{**metadata["model"], **execution})
    params = load_params(checkpoints, chosen, param_shapes(cfg))
    return Run(folder, chosen, cfg, params, tokenizer_from_dict(metadata["tokenizer"]))
