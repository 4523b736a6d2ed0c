"""A command's options: a frozen dataclass, read from YAML recipes and the command line, strictly.

Each field is a key of a recipe and an option; a field that is itself a dataclass is a section, whose keys are dotted
(``--train.steps 500``). Types come from the annotations, help from the docstring's ``Attributes``, the checks of
ranges from ``__post_init__``.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from slm_jax.errors import InputError, MissingInputError

Options = TypeVar("Options")

# Marks a field, or a section of a field, that may change between two starts of a run: field(metadata=EXECUTION).
EXECUTION: Mapping[str, bool] = {"execution": True}


def execution_keys(config: Any, prefix: str = "") -> set[str]:
    """Return the dotted keys of a configuration that are marked with :data:`EXECUTION`."""
    keys: set[str] = set()
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = flatten(dataclasses.asdict(value), f"{name}.")  # type: ignore[arg-type]
            keys |= set(inner) if field.metadata.get("execution") else execution_keys(value, f"{name}.")
        elif field.metadata.get("execution"):
            keys.add(name)
    return keys


def parse(cls: type[Options], args: Sequence[str], prog: str) -> Options:
    """Read ``--config FILE.yaml`` recipes and options in the order they are given; what comes later wins.

    Names may be typed with hyphens or underscores. Text arrives as it was typed; a field ``tuple[str, ...]`` collects
    the texts of an option that is given several times. ``--help`` prints every option and exits.

    Args:
        cls: the frozen dataclass of the command's options.
        args: the words after the command.
        prog: the command as it is typed, for ``--help``.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, a required one that is missing;
            a file that is missing or not YAML.
    """
    words = _canonical(cls, args)
    parser = _make_parser(cls, prog)
    for recipe in recipe_files(cls, args):
        _check_keys(cls, _read_yaml(cls, recipe), str(recipe))
    try:
        return _instantiate(cls, parser, words)
    except (ArgumentError, InputError) as error:
        raise InputError(_locate(cls, parser, words, _explain(cls, error))) from None


def name_words(args: Sequence[str], option: str) -> list[str]:
    """Write words that belong to no option as ``--option=WORD``; all words after ``--`` are such."""
    named: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--":
            named += [f"--{option}={rest}" for rest in words]
        elif word in ("-h", "--help") or (word.startswith("--") and "=" in word):
            named.append(word)
        elif word.startswith("--"):
            named += [word, *(value for value in [next(words, None)] if value is not None)]
        else:
            named.append(f"--{option}={word}")
    return named


def recipe_files(cls: type, args: Sequence[str]) -> list[Path]:
    """Return the files named by ``--config``, in their order."""
    return [Path(word.partition("=")[2]) for word in _canonical(cls, args) if word.startswith("--config=")]


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def meaning(cls: Any, name: str) -> str:
    """Return what the docstring of a dataclass, or of one that it is made of, says of a field.

    Raises:
        KeyError: none of them says anything.
    """
    for owner in cls.__mro__:
        described = re.search(rf"^( +){name}: (.*?)(?=^\1\S|^\s*$|\Z)", owner.__doc__ or "", re.MULTILINE | re.DOTALL)
        if described:
            return " ".join(described[2].split())
    raise KeyError(f"{cls.__name__} does not say what {name} is")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain data."""
    return dataclasses.asdict(config)


def dump_config(config: Any) -> str:
    """Return a configuration as YAML, every key written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def check_at_least(values: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """Let None through; raise InputError for the first of ``values`` that is below its limit, infinite or NaN."""
    for key, least in limits.items():
        if values[key] is not None and not least <= values[key] < float("inf"):
            finite = " and finite" if values[key] == float("inf") else ""
            raise InputError(f"{key} is {values[key]}; expected at least {least:g}{finite}")


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that does not fit 32 bits."""
    check_at_least({"seed": seed}, {"seed": 0})
    if seed >= 2**32:
        raise InputError(f"seed is {seed}; expected below 2**32, beyond which seeds repeat")


