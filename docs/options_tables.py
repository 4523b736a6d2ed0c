"""The options of commands and the keys of recipes, as lists for a page, from the dataclasses that the program reads.

A page has ``<!-- options: COMMAND -->`` (or ``bench KIND``), ``<!-- keys: SECTION -->``, ``<!-- commands -->`` or
``<!-- presets -->``.
"""

import dataclasses
import html
import importlib
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from slm_jax.cli import COMMANDS
from slm_jax.config import execution_keys, flatten, meaning
from slm_jax.model import PRESETS, count_params, get_gpt_config
from slm_jax.tasks.config import FinetuneConfig, RunConfig

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
EXECUTION = execution_keys(RunConfig())
OF_FINETUNE = flatten(dataclasses.asdict(FinetuneConfig()))


def fill_in(markdown: str) -> str:
    """Replace the comments that stand for lists of options; an unknown command or section is an error."""
    tables = {"commands": command_table, "presets": preset_table, "options": command_options, "keys": section_keys}
    return re.sub(
        r"<!-- (commands|presets|options|keys)(?:: ([\w ]+))? -->",
        lambda match: tables[match[1]](*([match[2]] if match[2] else [])),
        markdown,
    )


def command_table() -> str:
    """Return all commands with what they do."""
    rows = [f"| [`slm-jax {name}`](#slm-jax-{name}) | {_escaped(what)} |" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def preset_table() -> str:
    """Return the presets of the model's shape, with their parameters."""
    rows = ["| preset | width | heads | layers | context | vocabulary | parameters |", "|---|---|---|---|---|---|---|"]
    for name in PRESETS:
        cfg = get_gpt_config(name)
        shape = (cfg.emb_dim, cfg.n_heads, cfg.n_layers, cfg.context_length, f"{cfg.vocab_size:,}")
        rows.append(" | ".join([f"| `{name}`", *map(str, shape), f"{count_params(cfg):,} |"]))
    return "\n".join(rows)


def options_class(command: str) -> Any:
    """Return the dataclass of a command's options; ``bench train`` names a kind, too."""
    name, _, kind = command.partition(" ")
    module = importlib.import_module(COMMANDS[name][0])
    if kind:
        return module.KINDS[kind][0]
    return {"train": RunConfig, "finetune": FinetuneConfig}.get(name) or module.Options


def command_options(command: str) -> str:
    """Return what a command does and its options, without those of a run, which are a page of their own."""
    cls = options_class(command)
    of_run = {field.name for field in dataclasses.fields(RunConfig)} if issubclass(cls, RunConfig) else set()
    own = [field for field in dataclasses.fields(cls) if field.name not in of_run]
    entries = [_entry(cls, field, "--", hyphens=not of_run) for field in own]
    if of_run:
        entries.append("Any key of a run: see [configuration](configuration.md).")
    elif not any(field.name == "config" for field in dataclasses.fields(cls)):
        entries.append("`--config` · text\n:   a YAML file with any of these options.")
    about = (cls.__doc__ or "").partition("Attributes:")[0]
    if cls in (RunConfig, FinetuneConfig):  # which say what a run is, not what is done
        about = f"{COMMANDS[command][1][0].upper()}{COMMANDS[command][1][1:]}."
    return "\n\n".join([_escaped(" ".join(about.split())), *entries])


def section_keys(section: str) -> str:
    """Return the keys of a section of a recipe; ``run`` stands for those without a section."""
    if section == "run":
        cls, prefix = RunConfig, ""
    else:
        cls, prefix = next(f.type for f in dataclasses.fields(RunConfig) if f.name == section), f"{section}."
    fields = [field for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.type)]
    return "\n\n".join(_entry(cls, field, prefix, hyphens=False) for field in fields)


def _entry(cls: Any, field: Any, prefix: str, hyphens: bool) -> str:
    """Return one option: its name, values and default, and what it means."""
    name = prefix + (field.name.replace("_", "-") if hyphens else field.name)
    if dataclasses.is_dataclass(field.type):
        example = dataclasses.fields(field.type)[0].name
        return f"`{name}.KEY`, such as `{name}.{example}`\n:   {_escaped(meaning(cls, field.name))}"
    parts = [f"`{name}`", _values(field.type)]
    default = _default(field)
    parts.append("required" if default is dataclasses.MISSING else f"default {_shown(default)}")
    if not prefix.startswith("--"):
        key = f"{prefix}{field.name}"
        if OF_FINETUNE[key] != default:
            parts.append(f"default of finetune {_shown(OF_FINETUNE[key])}")
        if key in EXECUTION:
            parts.append("may change on a resume")
    return f"{' · '.join(parts)}\n:   {_escaped(meaning(cls, field.name))}"


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return " ".join(f"`{item}`" for item in value) or "none"
    return f"`{value}`" if value != "" else "empty"


def _values(kind: Any) -> str:
    """Say what values a type has."""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_values(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return "texts"
    return WORDS.get(kind, "section")


def _escaped(text: str) -> str:
    """Return plain text as Markdown."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else _escape_part(part) for part in parts)


def _escape_part(text: str) -> str:
    return re.sub(r"([\\*_\[\]|])", r"\\\1", html.escape(text, quote=False))
