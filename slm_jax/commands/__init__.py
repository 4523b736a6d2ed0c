"""The commands, one module each, and what they share.

A command's module has ``Options``, a frozen dataclass, and ``run(options)``, which returns the exit status; or
``main(args)``, if the arguments decide which dataclass it needs. Heavy modules are imported inside ``run``.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from slm_jax.config import NotNegative, Positive, Seed
from slm_jax.errors import InputError
from slm_jax.generation.config import Sampling
from slm_jax.training.process import set_up, use_compile_cache

if TYPE_CHECKING:
    from rich.console import Console

    from slm_jax.runs import Run

__all__ = [
    "LoadOptions",
    "ModelMesh",
    "ModelOptions",
    "SamplingOptions",
    "load",
    "set_up",
    "stdout_console",
    "use_compile_cache",
]


@dataclasses.dataclass(frozen=True)
class ModelMesh:
    """Devices that share the model, as in training.

    Attributes:
        fsdp: devices over which parameters are split.
        tensor: devices over which heads, hidden features and vocabulary are split; must divide the model's heads.
    """

    fsdp: Positive = 1
    tensor: Positive = 1


def stdout_console(**options: Any) -> "Console":
    """Return a Rich console that raises BrokenPipeError for a closed pipe, as print does, instead of SystemExit."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipeConsole(**options)


def load(
    source: str,
    tokenizer: str | None,
    n_heads: int | None,
    mesh: ModelMesh | None = None,
    weights: Literal["int8"] | None = None,
) -> "Run":
    """Load a model, over the first devices if ``mesh`` has several, or with its matrices in 8 bits."""
    import jax

    from slm_jax.model import axis_sizes
    from slm_jax.nn.int8 import quantize
    from slm_jax.runs import load_model
    from slm_jax.tokenizer import get_tokenizer
    from slm_jax.training.config import MeshConfig
    from slm_jax.training.sharding import describe_heads, make_mesh

    sizes = MeshConfig(**vars(mesh or ModelMesh()))
    n_devices = sizes.fsdp * sizes.tensor
    if weights == "int8" and n_devices > 1:
        raise InputError(f"weights is int8 and mesh has {n_devices} devices; expected one device with int8")
    sharding = make_mesh(sizes, jax.devices()[:n_devices]) if n_devices > 1 else None
    known = None if tokenizer is None else get_tokenizer(tokenizer)
    loaded = load_model(source, known, n_heads=n_heads, sharding=sharding)
    for warning in describe_heads(sizes, axis_sizes(loaded.model_config)):
        print(warning, file=sys.stderr)
    return loaded if weights is None else dataclasses.replace(loaded, params=quantize(loaded.params))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a model's weights may leave open.

    Attributes:
        tokenizer: gpt2, or a tokenizer's file or folder: a saved one, a run's, or a pretrained model's (tokenizer.json,
            tokenizer.model, GGUF, llama2.c's); null: the model's own, or GPT-2's.
        n_heads: number of attention heads, if the weights do not state it.
    """

    tokenizer: str | None = None
    n_heads: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions):
    """Which model.

    Attributes:
        run: a run's folder such as runs/tiny, or runs/tiny@800 for one of its checkpoints; or pretrained weights: a
            file, a folder or a name such as gpt2.
    """

    run: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(Sampling, ModelOptions):
    """Which model, and how its tokens are chosen.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        seed: random seed.
        mesh: devices that share the model.
        weights: int8 stores the matrices in 8 bits: a quarter of float32's memory, and faster on a CPU; null: as they
            are.
    """

    temperature: Annotated[float, Ge(0)] = 0.8
    top_k: NotNegative | None = 50
    max_new_tokens: Positive = 200
    seed: Seed = 0
    mesh: ModelMesh = dataclasses.field(default_factory=ModelMesh)
    weights: Literal["int8"] | None = None