class _HyphenParser(ArgumentParser):
    """A parser whose help shows ``--top-k`` for the field ``top_k``."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        text = super().format_help(*args, **kwargs).replace("[ITEM,...]", "TEXT")
        return re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), text)


def _make_parser(cls: Any, prog: str) -> ArgumentParser:
    kind = ArgumentParser if _sections(cls) else _HyphenParser
    parser = kind(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe: YAML with any of the keys below")
    parser.add_class_arguments(cls)
    return parser


def _instantiate(cls: Any, parser: ArgumentParser, words: Sequence[str]) -> Any:
    values = parser.instantiate(parser.parse_args(list(words)))
    options = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
    for key, text in _optional_texts(cls, words).items():
        options = _with_value(options, key, text)
    return options


def _with_value(options: Any, key: str, value: Any) -> Any:
    """Return the options with another value for a dotted key."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(options, **{name: _with_value(getattr(options, name), rest, value) if rest else value})


def _optional_texts(cls: Any, words: Sequence[str]) -> dict[str, str]:
    """Return the texts given for fields ``str | None``: the parser would take one such as ``# Title`` for null."""
    given: dict[str, Any] = {}
    for word in words:
        key, _, value = word[2:].partition("=")
        given.update(flatten(_read_yaml(cls, Path(value))) if key == "config" else {key: value})
    optional = [key for key, field in _fields(cls).items() if set(get_args(field.type)) == {str, type(None)}]
    return {key: given[key] for key in optional if isinstance(given.get(key), str) and given[key] != "null"}


def _canonical(cls: Any, args: Sequence[str]) -> list[str]:
    """Write every option as ``--name=value`` with underscores, and the texts of a repeated one as one YAML list.

    So a value that starts with a dash is not taken for an option, nor one that looks like YAML for a list.
    """
    known = {"config": None, **_fields(cls)}
    words: list[str] = []
    texts: dict[str, list[str]] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        key, has_value, value = _split(word)
        if key is None or key not in known:
            words.append(word if key is None else f"--{key}{has_value}{value}")
            continue
        if not has_value and rest and _split(rest[0])[0] not in {*known, "help"}:
            has_value, value = "=", rest.pop(0)
        if has_value and _is_texts(known[key]):
            texts.setdefault(key, []).append(value)
            words = [word for word in words if not word.startswith(f"--{key}=")]
            value = yaml.safe_dump(texts[key], default_style='"', default_flow_style=True)
        words.append(f"--{key}{has_value}{value}")
    return words


def _split(word: str) -> tuple[str | None, str, str]:
    """Take ``--some-name=value`` apart: ``some_name``, ``=`` and the value; no name for what is no option."""
    option, equals, value = word.partition("=")
    return (option[2:].replace("-", "_") if option.startswith("--") else None), equals, value


def _is_texts(field: Any) -> bool:
    return field is not None and get_origin(field.type) is tuple


