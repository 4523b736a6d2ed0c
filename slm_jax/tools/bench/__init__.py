"""What ``slm-jax bench`` measures: a training step, generation, the data pipeline, start-up, memory."""
