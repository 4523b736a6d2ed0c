"""The stages of training: each only says which batches, which head and which loss."""
