"""Products with activations quantised per token, at run time."""
