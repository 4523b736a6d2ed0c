"""What the model is built from: attention kernels, layers, heads, loss, cache and adapters."""
