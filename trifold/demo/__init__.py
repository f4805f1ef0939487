"""A little world to try things in: seeded text of known entropy, a model trained on it, tasks, and the demo."""
