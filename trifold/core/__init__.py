"""Nouns and shared mathematics."""
