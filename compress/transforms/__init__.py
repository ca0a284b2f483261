"""Exact reparametrisations: the same function, in weights that are easier to round.

A transform says what happens to which tensor; ``source.py`` does it when a tensor is
read, so that the model as a whole is never in memory. ``chain.py`` puts the transforms
of a config together.
"""
