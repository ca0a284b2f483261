"""Known faults of checkpoints: what they are, where, and how they are mended."""
