"""Several processes that carry out one run: who they are, and what they exchange."""
