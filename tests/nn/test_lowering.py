"""Every program that recipes compile can be lowered for a TPU, a T4 and an H100, on a machine that has none of them.

From shapes alone, in the dtype, with the attention and with the loop over layers that would be chosen there. Texts that
are not here are replaced by others: what matters are the shapes.
"""

import dataclasses
import functools
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh
from recipes import initial_params, read, shapes, training_step, with_tokens

from slm_jax.data.builtin import python_docs
from slm_jax.errors import MissingInputError
from slm_jax.generation.config import Sampling
from slm_jax.generation.decode import _Decoder, _Rules, _start
from slm_jax.model import GPTClassifier, GPTModel, get_gpt_config, param_shapes
from slm_jax.nn.blocks import unstack_blocks
from slm_jax.nn.fused_attention import FusedMultiHeadAttention
from slm_jax.nn.target import compiling_for
from slm_jax.runs import Run, save_run
from slm_jax.tasks import classification, pretraining
from slm_jax.tasks.config import get_task
from slm_jax.tokenizer import BPETokenizer, get_tokenizer
from slm_jax.training.hardware import best_dtype
from slm_jax.training.resume import find_start
from slm_jax.training.step import make_eval_step

TARGETS = {"tpu": ("tpu", None), "t4": ("cuda", 7.5), "h100": ("cuda", 9.0)}
# One recipe of each kind: small and large, with dropout, with Muon, each task.
SLOW = ("tiny", "verdict", "shakespeare_speedrun", "sft_instruction")
KINDS = ("gpt2_124m", "classify_spam", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))
# The dtypes of products (left, right, result): the logits are float32 in any case.
PRODUCTS = {
    "float32": {("f32", "f32", "f32")},
    "bfloat16": {("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32")},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """New models in place of what fine-tuning starts from: of their shapes, GPT-2 narrower."""
    folder, bpe = tmp_path_factory.mktemp("bases"), BPETokenizer.train(python_docs()[:300_000], vocab_size=4096)
    made = {f"runs/{name}": (read(name).gpt_config(4096), bpe) for name in ("tiny", "mini")}
    if gpt2_tokenizer_is_here():
        made["gpt2"] = (get_gpt_config(emb_dim=128, n_heads=2, n_layers=2), get_tokenizer("gpt2"))
    for name, (cfg, tokenizer) in made.items():
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), param_shapes(cfg))
        save_run(folder / name, Run(folder / name, None, cfg, params, tokenizer))
    return {name: str(folder / name) for name in made}


def gpt2_tokenizer_is_here():
    try:
        return bool(get_tokenizer("gpt2").encode("a"))
    except MissingInputError:
        return False


@pytest.fixture(scope="module", params=KINDS)
def built(request, bases, tmp_path_factory):
    """A recipe's configuration and task."""
    folder = tmp_path_factory.mktemp("runs")
    config = with_tokens(read(request.param, "--runs_dir", str(folder), "--checkpoint.mirror", "null"), folder)
    if "gpt2" in (config.tokenizer.kind, config.base) and not gpt2_tokenizer_is_here():
        pytest.skip("TIKTOKEN_CACHE_DIR does not point at GPT-2's tokenizer")
    if not config.data.source.startswith("tokens:"):
        source = "builtin:python-docs" if config.task == "pretraining" else f"jsonl:{rows_of(config.task, folder)}"
        data = dataclasses.replace(config.data, source=source, test_source=None)
        config = dataclasses.replace(config, data=data)
    config = dataclasses.replace(config, base=config.base and bases[config.base])
    return config, get_task(config.task).build(config, find_start(config))


