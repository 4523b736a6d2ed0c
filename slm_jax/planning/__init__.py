"""What a run will need of a device that is not here: memory, arithmetic, time."""

from slm_jax.planning.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
