"""One contestant of benchmarks/peers.py: a process of its own, which builds a model once and runs rounds when asked.

peers.py starts it with the work as JSON. It answers with one line of JSON when the model is built, and then with one
for each line on its standard input, which is a number of steps. Nothing but NumPy and the contestant's own library is
imported, so that any Python which has them will do.

A training step is forward, backward, clipping of the gradients' norm to 1 and AdamW, always on the same random tokens;
a step of generation decodes `new` tokens greedily after a prompt of `prompt` random ones, with a cache. The loss that
a round ends with shows that the contestants learn alike.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rounds = Callable[[int], float]  # runs so many steps, waits until they are done, and returns the loss or a checksum

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.99), 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a contestant is to do.

    Attributes:
        name: the contestant's.
        kind: train or generate.
        layers, heads, width, vocab, context, bias: the model's shape; a padded vocabulary is the contestant's business.
        batch: rows.
        prompt, new: tokens a row of generation.
        exact_gelu: slm_jax: GELU with the error function, as nanoGPT computes it.
        remat: slm_jax: what the backward pass computes again.
        dtype: float32, or bfloat16: for training in mixed precision, for generation of the weights, too.
        device: cpu or gpu.
        threads: CPU threads; None: all.
        compile: torch.compile for what is written in PyTorch.
        source: the folder of the contestant's code; None: it is installed.
    """

    name: str
    kind: str
    layers: int
    heads: int
    width: int
    vocab: int
    context: int
    batch: int
    bias: bool
    prompt: int
    new: int
    exact_gelu: bool
    remat: str
    dtype: str
    device: str
    threads: int | None
    compile: bool
    source: str | None = None


class SkippedError(Exception):
    """Why a contestant cannot do the work, and what would help."""


def slm_jax(work: Work) -> Rounds:
    """Build this checkout's model and the step that its training compiles."""
    from slm_jax.training.process import keep_freed_memory

    keep_freed_memory()  # as every command does
    import jax

    _require_jax_device(work)
    if work.kind == "generate":
        return _slm_jax_generation(work)
    from slm_jax.data.config import TokenizerConfig
    from slm_jax.tasks.config import RunConfig
    from slm_jax.tools.bench.training import compile_step
    from slm_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig
    from slm_jax.training.sharding import put_batch

    model = ModelConfig(
        n_layers=work.layers, n_heads=work.heads, emb_dim=work.width, vocab_size=work.vocab,
        context_length=work.context, bias=work.bias, exact_gelu=work.exact_gelu, remat=work.remat, dtype=work.dtype,
    )  # fmt: skip
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0], beta2=BETAS[1], clip_norm=CLIP_NORM,
    )  # fmt: skip
    train = TrainConfig(batch_size=work.batch)
    # A tokenizer of characters has as many ids as model.vocab_size says; there is no text.
    step = compile_step(
        RunConfig(model=model, tokenizer=TokenizerConfig(kind="char"), optimizer=optimizer, train=train)
    )
    tokens = _random_tokens(work, work.context + 1)
    weights = np.ones((work.batch, work.context), np.float32)
    batch = put_batch(step.mesh, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    state, frozen = step.init()
    metrics: Any = None

    def run(steps: int) -> float:
        nonlocal state, metrics
        for _ in range(steps):
            state, metrics = step.compiled(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return run


def _slm_jax_generation(work: Work) -> Rounds:
    import jax

    from slm_jax import GPTConfig, GPTModel, generate
    from slm_jax.model import init_params
    from slm_jax.nn.blocks import unstack_blocks

    dtype: Any = work.dtype
    cfg = GPTConfig(
        n_layers=work.layers, n_heads=work.heads, emb_dim=work.width, vocab_size=work.vocab, bias=work.bias,
        context_length=work.context, exact_gelu=work.exact_gelu, dtype=dtype, param_dtype=dtype,
    )  # fmt: skip
    params = unstack_blocks(jax.jit(lambda: init_params(cfg, jax.random.key(0)))())
    prompts = _random_tokens(work, work.prompt)

    def run(steps: int) -> float:
        for _ in range(steps):
            ids = generate(GPTModel(cfg), params, prompts, max_new_tokens=work.new, temperature=0.0)
            checksum = float(np.asarray(ids).sum())
        return checksum

    return run


def nanodo(work: Work) -> Rounds:
    """Build nanodo's model, and a step with the loss and the optimizer that its defaults describe."""
    if work.kind == "generate":
        raise SkippedError("nanodo has no cache to decode with")
    if work.bias:
        raise SkippedError("nanodo's model has no biases; leave out --bias")
    _import_from(work, "nanodo", "git clone https://github.com/google-deepmind/nanodo and --nanodo FOLDER")
    import jax
    import jax.numpy as jnp
    import optax
    from nanodo.model import DoConfig, TransformerDo

    _require_jax_device(work)
    dtype = getattr(jnp, work.dtype)
    model = TransformerDo(DoConfig(work.width, work.heads, work.context, work.layers, work.vocab, 4 * work.width,
                                   dtype=dtype, fsdp_enabled=False))  # fmt: skip
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=WEIGHT_DECAY),
    )
    tokens = jnp.asarray(_random_tokens(work, work.context + 1))

    def first_state() -> Any:
        params = model.init(jax.random.key(0), tokens[:, :-1])["params"]
        return params, optimizer.init(params)

    def loss_fn(params: Any, tokens: Any) -> Any:
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: Any, tokens: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    state, loss = jax.jit(first_state)(), jnp.nan
    compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()

    def run(steps: int) -> float:
        nonlocal state, loss
        for _ in range(steps):
            state, loss = compiled(state, tokens)
        jax.block_until_ready(state)
        return float(loss)

    return run


