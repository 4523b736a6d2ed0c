"""Configuration: frozen dataclasses, read strictly from YAML recipes and the command line.

Each field is a key of a recipe and a command-line option. A field that is itself a dataclass is a section, whose keys
are dotted (``--train.steps 500``). Ranges are part of the field's type (``Annotated[int, Ge(1)]``), its help is in the
docstring's ``Attributes``. Keys marked :data:`Execution` may change when a run resumes; the others are its identity.
"""

import collections
import dataclasses
import difflib
import functools
import importlib.resources
import math
import operator
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt

from slm_jax.errors import InputError, MissingInputError, located
from slm_jax.files import user_path

Options = TypeVar("Options")
T = TypeVar("T")

EXECUTION, POSITIONAL = "execution", "positional"
Execution = Annotated[T, EXECUTION]  # a field or section: how, where or for how long a run is computed
Words = Annotated[tuple[str, ...], POSITIONAL]  # receives the words that belong to no option
Positive = Annotated[int, Ge(1)]
NotNegative = Annotated[int, Ge(0)]
AboveZero = Annotated[float, Gt(0)]
Rate = Annotated[float, Ge(0), Lt(1)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # larger seeds repeat

# Limits for YAML: characters, values after expanding aliases, nested brackets. Recipes need less than a tenth.
_MOST_YAML, _MOST_VALUES, _DEEPEST = 1 << 16, 10_000, 50
_LARGEST = 1e308  # whole numbers above may not fit a float
_BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
_METAVARS = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", tuple: "TEXT", types.NoneType: "null"}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A field of a configuration."""

    name: str  # dotted, such as train.steps
    kinds: tuple[type, ...]
    choices: tuple[str, ...]
    markers: tuple[Any, ...]  # its annotations: ranges, EXECUTION, POSITIONAL
    default: Any  # dataclasses.MISSING for a required key
    owner: type

    @property
    def help(self) -> str:
        """Description of the field in its dataclass's docstring."""
        return describe(self.owner)[self.name.rpartition(".")[2]]

    def read(self, word: str) -> Any:
        """Return the value of a command-line word: text as it is, anything else parsed as YAML."""
        if word == "null" and (types.NoneType in self.kinds or str not in self.kinds):
            return None
        if str in self.kinds or word in self.choices:
            return word
        try:
            value = parse_yaml(word)
        except ValueError:
            return word
        return word if value is None else value

    def check(self, value: Any) -> Any:
        """Return the value, a list as a tuple, a whole number as a float if the field is one; refuse invalid values."""
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            value = tuple(value)
        elif type(value) is int and int not in self.kinds and float in self.kinds:
            value = float(value) if abs(value) < _LARGEST else math.inf
        if type(value) not in self.kinds and not (isinstance(value, str) and value in self.choices):
            words = [word for kind, word in _KINDS.items() if kind in self.kinds]
            words += [f"one of {', '.join(self.choices)}"] if self.choices else []
            words += ["null"] if types.NoneType in self.kinds else []
            raise InputError(f"{self.name} is {shown(value)}; expected {' or '.join(words)}")
        if type(value) in (int, float):
            bounds = [(*_BOUNDS[type(mark)], mark) for mark in self.markers if type(mark) in _BOUNDS]
            limits = [(getattr(operator, name), word, getattr(mark, name)) for name, word, mark in bounds]
            if not (abs(value) < float("inf") and all(holds(value, limit) for holds, _, limit in limits)):
                finite = [] if limits and abs(value) < float("inf") else ["finite"]
                expected = " and ".join([*finite, *(f"{word} {limit}" for _, word, limit in limits)])
                raise InputError(f"{self.name} is {value}; expected {expected}")
        return value


@functools.cache
def keys(cls: Any) -> dict[str, Key]:
    """Return the keys of a configuration by their dotted names, in the order of the fields."""
    found: dict[str, Key] = {}
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kinds, markers = _unwrap(hints[field.name])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if hasattr(kinds[0], "__dataclass_fields__"):
            for leaf, key in keys(kinds[0]).items():
                found[f"{field.name}.{leaf}"] = dataclasses.replace(
                    key, name=f"{field.name}.{leaf}", markers=markers + key.markers, default=getattr(default, leaf)
                )
        else:
            choices = tuple(choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind))
            plain = tuple(get_origin(kind) or kind for kind in kinds if get_origin(kind) is not Literal)
            found[field.name] = Key(field.name, plain, choices, markers, default, cls)
    return found


