"""Instruction following: predict the responses of a data set, shown through a template; pretraining's loss on them."""

import functools
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from slm_jax.data.corpus import make_tokenizer
from slm_jax.data.instruction_batches import (
    Tokens,
    encode_examples,
    instruction_batches,
    instruction_eval_batches,
    pack,
)
from slm_jax.data.instructions import Example, InstructionSplits, load_instructions
from slm_jax.data.templates import Message, Template, format_prompt, load_template
from slm_jax.data.text_batches import bucket_width
from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.responses import Response, score_responses
from slm_jax.evaluation.results import perplexity
from slm_jax.files import replace_text
from slm_jax.generation.conversation import answer, prompt_room
from slm_jax.model import GPTModel, Params, init_params
from slm_jax.tasks.base import count_steps, find_base, longest_allowed, new_base, prepare_params
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.tokenizer import Tokenizer
from slm_jax.training.start import Start
from slm_jax.training.step import Batch
from slm_jax.training.task import Evaluate, Moment, Task

__all__ = ["answer", "build", "format_prompt"]


def build(config: RunConfig, start: Start, stop: Callable[[], None] | None = None) -> Task:
    """Prepare fine-tuning on instructions: splits, base, template, batches and loss.

    Args:
        config: the run's configuration.
        start: where the run starts.
        stop: called between the phases; may raise to stop early.

    Raises:
        InputError: instructions, a template and a base that cannot be used, or not together.
    """
    check = stop or (lambda: None)
    section, train = config.instruction, config.train
    template = _template(section.template, start)
    splits = load_instructions(config.data, section, config.seed)
    check()
    base = find_base(config, start)
    if base is None:
        texts = (_texts(splits.train, template), _texts(splits.validation, template))
        base = new_base(config, make_tokenizer(config.tokenizer, *texts))
    check()
    cfg, tokenizer = base.model_config, base.tokenizer
    longest = longest_allowed(section.max_length, "instruction.max_length", cfg)
    encoded, notes = _encode(config, splits, tokenizer, template, longest)
    check()
    rows = {name: [[example] for example in tokens] for name, tokens in encoded.items()}
    if section.packing:
        rows = {name: pack(tokens, longest, config.seed) for name, tokens in encoded.items()}
        notes.append(f"packed {len(encoded['train']):,} training examples into {len(rows['train']):,} rows")
    shape: dict[str, Any] = {"limit": longest, "bucketed": not section.packing, "packed": section.packing}
    model = GPTModel(cfg)
    eval_rows = train.eval_batch_size or train.batch_size
    evaluation_batches = {
        name: functools.partial(instruction_eval_batches, rows[name], batch_size=eval_rows, **shape)
        for name in ("validation", "test")
    }
    n_new = config.sample.max_new_tokens
    room, asked = prompt_room(cfg, n_new), splits.test[: section.responses]

    def fits(example: Example) -> bool:
        return len(tokenizer.encode(template.prompt(example.prompt))) <= room

    if n_cut := len(asked) - sum(map(fits, asked)):
        notes.append(f"test: {n_cut:,} of {len(asked):,} answers see only the last {room} tokens of their prompt")
    held_out = next(filter(fits, splits.validation), splits.validation[0])
    respond = functools.partial(answer, model, tokenizer=tokenizer, template=template, max_new_tokens=n_new, stop=check)
    return Task(
        model_config=cfg,
        params=prepare_params(config, start, base, functools.partial(init_params, cfg)),
        loss_fn=make_loss_fn(model),
        train_batches=instruction_batches(rows["train"], batch_size=train.batch_size, seed=config.seed, **shape),
        validation_batches=evaluation_batches["validation"],
        longest=longest
        if section.packing
        else bucket_width(max(t.n_inputs for tokens in encoded.values() for t in tokens), longest),
        total_steps=count_steps(config, len(rows["train"])),
        tokens_per_step=round(train.batch_size * sum(t.n_inputs for t in encoded["train"]) / len(rows["train"])),
        tokenizer=tokenizer,
        files={"template.json": json.dumps(template.to_dict(), indent=1) + "\n"},
        metadata={"template": template.to_dict()},
        fingerprint=_fingerprint(encoded),
        samples_with_evaluation=True,
        sample=_sampler(config, respond, tokenizer, template, held_out),
        measure=functools.partial(_measure, evaluation_batches["test"], respond, asked),
        report=_report,
        notes=(*splits.notes, *notes),
        next_commands=_next_commands(config),
    )


def _template(name: str, start: Start) -> Template:
    """Return the template: a run that goes on has its own, whatever became of the file that it came from."""
    if "template" not in start.metadata:
        return load_template(name)
    saved = Template.from_dict(start.metadata["template"], "the run's template")
    try:
        wanted = load_template(name)
    except MissingInputError:
        return saved
    if wanted != saved:
        raise InputError(
            f"{start.folder.path} holds another run: instruction.template {name} has changed; change it back, or start "
            "anew with --run NAME"
        )
    return saved


