"""Preference tuning: raise the probability of chosen responses over that of rejected ones (DPO, IPO, SimPO).

The reference is the model that the run starts from. Its log-probabilities of all responses are computed once, before
training, and are stored with the run, so that no second model is in memory and no step computes them again.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track

from slm_jax.data import preferences
from slm_jax.data.config import PreferenceConfig
from slm_jax.data.preferences import SIDES, PairRows, PairTokens
from slm_jax.data.templates import load_template
from slm_jax.data.windows import bucket_width
from slm_jax.errors import InputError
from slm_jax.files import read_json
from slm_jax.model import GPTConfig, GPTModel, Params, init_params, param_shapes
from slm_jax.nn.blocks import merge_params
from slm_jax.tasks.base import Base, count_steps, find_base, prepare_params, row_length
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.instruction import Instruction, check_prompts, choose_asked, find_template, own_template
from slm_jax.training.resume import Start
from slm_jax.training.step import Batch, LossFn, Sums
from slm_jax.training.task import Evaluate, ModelShapes, Moment

REFERENCE = "reference.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Instruction):
    """Fine-tuning on pairs of responses; samples and answers as for :class:`Instruction`."""

    unit: ClassVar[Literal["token", "text"]] = "text"
    score: ClassVar[str | None] = "accuracy"
    written: ClassVar[Mapping[str, str]] = {
        **Instruction.written,
        REFERENCE: "log-probabilities of the responses before training, by split: chosen, rejected",
    }
    figure_formats: ClassVar[Mapping[str, str]] = {
        "loss": ".4f", "accuracy": ".2%", "margin": ".3f", "exact_match": ".2%", "rouge_l": ".4f",
    }  # fmt: skip

    config: RunConfig

    @classmethod
    def build(cls, config: RunConfig, start: Start, stop: Callable[[], None] = lambda: None) -> "Preference":
        section, train = config.preference, config.train
        if config.base is None:
            raise InputError("base is null; expected a model that answers, such as runs/sft_builtin")
        configured = find_template(section.template, start, "preference")
        splits = preferences.load_preferences(config.data, section, config.seed)
        stop()
        base = find_base(config, start)
        assert base is not None
        template, cfg, tokenizer = configured or own_template(base), base.model_config, base.tokenizer
        limit, notes = row_length(section.max_length, "preference.max_length", cfg), list(splits.notes)
        encoded: dict[str, list[PairTokens]] = {}
        for name in ("train", "validation", "test"):
            encoded[name], own_notes = preferences.encode_pairs(
                getattr(splits, name), tokenizer, template, max_length=limit, too_long=section.too_long
            )
            notes += [f"{name}: {note}" for note in own_notes]
        stop()
        eval_rows = train.eval_batch_size or train.batch_size
        references = _references(start, base, encoded, limit, eval_rows, stop)
        text = json.dumps({name: table.tolist() for name, table in references.items()})
        rows = {name: PairRows(encoded[name], references[name], limit) for name in encoded}
        test = splits.test[: section.responses]
        return cls(
            config=config,
            model=GPTModel(cfg),
            template=template,
            test=test,
            asked=choose_asked(config, tokenizer, template, cfg, splits.validation),
            stop=stop,
            model_config=cfg,
            params=prepare_params(config, start, base, functools.partial(init_params, cfg)),
            train_batches=rows["train"].train_batches(train.batch_size, config.seed),
            evaluation_batches={name: rows[name].eval_batches(eval_rows) for name in ("validation", "test")},
            longest=2 * bucket_width(max(pair.n_inputs for pairs in encoded.values() for pair in pairs), limit),
            total_steps=count_steps(config, len(encoded["train"])),
            tokens_per_step=round(
                train.batch_size * np.mean([sum(side.n_inputs for side in pair) for pair in encoded["train"]])
            ),
            tokenizer=tokenizer,
            files={"template.json": json.dumps(template.to_dict(), indent=1) + "\n", REFERENCE: text},
            metadata={"template": template.to_dict(), "reference_sha256": hashlib.sha256(text.encode()).hexdigest()},
            fingerprint=preferences.fingerprint(encoded),
            notes=(*notes, *check_prompts(config, tokenizer, template, cfg, test)),
        )

    @classmethod
    def shapes(cls, config: RunConfig, cfg: GPTConfig) -> ModelShapes:
        seq = row_length(config.preference.max_length, "preference.max_length", cfg)
        row = {name: jax.ShapeDtypeStruct((2 * seq,), dtype) for name, dtype in _ROW.items()}
        row |= {name: jax.ShapeDtypeStruct((), "float32") for name in ("pairs", *(f"reference_{s}" for s in SIDES))}
        loss_fn, notes = make_loss_fn(GPTModel(cfg), config.preference), (f"assumed: pairs of 2 × {seq} tokens",)
        return ModelShapes(param_shapes(cfg), functools.partial(init_params, cfg), loss_fn, row, cfg.vocab_size, notes)

    @classmethod
    def check_data(cls, config: RunConfig) -> None:
        if config.preference.template is not None:
            load_template(config.preference.template)
        preferences.load_preferences(config.data, config.preference, config.seed)

    @property
    def loss_fn(self) -> LossFn:
        return make_loss_fn(self.model, self.config.preference)

    def measure(self, params: Params, evaluate: Evaluate, moment: Moment, folder: Path | None) -> dict[str, Any]:
        """Return loss, accuracy and margin of the test split, and how near its answers are to the chosen responses."""
        sums = evaluate(self.evaluation_batches["test"])
        figures = {name: value for name, value in self.figures(sums).items() if name in self.figure_formats}
        return {"test": {"loss": sums.loss, **figures, **self.measure_responses(params, moment, folder)}}


_ROW = {"inputs": "int32", "targets": "int32", "weights": "float32"}


def preference_loss(
    policy: Float[Array, "pairs 2"],
    reference: Float[Array, "pairs 2"],
    lengths: Float[Array, "pairs 2"],
    config: PreferenceConfig,
) -> tuple[Float[Array, " pairs"], Float[Array, "pairs 2"]]:
    """Return the loss of each pair, and the rewards of both responses.

    ``policy`` and ``reference`` are log-probabilities of the chosen (first) and the rejected response (second), summed
    over their tokens, of which there are ``lengths``.

    - dpo: −log σ(Δ), where Δ is the difference of the rewards β · (policy − reference); with ``label_smoothing`` ε,
      (1 − ε) of it plus ε · −log σ(−Δ) (Rafailov et al. 2023, equation 7).
    - ipo: (d − 1 / 2β)², where d is the difference of the log-ratios per token (Azar et al. 2023, equation 17, with
      means over tokens as in TRL).
    - simpo: as dpo with Δ − γ, where the rewards are β · policy per token (Meng et al. 2024, equation 6).

    ``sft_weight`` adds the chosen response's loss per token.
    """
    if config.loss == "simpo":
        rewards = config.beta * policy / lengths
    elif config.loss == "ipo":
        rewards = config.beta * (policy - reference) / lengths
    else:
        rewards = config.beta * (policy - reference)
    delta = rewards[:, 0] - rewards[:, 1]
    if config.loss == "ipo":
        loss = jnp.square(delta / config.beta - 1 / (2 * config.beta))
    else:
        delta = delta - config.gamma if config.loss == "simpo" else delta
        wrong = config.label_smoothing
        loss = -(1 - wrong) * jax.nn.log_sigmoid(delta) - wrong * jax.nn.log_sigmoid(-delta)
    return loss - config.sft_weight * policy[:, 0] / lengths[:, 0], rewards


def make_loss_fn(model: GPTModel, config: PreferenceConfig) -> LossFn:
    """Return the loss, summed over pairs, with metrics on the rewards and log-probabilities."""

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array | None) -> Sums:
        policy, lengths = response_logprobs(model, merge_params(frozen, trainable), batch, key)
        reference = jnp.stack([batch[f"reference_{side}"] for side in SIDES], axis=1)
        loss, rewards = preference_loss(policy, reference, jnp.maximum(lengths, 1), config)
        pairs = batch["pairs"]
        metrics = {
            "accuracy": rewards[:, 0] > rewards[:, 1],
            "margin": rewards[:, 0] - rewards[:, 1],
            **{f"{side}_reward": rewards[:, i] for i, side in enumerate(SIDES)},
            **{f"{side}_logprob": policy[:, i] for i, side in enumerate(SIDES)},
        }
        return jnp.sum(loss * pairs), jnp.sum(pairs), {name: jnp.sum(each * pairs) for name, each in metrics.items()}

    return loss_fn


def response_logprobs(
    model: GPTModel, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[Float[Array, "pairs 2"], Float[Array, "pairs 2"]]:
    """Return the log-probabilities of both responses of each pair, summed over their tokens, and numbers of tokens."""
    n_pairs = len(batch["pairs"])
    inputs, targets, weights = (batch[name].reshape(2 * n_pairs, -1) for name in _ROW)
    rngs = None if key is None else {"dropout": key}
    logits: Any = model.apply({"params": params}, inputs, deterministic=key is None, rngs=rngs)
    logprobs = -optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights
    return logprobs.sum(1).reshape(n_pairs, 2), weights.sum(1).reshape(n_pairs, 2)


def _references(
    start: Start, base: Base, encoded: Mapping[str, list[PairTokens]], limit: int, rows: int, stop: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Return the base's log-probabilities of all responses by split; a run that resumes reads its own."""
    sizes = {name: len(pairs) for name, pairs in encoded.items()}
    if start.step is not None:
        path = start.folder.path / REFERENCE
        text = json.dumps(read_json(path, kind=dict[str, list[tuple[float, float]]]))
        if hashlib.sha256(text.encode()).hexdigest() != start.metadata.get("reference_sha256"):
            raise InputError(f"{path}: is not what this run was trained with; restore it")
        tables = {name: np.array(table, np.float32) for name, table in json.loads(text).items()}
        return {name: tables.get(name, np.zeros((n, 2), np.float32)) for name, n in sizes.items()}
    model = GPTModel(base.model_config)
    logprobs = jax.jit(lambda params, batch: response_logprobs(model, params, batch)[0])
    tables = {name: np.zeros((n, 2), np.float32) for name, n in sizes.items()}
    console = Console(stderr=True)
    for name, pairs in encoded.items():
        of_split = PairRows(pairs, tables[name], limit)
        batches, total = of_split.eval_batches(rows), math.ceil(len(pairs) / rows)
        shown = track(
            batches, f"reference: {name}", total, console=console, transient=True, disable=not console.is_terminal
        )
        for first, batch in zip(itertools.count(0, rows), shown, strict=False):
            stop()
            indices = of_split.order[first : first + rows]
            tables[name][indices] = np.asarray(logprobs(base.params, batch))[: len(indices)]
    return tables
