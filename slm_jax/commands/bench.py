"""``slm-jax bench``: measure speed and memory on this machine."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from slm_jax.commands import set_up, stdout_console
from slm_jax.config import AboveZero, NotNegative, Positive, parse
from slm_jax.errors import InputError
from slm_jax.files import check_new_file, write_file
from slm_jax.tasks.config import TASKS, RunConfig
from slm_jax.training.config import ModelConfig

SAVE_MEMORY = "lower --batch_sizes, --prompt_tokens or --new_tokens, or choose a smaller model"


@dataclasses.dataclass(frozen=True)
class Output:
    """Where figures are written; ``measures`` names the function of :mod:`slm_jax.tools.bench` that measures them.

    Attributes:
        format: what is printed: a table, or json.
        out: a file for the JSON as well; null: none.
        plot: a PNG file for a picture of the figures; null: none.
    """

    measures: ClassVar[str]

    format: Literal["table", "json"] = "table"
    out: str | None = None
    plot: str | None = None


@dataclasses.dataclass(frozen=True)
class OfARecipe(RunConfig, Output):
    """Options of a measurement of a recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        measured = [name for name, task in TASKS.items() if task.command == "train"]
        if self.task not in measured:
            raise InputError(f"task is {self.task}; expected {' or '.join(measured)}")


@dataclasses.dataclass(frozen=True)
class TrainOptions(OfARecipe):
    """Measure the training step of a recipe (any keys of train) on random tokens, which make no difference.

    Attributes:
        repeats: steps that are timed, in each of two ways: waited for one by one, and in a queue as train runs them.
        warmup: steps before them that are not timed.
        device: a device to compare with, such as h200, as in slm-jax plan; null: the one here.
        peak: FLOP/s of one device, such as 989e12, instead of the data sheet's; or measured: peak and bandwidth are
            measured here.
    """

    measures = "training.measure_step"

    repeats: Positive = 30
    warmup: NotNegative = 5
    device: str | None = None
    peak: AboveZero | Literal["measured"] | None = None


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Output):
    """Measure greedy generation: the prompt, each token after it, and the time to read the weights.

    Attributes:
        run: a run's folder such as runs/tiny, or pretrained weights: a file, a folder or a name such as gpt2; null: a
            model with random weights.
        model: shape of a model with random weights; dtype is the dtype of its weights, too.
        batch_sizes: numbers of prompts at a time, measured one after the other, such as 1,8.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens that are added to each.
        repeats: generations that are timed.
        warmup: generations before them that are not timed, which compile.
        peak: FLOP/s of the device, such as 989e12, or measured; null: from its data sheet.
    """

    measures = "generation.measure_generation"

    run: str | None = None
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    batch_sizes: str = "1,8"
    prompt_tokens: Positive = 64
    new_tokens: Annotated[int, Ge(2)] = 64
    repeats: Positive = 5
    warmup: Positive = 1
    peak: AboveZero | Literal["measured"] | None = None

    def __post_init__(self) -> None:
        if not all(word.strip().isdecimal() and int(word) for word in self.batch_sizes.split(",")):
            raise InputError(f"batch_sizes is {self.batch_sizes!r}; expected whole numbers of at least 1, such as 1,8")
        if self.run is not None and self.model != ModelConfig():
            raise InputError("--run and --model.* are both given; expected one of them")


@dataclasses.dataclass(frozen=True)
class DataOptions(OfARecipe):
    """Measure the batches of a recipe (any keys of train) as train reads them, without training.

    Attributes:
        repeats: repeats of reading some batches.
        warmup: repeats before them that are not timed.
        batches: batches of a repeat.
        step_ms: milliseconds of a training step, from slm-jax bench train, to report the batches' share of it; null:
            no share.
    """

    measures = "training.measure_batches"

    repeats: Positive = 20
    warmup: NotNegative = 2
    batches: Positive = 10
    step_ms: AboveZero | None = None


@dataclasses.dataclass(frozen=True)
class StartupOptions(OfARecipe):
    """Measure, in fresh processes, imports, and train of a recipe to its first step, without and with a compile cache.

    Attributes:
        repeats: repeats of each.
    """

    measures = "training.measure_startup"

    repeats: Positive = 3


@dataclasses.dataclass(frozen=True)
class MemoryOptions(OfARecipe):
    """Compare the memory of a recipe's training step: planned, by XLA's analysis, and measured over three steps."""

    measures = "training.measure_memory"


KINDS: dict[str, type[Output]] = {
    "train": TrainOptions,
    "generate": GenerateOptions,
    "data": DataOptions,
    "startup": StartupOptions,
    "memory": MemoryOptions,
}


def main(args: Sequence[str]) -> int:
    if args and args[0] in ("-h", "--help"):
        print("usage: slm-jax bench KIND [OPTIONS]\n")
        for name, cls in KINDS.items():
            print(f"  {name:<10} {(cls.__doc__ or '').partition('.')[0]}")
        return 0
    if not args or args[0] not in KINDS:
        problem = f"unknown measurement {args[0]!r}" if args else "nothing to measure"
        raise InputError(f"{problem}; expected one of {', '.join(KINDS)}")
    return run(parse(KINDS[args[0]], args[1:], f"slm-jax bench {args[0]}"))


def run(options: Output) -> int:
    out = None if options.out is None else check_new_file(options.out, "out", "figures.json")
    plot = None if options.plot is None else check_new_file(options.plot, "plot", "figures.png")
    if plot is not None and plot.suffix != ".png":
        raise InputError(f"plot is {options.plot!r}; expected a file whose name ends in .png")
    set_up()
    import jax

    from slm_jax.tools.bench.result import draw_result, print_result
    from slm_jax.training import program

    module, _, function = options.measures.partition(".")
    measure = getattr(importlib.import_module(f"slm_jax.tools.bench.{module}"), function)
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for field in dataclasses.fields(Output):
        del values[field.name]
    remedy = SAVE_MEMORY
    if isinstance(options, RunConfig):
        values["config"] = RunConfig(**{field.name: values.pop(field.name) for field in dataclasses.fields(RunConfig)})
        remedy = program.SAVE_MEMORY
    if isinstance(options, TrainOptions):
        jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the figures
    with program.out_of_memory_as_input_error(remedy):
        result = measure(**values)
    if out is not None:
        write_file(out, result.to_json())
    if plot is not None:
        draw_result(result, plot)
    if options.format == "json":
        print(result.to_json(), end="")
    else:
        print_result(result, stdout_console())
    return 0
