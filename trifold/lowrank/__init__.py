"""Lower rank: one file per method."""
