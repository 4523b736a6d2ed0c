"""Train a small GPT on 8 pretend devices in several ways and print what came out as JSON; see test_sharding.py.

Run as a program of its own, because the devices are pretended before JAX starts:
    XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=16 python eight_devices.py FOLDER
"""

import contextlib
import dataclasses
import functools
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.cli import main as slm_jax
from slm_jax.model import GPTClassifier, GPTConfig, GPTModel, init_cache, init_params
from slm_jax.nn.sharding import state_shardings
from slm_jax.runs import Run, save_run
from slm_jax.tasks import classification
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.tokenizer import CharTokenizer
from slm_jax.tools.plan.hlo import find_collectives
from slm_jax.training.checkpoint import Checkpoints
from slm_jax.training.config import LoRAConfig, MeshConfig, OptimizerConfig
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.sharding import make_mesh, put_batch, put_params
from slm_jax.training.step import TrainState, make_eval_step, make_train_step
from slm_jax.training.trainable import split_params

BATCH, SEQ, VOCAB, STEPS = 16, 8, 64, 5
MESHES = {
    "data=8": MeshConfig(),
    "fsdp=8": MeshConfig(fsdp=8),
    "tensor=8": MeshConfig(tensor=8),
    "data=2,fsdp=2,tensor=2": MeshConfig(fsdp=2, tensor=2),
    "replica=2,data=2,fsdp=2": MeshConfig(fsdp=2, replica=2),
}
GENERATED = {
    "tensor=8": ["--mesh.tensor", "8"],
    "fsdp=2,tensor=2": ["--mesh.fsdp", "2", "--mesh.tensor", "2"],  # half of the devices
}
# Trained on these meshes only, as compiling takes most of the time; benchmarks/mesh_losses.py has all.
WITH_DROPOUT = WITH_LORA = ("fsdp=8", "data=2,fsdp=2,tensor=2")
QWEN3 = {
    "norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "hidden_dim": 160, "bias": False, "head_dim": 16,
    "qk_norm": True,
}  # fmt: skip
DROP_RATES = {1: 0.0, 2: 0.1}  # by accumulation; with dropout a step takes twice as long to compile
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
MUON = OptimizerConfig(kind="muon", warmup_steps=2)


def model(drop_rate: float, **changes) -> GPTModel:
    cfg = GPTConfig(vocab_size=VOCAB, context_length=SEQ, emb_dim=64, n_heads=8, n_layers=1, unroll=True)
    return GPTModel(dataclasses.replace(cfg, drop_rate=drop_rate, **changes))