def _texts(examples: Sequence[Example], template: Template) -> list[str]:
    return ["".join(text for text, _ in template.pieces(example.messages)) for example in examples]


def _encode(
    config: RunConfig, splits: InstructionSplits, tokenizer: Tokenizer, template: Template, longest: int
) -> tuple[dict[str, list[Tokens]], list[str]]:
    encoded, notes = {}, []
    for name in ("train", "validation", "test"):
        encoded[name], said = encode_examples(
            getattr(splits, name),
            tokenizer,
            template,
            mask_prompt=config.instruction.mask_prompt,
            max_length=longest,
            too_long=config.instruction.too_long,
        )
        notes += [f"{name}: {note}" for note in said]
    return encoded, notes


def _fingerprint(encoded: dict[str, list[Tokens]]) -> str:
    digest = hashlib.sha256()
    for name, examples in encoded.items():
        digest.update(f"{name} {len(examples)}".encode())
        for tokens in examples:
            digest.update(
                f" {len(tokens.ids)} ".encode() + tokens.ids.astype("<u4").tobytes() + tokens.counts.tobytes()
            )
    return digest.hexdigest()


def _sampler(
    config: RunConfig,
    respond: Callable[..., list[str]],
    tokenizer: Tokenizer,
    template: Template,
    held_out: Example,
) -> Callable[[Params, jax.Array], str] | None:
    """Return what answers one instruction while training: the configured one, or the first of the validation split."""
    cfg = config.sample
    if not cfg.every:
        return None
    if cfg.prompt is not None and not cfg.prompt.strip():
        raise InputError("sample.prompt is empty; expected an instruction, or null for one of the validation split")
    asked = held_out.prompt if cfg.prompt is None else (Message("user", cfg.prompt),)
    try:
        tokenizer.encode(template.prompt(asked))  # refused now, not after an hour
    except InputError as error:
        raise InputError(f"sample.prompt: {error}") from None

    def sample(params: Params, key: jax.Array) -> str:
        text = respond(params, [asked], temperature=cfg.temperature, top_k=cfg.top_k, key=key)[0]
        return template.prompt(asked) + text

    return sample


def _measure(
    test_batches: Callable[[], Iterable[Batch]],
    respond: Callable[..., list[str]],
    test: Sequence[Example],
    params: Params,
    evaluate: Evaluate,
    moment: Moment,
    folder: Path | None,
) -> dict[str, Any]:
    """Return the loss on the test split, and exact match and ROUGE-L of the answers, which go into a file."""
    loss = evaluate(test_batches()).loss
    figures: dict[str, Any] = {"loss": loss, "perplexity": perplexity(loss)}
    if test:
        answers = respond(params, [example.prompt for example in test])
        responses = [Response(e.where, e.messages, text) for e, text in zip(test, answers, strict=True)]
        scores = score_responses(responses)
        figures |= {"responses": scores.n, "exact_match": scores.exact_match, "rouge_l": scores.rouge_l}
        if folder is not None:
            name = "responses.json" if moment == "after" else "responses-before.json"
            entries = [_entry(response) for response in responses]
            replace_text(folder / name, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    return {"test": figures}


def _entry(response: Response) -> dict[str, Any]:
    """Return a response as the file has it, with the names of the entries that it answers."""
    *asked, reference = response.messages
    answered = {"output": reference.content, "model_response": response.response}
    if len(asked) == 1:
        return {"instruction": asked[0].content, "input": asked[0].input, **answered}
    return {"messages": [{"role": message.role, "content": message.content} for message in asked], **answered}


def _report(before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
    lines = []
    for name, form in (("loss", ".4f"), ("perplexity", ",.2f"), ("exact_match", ".2%"), ("rouge_l", ".4f")):
        if name in after["test"]:
            was = f" (before training {before['test'][name]:{form}})" if before and name in before["test"] else ""
            lines.append(f"test: {name.replace('_', ' ')} {after['test'][name]:{form}}{was}")
    return lines


def _next_commands(config: RunConfig) -> tuple[str, ...]:
    folder = shlex.quote(str(config.folder))
    scoring = f"slm-jax evaluate --run {folder} --responses {shlex.quote(str(config.folder / 'responses.json'))}"
    return (
        f"slm-jax chat --run {folder} --temperature 0 --max-new-tokens {config.sample.max_new_tokens}",
        *([scoring] if config.instruction.responses != 0 else []),
        f"slm-jax export --run {folder} --out {shlex.quote(config.name + '-hf')}",
    )
