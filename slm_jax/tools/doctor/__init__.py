"""What a machine, or a run, is fit for, and what to fix: ``slm-jax doctor``."""
