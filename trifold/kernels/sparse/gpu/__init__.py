"""Sparse products on GPUs, through Triton."""
