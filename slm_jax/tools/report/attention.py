"""What the heads of a run's model look at in a text: maps of attention weights."""

import base64
import contextlib
import dataclasses
import io
import shlex
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from slm_jax.classifier import GPTClassifier
from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.capture import capture
from slm_jax.model import GPTModel, Params
from slm_jax.runs import read_checkpoint
from slm_jax.tokenizer import Tokenizer, tokenizer_from_dict
from slm_jax.tools.report.html import Html, details, escape, tag
from slm_jax.tools.report.read import Record, read_samples, steps_to_try
from slm_jax.training.checkpoint import read_metadata

MOST_LAYERS, MOST_HEADS, MOST_TOKENS = 6, 6, 20
TEXT = "If the file does not exist, an error is raised, and the function returns None."
HEAT = (58, 143, 222)  # seen on white and on black
CELL = 14  # of the units in which the text is 9 high


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """Attention weights of one text.

    Attributes:
        step: of the checkpoint.
        tokens: the text's first ones, as text.
        n_tokens: how many the text has.
        weights: (layers, heads, seq, seq), how much each token (third axis) takes of each; the first of both.
        n_layers, n_heads: how many the model has.
    """

    step: int
    tokens: list[str]
    n_tokens: int
    weights: Float[np.ndarray, "layers heads seq seq"]
    n_layers: int
    n_heads: int


def sample_text(record: Record) -> str:
    """Return what the maps are of where nobody says: the latest sample, or an English sentence."""
    samples = read_samples(record.folder)
    return samples[-1][1] if samples and samples[-1][1].strip() else TEXT


def attention_section(record: Record, text: str | None) -> list[Html]:
    """Return the maps of a text, or why there are none.

    Args:
        record: the run.
        text: that the maps are of; None: :func:`sample_text`.

    Raises:
        InputError: a text that the model's tokenizer cannot encode.
    """
    steps = steps_to_try(record.folder, record.step)
    if not steps:
        return [tag("p", "There are none: no checkpoint yet.", class_="dim")]
    sample = sample_text(record)
    for step in steps:
        try:
            loaded = _load(record, step)
        except InputError:
            continue
        try:
            maps = _maps(step, loaded, text, sample)
        except MissingInputError as error:  # the tokenizer's own files
            return [tag("p", f"There are none, as the text cannot be encoded: {error}", class_="dim")]
        if not maps.tokens:
            return [tag("p", "There are none: the text has no token that this model knows.", class_="dim")]
        return _show(maps)
    return [_unloadable(record)]


def _unloadable(record: Record) -> Html:
    which = "no checkpoint of this run" if record.step is None else f"the checkpoint of step {record.step:,}"
    cannot = "can be loaded" if record.step is None else "cannot be loaded"
    command = tag("code", f"slm-jax doctor --run {shlex.quote(str(record.folder.path))}")
    return tag("p", f"There are none: {which} {cannot}. What is damaged, and what to do: ", command, class_="dim")


class _Model(NamedTuple):
    model: GPTModel
    params: Params
    tokenizer: Tokenizer


def _load(record: Record, step: int) -> _Model:
    """Return a checkpoint's model, which may be a classifier."""
    classifies = "classes" in read_metadata(record.folder.checkpoints, step)
    cfg, params, metadata = read_checkpoint(record.folder.path, step, "float32", classifier=classifies)
    tokenizer = tokenizer_from_dict(metadata.get("tokenizer", {}))
    if classifies:
        try:
            classifier = GPTClassifier(cfg, n_classes=len(metadata["classes"]), pooling=metadata["pooling"])
        except (KeyError, TypeError) as error:
            raise InputError(f"step {step}: its metadata describe no classifier ({error!r})") from None
        return _Model(classifier, params, tokenizer)
    return _Model(GPTModel(cfg), params, tokenizer)


def _maps(step: int, loaded: _Model, text: str | None, sample: str) -> Maps:
    model, params, tokenizer = loaded
    cfg = model.cfg
    whole = _encode(tokenizer, text, sample)
    ids = whole[: min(MOST_TOKENS, cfg.context_length)]
    n_layers, n_heads = min(cfg.n_layers, MOST_LAYERS), min(cfg.n_heads, MOST_HEADS)
    if not ids:
        return Maps(step, [], 0, np.zeros((0, 0, 0, 0), np.float32), cfg.n_layers, cfg.n_heads)
    lengths: dict[str, Any] = {"lengths": jnp.array([len(ids)])} if isinstance(model, GPTClassifier) else {}
    names = [f"blocks/{layer}/attn/weights" for layer in range(n_layers)]
    _, seen = capture(model, params, jnp.array([ids], jnp.int32), names, **lengths)
    weights = np.stack([np.asarray(seen[name], np.float32)[0, :n_heads] for name in names])
    tokens = [tokenizer.decode([token]) for token in ids]
    return Maps(step, tokens, len(whole), weights, cfg.n_layers, cfg.n_heads)


