"""``slm-jax export``: write a model for another program."""

import dataclasses
import sys
from typing import Any, Literal

from slm_jax.commands import ModelOptions
from slm_jax.config import flatten
from slm_jax.errors import InputError
from slm_jax.weights.registry import FormatName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Write a model for Hugging Face's transformers, for nanoGPT or for the book's code, or only its LoRA adapters.

    Attributes:
        out: folder to write; it must be new or empty.
        format: format of another program (huggingface: a folder for GPT2LMHeadModel; else model.safetensors with the
            program's names), or adapter (only the LoRA adapters: adapter.safetensors for slm_jax.lora.load_adapters).
    """

    out: str
    format: Literal[FormatName, "adapter"] = "huggingface"


def run(options: Options) -> int:
    from slm_jax.files import check_new_folder
    from slm_jax.runs import find_tokenizer, load_gpt2
    from slm_jax.tokenizer import get_tokenizer
    from slm_jax.weights.writer import save_gpt2

    check_new_folder(options.out)
    if options.format == "adapter":
        return _export_adapters(options.run, options.out)
    tokenizer = None if options.tokenizer is None else get_tokenizer(options.tokenizer)
    cfg, params = load_gpt2(options.run, n_heads=options.n_heads)
    if tokenizer is None:
        try:
            tokenizer = find_tokenizer(options.run, cfg)
        except InputError as error:  # the weights are useful without one
            print(f"slm-jax export: the weights only: {error}", file=sys.stderr)
    figures = _figures(options.run)
    folder = save_gpt2(cfg, params, options.out, format=options.format, tokenizer=tokenizer, card=figures)
    print(f"{options.out} written: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if options.format == "huggingface":
        print(f"open it with: transformers.GPT2LMHeadModel.from_pretrained({options.out!r})")
    return 0


def _export_adapters(source: str, out: str) -> int:
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
    return 0


def _figures(source: str) -> dict[str, Any]:
    """Return the figures of a run's checkpoint for the model card; none for other weights."""
    from slm_jax.runs import find_checkpoint
    from slm_jax.training.checkpoint import read_metadata

    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return {}
    metadata = read_metadata(checkpoint[0] / "checkpoints", checkpoint[1])
    loss, config = metadata["validation_loss"], metadata.get("config", {})
    figures = {
        "trained on": flatten(config).get("data.source"),
        "optimizer steps": f"{checkpoint[1]:,}" if config else None,
        "validation loss (nats a token)": None if loss is None else f"{loss:.4f}",
    }
    return {name: value for name, value in figures.items() if value is not None}
