"""``slm-jax bench``: measure speed and memory on this machine."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from slm_jax.commands import load, set_up
from slm_jax.config import AboveZero, NotNegative, Positive, parse
from slm_jax.errors import InputError
from slm_jax.files import check_new_file, write_file
from slm_jax.model import get_gpt_config
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.ceilings import named_device
from slm_jax.training.config import ModelConfig

if TYPE_CHECKING:
    from slm_jax.model import GPTConfig, Params
    from slm_jax.tools.bench.result import Result


@dataclasses.dataclass(frozen=True)
class Output:
    """Where figures are written.

    Attributes:
        format: what is printed: a table, or json.
        out: a file for the JSON as well; null: none.
        plot: a PNG file for a picture of the figures; null: none.
    """

    format: Literal["table", "json"] = "table"
    out: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        if self.plot is not None and not self.plot.endswith(".png"):
            raise InputError(f"plot is {self.plot!r}; expected a file whose name ends in .png")


@dataclasses.dataclass(frozen=True)
class RunOptions(RunConfig, Output):
    """Options of a measurement of a recipe, by ``measure`` of a module of :mod:`slm_jax.tools.bench`."""

    module: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        Output.__post_init__(self)
        if self.task != "pretraining":
            raise InputError(f"task is {self.task}; expected pretraining")

    @property
    def recipe(self) -> RunConfig:
        """The run's configuration alone."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)})


