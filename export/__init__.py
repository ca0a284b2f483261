"""Exporters: plug-ins that write a compressed model for a stock consumer."""
