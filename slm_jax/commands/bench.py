"""``slm-jax bench``: measure speed and memory on this machine."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from slm_jax.commands import load, set_up
from slm_jax.config import AboveZero, NotNegative, Positive, parse
from slm_jax.errors import InputError
from slm_jax.files import check_new_file, write_file
from slm_jax.model import get_gpt_config
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.ceilings import named_device
from slm_jax.training.config import ModelConfig
from slm_jax.training.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from slm_jax.model import GPTConfig, Params
    from slm_jax.tools.bench.result import Result


@dataclasses.dataclass(frozen=True)
class Output:
    """Where figures go.

    Attributes:
        format: what is printed: a table, or json.
        out: a file for the JSON, too; null: none.
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
    """Options of what takes a recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Output.__post_init__(self)
        if self.task != "pretraining":
            raise InputError(f"task is {self.task}; expected pretraining: bench measures no other training")

    @property
    def recipe(self) -> RunConfig:
        """The run's configuration alone."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)})


@dataclasses.dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Measure the training step of a recipe (any keys of train) on random tokens: what they are makes no difference.

    Attributes:
        repeats: steps that are timed, in each of two ways: waited for one by one, and in a queue as train runs.
        warmup: steps before them that are not.
        device: whose peak and bandwidth to compare with, such as h200, as in slm-jax plan; null: the device's here.
        peak: FLOP/s of one device instead, such as 989e12; or measured: peak and bandwidth are measured here, at best.
    """

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
    """Measure greedy generation: the prompt, and each token after it, beside the reading of the weights.

    Attributes:
        run: a run's folder such as runs/tiny, or GPT-2 weights: a file, a folder or a name such as gpt2; null: a model
            with random weights.
        model: of random weights, its shape; dtype is of the weights, too.
        batch_sizes: how many prompts at a time, one after the other, such as 1,8.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens that are added to each.
        repeats: generations that are timed.
        warmup: generations before them that are not, which compile.
        peak: FLOP/s of the device, such as 989e12, or measured; null: as its data sheet says.
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
        _parse_sizes(self.batch_sizes)
        if self.run is not None and self.model != ModelConfig():
            raise InputError(f"run is {self.run} and there are keys of model, too; expected only one of them")


@dataclasses.dataclass(frozen=True)
class DataOptions(RunOptions):
    """Measure the batches of a recipe (any keys of train) as train takes them, without training.

    Attributes:
        repeats: how often the time of some batches is taken.
        warmup: such times before that do not count.
        batches: how many batches a time.
        step_ms: a training step's milliseconds, as slm-jax bench train tells them, to say what share of it batches
            take; null: not said.
    """

    repeats: Positive = 20
    warmup: NotNegative = 2
    batches: Positive = 10
    step_ms: AboveZero | None = None


@dataclasses.dataclass(frozen=True)
class StartupOptions(RunOptions):
    """Measure, in fresh processes, imports, and train of a recipe to its first step, without and with a compile cache.

    Attributes:
        repeats: how often each.
    """

    repeats: Positive = 3


@dataclasses.dataclass(frozen=True)
class MemoryOptions(RunOptions):
    """Compare the memory of a recipe's training step: as plan has it, as XLA says, and as measured over three steps."""


def main(args: Sequence[str]) -> int:
    """Read the kind and its options and run; see ``slm-jax bench KIND --help``."""
    if args and args[0] in ("-h", "--help"):
        print("usage: slm-jax bench KIND [OPTIONS]\n")
        for name, (cls, _) in KINDS.items():
            print(f"  {name:<10} {(cls.__doc__ or '').partition('.')[0]}")
        return 0
    if not args or args[0] not in KINDS:
        given = f"{args[0]!r} is nothing to measure" if args else "nothing to measure"
        raise InputError(f"{given}; expected one of {', '.join(KINDS)}")
    cls, measure = KINDS[args[0]]
    return run(parse(cls, args[1:], f"slm-jax bench {args[0]}"), measure)


def run(options: Any, measure: "Callable[[Any], Result]") -> int:
    """Measure; print, write and draw what is asked for; return 0."""
    out = None if options.out is None else check_new_file(options.out, "out", "figures.json")
    plot = None if options.plot is None else check_new_file(options.plot, "plot", "figures.png")
    result = measure(options)
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


def _train(options: TrainOptions) -> "Result":
    import jax

    from slm_jax.tools.bench.train import bench_train
    from slm_jax.training.program import out_of_memory_as_input_error

    keep_freed_memory()
    jax.config.update("jax_enable_compilation_cache", False)  # what compiling takes is one of the figures
    with out_of_memory_as_input_error():
        return bench_train(
            options.recipe, warmup=options.warmup, repeats=options.repeats, device=options.device, peak=options.peak
        )


def _generate(options: GenerateOptions) -> "Result":
    from slm_jax.tools.bench.ceilings import find_ceilings
    from slm_jax.tools.bench.generate import bench_generate

    set_up()
    with _generation_that_fits():
        cfg, params = _model(options)
        return bench_generate(
            cfg,
            params,
            find_ceilings(cfg.dtype, None, options.peak),
            batch_sizes=_parse_sizes(options.batch_sizes),
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            warmup=options.warmup,
            repeats=options.repeats,
        )


@contextlib.contextmanager
def _generation_that_fits() -> Iterator[None]:
    """Turn an error about memory, the device's or the machine's, into a line that says what to change."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "out of memory; lower --batch_sizes, --prompt_tokens or --new_tokens, or choose a smaller model"
        ) from None


def _model(options: GenerateOptions) -> "tuple[GPTConfig, Params]":
    """Load the model that is asked for, or make one."""
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


def _data(options: DataOptions) -> "Result":
    from slm_jax.tools.bench.data import bench_data

    return bench_data(
        options.recipe,
        warmup=options.warmup,
        repeats=options.repeats,
        batches=options.batches,
        step_ms=options.step_ms,
    )


def _startup(options: StartupOptions) -> "Result":
    from slm_jax.tools.bench.startup import bench_startup

    return bench_startup(options.recipe, options.repeats)


def _memory(options: MemoryOptions) -> "Result":
    from slm_jax.tools.bench.memory import bench_memory
    from slm_jax.training.program import out_of_memory_as_input_error

    set_up()  # the process that measures takes the step from there
    with out_of_memory_as_input_error():
        return bench_memory(options.recipe)


KINDS: dict[str, tuple[type, Any]] = {
    "train": (TrainOptions, _train),
    "generate": (GenerateOptions, _generate),
    "data": (DataOptions, _data),
    "startup": (StartupOptions, _startup),
    "memory": (MemoryOptions, _memory),
}


def _parse_sizes(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise InputError(f"batch_sizes is {text!r}; expected whole numbers of at least 1, such as 1,8")
    return tuple(map(int, words))
