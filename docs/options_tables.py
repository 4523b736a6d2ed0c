"""The options of commands and the keys of recipes, as lists for a page, from the dataclasses that the program reads.

A page has ``<!-- options: COMMAND -->`` (or ``bench KIND``), ``<!-- keys: SECTION -->``, ``<!-- commands -->`` or
``<!-- presets -->``.
"""

import dataclasses
import html
import importlib
import re
from typing import Any

from slm_jax.cli import COMMANDS
from slm_jax.config import EXECUTION, Key, describe, flatten, keys
from slm_jax.model import PRESETS, count_params, get_gpt_config
from slm_jax.tasks.config import FinetuneConfig, RunConfig

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", tuple: "texts", type(None): "null"}
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
