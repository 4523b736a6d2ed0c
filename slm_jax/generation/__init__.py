"""Text from a model: sampling and the decode loop."""
