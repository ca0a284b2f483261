"""Perplexity and the distance of a compressed model to its base."""
