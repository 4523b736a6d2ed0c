"""Make steps with Muon on 8 pretend devices, whole and split, and print what came out as JSON; see test_optimizer.py.

XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=16 python muon_devices.py
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.model import GPTConfig, GPTModel, init_params
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.training.config import MeshConfig, OptimizerConfig
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.sharding import make_mesh, put_batch, state_shardings
from slm_jax.training.step import TrainState, make_train_step

OPTIMIZER = OptimizerConfig(kind="muon", warmup_steps=2)
CFG = GPTConfig(vocab_size=64, context_length=8, emb_dim=64, n_heads=2, n_layers=1, unroll=True)
STEPS = 4


def initial_state() -> TrainState:
    params = init_params(CFG, jax.random.key(0))
    return TrainState(jnp.int32(0), params, make_optimizer(OPTIMIZER).init(params), jax.random.key(1))


def train(cfg: MeshConfig) -> tuple[list[float], dict[str, list[int]]]:
    """Return the losses, and of each matrix's moment the shape that one device has."""
    mesh = make_mesh(cfg)
    shardings = state_shardings(mesh, jax.eval_shape(initial_state))
    state = jax.jit(initial_state, out_shardings=shardings)()
    step = make_train_step(make_loss_fn(GPTModel(CFG)), make_optimizer(OPTIMIZER), make_schedule(OPTIMIZER, STEPS))
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    rng, losses = np.random.default_rng(0), []
    for _ in range(STEPS):
        tokens = rng.integers(64, size=(16, 9)).astype(np.int32)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((16, 8), np.float32)}
        state, metrics = step(state, {}, put_batch(mesh, batch))
        losses.append(float(metrics.loss))
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.ndim >= 3}
    moments = {name: leaf for name, leaf in moments.items() if "muon" in name}
    return losses, {name: [*leaf.addressable_shards[0].data.shape] for name, leaf in moments.items()}


if __name__ == "__main__":
    print(json.dumps([train(MeshConfig()), train(MeshConfig(data=4, fsdp=2))]))