def _read_yaml(cls: Any, path: Path) -> dict[Any, Any]:
    key, value = _example(cls)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        expected = f"a recipe: a YAML file with keys such as {key}"
        raise MissingInputError(f"{path}: {error.strerror}; expected {expected}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; expected a YAML file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"{values!r:.60}"
        raise InputError(f"{path}: expected keys and values, such as {key}: {value}, found {found}")
    return values


def _check_keys(cls: Any, values: dict[Any, Any], where: str) -> None:
    """Refuse what is not one of the keys, and null where there must be a value; ``where`` is named."""
    fields, sections = _fields(cls), _sections(cls)
    for key, value in values.items():
        if key in sections and not isinstance(value, dict):
            raise InputError(f"{where}: {key} is {value!r:.60}; expected keys such as {sections[key]} below it")
    for key in [*flatten(values), *(key for key, value in values.items() if value == {})]:
        if key not in fields and key not in sections:
            raise InputError(f"{where}: {_unknown_key(cls, str(key))}")
    for key, value in flatten(values).items():
        # The parser itself lets null pass in a file.
        if key in fields and value is None and type(None) not in get_args(fields[key].type):
            raise InputError(f"{where}: {key} is null; expected {_expected_value(cls, key)}")


def _fields(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the dataclass field of every dotted key."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        section = dataclasses.is_dataclass(field.type)
        fields.update(_fields(field.type, f"{prefix}{field.name}.") if section else {prefix + field.name: field})
    return fields


def _sections(cls: Any) -> dict[str, str]:
    """Return the sections, each with its first key."""
    keys = [key.partition(".") for key in _fields(cls)]
    return {section: key for section, dot, key in reversed(keys) if dot}


def _example(cls: Any, section: str = "") -> tuple[str, Any]:
    """Return a key with a value that it may have, for messages."""
    fields = {key: field for key, field in _fields(cls).items() if key.startswith(section)}
    for key, field in fields.items():
        if field.default not in (dataclasses.MISSING, None, "", ()):
            return key, field.default
    first = next(iter(fields))
    return first, first.upper()


def _expected_value(cls: Any, key: str) -> str:
    default = _fields(cls)[key].default
    if default is dataclasses.MISSING:
        return meaning(cls, key).rstrip(".")
    return f"a value, such as {default!r}; leave the key out for the default"


def _option(cls: Any, key: str) -> str:
    """Return a key as ``--help`` shows it."""
    return f"--{key if _sections(cls) else key.replace('_', '-')}"


def _locate(cls: Any, parser: ArgumentParser, words: Sequence[str], message: str) -> str:
    """Say which recipe file an error came from, if one of them by itself is wrong in the same way."""
    if message.startswith("--"):  # about the command line
        return message
    required = [f"--{key}=" for key, field in _fields(cls).items() if _is_required(field)]
    needed = [word for word in words if word.startswith(tuple(required))]
    for recipe in [word for word in words if word.startswith("--config=")]:
        try:
            _instantiate(cls, parser, [*needed, recipe])
        except (ArgumentError, InputError) as in_file:
            if _explain(cls, in_file) == message:
                return f"{recipe.partition('=')[2]}: {message}"
    return message


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _explain(cls: Any, error: Exception) -> str:
    """Turn the parser's error into one line: the key, its value and what was expected, or the nearest key."""
    message = _one_line(error)
    if missing := re.search(r"arguments are required: (?P<key>[\w.]+)", message):
        return f"{_option(cls, missing['key'])} is missing; expected {meaning(cls, missing['key']).rstrip('.')}"
    if bare := re.search(r"argument --(?P<key>[\w.]+): expected one argument", message):
        return f"{_option(cls, bare['key'])} has no value; expected {_option(cls, bare['key'])} VALUE"
    if option := re.search(r"[Uu]nrecognized arguments: --(?P<key>[^\s=]+)", message):
        return _unknown_key(cls, option["key"])
    if word := re.search(r"[Uu]nrecognized arguments: (?P<word>.*)", message):
        return f"{word['word']!r} is not an option; expected --KEY VALUE, such as {_example_option(cls)}"
    if section := re.search(r'Parser key "(?P<key>\w+)": Unable to load config .(?P<value>.*?). - ', message):
        example = _example_option(cls, f"{section['key']}.")
        return f"{section['key']} is {section['value']!r}; expected one of its keys, such as {example}"
    if wrong := re.search(r'Parser key "(?P<key>[\w.]+)":.*(?:Got|Given) value: (?P<value>.*)', message):
        return f"{wrong['key']} is {wrong['value']!r}; expected {_expected_type(message)}"
    return message


def _example_option(cls: Any, section: str = "") -> str:
    key, value = _example(cls, section)
    return f"{_option(cls, key)} {value}"


def _unknown_key(cls: Any, key: str) -> str:
    known = list(_fields(cls))
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near += [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.7)]
    hint = f"did you mean {near[0]}?" if near else "see --help for all keys"
    return f"unknown key {key}; {hint}"


def _expected_type(message: str) -> str:
    """Name the types that the parser's message lists, in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    words |= {"tuple": "a list of texts", "NoneType": "null"}
    types = re.findall(r"Expected a <class '(\w+)'>", message)
    named = [words[name] for name in sorted(types, key="NoneType".__eq__) if name in words]  # null last
    for choices in re.findall(r"Literal\[(.*?)\]", message):
        named.append("one of " + choices.replace("'", ""))
    return " or ".join(dict.fromkeys(named)) or "another type"


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
