"""Differentiable k-means: tables that follow the weights while these are trained."""
