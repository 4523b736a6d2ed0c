"""Text to batches: sources, token arrays, windows."""
