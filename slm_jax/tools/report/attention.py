"""Maps of the attention weights of a run's model in a text."""

import base64
import contextlib
import dataclasses
import io
import shlex
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.capture import capture
from slm_jax.model import GPTClassifier, GPTModel, Params
from slm_jax.nn.axes import STACK
from slm_jax.runs import read_checkpoint
from slm_jax.tokenizer import Tokenizer, tokenizer_from_dict
from slm_jax.tools.report.record import Record, steps_to_try

MOST_LAYERS, MOST_HEADS, MOST_TOKENS = 6, 6, 20
TEXT = "If the file does not exist, an error is raised, and the function returns None."
COLOR = (58, 143, 222)  # visible on white and on black


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """Attention weights of one text.

    Attributes:
        tokens, n_tokens: the first tokens of the text, and how many it has.
        weights: of the first layers and heads: what a query (third axis) gives to each key.
        n_layers, n_heads: of the model.
    """

    step: int
    tokens: list[str]
    n_tokens: int
    weights: Float[np.ndarray, "layers heads seq seq"]
    n_layers: int
    n_heads: int

    @property
    def names(self) -> list[str]:
        """The tokens with spaces and line breaks made visible."""
        shown = [token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅" for token in self.tokens]
        return [name if len(name) <= 24 else f"{name[:23]}…" for name in shown]

    def blocks(self) -> list[list[dict[str, str]]]:
        """Return ``{src, alt}`` of the picture of each head of each block."""
        return [
            [
                {
                    "src": to_png(head),
                    "alt": f"attention weights of block {block}, head {i}: the last token gives {head[-1].max():.0%} "
                    f"to token {head[-1].argmax()}, {self.names[head[-1].argmax()]}",
                }
                for i, head in enumerate(heads)
            ]
            for block, heads in enumerate(self.weights)
        ]


def read_maps(record: Record, text: str | None) -> Maps | str:
    """Return the maps of a text (None: the latest sample, or an English sentence), or why there are none.

    Raises:
        InputError: a text that the model's tokenizer cannot encode.
    """
    steps = steps_to_try(record.folder, record.step)
    if not steps:
        return "None: no checkpoint yet."
    samples = [TEXT, *(sample for _, sample in record.folder.samples() if sample.strip())]
    for step in steps:
        try:
            loaded = _load(record, step)
        except InputError:
            continue
        try:
            maps = _maps(step, *loaded, text, samples[-1])
        except MissingInputError as error:  # the tokenizer's own files
            return f"None: the text cannot be encoded ({error})."
        return maps if maps.tokens else "None: the text has no token that this model knows."
    which = "no checkpoint" if record.step is None else f"the checkpoint of step {record.step:,} not"
    command = f"slm-jax doctor --run {shlex.quote(str(record.folder.path))}"
    return f"None: {which} readable. This command shows what is damaged: {command}"


def _load(record: Record, step: int) -> tuple[GPTModel, Params, Tokenizer]:
    """Return a checkpoint's model, which may be a classifier."""
    is_classifier = "classes" in record.metadata
    cfg, params, metadata = read_checkpoint(record.folder.path, step, "float32", classifier=is_classifier)
    model = GPTModel(cfg)
    if is_classifier:
        model = GPTClassifier(cfg, n_classes=len(metadata["classes"]), pooling=metadata["pooling"])
    return model, params, tokenizer_from_dict(metadata["tokenizer"])


def _maps(step: int, model: GPTModel, params: Params, tokenizer: Tokenizer, text: str | None, sample: str) -> Maps:
    cfg = model.cfg
    whole = encode(tokenizer, text, sample)
    ids = whole[: min(MOST_TOKENS, cfg.context_length)]
    n_layers, n_heads = min(cfg.n_layers, MOST_LAYERS), min(cfg.n_heads, MOST_HEADS)
    weights = np.zeros((n_layers, n_heads, len(ids), len(ids)), np.float32)
    if ids:
        lengths: dict[str, Any] = {"lengths": jnp.array([len(ids)])} if isinstance(model, GPTClassifier) else {}
        names = [f"{STACK}/{layer}/attn/weights" for layer in range(n_layers)]
        _, seen = capture(model, params, jnp.array([ids], jnp.int32), names, **lengths)
        weights = np.stack([np.asarray(seen[name], np.float32)[0, :n_heads] for name in names])
    tokens = [tokenizer.decode([token]) for token in ids]
    return Maps(step, tokens, len(whole), weights, cfg.n_layers, cfg.n_heads)


def encode(tokenizer: Tokenizer, text: str | None, sample: str) -> list[int]:
    """Encode the requested text, or without one a sample, leaving out characters that the tokenizer cannot encode."""
    try:
        return tokenizer.encode(sample, allow_special=True) if text is None else tokenizer.encode(text)
    except MissingInputError:
        raise
    except InputError as error:
        if text is not None:
            raise InputError(f"text: {error}") from None
    ids: list[int] = []
    for character in sample:
        with contextlib.suppress(InputError):
            ids += tokenizer.encode(character)
    return ids


def to_png(weights: Float[np.ndarray, "seq seq"]) -> str:
    """Return a map as the data URL of a picture with one pixel a weight; larger weights are more opaque."""
    from matplotlib.image import imsave

    pixels = np.zeros((*weights.shape, 4), np.uint8)
    pixels[..., :3] = COLOR
    pixels[..., 3] = np.rint(255 * np.clip(np.nan_to_num(weights), 0, 1) ** 0.7)  # small weights stay visible
    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": ""})  # the same bytes with any version
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
