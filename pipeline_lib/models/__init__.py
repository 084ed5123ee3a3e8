"""Models: load, adapt, score, sample, publish."""
