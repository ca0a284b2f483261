"""Quantizers: plug-ins that turn one weight matrix into codes."""