def batches() -> list[dict[str, np.ndarray]]:
    """Random tokens; row i counts its first i/2 + 1 targets."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        tokens = rng.integers(VOCAB, size=(BATCH, SEQ + 1)).astype(np.int32)
        weights = (np.arange(SEQ)[None, :] <= np.arange(BATCH)[:, None] // 2).astype(np.float32)
        found.append({"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    return found


def initial_state(optimizer: OptimizerConfig = OPTIMIZER, **changes) -> TrainState:
    params = init_params(model(0.0, **changes).cfg, jax.random.key(0))
    return TrainState(jnp.int32(0), params, make_optimizer(optimizer).init(params), jax.random.key(1))


def train_step(accumulate: int, optimizer: OptimizerConfig = OPTIMIZER, **changes):
    loss_fn = make_loss_fn(model(DROP_RATES[accumulate], **changes))
    return make_train_step(loss_fn, make_optimizer(optimizer), make_schedule(optimizer, STEPS), accumulate)


def on_mesh(cfg: MeshConfig | None) -> contextlib.AbstractContextManager:
    """Name the mesh, as the loop does: without it the model splits nothing by itself."""
    return contextlib.nullcontext() if cfg is None else jax.set_mesh(make_mesh(cfg))


def train(cfg: MeshConfig | None, start, given: tuple, step, frozen: dict, batches: list) -> tuple:
    """Losses, last state and what is frozen, on a mesh, put together as the loop does it (None: on one device)."""
    if cfg is None:
        state, step = jax.jit(start)(*given), jax.jit(step)
    else:
        mesh = make_mesh(cfg)
        shardings = state_shardings(mesh, jax.eval_shape(start, *given))
        state = jax.jit(start, out_shardings=shardings)(*(put_params(mesh, tree) for tree in given))
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        frozen, batches = put_params(mesh, frozen), [put_batch(mesh, batch) for batch in batches]
    losses = []
    with on_mesh(cfg):
        for batch in batches:
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics.loss))
    return losses, state, frozen


def train_gpt(cfg: MeshConfig | None, accumulate: int, optimizer=OPTIMIZER, **changes) -> tuple:
    """The losses of the steps, and of an evaluation after them; the last state."""
    start = functools.partial(initial_state, optimizer, **changes)
    losses, state, _ = train(cfg, start, (), train_step(accumulate, optimizer, **changes), {}, batches())
    batch = batches()[0] if cfg is None else put_batch(make_mesh(cfg), batches()[0])
    with on_mesh(cfg):
        loss, weight, _ = jax.jit(make_eval_step(make_loss_fn(model(0.0, **changes))))(state.trainable, {}, batch)
    return [*losses, float(loss) / float(weight)], state


def tune_with_lora(cfg: MeshConfig | None) -> dict:
    """The losses of a classifier with adapters beside a frozen trunk, on a mesh (None: on one device)."""
    tuned = GPTClassifier(model(0.0).cfg, n_classes=3)
    shape = {"tokens": jnp.zeros((1, 1), jnp.int32), "lengths": jnp.ones(1, jnp.int32)}
    params = jax.jit(tuned.init)(jax.random.key(0), **shape)["params"]
    config = RunConfig(base="x", trainable="lora", lora=LoRAConfig(rank=64, targets=("*",)))
    trainable, frozen = jax.tree.map(np.asarray, split_params(params, config, jax.random.key(2)))
    step = make_train_step(
        classification.make_loss_fn(tuned), make_optimizer(OPTIMIZER), make_schedule(OPTIMIZER, STEPS), 2
    )
    texts = [
        {
            "inputs": batch["inputs"],
            "lengths": np.arange(BATCH, dtype=np.int32) // 2 + 1,
            "labels": batch["targets"][:, 0] % 3,
            "weights": batch["weights"].sum(1) / SEQ,
        }
        for batch in batches()
    ]

    def start(trainable) -> TrainState:
        return TrainState(jnp.int32(0), trainable, make_optimizer(OPTIMIZER).init(trainable), jax.random.key(1))

    losses, state, frozen = train(cfg, start, (trainable,), step, frozen, texts)
    if cfg is None:
        return {"losses": losses}
    return {"losses": losses, "trainable": shard_shapes(state.trainable), "frozen": shard_shapes(frozen)}


def shard_shapes(tree) -> dict[str, list]:
    """Of each leaf its shape and those of the parts that the devices hold."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(leaf.shape),
            sorted({s.data.shape for s in leaf.addressable_shards}),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def bits(tree) -> list[str]:
    return [np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves(tree)]


def abstract(state: TrainState, shardings) -> TrainState:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def raw(state: TrainState) -> TrainState:
    return state.replace(key=jax.random.key_data(state.key))


def sent(name: str, accumulate: int = 1, times: int = 1) -> dict[str, float]:
    """The bytes in each kind of collective of a training step, as multiples of the parameters'."""
    mesh, shapes = make_mesh(MESHES[name]), jax.eval_shape(initial_state)
    shardings = state_shardings(mesh, shapes)
    batch = put_batch(mesh, {key: np.concatenate([rows] * times) for key, rows in batches()[0].items()})
    step = jax.jit(train_step(accumulate), donate_argnums=0, out_shardings=(shardings, None))
    with on_mesh(MESHES[name]):
        text = step.lower(abstract(shapes, shardings), {}, batch).compile().as_text()
    n_bytes, found = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes.trainable)), {}
    for one in find_collectives(text):
        found[one.kind] = found.get(one.kind, 0) + one.count * one.n_bytes / n_bytes
    return found


