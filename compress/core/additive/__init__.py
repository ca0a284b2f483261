"""Additive codes of one matrix: runs of columns as sums of entries of tables."""