def _encode(tokenizer: Tokenizer, text: str | None, sample: str) -> list[int]:
    """Encode the text that was asked for, or a sample without the characters that the tokenizer cannot encode."""
    try:
        return tokenizer.encode(sample, allow_special=True) if text is None else tokenizer.encode(text)
    except MissingInputError:  # of the tokenizer's own files
        raise
    except InputError as error:
        if text is not None:
            raise InputError(f"text: {error}") from None
    ids: list[int] = []
    for character in sample:
        with contextlib.suppress(InputError):
            ids += tokenizer.encode(character)
    return ids


def _show(maps: Maps) -> list[Html]:
    layers, heads = maps.weights.shape[:2]
    some, part = "", ""
    if layers < maps.n_layers or heads < maps.n_heads:
        some = f" (the first {layers} of {maps.n_layers} layers and {heads} of {maps.n_heads} heads)"
    if len(maps.tokens) < maps.n_tokens:
        part = f", in the first {len(maps.tokens)} of {maps.n_tokens:,} tokens of a text"
    said = (
        f"Weights of the model of step {maps.step:,}{some}{part}. Each small picture is a head. A row is a token that "
        "looks, from the first at the top to the last; a column is a token that it looks at; the stronger the colour, "
        "the more of its attention. A token sees only itself and what stands before it."
    )
    tokens = [tag("span", tag("small", i), _visible(token)) for i, token in enumerate(maps.tokens)]
    pictures = [[_png(head) for head in layer] for layer in maps.weights]
    small, large = [], []
    for layer, row in enumerate(pictures):
        about = [_describe(maps, layer, head) for head in range(heads)]
        figures = [
            tag("figure", Html(f'<img src="{png}" alt="{alt}">'), tag("figcaption", f"head {head}"))
            for head, (png, alt) in enumerate(zip(row, about, strict=True))
        ]
        columns = f"grid-template-columns: repeat({heads}, minmax(0, 7.5rem))"
        small.append(tag("div", tag("h3", f"Block {layer}"), tag("div", *figures, class_="heads", style=columns)))
        figures = [
            tag("figure", _labelled(maps.tokens, png, alt), tag("figcaption", f"block {layer}, head {head}"))
            for head, (png, alt) in enumerate(zip(row, about, strict=True))
        ]
        large.append(details(f"Block {layer} with the tokens beside it", tag("div", *figures, class_="grid")))
    return [tag("p", said), tag("p", *tokens, class_="tokens"), tag("div", *small, class_="grid"), *large]


def _visible(token: str) -> str:
    """Return a token in which spaces and line breaks are seen."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _describe(maps: Maps, layer: int, head: int) -> Html:
    """Return a map in words: what the last token looks at most."""
    last = maps.weights[layer, head, -1]
    most = int(last.argmax())
    looks = f"the last token takes {last[most]:.0%} of token {most}, {_visible(maps.tokens[most])}"
    return escape(f"attention weights of block {layer}, head {head}: {looks}")


def _png(weights: Float[np.ndarray, "seq seq"]) -> str:
    """Return a map as the address of a picture of one pixel a weight: the larger, the less transparent."""
    from matplotlib.image import imsave

    alpha = np.clip(np.nan_to_num(weights), 0, 1) ** 0.7  # small weights are seen, too
    pixels = np.zeros((*weights.shape, 4), np.uint8)
    pixels[..., :3] = HEAT
    pixels[..., 3] = np.rint(255 * alpha)
    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": ""})  # the same with any version
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _labelled(tokens: list[str], png: str, label: Html) -> Html:
    """Return a map with the tokens along its sides."""
    names = [_visible(token) for token in tokens]
    names = [name if len(name) <= 12 else f"{name[:11]}…" for name in names]
    side, margin = len(names) * CELL, 8 + 5.6 * max(map(len, names))
    size = f"{margin + side:.0f}"
    parts = [
        f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="{label}" font-size="9" fill="currentColor" '
        f'style="max-width: {1.5 * (margin + side):.0f}px">'
        f'<image href="{png}" x="{margin:.0f}" y="0" width="{side}" height="{side}" preserveAspectRatio="none" '
        'style="image-rendering: pixelated"/>'
        f'<rect x="{margin:.0f}" y="0" width="{side}" height="{side}" fill="none" stroke="currentColor" opacity=".3"/>'
    ]
    for i, name in enumerate(names):
        middle = i * CELL + CELL / 2
        parts.append(f'<text x="{margin - 4:.0f}" y="{middle + 3:.0f}" text-anchor="end">{escape(name)}</text>')
        turned = f"translate({margin + middle + 3:.0f} {side + 5}) rotate(-90)"
        parts.append(f'<text text-anchor="end" transform="{turned}">{escape(name)}</text>')
    return Html("".join(parts) + "</svg>")
