"""Calibration text, and the statistics it leaves at each layer."""
