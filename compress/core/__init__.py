"""Types, grids and contracts that every other part of the toolkit builds on.

Nothing in this package imports the rest of ``compress``, transformers, or does I/O.
"""
