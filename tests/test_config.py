"""What must hold of options and recipes: what is read, how names and texts may be typed, what is refused and how."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from annotated_types import Ge, Le
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_jax import config
from slm_jax.config import Execution, Positive, Seed, Words, dump_config, find_recipe, flatten, parse
from slm_jax.errors import InputError, MissingInputError


@dataclasses.dataclass(frozen=True)
class Section:
    """Some keys.

    Attributes:
        size: how large.
        rate: how fast.
    """

    size: Positive = 8
    rate: Annotated[float, Ge(0), Le(1)] | None = None


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
        dry: 100% dry.
        prompt: what comes first.
        peak: a number or a word.
        seed: the seed.
    """

    run: str
    note: str | None = None
    top_k: Execution[Annotated[int, Ge(0)] | None] = 50
    share: Annotated[float, Ge(0)] = 0.5
    past_context: Literal["slide", "stop"] = "slide"
    stop: tuple[str, ...] = ()
    dry: bool = False
    prompt: str = ""
    peak: float | Literal["measured"] | None = None
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        name: its name.
        small: a section.
        fast: another.
    """

    name: str = "x"
    small: Section = dataclasses.field(default_factory=lambda: Section(size=2))
    fast: Execution[Section] = dataclasses.field(default_factory=Section)


def read(*args: object, cls: type = Options) -> Options:
    return parse(cls, [*(["--run", "x"] if cls is Options else []), *map(str, args)], "slm-jax something")


def refused(cls: type, *args: object) -> str:
    """The one line that these arguments are refused with."""
    with pytest.raises(InputError) as error:
        parse(cls, [str(arg) for arg in args], "slm-jax something")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe; return its path."""

    def write(content: object, name: str = "recipe.yaml") -> Path:
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else yaml.safe_dump(content)).encode()
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


# What is read


def test_names_take_hyphens_or_underscores_and_later_ones_win():
    for args in (["--top-k", "3"], ["--top_k", "3"], ["--top-k=3"], ["--top_k=3"], ["--top-k", "5", "--top_k", "3"]):
        assert read(*args) == Options(run="x", top_k=3)


def test_types(recipe):
    words = ["--past-context", "stop", "--dry", "true", "--share", "1e-3", "--top-k", "null", "--peak", "measured"]
    assert read(*words) == Options("x", past_context="stop", dry=True, share=0.001, top_k=None, peak="measured")
    assert read("--peak", "989e12").peak == 989e12
    assert read() == Options("x")
    for text in ("1e-3", "1.0e-3", "0.001", ".001", "1E-3", "1.e-3"):  # YAML 1.1 itself would read 1e-3 as text
        assert read("--share", text).share == read("--config", recipe(f"share: {text}")).share == 0.001
    assert type(read("--config", recipe("share: 1")).share) is float


TEXTS = ["3", "null", "~", "1e3", "true", "[a]", "{a: b}", "- a", "x: y", "# c", "&a", "'q'", '"', " ", "\\n", "a\nb"]
TEXTS += ["\n\n", "-x", "--- x", "--top-q", "-- she", "a=b", "\x00", "\x85", "é🙂", "!!python/object:os.system {}"]


@settings(max_examples=40, deadline=None)
@given(st.text())
@example("--top-k")
@example("--run=y")
def test_any_text_arrives_as_typed(text):
    assert read(f"--prompt={text}").prompt == text
    assert read(f"--note={text}").note == (None if text == "null" else text)
    assert read("--stop=a", f"--stop={text}", "--share=1", f"--stop={text}").stop == ("a", text, text)


def test_a_text_that_is_no_name_of_an_option_needs_no_equals_sign():
    for text in TEXTS:
        assert read("--prompt", text, "--stop", text, "--stop", "b") == Options(run="x", prompt=text, stop=(text, "b"))


def test_texts_in_a_recipe(recipe):
    path = recipe({"prompt": "# Title", "note": "# Title", "stop": ["3", "- a", "\n"]})
    assert read("--config", path) == Options("x", prompt="# Title", note="# Title", stop=("3", "- a", "\n"))
    assert read("--config", path, "--stop", "end", "--note", "null") == Options("x", prompt="# Title", stop=("end",))
    assert read("--note", "a", "--config", recipe({"note": None})).note is None


