"""Products with factors on GPUs: the left one and what it is added to in one kernel."""
