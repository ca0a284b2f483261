"""Structured pruners: plug-ins of the entry-point group ``compress.pruners``."""