def test_a_recipe_may_give_what_is_required_and_recipes_are_merged(recipe):
    path = str(recipe({"run": "y", "top_k": 3}))
    assert parse(Options, ["--config", path], "x") == Options(run="y", top_k=3)
    assert parse(Options, [f"--config={path}", "--run", "z"], "x") == Options(run="z", top_k=3)
    assert read("--config", path).run == "y"
    first = recipe("small: {size: 5, rate: 0.5}\nname: a", "first.yaml")
    second = recipe("small: {size: 6}\nfast: {}", "second.yaml")
    merged = read("--config", first, "--config", second, "--fast.rate", "1", cls=Recipe)
    assert merged == Recipe("a", Section(6, 0.5), Section(8, 1.0))
    assert read("--small.rate", "0", cls=Recipe).small == Section(size=2, rate=0.0)


def test_words_without_an_option():
    @dataclasses.dataclass(frozen=True)
    class Texts:
        text: Words = ()
        dry: bool = False

    words = ["a b", "--text", "x", "-1", "", "--dry=true", "--", "--text", "--"]
    assert parse(Texts, words, "x") == Texts(("a b", "x", "-1", "", "--text", "--"), dry=True)


def test_help_shows_every_option_with_its_default(capsys):
    for cls, words in ((Options, ["--help"]), (Options, ["--top-k", "3", "-h"]), (Recipe, ["--help"])):
        with pytest.raises(SystemExit, match="0"):
            parse(cls, words, "slm-jax something")
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "usage: slm-jax something",
        "--run TEXT a folder such as runs/tiny, or a file (required)",
        "--top-k INT|null how many tokens; 0: all (default: 50)",
        "100% dry",
        "slide|stop",
        "measured|FLOAT|null",
        "--small.size INT",
    ):
        assert part in out


def test_a_configuration_survives_yaml(recipe):
    changed = Recipe("a: 'b'\n#c", Section(3, 1e-12), Section(4))
    assert read("--config", recipe(dump_config(changed)), cls=Recipe) == changed
    assert flatten(yaml.safe_load(dump_config(Recipe()))).keys() == config.keys(Recipe).keys()


def test_execution_keys_are_marked_beside_fields_and_sections():
    assert config.execution_keys(Options("x")) == {"top_k"}
    assert config.execution_keys(Recipe()) == {"fast.size", "fast.rate"}


# What is refused


def test_a_missing_option_or_value_is_asked_for(recipe):
    expected = "--run is missing; expected a folder such as runs/tiny, or a file"
    assert refused(Options) == refused(Options, "--config", recipe({"top_k": 3})) == expected
    for words in (["--run"], ["--run", "--top-k", "3"], ["--top-k=1", "--run"]):
        assert refused(Options, *words).startswith("--run has no value")


WRONG = [
    (Options, "top_k", "1.5", "a whole number or null"),
    (Options, "top_k", "true", "a whole number"),
    (Options, "top_k", "[1, 2]", "a whole number"),
    (Options, "top_k", "-1", "at least 0"),
    (Options, "share", ".nan", "at least 0"),
    (Options, "share", ".inf", "at least 0"),
    (Options, "share", "much", "a number"),
    (Options, "past_context", "go", "one of slide, stop"),
    (Options, "dry", "2", "true or false"),
    (Options, "peak", ".inf", "finite"),
    (Options, "peak", "high", "a number or one of measured or null"),
    (Options, "seed", "4294967296", "below 4294967296"),
    (Options, "seed", "null", "a whole number"),
    (Recipe, "small.size", "0", "at least 1"),
    (Recipe, "small.rate", "1.5", "at least 0 and at most 1"),
    (Recipe, "fast.rate", "fast", "a number or null"),
]


@pytest.mark.parametrize(("cls", "key", "value", "expected"), WRONG)
def test_a_wrong_value_is_named_with_what_was_expected_and_the_file(recipe, cls, key, value, expected):
    line = refused(cls, *["--run=x"] * (cls is Options), f"--{key.replace('_', '-')}={value}")
    assert line.startswith(f"{key} is ")
    assert expected in line.partition("; expected ")[2]
    path = recipe(f"{key}: {value}\n")
    assert refused(cls, "--config", path, "--config", recipe({}, "good.yaml")) == f"{path}: {line}"


