"""What a run will need of a device that is not here: memory, arithmetic, time."""

from slm_jax.tools.plan.estimate import Plan, make_plan

__all__ = ["Plan", "make_plan"]
