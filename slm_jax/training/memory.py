"""Whether a step fits into a device's memory, said in a line that tells what to change."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from slm_jax.errors import InputError
from slm_jax.training.progress import format_bytes

SAVE_MEMORY = (
    "raise --train.accumulate, lower --train.batch_size, --train.eval_batch_size or the length of rows "
    "(--model.context_length, in fine-tuning max_length), or set --model.remat full"
)


@contextlib.contextmanager
def out_of_memory_as_input_error() -> Iterator[None]:
    """Turn the device's error about its memory into a line that says what to change.

    Raises:
        InputError: the device is out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"the device is out of memory; {SAVE_MEMORY}") from None


def device_bytes(compiled: Any) -> int:
    """Return what XLA says a compiled step takes of one device; 0 where it does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    parts = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return parts - memory.alias_size_in_bytes


def check_fits(needed: int, there: int | None) -> None:
    """Refuse a step that takes more bytes of a device than there are; None: not known.

    Raises:
        InputError: it does.
    """
    if there is not None and needed > there:
        raise InputError(
            f"a training step needs {format_bytes(needed)} on each device and there are {format_bytes(there)}; "
            f"{SAVE_MEMORY}"
        )
