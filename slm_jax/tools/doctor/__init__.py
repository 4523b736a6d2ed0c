"""What a machine, or a run, is fit for, and what to mend: ``slm-jax doctor``."""
