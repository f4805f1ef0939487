"""Products with sparse weights: what is pruned is neither stored nor, where groups go, multiplied."""