def nanogpt(work: Work) -> Rounds:
    """Build nanoGPT's model and optimizer, and the step of its train.py."""
    if work.kind == "generate":
        raise SkippedError("nanoGPT has no cache to decode with")
    if work.source is None:
        raise SkippedError("nanoGPT is not named: git clone https://github.com/karpathy/nanoGPT and --nanogpt FOLDER")
    _import_from(work, "model", "expected nanoGPT's model.py in the folder that --nanogpt names")
    from model import GPT
    from model import GPTConfig as Config

    vocab = 50_304 if work.vocab == 50_257 else work.vocab  # as its train.py rounds GPT-2's up, for speed
    model = GPT(Config(work.context, vocab, work.layers, work.heads, work.width, dropout=0.0, bias=work.bias))
    model.to(_torch_device(work))
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, _torch_device(work))
    return _torch_rounds(work, model, optimizer, lambda model, inputs, targets: model(inputs, targets)[1])


def transformers(work: Work) -> Rounds:
    """Build transformers' GPT-2, as its documentation has it."""
    if not work.bias:
        raise SkippedError("transformers' GPT-2 always has biases; add --bias")
    _import_from(work, "transformers", "pip install torch transformers")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = GPT2Config(
        vocab_size=work.vocab, n_positions=work.context, n_embd=work.width, n_layer=work.layers, n_head=work.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=work.kind == "generate",
    )  # fmt: skip
    model = GPT2LMHeadModel(cfg).to(_torch_device(work))
    if work.kind == "train":
        # It shifts the labels itself, so the row's last position has none.
        return _torch_rounds(work, model, None, lambda model, inputs, _: model(inputs, labels=inputs).loss)
    model = model.to(getattr(torch, work.dtype)).eval()
    prompts = torch.tensor(_random_tokens(work, work.prompt), device=_torch_device(work))

    def run(steps: int) -> float:
        for _ in range(steps):
            with torch.inference_mode():
                out = model.generate(
                    prompts, attention_mask=torch.ones_like(prompts), use_cache=True, do_sample=False,
                    max_new_tokens=work.new, min_new_tokens=work.new, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            checksum = float(out.sum())
        return checksum

    return run


def book(work: Work) -> Rounds:
    """Build the book's GPTModel, its output head tied so that it has as many parameters as the others."""
    if work.kind == "generate":
        raise SkippedError("the cached GPTModel of the book's package fails at the second token")
    if not work.bias:
        raise SkippedError("the book's GPTModel always has biases; add --bias")
    _import_from(work, "llms_from_scratch", "pip install llms-from-scratch, or --book FOLDER that has its package")
    import torch

    cfg = {
        "vocab_size": work.vocab, "context_length": work.context, "emb_dim": work.width, "n_heads": work.heads,
        "n_layers": work.layers, "drop_rate": 0.0, "qkv_bias": True,
    }  # fmt: skip
    from llms_from_scratch.ch04 import GPTModel

    model = GPTModel(cfg)
    model.out_head.weight = model.tok_emb.weight
    for weight in (p for p in model.parameters() if p.dim() >= 2):
        torch.nn.init.normal_(weight, std=0.02)  # PyTorch's default embeddings would give a tied head wild logits
    model.to(_torch_device(work))
    cross_entropy = torch.nn.functional.cross_entropy
    return _torch_rounds(
        work, model, None, lambda model, inputs, targets: cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    )


def _torch_rounds(work: Work, model: Any, optimizer: Any, loss_of: Callable[..., Any]) -> Rounds:
    """Return nanoGPT's step; without an optimizer, AdamW with decay of the matrices only, which is nanoGPT's, too."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as nanoGPT, and as JAX by default
    device = _torch_device(work)
    if optimizer is None:
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=device == "cuda")
    tokens = torch.tensor(_random_tokens(work, work.context + 1), dtype=torch.long, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    forward = torch.compile(model) if work.compile else model

    def precision() -> contextlib.AbstractContextManager[Any]:
        return (
            contextlib.nullcontext() if work.dtype == "float32" else torch.autocast(device, getattr(torch, work.dtype))
        )

    def run(steps: int) -> float:
        for _ in range(steps):
            with precision():
                loss = loss_of(forward, inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return run


def _torch_device(work: Work) -> str:
    import torch

    if work.device == "gpu" and not torch.cuda.is_available():
        raise SkippedError("this PyTorch sees no GPU; install one with CUDA")
    return "cuda" if work.device == "gpu" else "cpu"


def _require_jax_device(work: Work) -> None:
    import jax

    try:
        jax.devices(work.device)
    except (AssertionError, RuntimeError):  # the former where JAX has no plugin for GPUs at all
        remedy = "; pip install 'jax[cuda12]'" if work.device == "gpu" else ""
        raise SkippedError(f"JAX finds no {work.device.upper()} here{remedy}") from None


def _import_from(work: Work, module: str, remedy: str) -> None:
    """Make a module importable from the folder, or say how to get it."""
    if work.source is not None:
        sys.path.insert(0, work.source)
    if importlib.util.find_spec(module) is None:
        where = f"in {work.source}" if work.source else "in this Python"
        raise SkippedError(f"there is no {module} {where}: {remedy}")


def _random_tokens(work: Work, length: int) -> Any:
    return np.random.default_rng(0).integers(work.vocab, size=(work.batch, length), dtype=np.int32)


def set_up(work: Work) -> None:
    """Choose what this process computes on, before any library is imported. XLA counts the CPUs that it may use."""
    sys.path[0] = str(Path(__file__).parent.parent)  # this checkout's slm_jax; the names in this folder are too plain
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("JAX_PLATFORMS", "cuda" if work.device == "gpu" else "cpu")
    if work.threads is not None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.threads])
        os.environ |= {name: str(work.threads) for name in ("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def _peak_bytes(work: Work) -> int:
    """Return the most memory taken so far: of the GPU what the framework gave out, on a CPU the process's."""
    if work.device == "gpu" and "jax" in sys.modules:
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    if work.device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _describe(work: Work) -> dict[str, Any]:
    """Return versions and, of slm_jax, the arithmetic of a token and what the device can do at best."""
    libraries = [name for name in ("jax", "torch", "transformers") if name in sys.modules]
    versions = {name: importlib.metadata.version(name) for name in libraries}
    if work.name != "slm_jax":
        return {"versions": versions}
    import jax

    from slm_jax import GPTConfig
    from slm_jax.training.hardware import flops_per_token, peak_flops

    dtype: Any = work.dtype
    cfg = GPTConfig(n_layers=work.layers, n_heads=work.heads, emb_dim=work.width, vocab_size=work.vocab,
                    context_length=work.context, bias=work.bias, dtype=dtype)  # fmt: skip
    figures = {"flops_per_token": flops_per_token(cfg), "peak_flops": peak_flops(cfg.dtype)}
    return {"versions": versions, "device": jax.devices()[0].device_kind, **figures}


CONTESTANTS = {
    "slm_jax": slm_jax, "nanogpt": nanogpt, "transformers": transformers, "book": book, "nanodo": nanodo,
}  # fmt: skip


def main() -> None:
    """Build the contestant, and run a round for each line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print must not get between the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers)

    work = Work(**json.loads(sys.argv[1]))
    set_up(work)
    began = time.perf_counter()
    try:
        run = CONTESTANTS[work.name](work)
        run(1)  # what compiles at the first call does it here
        first_step_seconds, began = time.perf_counter() - began, time.perf_counter()
        run(1)
        answer(first_step_seconds=first_step_seconds, step_seconds=time.perf_counter() - began, **_describe(work))
        for line in sys.stdin:
            idle_cpu = time.process_time()
            round_began = time.perf_counter()
            loss = run(int(line))
            seconds = time.perf_counter() - round_began
            answer(seconds=seconds, loss=loss, peak_bytes=_peak_bytes(work), cpu=(idle_cpu, time.process_time()))
    except SkippedError as reason:
        answer(skipped=str(reason))
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        out_of_memory = any(
            sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "out of memory", "on each device and there are")
        )
        answer(failed="out of memory" if out_of_memory else f"{type(error).__name__}: {text}")
        raise


if __name__ == "__main__":
    main()