@dataclasses.dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Measure the training step of a recipe (any keys of train) on random tokens, which make no difference.

    Attributes:
        repeats: steps that are timed, in each of two ways: waited for one by one, and in a queue as train runs them.
        warmup: steps before them that are not timed.
        device: a device to compare with, such as h200, as in slm-jax plan; null: the one here.
        peak: FLOP/s of one device, such as 989e12, instead of the data sheet's; or measured: peak and bandwidth are
            measured here.
    """

    module = "step_speed"

    repeats: Positive = 30
    warmup: NotNegative = 5
    device: str | None = None
    peak: AboveZero | Literal["measured"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device is not None:
            named_device(self.device)


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Output):
    """Measure greedy generation: the prompt, each token after it, and the time to read the weights.

    Attributes:
        run: a run's folder such as runs/tiny, or GPT-2 weights: a file, a folder or a name such as gpt2; null: a model
            with random weights.
        model: shape of a model with random weights; dtype is the dtype of its weights, too.
        batch_sizes: numbers of prompts at a time, measured one after the other, such as 1,8.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens that are added to each.
        repeats: generations that are timed.
        warmup: generations before them that are not timed, which compile.
        peak: FLOP/s of the device, such as 989e12, or measured; null: from its data sheet.
    """

    run: str | None = None
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    batch_sizes: str = "1,8"
    prompt_tokens: Positive = 64
    new_tokens: Annotated[int, Ge(2)] = 64
    repeats: Positive = 5
    warmup: Positive = 1
    peak: AboveZero | Literal["measured"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(word.strip().isdecimal() and int(word) for word in self.batch_sizes.split(",")):
            raise InputError(f"batch_sizes is {self.batch_sizes!r}; expected whole numbers of at least 1, such as 1,8")
        if self.run is not None and self.model != ModelConfig():
            raise InputError(f"run is {self.run} and there are keys of model; expected only one of them")


@dataclasses.dataclass(frozen=True)
class DataOptions(RunOptions):
    """Measure the batches of a recipe (any keys of train) as train reads them, without training.

    Attributes:
        repeats: repeats of reading some batches.
        warmup: repeats before them that are not timed.
        batches: batches of a repeat.
        step_ms: milliseconds of a training step, from slm-jax bench train, to report the batches' share of it; null:
            no share.
    """

    module = "batch_speed"

    repeats: Positive = 20
    warmup: NotNegative = 2
    batches: Positive = 10
    step_ms: AboveZero | None = None


@dataclasses.dataclass(frozen=True)
class StartupOptions(RunOptions):
    """Measure, in fresh processes, imports, and train of a recipe to its first step, without and with a compile cache.

    Attributes:
        repeats: repeats of each.
    """

    module = "startup_time"

    repeats: Positive = 3


@dataclasses.dataclass(frozen=True)
class MemoryOptions(RunOptions):
    """Compare the memory of a recipe's training step: planned, by XLA's analysis, and measured over three steps."""

    module = "step_memory"


def main(args: Sequence[str]) -> int:
    """Read the kind and its options and run; see ``slm-jax bench KIND --help``."""
    if args and args[0] in ("-h", "--help"):
        print("usage: slm-jax bench KIND [OPTIONS]\n")
        for name, cls in KINDS.items():
            print(f"  {name:<10} {(cls.__doc__ or '').partition('.')[0]}")
        return 0
    if not args or args[0] not in KINDS:
        given = f"{args[0]!r} is nothing to measure" if args else "nothing to measure"
        raise InputError(f"{given}; expected one of {', '.join(KINDS)}")
    return run(parse(KINDS[args[0]], args[1:], f"slm-jax bench {args[0]}"))


def run(options: Any) -> int:
    """Measure; print, write and draw the result; return 0."""
    out = None if options.out is None else check_new_file(options.out, "out", "figures.json")
    plot = None if options.plot is None else check_new_file(options.plot, "plot", "figures.png")
    set_up()
    result = _generate(options) if isinstance(options, GenerateOptions) else _measure_recipe(options)
    from rich.console import Console

    from slm_jax.tools.bench.result import draw_result, print_result

    if options.format == "json":
        print(result.to_json(), end="")
    else:
        print_result(result, Console())
    if out is not None:
        write_file(out, result.to_json())
    if plot is not None:
        draw_result(result, plot)
    return 0


def _measure_recipe(options: RunOptions) -> "Result":
    """Call the function of a kind with the recipe and with the options that no other kind has."""
    import jax

    from slm_jax.training.program import out_of_memory_as_input_error

    if isinstance(options, TrainOptions):
        jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the figures
    module = importlib.import_module(f"slm_jax.tools.bench.{options.module}")
    own = {field.name for field in dataclasses.fields(options)} - {f.name for f in dataclasses.fields(RunOptions)}
    with out_of_memory_as_input_error():
        return module.measure(options.recipe, **{name: getattr(options, name) for name in own})


def _generate(options: GenerateOptions) -> "Result":
    from slm_jax.tools.bench.ceilings import find_ceilings
    from slm_jax.tools.bench.decode_speed import bench_generate
    from slm_jax.training.program import out_of_memory_as_input_error

    remedy = "lower --batch_sizes, --prompt_tokens or --new_tokens, or choose a smaller model"
    with out_of_memory_as_input_error(remedy):
        cfg, params = _model(options)
        return bench_generate(
            cfg,
            params,
            find_ceilings(cfg.dtype, None, options.peak),
            batch_sizes=tuple(map(int, options.batch_sizes.split(","))),
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            warmup=options.warmup,
            repeats=options.repeats,
        )


def _model(options: GenerateOptions) -> "tuple[GPTConfig, Params]":
    """Load the model, or make one."""
    import functools

    import jax

    from slm_jax.model import init_params
    from slm_jax.training.hardware import best_dtype

    if options.run is not None:
        loaded = load(options.run, None, None)
        return loaded.model_config, loaded.params
    section = options.model
    dtype = best_dtype() if section.dtype == "auto" else section.dtype
    cfg = RunConfig(model=section).gpt_config(section.vocab_size or get_gpt_config(section.preset).vocab_size, dtype)
    cfg = dataclasses.replace(cfg, param_dtype=section.param_dtype or dtype)
    return cfg, jax.jit(functools.partial(init_params, cfg))(jax.random.key(0))


KINDS = {
    "train": TrainOptions,
    "generate": GenerateOptions,
    "data": DataOptions,
    "startup": StartupOptions,
    "memory": MemoryOptions,
}
