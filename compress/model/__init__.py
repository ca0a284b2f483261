"""Checkpoints: lazy sources of tensors, and running a model block by block."""
