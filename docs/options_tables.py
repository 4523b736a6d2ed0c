"""Lists for the reference, made from the program itself.

A page has ``<!-- options: COMMAND -->`` (or ``bench KIND``), ``<!-- keys: SECTION -->``, ``<!-- commands -->``,
``<!-- presets -->``, ``<!-- names -->``, ``<!-- modules: PACKAGE -->`` or ``<!-- scaling: SHAPE -->``.
"""

import dataclasses
import html
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import slm_jax
from slm_jax.cli import COMMANDS
from slm_jax.config import EXECUTION, Key, describe, flatten, keys
from slm_jax.model import PRESETS, count_params, get_gpt_config
from slm_jax.tasks.config import FinetuneConfig, RunConfig
from slm_jax.tools.plan.scaling import scaling_table

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", tuple: "texts", type(None): "null"}
OF_FINETUNE = flatten(dataclasses.asdict(FinetuneConfig()))


def fill_in(markdown: str) -> str:
    """Replace the comments that stand for lists; an unknown command, section or package is an error."""
    tables: dict[str, Callable[..., str]] = {
        "commands": command_table,
        "presets": preset_table,
        "options": command_options,
        "keys": section_keys,
        "modules": package_modules,
        "names": public_names,
        "scaling": scaling_table,
    }
    return re.sub(
        rf"<!-- ({'|'.join(tables)})(?:: ([\w. -]+))? -->",
        lambda match: tables[match[1]](*([match[2]] if match[2] else [])),
        markdown,
    )


def package_modules(package: str) -> str:
    """Return the directives that document all public modules of a package, without its configuration."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    names = [one.name for one in found if not one.ispkg and one.name != "config" and not one.name.startswith("_")]
    return "\n\n".join(f"::: {package}.{name}" for name in names)


def public_names() -> str:
    """Return the public names of slm_jax, with the first sentence of their docstrings."""
    rows = ["| name | description |", "|---|---|"]
    for name in slm_jax.__all__:
        thing = getattr(slm_jax, name)
        about = inspect.cleandoc(thing.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        about = re.split(r"(?<!al)\. ", re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", about))[0]
        rows.append(f"| [`{name}`][{address(thing)}] | {_escaped(about.rstrip('.'))} |")
    return "\n".join(rows)


def address(thing: Any) -> str:
    """Return the dotted path of the module that defines a public name, and of a package its first module."""
    if not inspect.ismodule(thing):
        return f"{thing.__module__}.{thing.__qualname__}"
    return f"{thing.__name__}.pretraining" if thing.__name__ == "slm_jax.tasks" else thing.__name__


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
        return module.KINDS[kind]
    return {"train": RunConfig, "finetune": FinetuneConfig}.get(name) or module.Options


def command_options(command: str) -> str:
    """Return what a command does and its options, without those of a run, which are a page of their own."""
    cls = options_class(command)
    of_run = keys(RunConfig) if issubclass(cls, RunConfig) else {}
    own = {name: key for name, key in keys(cls).items() if name not in of_run}
    sections = {name.partition(".")[0] for name in own if "." in name}
    entries = [
        _entry(key, f"--{name if of_run else name.replace('_', '-')}") for name, key in own.items() if "." not in name
    ]
    entries += [f"`--{name}.KEY`\n:   {_escaped(describe(cls)[name])}" for name in sections]
    if of_run:
        entries.append("Any key of a run: see [configuration](configuration.md).")
    else:
        entries.append("`--config` · text\n:   a YAML file with any of these options.")
    about = (cls.__doc__ or "").partition("Attributes:")[0]
    if cls in (RunConfig, FinetuneConfig):  # which say what a run is, not what is done
        about = f"{COMMANDS[command][1][0].upper()}{COMMANDS[command][1][1:]}."
    return "\n\n".join([_escaped(" ".join(about.split())), *entries])


def section_keys(section: str) -> str:
    """Return the keys of a section of a recipe; ``run`` stands for those without a section."""
    entries = []
    for name, key in keys(RunConfig).items():
        if (name.rpartition(".")[0] or "run") == section:
            more = [] if OF_FINETUNE[name] == key.default else [f"default of finetune {_shown(OF_FINETUNE[name])}"]
            entries.append(_entry(key, name, *more, *["may change on a resume"] * (EXECUTION in key.markers)))
    if not entries:
        raise KeyError(section)
    return "\n\n".join(entries)


def _entry(key: Key, name: str, *more: str) -> str:
    """Return one option: its name, values and default, and what it means."""
    choices = [f"`{choice}`" for choice in key.choices]
    values = " or ".join([*choices, *(WORDS[kind] for kind in key.kinds)])
    default = "required" if key.default is dataclasses.MISSING else f"default {_shown(key.default)}"
    return f"{' · '.join([f'`{name}`', values, default, *more])}\n:   {_escaped(key.help)}"


def _shown(value: Any) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return " ".join(f"`{item}`" for item in value) or "none"
    return f"`{value}`" if value != "" else "empty"


def _escaped(text: str) -> str:
    """Return plain text as Markdown."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else _escape_part(part) for part in parts)


def _escape_part(text: str) -> str:
    return re.sub(r"([\\*_\[\]|])", r"\\\1", html.escape(text, quote=False))
