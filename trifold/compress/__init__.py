"""From a model and a recipe to a packed checkpoint."""
