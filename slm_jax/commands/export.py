"""``slm-jax export``: write a model for another program."""

import dataclasses
import re
import sys
from typing import TYPE_CHECKING, Any, Literal

from slm_jax.commands import ModelOptions
from slm_jax.config import flatten
from slm_jax.errors import InputError
from slm_jax.weights.registry import FormatName, GGUFDtype

if TYPE_CHECKING:
    from slm_jax.model import GPTConfig, Params
    from slm_jax.tokenizer import Tokenizer
    from slm_jax.weights.side_files import About


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Write a model for Hugging Face's transformers, llama.cpp and Ollama, nanoGPT or the book's code, or its adapters.

    Attributes:
        out: folder to write; it must be new or empty.
        format: format of another program (huggingface: a folder that transformers opens; gguf: model.gguf for llama.cpp
            and a Modelfile for Ollama; else model.safetensors with the program's names), or adapter (only the LoRA
            adapters: adapter.safetensors for slm_jax.lora.load_adapters).
        dtype: dtype of the matrices in GGUF (q8_0: 8 bits, with a scale for every 32 values); null: float32.
        push: upload the folder to this repository of Hugging Face's hub, OWNER/NAME; null: write it only.
        private: whether only you can see a repository that push makes.
    """

    out: str
    format: Literal[FormatName, "adapter"] = "huggingface"
    dtype: GGUFDtype | None = None
    push: str | None = None
    private: bool = True


def run(options: Options) -> int:
    from slm_jax.files import check_new_folder, user_path
    from slm_jax.weights.upload import check_hub_name, upload

    check_new_folder(options.out)
    if options.dtype is not None and options.format != "gguf":
        raise InputError(f"dtype is {options.dtype}; expected it only with --format gguf")
    if options.push is not None:
        check_hub_name(options.push)
    if options.format == "adapter":
        _export_adapters(options.run, options.out)
    else:
        _export_model(options)
    if options.push is not None:
        print(f"uploaded to {upload(user_path(options.out), options.push, private=options.private)}")
    return 0


def _export_model(options: Options) -> None:
    from slm_jax.runs import find_tokenizer
    from slm_jax.tokenizer import get_tokenizer
    from slm_jax.weights.writer import write_model

    tokenizer = None if options.tokenizer is None else get_tokenizer(options.tokenizer)
    cfg, params = _load(options)
    if tokenizer is None:
        try:
            tokenizer = find_tokenizer(options.run, cfg)
        except InputError as error:  # the weights are useful without one
            print(f"slm-jax export: the weights only: {error}", file=sys.stderr)
    about = dataclasses.replace(_about(options, tokenizer), dtype=options.dtype or "float32")
    assert options.format != "adapter"
    folder = write_model(cfg, params, options.out, options.format, about)
    print(f"{options.out} written: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if options.format == "huggingface":
        _say_how_to_open(options.out, about)
    elif options.format == "gguf":
        _say_how_to_run(options.out, tokenizer)


def _load(options: Options) -> "tuple[GPTConfig, Params]":
    """Load a language model or a classifier."""
    from slm_jax.runs import find_checkpoint, is_classifier, load_pretrained, read_checkpoint
    from slm_jax.training.checkpoint import read_metadata

    checkpoint = find_checkpoint(options.run)
    metadata = read_metadata(checkpoint[0] / "checkpoints", checkpoint[1]) if checkpoint else {}
    if checkpoint is None or not is_classifier(metadata):
        return load_pretrained(options.run, n_heads=options.n_heads)
    if (pooling := metadata["pooling"]) != "last":
        problem = f"its classification.pooling is {pooling}; other programs' classifiers have only last"
        raise InputError(f"{options.run}: {problem}")
    return read_checkpoint(*checkpoint, "float32", "float32", options.n_heads, classifier=True)[:2]


def _say_how_to_open(out: str, about: "About") -> None:
    from slm_jax.weights.tokenizer_json import tokenizer_json

    task, kind = ("classification", "SequenceClassification") if about.classes else ("generation", "CausalLM")
    if about.tokenizer is not None:
        try:
            tokenizer_json(about.tokenizer)
            print(f'open it with: transformers.pipeline("text-{task}", model={out!r})')
            return
        except InputError as error:
            print(f"slm-jax export: no tokenizer for other programs: {error}", file=sys.stderr)
    print(f"open it with: transformers.AutoModelFor{kind}.from_pretrained({out!r})")


def _say_how_to_run(out: str, tokenizer: "Tokenizer | None") -> None:
    from slm_jax.weights.gguf_tokenizer import tokenizer_metadata

    if tokenizer is None:
        return
    try:
        tokenizer_metadata(tokenizer)
    except InputError as error:
        print(f"slm-jax export: no tokenizer in model.gguf, so only slm-jax can run it: {error}", file=sys.stderr)
        return
    print(f"use it with: llama-cli -m {out}/model.gguf, or: ollama create NAME -f {out}/Modelfile")


def _export_adapters(source: str, out: str) -> None:
    from slm_jax.files import new_folder
    from slm_jax.runs import get_checkpoint, is_classifier, read_adapters
    from slm_jax.training.checkpoint import read_metadata
    from slm_jax.weights.adapters import save_adapters

    checkpoint = get_checkpoint(source)
    adapters = read_adapters(*checkpoint)
    with new_folder(out) as partial:
        save_adapters(partial / "adapter.safetensors", adapters)
    print(f"{out} written: adapter.safetensors")
    if is_classifier(read_metadata(checkpoint[0] / "checkpoints", checkpoint[1])):
        print("the classifier's head is not part of the adapters; it stays in the run", file=sys.stderr)


def _about(options: Options, tokenizer: "Tokenizer | None") -> "About":
    """Return facts about a run's checkpoint for the files beside its weights; for other weights, only the name."""
    from slm_jax.data.chat_template import own_template, template_from_dict
    from slm_jax.data.templates import TEMPLATES
    from slm_jax.runs import find_checkpoint
    from slm_jax.training.checkpoint import read_metadata
    from slm_jax.training.run_folder import RunFolder
    from slm_jax.weights.hub import PINS
    from slm_jax.weights.side_files import About

    checkpoint = find_checkpoint(options.run)
    name = options.push or options.out
    if checkpoint is None:
        return About(name=name, tokenizer=tokenizer, template=own_template(tokenizer))
    folder, step = checkpoint
    metadata = read_metadata(folder / "checkpoints", step)
    config, summary = flatten(metadata.get("config", {})), RunFolder(folder).read_json("summary.json") or {}
    template = template_from_dict(metadata["template"]) if "template" in metadata else own_template(tokenizer)
    base = config.get("base")
    figures: dict[str, Any] = {
        "task": config.get("task"),
        "base": base and _without_folders(base),
        "trained": None if base is None else config.get("trainable"),
        "data": _without_folders(config.get("data.source") or "") or None,
        "template": template and next((k for k, known in TEMPLATES.items() if known == template), "the model's own"),
        "optimizer steps": f"{step:,}" if config else None,
        f"validation loss (nats a {'text' if 'classes' in metadata else 'token'})": metadata["validation_loss"],
    }
    if step == summary.get("best_step"):  # which it was measured with
        test = summary.get("after", {}).get("test", {})
        numbers = {name: value for name, value in test.items() if isinstance(value, int | float)}
        figures |= {f"test: {name.replace('_', ' ')}": value for name, value in numbers.items()}
    return About(
        name=name,
        tokenizer=tokenizer,
        template=template,
        classes=metadata.get("classes", ()),
        base_model=PINS[base].repository if base in PINS else None,
        generation=_sampling(config),
        card={name: _shown(value) for name, value in figures.items() if value is not None},
    )


def _without_folders(text: str) -> str:
    """Return a path or source without absolute folders of this machine, because a model card may be published."""
    return re.sub(r"(?<![^:])(/(?!/)|~/|[A-Z]:\\).*[/\\](?=.)", "", text)


def _sampling(config: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling settings of the run as in ``generation_config.json``."""
    if "sample.temperature" not in config:
        return {}
    if not config["sample.temperature"]:
        return {"do_sample": False}
    top_k = config.get("sample.top_k")
    return {"do_sample": True, "temperature": config["sample.temperature"], "top_k": 0 if top_k is None else top_k}


def _shown(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else str(value)