def test_values_given_in_python_are_checked_too():
    config.check(Recipe())
    for wrong, line in ((Recipe(small=Section(size=0)), "small.size is 0"), (Recipe(name=3), "name is 3")):
        with pytest.raises(InputError, match=line):
            config.check(wrong)


@pytest.mark.parametrize(
    ("cls", "key", "nearest"),
    [(Options, "topk", "top_k"), (Options, "xyzzy", None), (Recipe, "small.rat", "small.rate"), (Recipe, "1", None)],
)
def test_an_unknown_key_is_refused_with_the_nearest(recipe, cls, key, nearest):
    line = refused(cls, f"--{key}", "5")
    assert line == refused(cls, f"--{key}=5") == refused(cls, f"--{key}")
    assert line.startswith(f"unknown key {key}; ")
    assert (f"did you mean {nearest}?" if nearest else "--help") in line
    path = recipe(f"{key}: 5\n")
    assert refused(cls, "--config", path) == f"{path}: {line}"


def test_words_that_are_no_options_are_refused():
    for words, word in ((["y"], "'y'"), (["-t", "y"], "'-t'"), (["--", "y"], "'--'")):
        assert refused(Options, "--run=x", *words).startswith(f"{word} is not an option")
    assert refused(Recipe, "--small", "5") == "small is '5'; expected keys such as small.size"


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n- b\n", "expected keys and values"),
        ("# nothing but a comment\n", "expected keys and values"),
        ("small: 5", "small is 5; expected keys such as small.size"),
        ("small:\n  - size: 5", "expected keys such as small.size"),
        ("name: {a: 1}", "unknown key name.a"),
        ("name: 3", "name is 3; expected text"),
        ("name:", "name is null"),
        ("xyzzy: {}", "unknown key xyzzy"),
        ("small: {size: 5, size: 6}", "size occurs twice"),
        ("small: {size: 5}\nsmall: {rate: 1}", "small occurs twice"),
        (
            "".join(f"a{i}: &a{i} [x, {', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)).replace("*a0", "x"),
            "aliases",
        ),
        ("a: &a {b: *a}", "contains itself"),
        ("[" * 5_000, "nested too deep"),
        ("- " * 5_000, "nested too deep"),
        (f"a: {'9' * 5_000}", "digits"),
        (f"a: {'9' * 60_000}e", "unknown key a"),
        (f"small: {{rate: 1{'0' * 400}}}", "small.rate is inf; expected"),
        ("name: x" * 10_000, "70,000 characters; expected at most 65,536"),
        ("!!map [1]", "expected a mapping"),
        ("small:\n  size: 5\n rate: 3", "line 3"),
        ("!!python/object:os.system {}", "YAML"),
        (b"name: caf\xe9\n", "0xe9"),
        (b"\x00\x01\x02", "YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line_that_names_it(recipe, content, expected):
    path = recipe(content)
    line = refused(Recipe, "--config", path)
    assert line.startswith(f"{path}: ")
    assert expected in line


def test_a_recipe_of_the_package_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("shakespeare_char").name == "shakespeare_char.yaml"
    for name in ("shakespeare", str(tmp_path), "configs/none.yaml"):
        with pytest.raises(MissingInputError, match=r"one of .*shakespeare_char, .*tiny"):
            find_recipe(name)
    (tmp_path / "tiny").write_text("seed: 1")
    assert find_recipe("tiny") == Path("tiny")  # a file comes first


def test_an_installed_package_has_recipes_of_its_own(tmp_path):
    """The wheel has them in slm_jax/configs."""
    package = tmp_path / "slm_jax"
    package.mkdir()
    for module in ("__init__", "config", "errors", "files"):
        (package / f"{module}.py").write_bytes((Path(config.__file__).parent / f"{module}.py").read_bytes())
    (package / "configs").mkdir()
    (package / "configs" / "mine.yaml").write_text("seed: 1")
    script = "from slm_jax.config import find_recipe; print(find_recipe('mine'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, env=environment, text=True)
    assert Path(found.strip()) == package / "configs" / "mine.yaml"
