"""Instruction following: predict the responses of a data set, formatted by a template; the loss is pretraining's."""

import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from slm_jax.data import instructions
from slm_jax.data.chat_template import ChatTemplate, template_from_dict
from slm_jax.data.corpus import make_tokenizer
from slm_jax.data.instructions import Tokens
from slm_jax.data.templates import TEMPLATES, Message, Template, encode_prompt, format_prompt, load_template
from slm_jax.data.windows import bucket_width
from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.logprobs import perplexity
from slm_jax.evaluation.responses import Response, score_responses
from slm_jax.files import replace_text
from slm_jax.generation.conversation import answer, prompt_room
from slm_jax.model import GPTConfig, GPTModel, Params, init_params
from slm_jax.tasks.base import Base, count_steps, find_base, new_base, prepare_params, row_length
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.pretraining import language_model_shapes, make_loss_fn
from slm_jax.tokenizer import Tokenizer
from slm_jax.training.resume import Start
from slm_jax.training.step import LossFn
from slm_jax.training.task import Evaluate, ModelShapes, Moment, Task

__all__ = ["Instruction", "answer", "format_prompt"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction(Task):
    """Fine-tuning on instructions with their responses; samples respond to ``asked``, the report to ``test``."""

    unused_keys: ClassVar[tuple[str, ...]] = ("data.packing", "data.text_column")
    samples_at_evaluation: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    written: ClassVar[Mapping[str, str]] = {
        "responses-before.json": "the responses to the test instructions before training",
        "responses.json": "the responses to the test instructions after training",
        "template.json": "the template of the instructions",
    }

    model: GPTModel
    template: Template
    test: Sequence[Any]  # examples or pairs
    asked: Sequence[Message]
    stop: Callable[[], None]

    @classmethod
    def build(cls, config: RunConfig, start: Start, stop: Callable[[], None] = lambda: None) -> "Instruction":
        section, train = config.instruction, config.train
        configured = find_template(section.template, start, "instruction")
        splits = instructions.load_instructions(config.data, section, config.seed)
        stop()
        base = find_base(config, start)
        template = configured or own_template(base)
        if base is None:
            texts = [
                [template.text(example.messages) for example in examples]
                for examples in (splits.train, splits.validation)
            ]
            base = new_base(config, make_tokenizer(config.tokenizer, *texts))
        stop()
        cfg, tokenizer = base.model_config, base.tokenizer
        longest, notes = row_length(section.max_length, "instruction.max_length", cfg), list(splits.notes)
        encoded: dict[str, list[Tokens]] = {}
        for name in ("train", "validation", "test"):
            encoded[name], own_notes = instructions.encode_examples(
                getattr(splits, name),
                tokenizer,
                template,
                mask_prompt=section.mask_prompt,
                max_length=longest,
                too_long=section.too_long,
            )
            notes += [f"{name}: {note}" for note in own_notes]
        stop()
        rows = {name: [[example] for example in tokens] for name, tokens in encoded.items()}
        width = bucket_width(max(t.n_inputs for tokens in encoded.values() for t in tokens), longest)
        if section.packing:
            width = longest
            rows = {name: instructions.pack(tokens, longest, config.seed) for name, tokens in encoded.items()}
            notes.append(f"packed {len(encoded['train']):,} training examples into {len(rows['train']):,} rows")
        shape: dict[str, Any] = {"limit": longest, "bucketed": not section.packing, "packed": section.packing}
        eval_rows = train.eval_batch_size or train.batch_size
        test = splits.test[: section.responses]
        notes += check_prompts(config, tokenizer, template, cfg, test)
        return cls(
            config=config,
            model=GPTModel(cfg),
            template=template,
            test=test,
            asked=choose_asked(config, tokenizer, template, cfg, splits.validation),
            stop=stop,
            model_config=cfg,
            params=prepare_params(config, start, base, functools.partial(init_params, cfg)),
            train_batches=instructions.instruction_batches(
                rows["train"], batch_size=train.batch_size, seed=config.seed, **shape
            ),
            evaluation_batches={
                name: instructions.instruction_eval_batches(rows[name], batch_size=eval_rows, **shape)
                for name in ("validation", "test")
            },
            longest=width,
            total_steps=count_steps(config, len(rows["train"])),
            tokens_per_step=round(train.batch_size * sum(t.n_inputs for t in encoded["train"]) / len(rows["train"])),
            tokenizer=tokenizer,
            files={"template.json": json.dumps(template.to_dict(), indent=1) + "\n"},
            metadata={"template": template.to_dict()},
            fingerprint=_fingerprint(encoded),
            notes=tuple(notes),
        )

    @classmethod
    def shapes(cls, config: RunConfig, cfg: GPTConfig) -> ModelShapes:
        seq = row_length(config.instruction.max_length, "instruction.max_length", cfg)
        notes = (f"assumed: rows of {seq} tokens (instruction.max_length)",)
        return language_model_shapes(cfg, seq, config.instruction.packing, notes)

    @classmethod
    def check_data(cls, config: RunConfig) -> None:
        if config.instruction.template is not None:
            load_template(config.instruction.template)
        instructions.load_instructions(config.data, config.instruction, config.seed)

    @property
    def loss_fn(self) -> LossFn:
        return make_loss_fn(self.model)

    def sample(self, params: Params, key: jax.Array) -> str:
        section = self.config.sample
        text = self._respond(params, [self.asked], temperature=section.temperature, top_k=section.top_k, key=key)[0]
        return self.template.prompt(self.asked) + text

    def _respond(self, params: Params, prompts: Sequence[Sequence[Message]], **sampling: Any) -> list[str]:
        sampling |= {"max_new_tokens": self.config.sample.max_new_tokens, "stop": self.stop}
        return answer(self.model, params, prompts, tokenizer=self.tokenizer, template=self.template, **sampling)

    def measure(self, params: Params, evaluate: Evaluate, moment: Moment, folder: Path | None) -> dict[str, Any]:
        """Return loss, exact match and ROUGE-L of the test split; write the responses to a file."""
        loss = evaluate(self.evaluation_batches["test"]).loss
        return {
            "test": {"loss": loss, "perplexity": perplexity(loss), **self.measure_responses(params, moment, folder)}
        }

    def measure_responses(self, params: Params, moment: Moment, folder: Path | None) -> dict[str, Any]:
        """Return exact match and ROUGE-L of the answers to ``test``, if it has any; write them to a file."""
        figures: dict[str, Any] = {}
        if self.test:
            answers = self._respond(params, [example.prompt for example in self.test])
            responses = [Response(e.where, e.messages, text) for e, text in zip(self.test, answers, strict=True)]
            scores = score_responses(responses)
            figures |= {"responses": scores["n"], "exact_match": scores["exact_match"], "rouge_l": scores["rouge_l"]}
            if folder is not None:
                file = folder / ("responses.json" if moment == "after" else "responses-before.json")
                replace_text(file, json.dumps([_entry(r) for r in responses], indent=1, ensure_ascii=False) + "\n")
        return figures

    figure_formats: ClassVar[Mapping[str, str]] = {
        "loss": ".4f", "perplexity": ",.2f", "exact_match": ".2%", "rouge_l": ".4f",
    }  # fmt: skip

    def report(self, before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
        lines, then = [], before["test"] if before else {}
        for name, form in self.figure_formats.items():
            if name in after["test"]:
                was = f" (before training {then[name]:{form}})" if name in then else ""
                lines.append(f"test: {name.replace('_', ' ')} {after['test'][name]:{form}}{was}")
        return lines

    def next_commands(self) -> tuple[str, ...]:
        config = self.config
        folder = shlex.quote(str(config.folder))
        scoring = f"slm-jax evaluate --run {folder} --responses {shlex.quote(str(config.folder / 'responses.json'))}"
        return (
            f"slm-jax chat --run {folder} --temperature 0 --max-new-tokens {config.sample.max_new_tokens}",
            *([scoring] if self.test else []),
            f"slm-jax export --run {folder} --out {shlex.quote(config.name + '-hf')}",
        )


def find_template(name: str | None, start: Start, section: str) -> Template | None:
    """Return the template; a run that resumes has its own, even if the file that it came from is gone."""
    if "template" not in start.metadata:
        return None if name is None else load_template(name)
    saved = template_from_dict(start.metadata["template"], "the run's template")
    try:
        wanted = saved if name is None else load_template(name)
    except MissingInputError:
        return saved
    if wanted != saved:
        problem = f"{start.folder.path} holds another run: {section}.template {name} has changed"
        raise InputError(f"{problem}; change it back, or use another --run NAME")
    return saved


def own_template(base: Base | None) -> Template:
    """Return the template that a base was trained with, or Alpaca's; one that asks for the date gets today's."""
    template = None if base is None else base.template
    return template.dated() if isinstance(template, ChatTemplate) else template or TEMPLATES["alpaca"]


def check_prompts(
    config: RunConfig, tokenizer: Tokenizer, template: Template, cfg: GPTConfig, test: Sequence[Any]
) -> list[str]:
    """Return a warning if prompts of the test leave no room for an answer."""
    room = prompt_room(cfg, config.sample.max_new_tokens)
    fits = [len(encode_prompt(tokenizer, template, example.prompt)) <= room for example in test]
    if not (n_cut := fits.count(False)):
        return []
    return [
        f"warning: {n_cut:,} of {len(test):,} test prompts are longer than {room} tokens and are truncated on the left "
        "(model.context_length less sample.max_new_tokens)"
    ]


def choose_asked(
    config: RunConfig, tokenizer: Tokenizer, template: Template, cfg: GPTConfig, validation: Sequence[Any]
) -> Sequence[Message]:
    """Return the messages that samples respond to: ``sample.prompt``, or the first validation prompt that fits."""
    section, room = config.sample, prompt_room(cfg, config.sample.max_new_tokens)
    if section.prompt is None or not section.every:
        fits = (e for e in validation if len(encode_prompt(tokenizer, template, e.prompt)) <= room)
        return next(fits, validation[0]).prompt
    if not section.prompt.strip():
        raise InputError("sample.prompt is empty; expected an instruction, or null for one of the validation split")
    asked = (Message("user", section.prompt),)
    try:
        encode_prompt(tokenizer, template, asked)  # reported now, not after an hour
    except InputError as error:
        raise InputError(f"sample.prompt: {error}") from None
    return asked


def _fingerprint(encoded: dict[str, list[Tokens]]) -> str:
    digest = hashlib.sha256()
    for name, examples in encoded.items():
        digest.update(f"{name} {len(examples)}".encode())
        for one in examples:
            digest.update(f" {len(one.ids)} ".encode() + one.ids.astype("<u4").tobytes() + one.counts.tobytes())
    return digest.hexdigest()


def _entry(response: Response) -> dict[str, Any]:
    """Return a response in the format of its file, with the field names of the data set."""
    *asked, reference = response.messages
    answered = {"output": reference.content, "model_response": response.response}
    if len(asked) == 1:
        return {"instruction": asked[0].content, "input": asked[0].input, **answered}
    return {"messages": [{"role": message.role, "content": message.content} for message in asked], **answered}