def _unwrap(hint: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the alternatives of a type, and its annotations."""
    if get_origin(hint) is Annotated:
        kinds, markers = _unwrap(get_args(hint)[0])
        return kinds, (*markers, *hint.__metadata__)
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_unwrap(part) for part in get_args(hint)]
        return tuple(kind for kinds, _ in parts for kind in kinds), tuple(mark for _, marks in parts for mark in marks)
    return (hint,), ()


def execution_keys(config: Any) -> set[str]:
    """Return the dotted keys of a configuration that may change when a run is resumed."""
    return {name for name, key in keys(config.__class__).items() if EXECUTION in key.markers}


@functools.cache
def describe(cls: type) -> dict[str, str]:
    """Return the description of each field, from the docstrings of a dataclass and its base classes."""
    return {
        param.arg_name: " ".join((param.description or "").split())
        for owner in reversed(cls.__mro__)
        for param in _parse_docstring(owner).params
    }


def _parse_docstring(cls: type) -> Any:
    import docstring_parser

    return docstring_parser.parse(cls.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)


def check(config: Any) -> None:
    """Raise an InputError if a value of a configuration made in Python has a wrong type or is out of range."""
    for name, key in keys(config.__class__).items():
        key.check(operator.attrgetter(name)(config))


def parse(cls: Callable[..., Options], args: Sequence[str], prog: str) -> Options:
    """Parse ``--config RECIPE`` and options, the words after the command ``prog``, into the dataclass ``cls``.

    Later ones win. Names may have hyphens or underscores. Text is not parsed; a field ``tuple[str, ...]`` collects the
    texts of an option that is given several times. ``--help`` prints every option and exits.

    Raises:
        InputError: an unknown key, a value that has a wrong type or is out of range, a missing required key, a recipe
            that does not exist or is not YAML.
    """
    if any(name == "help" for name, _ in _split(cls, args)):
        print(_help(cls, prog))
        raise SystemExit(0)
    values = given(cls, args)
    for name, key in keys(cls).items():
        if key.default is dataclasses.MISSING and name not in values:
            raise InputError(f"{_option(cls, name)} is missing; expected {key.help.rstrip('.')}")
    options = {name: value for name, value in values.items() if "." not in name}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        prefix = f"{field.name}."
        section = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        if section and field.default_factory is not dataclasses.MISSING:
            options[field.name] = dataclasses.replace(field.default_factory(), **section)
    return cls(**options)


def given(cls: Any, args: Sequence[str]) -> dict[str, Any]:
    """Return the values that recipes and options set, by dotted key; raises as :func:`parse` does."""
    values: dict[str, Any] = {}
    texts: dict[str, list[str]] = collections.defaultdict(list)
    for name, word in _split(cls, args):
        if name == "config":
            values |= _read_recipe(cls, find_recipe(word))
        elif name != "help":
            key = _find(cls, name, word)
            texts[name].append(word)
            values[name] = key.check(texts[name] if tuple in key.kinds else key.read(word))
    return values


def recipe_files(cls: type, args: Sequence[str]) -> list[Path]:
    """Return the recipes given by ``--config``, in order."""
    return [find_recipe(word) for name, word in _split(cls, args) if name == "config"]


def find_recipe(name: str) -> Path:
    """Return the file that ``--config`` names: a path, or the name of a recipe of slm_jax."""
    path = user_path(name)
    if path.is_file():
        return path
    packaged = Path(str(importlib.resources.files("slm_jax"))) / "configs"
    folder = packaged if packaged.is_dir() else packaged.parents[1] / "configs"  # the latter in a checkout
    recipes = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name not in recipes:
        raise MissingInputError(f"{name}: no such file; expected a YAML file or one of {', '.join(recipes)}")
    return recipes[name]


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into one with dotted keys; an empty dict stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


to_dict = dataclasses.asdict


def dump_config(config: Any) -> str:
    """Return a configuration as YAML, every key written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def shown(value: Any) -> str:
    """Return a value as YAML writes it, for messages."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else f"{value!r:.60}"


def parse_yaml(text: str) -> Any:
    """Parse YAML; ValueError: invalid, too long, nested too deep, or too many values after expanding aliases."""
    try:
        if len(text) > _MOST_YAML:
            raise ValueError(f"{len(text):,} characters; expected at most {_MOST_YAML:,}")
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but ``1e-3`` is a number, as in YAML 1.2, and a key that occurs twice is an error."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level == _DEEPEST:  # PyYAML's time is quadratic in the depth
            raise yaml.scanner.ScannerError(None, None, "nested too deep", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)  # an alias gives the node that it refers to
        if not isinstance(node, yaml.ScalarNode) and not hasattr(node, "size"):
            if is_alias:
                raise yaml.composer.ComposerError(None, None, "contains itself", node.start_mark)
            items = (
                node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            )
            node.size = 1 + sum(getattr(item, "size", 1) for item in items)
            if node.size > _MOST_VALUES:
                problem = f"more than {_MOST_VALUES:,} values, aliases written out"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        names = collections.Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
        if names and max(names.values()) > 1:
            problem = f"{names.most_common(1)[0][0]} occurs twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _sections(cls: Any) -> dict[str, str]:
    """Return the sections, each with its first key."""
    names = [name.partition(".") for name in keys(cls)]
    return {section: key for section, dot, key in reversed(names) if dot}


def _option(cls: Any, name: str) -> str:
    """Return a key as ``--help`` shows it: with hyphens, except for keys of recipes."""
    return f"--{name if _sections(cls) else name.replace('_', '-')}"


def _split(cls: Any, args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Split words into pairs of a key (with underscores) and its text."""
    names = {*keys(cls), *_sections(cls), "config", "help"}
    positional = next((name for name, key in keys(cls).items() if POSITIONAL in key.markers), None)
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.removeprefix("--").replace("-", "_").partition("=")
        if word in ("-h", "--help"):
            yield "help", ""
        elif word == "--" and positional:
            yield from ((positional, text) for text in rest)
            return
        elif not word.startswith("--") or word == "--":
            if positional is None:
                raise InputError(f"{word!r:.60} is not an option; expected --KEY VALUE")
            yield positional, word
        elif equals:
            yield name, word.partition("=")[2]
        elif rest and not (rest[0].startswith("--") and rest[0][2:].partition("=")[0].replace("-", "_") in names):
            yield name, rest.pop(0)
        elif name in keys(cls) and bool in keys(cls)[name].kinds:
            yield name, "true"
        elif name in names:
            raise InputError(f"{_option(cls, name)} has no value; expected {_option(cls, name)} VALUE")
        else:
            _find(cls, name, "")


def _find(cls: Any, name: str, value: Any) -> Key:
    """Return the key of a name; refuse an unknown one."""
    known, sections = keys(cls), _sections(cls)
    if name in known:
        return known[name]
    if name in sections:
        raise InputError(f"{name} is {shown(value)}; expected keys such as {name}.{sections[name]}")
    near = difflib.get_close_matches(name, known, n=1)
    raise InputError(f"unknown key {name}; " + (f"did you mean {near[0]}?" if near else "see --help for all keys"))


def _read_recipe(cls: Any, path: Path) -> dict[str, Any]:
    """Return the checked values of a recipe by dotted key."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {shown(content)}")
    sections = _sections(cls)
    values = {name: value for name, value in flatten(content).items() if value != {} or name not in sections}
    with located(path):
        return {name: _find(cls, name, value).check(value) for name, value in values.items()}


def _help(cls: Any, prog: str) -> str:
    """Return the text of ``--help``."""
    import argparse

    about = _parse_docstring(cls).description or ""
    parser = argparse.ArgumentParser(prog, "%(prog)s [OPTIONS]", " ".join(about.split()), add_help=False)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file, or a recipe of slm_jax by name, with these keys")
    groups: dict[str, Any] = {"": parser}
    for name, key in keys(cls).items():
        section = name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section, describe(cls)[section])
        default = "required" if key.default is dataclasses.MISSING else f"default: {shown(key.default)}"
        values = "|".join([*key.choices, *(_METAVARS[kind] for kind in key.kinds)])
        text = f"{key.help.rstrip('.')} ({default})".replace("%", "%%")
        groups[section].add_argument(_option(cls, name), metavar=values, help=text)
    return parser.format_help()
