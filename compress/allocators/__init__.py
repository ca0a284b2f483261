"""Choices of mixed precision: which scheme each layer takes. Plug-ins."""