def rows_of(task, folder):
    """Write a few hundred texts of lengths up to the longest that models are given."""
    texts = ["a word or two " * (1 + i % 80) for i in range(600)]
    rows = [{"text": f"{i} {text}", "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    if task == "instruction":
        rows = [{"instruction": row["text"], "output": row["label"]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture(params=TARGETS)
def machine(request, monkeypatch):
    """Another machine: its name and what it computes in."""
    # All that jax asks of the machine before it writes down a call of cuDNN's attention; 9.10 is jax 0.7's.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    with compiling_for(*TARGETS[request.param]):
        yield request.param, best_dtype()


def test_every_program_of_a_recipe_lowers_for_accelerators(built, machine):
    (config, task), (target, dtype) = built, machine
    cfg = dataclasses.replace(task.model_config, dtype=dtype)
    if config.task == "classification":
        n_classes = len(task.metadata["classes"])
        loss_fn = classification.make_loss_fn(GPTClassifier(cfg, n_classes, config.classification.pooling))
    else:
        loss_fn = pretraining.make_loss_fn(GPTModel(cfg))
    train_step, initial_state = training_step(config, loss_fn, initial_params(task), task.total_steps)
    state = jax.eval_shape(initial_state, jax.random.key(0))
    batch, validation = jax.eval_shape(lambda: (task.train_batches[0], next(iter(task.validation_batches()))))
    frozen = jax.eval_shape(lambda: task.params.frozen)
    assert len(batch["inputs"]) == config.train.batch_size

    traced = train_step.trace(state, frozen, batch)
    assert shapes(traced.out_info[0]) == shapes(state)
    training = lower(target, traced)
    evaluation = lower(target, jax.jit(make_eval_step(loss_fn)).trace(state.trainable, frozen, validation))

    n_donated = len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", training.text))
    assert n_donated == len(jax.tree.leaves(state))
    assert "stablehlo.while" in training.text  # a loop over layers: as long for 12 of them as for 2
    # Flash attention holds no weights that dropout could drop.
    assert training.has_flash == (target in ("h100", "tpu") and cfg.drop_rate == 0)
    assert evaluation.has_flash == (target in ("h100", "tpu"))
    if config.task == "classification":  # a small head and counts in float32
        assert training.products >= PRODUCTS[dtype] - {("bf16", "bf16", "f32")}
    else:
        assert training.products == evaluation.products == PRODUCTS[dtype]
        # Each layer has a piece of program of its own there, the same for all; what only training does is left out.
        for program in lowered_generation(target, dataclasses.replace(cfg, n_layers=1, drop_rate=0.0, remat="none")):
            assert program.products == PRODUCTS[dtype]


class Program(NamedTuple):
    """A lowered program: its text, the dtypes (left, right, result) of its products, if it calls flash attention."""

    text: str
    products: set[tuple[str, ...]]
    has_flash: bool


def lower(target, traced):
    """Lower for a target, and check what must hold of any program."""
    text = traced.lower(lowering_platforms=(TARGETS[target][0],)).as_text()
    calls = set(re.findall(r"custom_call @([\w.$]+)", text))
    flash_calls = {call for call in calls if call.startswith(("__cudnn$fmha", "tpu_custom_call"))}
    assert calls - flash_calls <= {"Sharding", "cu_threefry2x32_ffi"}  # none back to Python
    assert "f64" not in text
    kind = r"tensor<(?:\d+x)*(\w+)>"
    # Not those with batch dimensions, of attention's scores and weights, whose gradients stay in float32.
    products = re.findall(rf"dot_general (?!.*batching_dims).* : \({kind}, {kind}\) -> {kind}", text)
    return Program(text, set(products), bool(flash_calls))


@functools.cache
def lowered_generation(target, cfg):
    """Lower the three programs of generation, for two texts that are sampled; models of one shape share them."""
    params = jax.eval_shape(unstack_blocks, param_shapes(cfg))
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.9)
    rules = _Rules(sampling.numbers(), jax.random.split(jax.random.key(0), 2), jnp.zeros(1, jnp.int32))
    text = _start(cfg, [np.zeros(9, np.int32), np.zeros(3, np.int32)], keeps_seen=False)
    decoder = _Decoder(GPTModel(cfg), sampling.top_k, stop_when_full=False)
    prefill = _Decoder.prefill.trace(decoder, params, text, rules, length=16, capacity=cfg.context_length)
    text, cache = prefill.out_info
    cached = _Decoder.cached_steps.trace(decoder, params, text, cache, rules, 7)
    sliding = _Decoder.sliding_steps.trace(decoder, params, text, rules, 7)
    return [lower(target, program) for program in (prefill, cached, sliding)]


@pytest.mark.parametrize(("target", "call"), [("tpu", "tpu_custom_call"), ("h100", "__cudnn$fmha")])
def test_flash_attention_lowers_where_micro_batches_have_mapped_some_axes_of_the_mesh(monkeypatch, target, call):
    """As with gradient accumulation over devices that have copies of the parameters."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    attention = FusedMultiHeadAttention(emb_dim=128, n_heads=2, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16)
    params = jax.eval_shape(attention.init, jax.random.key(0), x)
    mesh = AbstractMesh((2, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    whole, rows = PartitionSpec(), PartitionSpec("data")
    with use_abstract_mesh(mesh), compiling_for(*TARGETS[target]):
        mapped = jax.shard_map(
            attention.apply, in_specs=(whole, rows), out_specs=rows, axis_names={"data"}, check_vma=False
        )
        text = jax.jit(mapped).trace(params, x).lower(lowering_platforms=(TARGETS[target][0],)).as_text()
    assert call in text


@pytest.mark.parametrize(
    ("target", "call", "queries", "keys"),
    [
        ("tpu", "@tpu_custom_call", "2x4x128x128", "2x2x128x128"),
        ("h100", "@__cudnn$fmha", "2x128x4x128", "2x128x2x128"),
    ],
)
def test_flash_attention_takes_fewer_key_and_value_heads_as_they_are(monkeypatch, target, call, queries, keys):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    attention = FusedMultiHeadAttention(emb_dim=512, n_heads=4, n_kv_heads=2, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((2, 128, 512), jnp.bfloat16)
    params = jax.eval_shape(attention.init, jax.random.key(0), x)

    def total(params, x):
        return attention.apply(params, x).sum()

    with compiling_for(*TARGETS[target]):
        step = jax.jit(jax.grad(total)).trace(params, x)
        text = step.lower(lowering_platforms=(TARGETS[target][0],)).as_text()
    calls = [line.rsplit(" : (")[-1].partition("->")[0] for line in text.splitlines() if call in line]
    assert len(calls) >= 2  # forward and backward
    for operands in calls:
        assert (operands.count(f"<{queries}xbf16>"), operands.count(f"<{keys}xbf16>")) in ((1, 2), (2, 2), (3, 2))