def own_mesh() -> list[float]:
    """The losses on a mesh of other axes than ours, which only splits the rows that it was given so."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    state, step, losses = jax.jit(initial_state)(), jax.jit(train_step(2)), []
    with jax.set_mesh(mesh):
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        for batch in batches():
            state, metrics = step(state, {}, jax.device_put(batch, NamedSharding(mesh, PartitionSpec("x"))))
            losses.append(float(metrics.loss))
    return losses


def write_texts(run: Path) -> dict[str, dict[str, str]]:
    """What ``slm-jax generate`` writes, greedily and at random, on one device and on several."""
    cfg, tokenizer = model(0.0).cfg, CharTokenizer().build_vocab("".join(map(chr, range(48, 47 + VOCAB))))
    save_run(run, Run(run, None, cfg, init_params(cfg, jax.random.key(0)), tokenizer))
    texts: dict = {}
    for temperature in ("0", "1"):
        for name, words in (("one", []), *GENERATED.items()):
            arguments = ["--prompt", "12", "--max_new_tokens", "9", "--temperature", temperature, *words]
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert slm_jax(["generate", "--run", str(run), *arguments]) == 0
            texts.setdefault(temperature, {})[name] = out.getvalue()
    return texts


def cache_shards() -> dict[str, list]:
    """How tensor splits a cache of two rows."""
    gpt, mesh = model(0.0), make_mesh(MESHES["tensor=8"])
    params = put_params(mesh, init_params(gpt.cfg, jax.random.key(0)))

    @jax.jit
    def prefill(params):
        cache = init_cache(gpt.cfg, params, 2, SEQ)
        return gpt.apply({"params": params}, jnp.ones((2, 3), jnp.int32), cache=cache)[1].blocks

    with jax.set_mesh(mesh):
        return shard_shapes(prefill(params))


def main(folder: Path) -> None:
    assert jax.device_count() == 8
    result: dict = {"one": {}, "mesh": {}, "shards": {}}
    for accumulate in (1, 2):
        result["one"][f"accumulate={accumulate}"] = train_gpt(None, accumulate)[0]
        for name in MESHES if accumulate == 1 else WITH_DROPOUT:
            losses, state = train_gpt(MESHES[name], accumulate)
            result["mesh"][f"{name} accumulate={accumulate}"] = losses
            result["shards"][f"{name} accumulate={accumulate}"] = {
                "params": shard_shapes(state.trainable), "opt_state": shard_shapes(state.opt_state)
            }  # fmt: skip
    for name, cfg in (("whole", MeshConfig()), ("split", MeshConfig(data=2, fsdp=2, tensor=2))):
        losses, muon = train_gpt(cfg, 1, MUON)
        result[f"muon {name}"] = {"losses": losses, "shards": shard_shapes(muon.opt_state)}
    for n_kv_heads, mesh in ((1, MeshConfig(tensor=2)), (2, MESHES["data=2,fsdp=2,tensor=2"])):
        losses = [train_gpt(cfg, 1, **QWEN3, n_kv_heads=n_kv_heads)[0] for cfg in (None, mesh)]
        result[f"qwen3, {n_kv_heads} kv heads"] = losses
    result["sent"] = {
        "fsdp": sent("fsdp=8"), "twice the rows": sent("fsdp=8", times=2),
        "data": sent("data=8"), "accumulated": sent("data=8", accumulate=2),
    }  # fmt: skip
    result["lora"] = {name: tune_with_lora(MESHES.get(name)) for name in ("one", *WITH_LORA)}

    result["own mesh"] = own_mesh()
    result["generated"], result["cache"] = write_texts(folder / "written"), cache_shards()

    # What one device saved (test_sharding.py did), restored onto a mesh; and what a mesh saved, for one device.
    for name, cfg in MESHES.items():
        mesh = make_mesh(cfg)
        shapes = jax.eval_shape(initial_state)
        like = abstract(shapes, state_shardings(mesh, shapes))
        with Checkpoints(folder / "from_one") as checkpoints:
            restored = checkpoints.restore(3, like)
        result[f"restored on {name}"] = {"bits": bits(raw(restored)), "shards": shard_shapes(restored.trainable)}
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
    with Checkpoints(folder / "from_eight") as checkpoints:
        checkpoints.save(state, {"data": {}}, 1.0)
    result["saved by eight"] = {"step": int(state.step), "bits": bits(raw(state))}
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
