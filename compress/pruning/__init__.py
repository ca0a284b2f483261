"""Structured pruning: measuring, dealing budgets, cutting, repairing, saving."""
