"""What must hold of a command's options: what is read, how names and texts may be typed, what is refused and how."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_jax.config import check_at_least, check_seed, flatten, name_words, parse, recipe_files
from slm_jax.errors import InputError, MissingInputError


@dataclasses.dataclass(frozen=True)
class Options:
    """Do something.

    Attributes:
        run: a folder such as runs/tiny, or
            a file.
        note: anything; null: nothing.
        top_k: how many tokens; 0: all.
        share: from 0 to 1.
        past_context: what happens then.
        stop: a text that ends it.
        dry: only says what it would do.
        prompt: what comes first.
    """

    run: str
    note: str | None = None
    top_k: int | None = 50
    share: float = 0.5
    past_context: Literal["slide", "stop"] = "slide"
    stop: tuple[str, ...] = ()
    dry: bool = False
    prompt: str = ""

    def __post_init__(self) -> None:
        check_at_least(vars(self), {"top_k": 0, "share": 0})


def read(*args: str) -> Options:
    return parse(Options, ["--run", "x", *args], "slm-jax something")


def refused(*args: str) -> str:
    """The one line that these arguments are refused with."""
    with pytest.raises(InputError) as error:
        parse(Options, args, "slm-jax something")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path):
    def write(name: str = "recipe.yaml", **values: object) -> str:
        (tmp_path / name).write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(tmp_path / name)

    return write


# What is read


def test_defaults_are_the_dataclass_s():
    assert read() == Options(run="x")


@pytest.mark.parametrize(
    "args",
    [
        ["--top-k", "3"],
        ["--top_k", "3"],
        ["--top-k=3"],
        ["--top_k=3"],
        ["--top-k", "5", "--top_k", "3"],
    ],
)
def test_names_take_hyphens_or_underscores(args):
    assert read(*args) == Options(run="x", top_k=3)


def test_types():
    assert read("--past-context", "stop", "--dry", "true", "--share", "1e-3", "--top-k", "null") == Options(
        run="x", past_context="stop", dry=True, share=0.001, top_k=None
    )


TEXTS = [
    "3",
    "null",
    "~",
    "1e3",
    "true",
    "[a]",
    "{a: b}",
    "- a",
    "x: y",
    "# c",
    "&a",
    "*a",
    "'q'",
    '"',
    "a b",
    " ",
    "\\n",
]
TEXTS += [
    "a\nb",
    "\n\n",
    " \n x",
    "-x",
    "--- x",
    "--top-q",
    "-- she said",
    "a=b",
    "some-thing",
    "\t",
    "\x00",
    "\x85",
    "é🙂",
]
TEXTS += ["!!python/object:os.system {}", "2020-01-01", "x" * 300 + " \n " + "y " * 300]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("--top-k")
@example("--run=y")
def test_any_text_arrives_as_it_was_typed(text):
    if text != "--":  # argparse's own word
        assert read(f"--prompt={text}").prompt == text
        if text != "null":
            assert read(f"--note={text}").note == text
    assert read("--stop=a", f"--stop={text}", "--share=1", f"--stop={text}").stop == ("a", text, text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_needs_no_equals_sign(text):
    """Unless it is the name of an option."""
    assert read("--prompt", text, "--stop", text, "--stop", "b") == Options(run="x", prompt=text, stop=(text, "b"))


def test_texts_in_a_recipe(recipe):
    values = {"prompt": "# Title", "note": "# Title", "stop": ["3", "- a", "\n"]}
    assert read("--config", recipe(**values)) == Options(
        run="x", prompt="# Title", note="# Title", stop=("3", "- a", "\n")
    )
    assert read("--config", recipe(**values), "--stop", "end", "--note", "null") == Options(
        run="x", prompt="# Title", stop=("end",)
    )
    assert read("--note", "a", "--config", recipe(note=None)).note is None


def test_a_recipe_may_give_what_is_required_and_what_comes_later_wins(recipe):
    path = recipe(run="y", top_k=3)
    assert parse(Options, ["--config", path], "x") == Options(run="y", top_k=3)
    assert parse(Options, [f"--config={path}", "--run", "z"], "x") == Options(run="z", top_k=3)
    assert parse(Options, ["--run", "z", "--config", path], "x").run == "y"
    assert recipe_files(Options, ["--prompt=--config", "--config", path, f"--config={path}"]) == [Path(path)] * 2


def test_help_shows_every_option_as_it_is_typed(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Options, ["--help"], "slm-jax something")
    out = " ".join(capsys.readouterr().out.split())
    assert "usage: slm-jax something" in out
    for shown in (
        "--run RUN a folder such as runs/tiny, or a file. (required",
        "--top-k TOP_K how many tokens; 0: all.",
    ):
        assert shown in out
    for shown in ("default: 50", "--past-context {slide,stop}", "--stop TEXT a text that ends it.", "default: slide"):
        assert shown in out


# What is refused


def test_what_is_required_is_asked_for_with_its_help(recipe):
    said = "--run is missing; expected a folder such as runs/tiny, or a file"
    assert refused() == refused("--top-k", "3") == refused("--config", recipe(top_k=3)) == said
    path = recipe(run=None)
    assert refused("--config", path) == f"{path}: run is null; expected a folder such as runs/tiny, or a file"


def test_an_option_without_a_value():
    assert refused("--run") == refused("--run", "--top-k", "3") == "--run has no value; expected --run VALUE"
    assert refused("--run=x", "--top-k") == "--top-k has no value; expected --top-k VALUE"
    assert refused("--run=x", "--stop").startswith("--stop has no value")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("top_k", "1.5", "top_k is '1.5'; expected a whole number or null"),
        ("top_k", -1, "top_k is -1; expected at least 0"),
        ("share", ".nan", "share is nan; expected at least 0"),
        ("share", ".inf", "share is inf; expected at least 0 and finite"),
        ("share", "much", "share is 'much'; expected a number"),
        ("past_context", "go", "past_context is 'go'; expected one of slide, stop"),
        ("dry", "maybe", "dry is 'maybe'; expected true or false"),
    ],
)
def test_a_wrong_value_is_named_with_the_recipe_that_has_it(recipe, tmp_path, key, value, said):
    assert refused("--run=x", f"--{key.replace('_', '-')}={value}") == said
    path = tmp_path / "wrong.yaml"
    path.write_text(f"{key}: {value}\n")
    assert refused("--run=x", "--config", str(path), "--prompt", "x") == f"{path}: {said}"
    assert refused("--run=x", "--config", str(path), "--config", recipe(prompt="x")) == f"{path}: {said}"


def test_stop_in_a_recipe_is_a_list_of_texts(recipe):
    assert refused("--run=x", "--config", recipe(stop="end")).endswith("stop is 'end'; expected a list of texts")
    assert refused("--run=x", "--config", recipe(stop=[1])).endswith("stop is '1'; expected text")


def test_unknown_keys_and_words_are_answered_with_this_command_s():
    assert refused("--run=x", "--topk", "3") == "unknown key topk; did you mean top_k?"
    assert refused("--run=x", "--train.steps", "3") == "unknown key train.steps; see --help for all keys"
    assert refused("--run=x", "y") == "'y' is not an option; expected --KEY VALUE, such as --top-k 50"
    assert refused("--run=x", "-t", "y").startswith("'-t y' is not an option")
    assert refused("--run=x", "--", "y").startswith("'-- y' is not an option")


def test_files_that_are_no_recipes(tmp_path, recipe):
    with pytest.raises(MissingInputError) as error:
        read("--config", str(tmp_path / "none.yaml"))
    assert str(error.value).endswith(
        "none.yaml: No such file or directory; expected a recipe: a YAML file with keys such as top_k"
    )
    path = tmp_path / "list.yaml"
    path.write_text("- 1")
    assert (
        refused("--run=x", "--config", str(path)) == f"{path}: expected keys and values, such as top_k: 50, found [1]"
    )
    path = recipe(**{"top-k": 3})
    assert refused("--run=x", "--config", path) == f"{path}: unknown key top-k; did you mean top_k?"


# The rest


def test_words_are_told_from_options():
    words = ["a b", "--run", "x", "-1", "", "--format=json", "--", "--run", "--"]
    named = ["--text=a b", "--run", "x", "--text=-1", "--text=", "--format=json", "--text=--run", "--text=--"]
    assert name_words(words, "text") == named
    assert name_words(["--run"], "text") == ["--run"]
    assert name_words(["--help", "-h"], "text") == ["--help", "-h"]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1], "f": {}}) == {"a.b": 1, "a.c.d": None, "e": [1]}


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_have_32_bits(seed):
    check_seed(0)
    check_seed(2**32 - 1)
    with pytest.raises(InputError, match=f"seed is {seed}"):
        check_seed(seed)
