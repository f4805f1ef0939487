"""Fewer weights: one file per method."""
