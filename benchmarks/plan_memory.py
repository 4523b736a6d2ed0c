"""Compare the memory that slm-jax plan computes with XLA's own analysis of the compiled training step.

    python benchmarks/plan_memory.py                                  # this machine's CPU, float32
    python benchmarks/plan_memory.py --tpu v5e:2x2                    # a TPU's compiler; no TPU is needed, only libtpu
    python benchmarks/plan_memory.py --case gpt2-small,4,context_length=256,remat=full

A case is PRESET,ROWS and then fields of the model, and accumulate. The step is the training loop's, with donated state;
nothing is run. For a TPU each case takes one to three minutes to compile, and must fit: what its compiler counts before
it gives up is more than it would have made of it. The last column is plan less XLA, as a share of XLA.
"""

import argparse
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slm_jax.model import GPTConfig, GPTModel, get_gpt_config, init_params, param_shapes
from slm_jax.nn.fused_attention import choose_implementation
from slm_jax.nn.target import Target, compiling_for
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.tools.plan.memory_model import Work, state_bytes, step_memory
from slm_jax.training.config import OptimizerConfig
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.program import device_bytes
from slm_jax.training.step import TrainState, make_train_step

CPU_CASES = (
    "tiny,8",
    "mini,8",
    "mini,8,accumulate=4",
    "mini,8,unroll=false,remat=dots",
    "gpt2-small,4,context_length=256",
    "gpt2-small,4,context_length=256,unroll=false",
    "gpt2-small,8,unroll=false,remat=full",
)
TPU_CASES = (
    "gpt2-small,16",
    "gpt2-small,4,context_length=4096",
    "gpt2-small,16,remat=dots",
    "gpt2-small,40,remat=dots",
    "gpt2-medium,8",
    "gpt2-medium,16,remat=dots",
)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", help="a topology such as v5e:2x2, compiled for in bfloat16 (default: the CPU)")
    parser.add_argument("--case", action="append", help="PRESET,ROWS[,FIELD=VALUE …]; may be given several times")
    options = parser.parse_args()
    target = Target("tpu" if options.tpu else "cpu")
    device = _tpu(options.tpu) if options.tpu else jax.devices("cpu")[0]
    print(f"{'case':<52} {'plan':>9} {'XLA':>9}")
    for case in options.case or (TPU_CASES if options.tpu else CPU_CASES):
        cfg, rows, accumulate = _read_case(case, "bfloat16" if options.tpu else "float32")
        planned = _planned(cfg, rows, accumulate, target)
        try:
            with compiling_for(*target):
                measured = _compiled_bytes(cfg, rows, accumulate, device)
        except jax.errors.JaxRuntimeError as error:
            print(f"{case:<52} {planned / 1e9:>6.3f} GB {str(error).splitlines()[0]}", flush=True)
            continue
        print(
            f"{case:<52} {planned / 1e9:>6.3f} GB {measured / 1e9:>6.3f} GB {planned / measured - 1:+.1%}", flush=True
        )


def _read_case(case: str, dtype: str) -> tuple[GPTConfig, int, int]:
    preset, rows, *fields = case.split(",")
    values: dict[str, Any] = yaml.safe_load("\n".join(field.replace("=", ": ") for field in fields)) or {}
    accumulate = values.pop("accumulate", 1)
    return get_gpt_config(preset, dtype=dtype, **values), int(rows), accumulate


def _tpu(topology: str) -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it looks for the machine's TPU
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def _planned(cfg: GPTConfig, rows: int, accumulate: int, target: Target) -> float:
    attention = choose_implementation(
        cfg.attention, cfg.dtype, cfg.emb_dim // cfg.n_heads, cfg.drop_rate > 0, device=target
    )
    work = Work(
        cfg, target, attention, rows // accumulate, cfg.context_length, cfg.vocab_size, cfg.n_layers, accumulate
    )
    return step_memory(work, state_bytes(param_shapes(cfg), {})).total


def _compiled_bytes(cfg: GPTConfig, rows: int, accumulate: int, device: Any) -> float:
    """Compile the step as the training loop does, and return what XLA says that it takes."""
    mesh = Mesh(np.array([[device]]), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(OptimizerConfig())
    step = make_train_step(make_loss_fn(GPTModel(cfg)), optimizer, make_schedule(OptimizerConfig(), 1000), accumulate)

    def initial_state() -> TrainState:
        params = init_params(cfg, jax.random.key(0))
        return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, jax.eval_shape(initial_state))
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {name: placed(jax.ShapeDtypeStruct((rows, cfg.context_length), dtype)) for name, dtype in dtypes.items()}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return device_bytes(jitted.lower(state, {}, batch).compile())


if __name__ == "__main__":
    main()
